"""The cost of SigLIP, which has no class token, and its forecast by ropelab-plan."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import SiglipConfig, SiglipModel

from datamodules.batch import IGNORE_INDEX, VISUAL_SLOT, VideoBatch, Visual
from experiments.planning.forecast import forecast
from experiments.planning.memory_watch import ATTENTION
from experiments.run.compose import build, plain
from lightning_modules.callbacks.flops import FlopMeter
from lightning_modules.encoder.clip_vision import ClipVisionEncoder
from lightning_modules.encoder.siglip import SiglipEncoder
from lightning_modules.training.instruct import VideoLLMModule
from tests.helpers.visuals import frames_of

WIDTH, LAYERS, SIDE, PATCHES = 32, 3, 32, 4  # four patches; a fifth would show
SIZES = {"hidden_size": WIDTH, "intermediate_size": 64, "num_attention_heads": 2}
VISION = {**SIZES, "num_hidden_layers": LAYERS, "image_size": SIDE, "patch_size": 16}
TEXT = {**SIZES, "num_hidden_layers": 2, "vocab_size": 2048, "max_position_embeddings": 64}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
SPEC = {
    "_target_": "lightning_modules.encoder.siglip.SiglipEncoder",
    "config": {"vision": VISION, "text": TEXT},
    "context_length": None,
    "image_size": SIDE,
}


def by_hand(frames: int) -> int:
    """Returns the forward FLOPs of patches in all layers but the last, which does not run."""
    weights = 4 * WIDTH * WIDTH + 2 * WIDTH * 64  # q, k, v, out; both of the MLP
    blocks = (LAYERS - 1) * (2 * weights + 4 * PATCHES * WIDTH) * frames * PATCHES
    return blocks + 2 * 3 * 16 * 16 * WIDTH * frames * PATCHES  # the patches' convolution


class Stages(torch.nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder


@pytest.mark.parametrize("tower", [SiglipEncoder, ClipVisionEncoder])
@torch.no_grad()
def test_a_frame_is_its_patches_and_a_class_token_where_there_is_one(tower):
    stages = Stages(tower(config={"vision": VISION}))
    meter = FlopMeter(stages)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        stages.encoder([Visual(torch.zeros(5, 3, SIDE, SIDE))])
    found = meter.flops["encoder"]
    assert found == counter.get_total_flops()
    assert (found == by_hand(5)) == (tower is SiglipEncoder)


def make_batch() -> VideoBatch:
    ids = torch.full((2, 20), 5)
    ids[:, 0] = VISUAL_SLOT
    labels = ids.clone()
    labels[:, :10] = IGNORE_INDEX
    prompt = torch.ones(2, 7, dtype=torch.long)
    return VideoBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids, dtype=torch.bool),
        labels=labels,
        **frames_of(torch.zeros(8, 3, SIDE, SIDE, dtype=torch.uint8), [4, 4]),
        prompt_ids=prompt,
        prompt_mask=prompt.bool(),
        keys=["a", "b"],
    )


@pytest.mark.parametrize("pooler", ["average_2x2", "prompt_guided_2x2"])
def test_a_step_with_siglip_is_what_the_counter_says(pooler, compose, tmp_path):
    """With a prompt-guided pooler, the text tower and the pooling head count as well."""
    config = compose(["experiment=resume_probe", f"pooler={pooler}"], tmp_path)
    spec = plain(config.model) | {"encoder": SPEC}
    network = VideoLLMModule(spec, build(config.optim.optimizer, "optim")).network
    meter = FlopMeter(network)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        network(make_batch()).loss.backward()
    total = counter.get_total_flops()
    assert sum(meter.flops.values()) == pytest.approx(total, rel=0.02)


@torch.no_grad()
def test_the_pooling_head_is_counted_with_its_values():
    """16 patches through values, output and MLP: computed by hand, and as PyTorch counts them."""
    stages = Stages(SiglipEncoder(config={"vision": VISION, "text": TEXT}, context_length=None))
    meter = FlopMeter(stages)
    with FlopCounterMode(display=False) as counter:
        stages.encoder.align(torch.zeros(4, PATCHES, WIDTH))
    by_hand = 2 * 16 * (2 * WIDTH * WIDTH + 2 * WIDTH * 64)
    assert meter.flops["encoder"] == by_hand == counter.get_total_flops()


def test_ropelab_plan_reads_a_folder_of_siglip(compose, tmp_path):
    SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT)).config.save_pretrained(
        tmp_path / "siglip"
    )
    words = ["experiment=resume_probe", "encoder=siglip_so400m_384", "data.batch_size=2"]
    words += [f"model.encoder.source={tmp_path}/siglip", f"model.encoder.image_size={SIDE}"]
    words += ["model.encoder.context_length=null"]
    step = forecast(compose([*words, "tokens=64", "frames=4"], tmp_path, "plan"), 1).step
    model = SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT))
    layer = sum(p.numel() for p in model.vision_model.encoder.layers[0].parameters())
    whole = sum(p.numel() for p in model.parameters()) - layer - 2  # scale and bias of its loss
    other = [p.numel() for p in _rest(compose(words, tmp_path)).parameters()]
    assert step.parameters == whole + sum(other)


def _rest(config) -> torch.nn.Module:
    """Returns all of the model except its encoder."""
    spec = plain(config.model) | {"encoder": SPEC}
    network = VideoLLMModule(spec, build(config.optim.optimizer, "optim")).network
    del network.encoder
    return network


def test_the_published_siglip_is_planned_without_a_network(compose, tmp_path):
    """878 M parameters, as on the model's page on the hub; 27 x 27 patches a frame."""
    sizes = plain(compose([], tmp_path, "plan").sizes)["google/siglip-so400m-patch14-384"]
    config = SiglipConfig(vision_config=sizes["vision"], text_config=sizes["text"])
    with torch.device("meta"):
        model = SiglipModel(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(878e6, rel=1e-3)
    assert math.isqrt(model.vision_model.embeddings.num_patches) == 27
