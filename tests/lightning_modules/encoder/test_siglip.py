"""SigLIP as the encoder: transformers' own numbers, prompts of any length, or no prompts."""

import pytest
import torch
from omegaconf import OmegaConf
from transformers import SiglipConfig, SiglipModel

from datamodules.batch import VISUAL_SLOT, VideoBatch, Visual
from experiments import CONFIG_DIR
from lightning_modules.encoder.clip_vision import ClipVisionEncoder
from lightning_modules.encoder.prompt import stretch_positions
from lightning_modules.encoder.siglip import SiglipEncoder
from lightning_modules.model import VideoLanguageModel, VideoLanguageModelConfig
from lightning_modules.spec import build
from tests.helpers.visuals import frames_of

HEADS = {"num_attention_heads": 2, "intermediate_size": 48}
VISION = {**HEADS, "hidden_size": 24, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
TEXT = {**HEADS, "hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 60}
LENGTH = 64
STAGES = "lightning_modules"


@pytest.fixture(scope="module")
def siglip():
    torch.manual_seed(0)
    config = SiglipConfig(
        vision_config=VISION,
        text_config={**TEXT, "bos_token_id": 58, "eos_token_id": 59, "pad_token_id": 1},
    )
    model = SiglipModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


@pytest.fixture(scope="module")
def folder(siglip, tmp_path_factory):
    path = tmp_path_factory.mktemp("siglip")
    siglip.save_pretrained(path)
    return str(path)


def assert_near(ours, theirs):
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def frames(count):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layer", [0, 1, -2, -1])
@torch.no_grad()
def test_patches_are_those_of_the_hidden_state(layer, siglip, folder):
    encoder = SiglipEncoder(folder, feature_layer=layer).eval()
    theirs = siglip.vision_model(frames(3), output_hidden_states=True).hidden_states[layer]
    assert_near(encoder.encode(frames(3), [1, 2]), theirs)
    assert encoder.grid == (4, 4)
    assert encoder([]) == []


@torch.no_grad()
def test_uint8_frames_are_normalised_to_minus_one_to_one(folder):
    encoder = SiglipEncoder(folder).eval()
    rgb = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    assert_near(encoder.encode(rgb, [1]), encoder.encode((rgb / 255 - 0.5) / 0.5, [1]))


@torch.no_grad()
def test_prompts_are_embedded_as_by_siglip_whatever_stands_beside_them(siglip, folder):
    encoder = SiglipEncoder(folder, context_length=None).eval()
    ids = torch.tensor([[5, 6, 7, 59], [8, 59, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    ours = encoder.encode_prompt(ids, mask)
    padded = torch.ones(2, LENGTH, dtype=torch.long)  # as its processor pads: to all positions
    padded[0, :4], padded[1, :2] = ids[0], ids[1, :2]
    assert_near(ours, siglip.get_text_features(padded).pooler_output)
    assert_near(encoder.encode_prompt(ids[1:, :2], mask[1:, :2]), ours[1:])
    with pytest.raises(ValueError, match="a prompt of 65 tokens, but the text tower has 64"):
        encoder.encode_prompt(torch.zeros(1, 65).long(), torch.ones(1, 65).bool())


@torch.no_grad()
def test_align_is_the_pooling_head_on_each_patch_alone(siglip, folder):
    encoder = SiglipEncoder(folder, feature_layer=-1).eval()
    patches = encoder.encode(frames(2), [2])
    normed = siglip.vision_model.post_layernorm(patches).reshape(-1, 1, 24)
    theirs = siglip.vision_model.head(normed).view(2, 16, 24)
    assert_near(encoder.align(patches), theirs)


@torch.no_grad()
def test_positions_are_stretched_from_64_to_196(siglip, folder):
    encoder = SiglipEncoder(folder)
    table = siglip.text_model.embeddings.position_embedding.weight
    stretched = encoder.text.embeddings.position_embedding
    assert stretched.weight.shape == (196, 24)
    assert_near(stretched.weight, stretch_positions(table, 196, 20))
    assert torch.equal(stretched.kept, table[:20])
    ids = torch.randint(2, 58, (1, 150))
    assert encoder.encode_prompt(ids, torch.ones_like(ids).bool()).isfinite().all()


@pytest.mark.parametrize("context_length", [None, 196])
def test_a_spec_rebuilds_it(context_length, folder):
    encoder = SiglipEncoder(folder, feature_layer=1, context_length=context_length)
    again = build(encoder.to_spec())
    again.load_state_dict(encoder.state_dict())
    assert again.to_spec() == encoder.to_spec()
    assert (again.grid, again.width, again.context_length) == (
        encoder.grid,
        encoder.width,
        encoder.context_length,
    )


def specs(encoder, pooler):
    poolers = {
        "prompt": {
            "_target_": f"{STAGES}.pooler.prompt_guided.PromptGuidedPooler",
            "kernel": [1, 2, 2],
        },
        "none": {"_target_": f"{STAGES}.pooler.identity.IdentityPooler"},
    }
    llm = {**HEADS, "model_type": "qwen2", "vocab_size": 50, "hidden_size": 32}
    return VideoLanguageModelConfig(
        encoder={"_target_": f"{STAGES}.encoder.{encoder[0]}", "config": encoder[1]},
        pooler=poolers[pooler],
        rotary={"_target_": f"{STAGES}.rotary.vanilla.VanillaRope"},
        llm={
            "_target_": f"{STAGES}.llm.causal_lm.CausalLM",
            "config": {**llm, "num_hidden_layers": 1, "num_key_value_heads": 2},
        },
    )


TEXTLESS = {
    "siglip": ("siglip.SiglipEncoder", {"vision": {**VISION, "vision_use_head": False}}),
    "clip": ("clip_vision.ClipVisionEncoder", {"vision": VISION}),
}


def make_batch():
    ids = torch.tensor([[5, VISUAL_SLOT, 6, 7]])
    return VideoBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids).bool(),
        labels=ids.clamp(min=-100),
        **frames_of(frames(2), [2]),
        prompt_ids=torch.tensor([[5, 59]]),
        prompt_mask=torch.ones(1, 2).bool(),
        keys=["one"],
    )


@pytest.mark.parametrize("name", TEXTLESS)
def test_without_a_text_tower_no_prompt_guides_the_pooler(name):
    with pytest.raises(ValueError, match=r"no text tower .* pooler=average") as caught:
        VideoLanguageModel(specs(TEXTLESS[name], "prompt"))
    assert "\n" not in str(caught.value)
    model = VideoLanguageModel(specs(TEXTLESS[name], "none"))
    model(make_batch()).loss.backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle, "every trained parameter has a gradient, or ranks would wait for it"
    with pytest.raises(ValueError, match="no text tower"):
        model.encoder.encode_prompt(torch.tensor([[5]]), torch.ones(1, 1).bool())


def test_a_prompt_guides_the_pooler_over_siglip_and_all_that_is_trained_has_a_gradient():
    config = {"vision": VISION, "text": {**TEXT, "eos_token_id": 59, "bos_token_id": 58}}
    model = VideoLanguageModel(specs(("siglip.SiglipEncoder", config), "prompt"))
    model(make_batch()).loss.backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle
    assert model.encoder.text.encoder.layers[0].mlp.fc1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("cls", [SiglipEncoder, ClipVisionEncoder])
def test_mistakes_are_named(cls):
    with pytest.raises(ValueError, match=r"image_size is 64, but the tower reads frames of 32"):
        cls(config={"vision": VISION}, image_size=64)
    with pytest.raises(ValueError, match="frames of 16 x 16 pixels, but the encoder reads 32 x 32"):
        cls(config={"vision": VISION})([Visual(torch.zeros(1, 3, 16, 16))])


def test_the_yaml_names_the_encoder_and_its_arguments():
    node = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "encoder/siglip_so400m_384.yaml"))
    assert node.pop("_target_") == f"{STAGES}.encoder.siglip.SiglipEncoder"
    config = {"vision": {**VISION, "image_size": 384, "patch_size": 14}, "text": TEXT}
    with torch.device("meta"):
        encoder = SiglipEncoder(**{**node, "source": None, "config": config})
    assert encoder.grid == (27, 27)
    assert encoder.context_length == 196


def make_encoder(name, **options):
    """Makes `clip_vision` or `siglip`. The seed gives the same weights each time."""
    torch.manual_seed(0)
    if name == "clip_vision":
        return ClipVisionEncoder({"vision": VISION}, **options).eval()
    return SiglipEncoder(config={"vision": VISION, "text": TEXT}, **options).eval()


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
@pytest.mark.parametrize("name", ["clip_vision", "siglip"])
@torch.no_grad()
def test_every_attention_gives_the_same_and_is_kept(name, attention, uncompiled_flex):
    encoder = make_encoder(name, attention=attention)
    expected = make_encoder(name).encode(frames(3), [1, 2])
    found = encoder.encode(frames(3), [1, 2])
    assert not torch.equal(found, expected), "the other attention must compute in another order"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    again = build(encoder.to_spec())
    assert again.attention == again.vision.config._attn_implementation == attention


@pytest.mark.parametrize("name", ["clip_vision", "siglip"])
def test_an_attention_that_is_not_there_is_one_line(name):
    with pytest.raises(
        ValueError, match=r"model\.encoder\.attention=sdpaa .*not supported"
    ) as caught:
        make_encoder(name, attention="sdpaa")
    assert "\n" not in str(caught.value)
