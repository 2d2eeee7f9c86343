"""Published layouts, tiny and random: after the import, the numbers equal those of transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from datamodules.batch import VISUAL_SLOT
from experiments import import_weights
from lightning_modules.llm.causal_lm import CausalLM
from lightning_modules.model import VideoLanguageModel, VideoLanguageModelConfig
from lightning_modules.rotary.base import RotaryEmbedding
from lightning_modules.rotary.mrope import MRope
from lightning_modules.training.initial import Initial
from tests.helpers.published import (
    LAYOUTS,
    TEXT,
    VISION,
    assert_near,
    imported,
    make_batch,
    make_llava_next,
    make_llava_onevision,
    randomise,
    rename,
    write,
)

BEFORE, AFTER = [1, 5, 6], [7, 8, 9, 2]


@pytest.fixture(scope="module")
def llava_next():
    return make_llava_next()


@pytest.fixture(scope="module")
def llava_onevision():
    return make_llava_onevision()


@pytest.fixture(scope="module")
def qwen2_vl():
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    config = Qwen2VLConfig(
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2},
        text_config={**TEXT, "model_type": "qwen2_vl_text", "rope_parameters": rope},
        vision_start_token_id=3,
    )
    return randomise(Qwen2VLForConditionalGeneration(config))


def pixels(count):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def their_logits(model, before, visual, after):
    """transformers' LLM on text, on its projector's output for a visual, and on text."""
    embed = model.get_input_embeddings()
    parts = [embed(torch.tensor([before])), visual[None], embed(torch.tensor([after]))]
    hidden = model.model.language_model(inputs_embeds=torch.cat(parts, 1)).last_hidden_state
    return model.lm_head(hidden)


def their_patches(model, frames, layer):
    tower = model.model.vision_tower
    hidden = tower(frames, output_hidden_states=True).hidden_states[layer]
    return model.model.multi_modal_projector(hidden)


@torch.no_grad()
def test_llava_next_gives_its_logits(llava_next, tmp_path):
    model = imported(write(llava_next, tmp_path / "in", "hub"), tmp_path / "out")
    ids = torch.tensor([[1, 5, 6, 7]])
    text = model(make_batch(ids[0].tolist(), pixels(0), []))
    assert_near(model.llm.head(text.hidden), llava_next(ids).logits)

    image = their_patches(llava_next, pixels(1), -2)[0, 1:]
    ours = model(make_batch([*BEFORE, VISUAL_SLOT, *AFTER], pixels(1), [1]))
    assert_near(model.llm.head(ours.hidden), their_logits(llava_next, BEFORE, image, AFTER))
    assert model.config.tiles == {"newline": True}
    assert torch.equal(model.image_newline, llava_next.model.image_newline)


def test_a_prompt_guided_model_starts_from_llava_next_as_ppllava_does(llava_next, tmp_path):
    plain = imported(write(llava_next, tmp_path / "in"), tmp_path / "out")
    clip = {"vision": VISION, "text": TEXT, "projection_dim": 8}
    target = "lightning_modules.encoder.clip.ClipEncoder"
    guided = "lightning_modules.pooler.prompt_guided.PromptGuidedPooler"
    config = VideoLanguageModelConfig(
        encoder={"_target_": target, "config": clip},
        pooler={"_target_": guided, "kernel": [1, 2, 2]},
        rotary={"_target_": "lightning_modules.rotary.videorope.VideoRope", "sections": [2, 3, 3]},
        llm=plain.config.llm,
    )
    model = VideoLanguageModel(config)
    prompts = ["encoder.text.*", "encoder.text_projection.*", "encoder.visual_projection.*"]
    unused = ["image_newline"]  # of tiles, which this model does not have
    Initial(str(tmp_path / "out"), unused, [*prompts, "pooler.*"]).fill(model, {})
    state, stored = model.state_dict(), plain.state_dict()
    stored.pop(*unused)
    for name, value in stored.items():
        assert torch.equal(state[name], value), name


@torch.no_grad()
def test_llava_onevision_gives_its_logits(llava_onevision, tmp_path):
    model = imported(write(llava_onevision, tmp_path / "in", "hub"), tmp_path / "out")
    ids = torch.tensor([[1, 5, 6, 7]])
    text = model(make_batch(ids[0].tolist(), pixels(0), []))
    assert_near(model.llm.head(text.hidden), llava_onevision(ids).logits)

    image = their_patches(llava_onevision, pixels(1), -1)[0]
    ours = model(make_batch([*BEFORE, VISUAL_SLOT, *AFTER], pixels(1), [1]))
    assert_near(model.llm.head(ours.hidden), their_logits(llava_onevision, BEFORE, image, AFTER))

    # A video without the newline after it: on an even grid, the bilinear halving equals ours.
    videos = llava_onevision.model.get_video_features(
        pixels(3)[None], vision_feature_layer=-1, vision_feature_select_strategy="full"
    )
    video = videos.pooler_output[0, :-1]
    assert len(video) == 3 * 2 * 2
    ours = model(make_batch([*BEFORE, VISUAL_SLOT, *AFTER], pixels(3), [3]))
    assert_near(model.llm.head(ours.hidden), their_logits(llava_onevision, BEFORE, video, AFTER))


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_every_layout_is_the_same_model(family, request, tmp_path):
    theirs = request.getfixturevalue(family)
    states = []
    for layout in LAYOUTS:
        source = write(theirs, tmp_path / f"{layout}_in", layout)
        stored = load_file(source / "model.safetensors")
        states.append(imported(source, tmp_path / layout).state_dict())
        report = json.loads((tmp_path / layout / "import.json").read_text())
        left = report["unused_on_purpose"]
        assert {*report["used"], *left} == set(stored)
        dropped = {name for name in left if "image_newline" not in name}
        assert all(".layers.2." in name for name in dropped)
        assert bool(dropped) == (family == "llava_next"), "its features come before the last layer"
        assert not report["unused"]
        assert not report["unfilled"]
    for state in states[1:]:
        torch.testing.assert_close(state, states[0], atol=0, rtol=0)
    values = theirs.state_dict()["model.language_model.embed_tokens.weight"]
    assert torch.equal(states[0]["llm.lm.model.embed_tokens.weight"], values)


@pytest.mark.parametrize("layout", ["4.x", "5.x"])
@torch.no_grad()
def test_qwen2_vl_is_a_plain_qwen2_under_mrope(layout, qwen2_vl, tmp_path):
    source = write(qwen2_vl, tmp_path / "in")
    if layout == "5.x":
        rename(
            source,
            lambda n: n.replace("model.", "model.language_model.", 1).replace(
                "visual.", "model.visual.", 1
            ),
        )
    else:  # and its config is flat
        config = json.loads((source / "config.json").read_text())
        text = config.pop("text_config") | {"model_type": "qwen2_vl"}
        rope = text.pop("rope_parameters")
        text |= {
            "rope_theta": rope["rope_theta"],
            "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        }
        (source / "config.json").write_text(json.dumps({**config, **text}))
    words = [str(source), str(tmp_path / "out"), "--format", "qwen2_vl_text"]
    assert import_weights.main(words) == 0
    report = json.loads((tmp_path / "out" / "import.json").read_text())
    assert report["unused_on_purpose"]
    assert all("visual." in name for name in report["unused_on_purpose"])

    sections = report["stages"]["rotary"]["sections"]
    ours = CausalLM(source=str(tmp_path / "out")).eval()
    ours.replace_rotary(lambda original: RotaryEmbedding(MRope(sections), original))
    embeds = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
    axes = torch.tensor([[0, 1, 1, 1, 1, 3, 4], [0, 1, 1, 2, 2, 3, 4], [0, 1, 2, 1, 2, 3, 4]])
    decoder = qwen2_vl.model.language_model
    theirs = decoder(inputs_embeds=embeds, position_ids=axes[:, None]).last_hidden_state
    positions = torch.cat([torch.arange(7)[None, None], axes[:, None]]).float()
    hidden = ours(embeds, torch.ones(1, 7, dtype=torch.bool), positions)
    assert_near(ours.head(hidden), qwen2_vl.lm_head(theirs))
