"""Scalings of the rotary frequencies: against transformers', and through a whole model."""

import pytest
import torch
from transformers import Qwen2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from datamodules.batch import VISUAL_SLOT, VideoBatch, Visual, pad_rows, visual_fields
from experiments.run.compose import plain
from lightning_modules.llm.causal_lm import CausalLM
from lightning_modules.metrics.needle.prefix import PrefixCache
from lightning_modules.model import VideoLanguageModel, VideoLanguageModelConfig
from lightning_modules.rotary.base import RotaryEmbedding
from lightning_modules.rotary.scaling.dynamic import Dynamic
from lightning_modules.rotary.scaling.yarn import Yarn
from lightning_modules.rotary.vanilla import VanillaRope

NAMES = ("ntk", "yarn_v", "mrope_pp", "yarn", "dynamic", "dynamic_by_base")


@pytest.fixture(name="make")
def make_fixture(compose, tiny, tmp_path):
    """`make(*words)` returns a tiny model with the same weights each time."""

    def make(*words):
        config = compose([*tiny, *words], tmp_path)
        torch.manual_seed(0)
        return VideoLanguageModel(VideoLanguageModelConfig(**plain(config.model))).eval()

    return make


def make_batch(model):
    """Two rows, one longer than the other, each with a video of 12 frames."""
    rows, generator = [[VISUAL_SLOT, 5, 6, 7], [8, VISUAL_SLOT, 9, 10, 11, 12]], torch.Generator()
    _, c, h, w = model.encoder.blank().frames.shape
    frames = torch.randint(256, (2, 12, c, h, w), dtype=torch.uint8, generator=generator)
    ids = pad_rows(rows, 0)
    return VideoBatch(
        input_ids=ids,
        attention_mask=pad_rows([[1] * len(row) for row in rows], 0).bool(),
        labels=torch.where(ids > 0, ids, -100),
        prompt_ids=torch.tensor([[2, 3, 1], [4, 5, 1]]),
        prompt_mask=torch.ones(2, 3, dtype=torch.bool),
        keys=["a", "b"],
        **visual_fields([Visual(video) for video in frames]),
    )


@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
def test_text_turns_as_in_transformers(kind, theta):
    """Their YaRN has the paper's factor on cos and sin. Their dynamic NTK counts tokens."""
    sizes = {"hidden_size": 128, "num_attention_heads": 1, "num_key_value_heads": 1}
    rope = {"rope_type": kind, "rope_theta": theta, "factor": 4.0}
    rope |= {"original_max_position_embeddings": 4096} if kind == "yarn" else {}
    config = Qwen2Config(rope_parameters=rope, max_position_embeddings=4096, **sizes)
    length = 10_000
    theirs, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)

    plain_rope = {"rope_type": "default", "rope_theta": theta}
    sizes |= {"num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 8}
    llm = CausalLM(config={"model_type": "qwen2", "rope_parameters": plain_rope, **sizes})
    scheme = VanillaRope()
    scheme.scaling = {"yarn": Yarn, "dynamic": Dynamic}[kind](4.0, 4096)
    llm.replace_rotary(lambda original: RotaryEmbedding(scheme, original))
    positions = torch.arange(length)[None]
    cos, sin = llm.decoder.rotary_emb(torch.zeros(1, length, 8), positions)
    angle = positions[0, :, None] * torch.cat([theirs, theirs])
    torch.testing.assert_close(cos[0], angle.cos() * factor, atol=5e-3, rtol=0)
    torch.testing.assert_close(sin[0], angle.sin() * factor, atol=5e-3, rtol=0)
    assert (factor > 1) == (kind == "yarn")


@pytest.mark.parametrize("name", NAMES)
def test_a_scaled_model_differs_and_is_saved_with_its_scaling(name, make, tmp_path):
    words = [f"scaling={name}", "model.rotary.scaling.original_length=16"]
    model, plain_model = make(*words), make()
    batch = make_batch(model)
    with torch.no_grad():
        scaled, unscaled = model(batch).hidden, plain_model(batch).hidden
        assert (scaled - unscaled).abs().max() > 1e-4
        model.save_pretrained(tmp_path / "saved")
        again = VideoLanguageModel.from_pretrained(tmp_path / "saved").eval()
        assert torch.equal(again(batch).hidden, scaled)
        other = VideoLanguageModel.from_pretrained(
            tmp_path / "saved", rotary=plain_model.config.rotary
        )
        assert torch.equal(other.eval()(batch).hidden, unscaled)


@pytest.mark.parametrize("name", ["yarn_v", "mrope_pp"])
def test_a_scheme_without_an_axis_of_time_is_refused(name, make):
    with pytest.raises(ValueError, match=r"has 1: choose scaling=ntk, or rotary=videorope"):
        make("rotary=vanilla", f"scaling={name}")


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("factor=0.5", "model.rotary.scaling.factor is 0.5; set it to 1 or more"),
        ("original_length=1", "model.rotary.scaling.original_length is 1; set it to 2 or more"),
        ("slow=40.0", "set 0 < slow < fast"),
    ],
)
def test_a_bad_setting_is_one_line(word, line, make):
    with pytest.raises(ValueError, match=line):
        make("scaling=yarn", f"model.rotary.scaling.{word}")


def test_an_llm_that_scales_by_itself_is_refused(make):
    rope = "+model.llm.config.rope_parameters={rope_type: linear, rope_theta: 10000.0, factor: 2.0}"
    with pytest.raises(ValueError, match="an LLM that does not scale them itself"):
        make("scaling=dynamic_by_base", "~model.llm.config.rope_parameters", rope)


def test_a_row_that_is_read_in_parts_turns_by_its_whole_length(make):
    model = make("scaling=dynamic", "model.rotary.scaling.original_length=16")
    batch = make_batch(model)
    with torch.no_grad():
        inputs = model.compose(batch, model.encoder(batch.visuals))
        whole = model.llm(inputs.embeds, inputs.mask, inputs.positions)
        prefixes = PrefixCache(model, chunk_tokens=7)
        for _ in range(2):  # the second time nothing is taken from the cache
            found = prefixes.hidden(inputs, 3)
            kept = inputs.mask[:, 3:]
            torch.testing.assert_close(found[kept], whole[:, 3:][kept], rtol=1e-3, atol=1e-4)
    assert prefixes.computed == prefixes.recomputed
    assert model.llm.decoder.rotary_emb.whole_row is None
