"""An LLM keeps its own angles and logits on text, or is refused in one line."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from datamodules.batch import Grid
from lightning_modules.llm.causal_lm import CausalLM, check_rotary
from lightning_modules.rotary.angles import Angles
from lightning_modules.rotary.base import RotaryEmbedding
from lightning_modules.rotary.vanilla import VanillaRope
from lightning_modules.rotary.videorope import VideoRope
from tests.helpers.visuals import row_of
from tests.lightning_modules.rotary.test_rotary import load, make_llm

SIZES = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,  # SmolLM3 has no rotation in every fourth layer
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,  # so that attention is not nearly uniform
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: Differences: partial, in pairs, each frequency once, in float32, scaled logits or embeddings, …
KEPT = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "mistral": {"head_dim": 32},
    "phi3": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "gemma": {"head_dim": 32},
    "cohere": {},
    "cohere2": {"head_dim": 32, "sliding_window": 8},
    "olmo2": {},
    "glm": {"head_dim": 32},
    "gpt_neox": {},
    "gpt_oss": {
        "head_dim": 32,
        "attention": "eager",
        "num_local_experts": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "smollm3": {},
    "starcoder2": {},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "stablelm": {},
    "minicpm3": {},
}
REFUSED = {
    "gemma2": ({"attention": "eager"}, "Gemma2ForCausalLM limits its logits"),
    "gemma3_text": (
        {"attention": "eager"},
        r"Gemma3RotaryEmbedding uses different angles in different layers \(layer_type\)",
    ),
    "gemma4_text": (
        {"head_dim": 32, "attention": "eager"},
        r"Gemma4ForCausalLM reads more from its decoder than hidden states",
    ),
    "olmo3": ({}, "Olmo3RotaryEmbedding uses different angles"),
    "gptj": ({}, "the way in which GPTJRotaryEmbedding computes its angles is not supported"),
    "gpt2": ({}, "GPT2Model has no `rotary_emb`"),
    "falcon": ({"alibi": True}, "FalconModel has no `rotary_emb` to replace, or does not use it"),
}
SCALINGS = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "short_factor": [1.0 + n / 16 for n in range(16)],
        "long_factor": [2.0 + n for n in range(16)],
        "original_max_position_embeddings": 16,
        "factor": 4.0,
    },
}


def make(model_type, attention="sdpa", **fields):
    torch.manual_seed(0)
    config = {"model_type": model_type, **SIZES, **fields}
    return CausalLM(config=config, attention=attention).eval()


def replaced(llm, scheme=None):
    llm.replace_rotary(lambda original: RotaryEmbedding(scheme or VanillaRope(), original))
    return llm


@torch.no_grad()
def logits_of(llm, ids):
    positions = VanillaRope().batch_positions([[ids.shape[1]]] * len(ids))
    return llm.head(llm(llm.embed(ids), None, positions))


@pytest.mark.parametrize("model_type", KEPT)
@torch.no_grad()
def test_on_text_a_family_gives_the_logits_of_the_stock_model(model_type):
    """From token ids, so that scaled embeddings and logits count as well. Equal to the last bit."""
    ids = torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(0))
    stock = make(model_type, **KEPT[model_type]).lm(ids).logits
    ours = logits_of(replaced(make(model_type, **KEPT[model_type])), ids)
    assert torch.equal(ours, stock)
    assert stock.std() > 1e-3


@pytest.mark.parametrize("model_type", REFUSED)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_family_that_would_differ_is_refused_in_one_line(model_type, device):
    fields, message = REFUSED[model_type]
    with pytest.raises(ValueError, match=message) as error, torch.device(device):
        replaced(make(model_type, **fields))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("model.llm: ")


@torch.no_grad()
def test_without_its_soft_cap_gemma2_is_as_it_was():
    ids = torch.arange(3, 23)[None]
    fields = {"attention": "eager", "final_logit_softcapping": None, "head_dim": 32}
    stock = make("gemma2", **fields).lm(ids).logits
    assert torch.equal(logits_of(replaced(make("gemma2", **fields)), ids), stock)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("length", [12, 40, 150])
@torch.no_grad()
def test_scaled_angles_are_those_of_the_stock_model(scaling, length):
    """Lengths are below and above every length at which a scaling changes its frequencies."""
    rope = {"rope_type": scaling, "rope_theta": 1e4, **SCALINGS[scaling]}
    fields = {"rope_parameters": rope, "max_position_embeddings": 64}
    ids = torch.randint(3, 61, (1, length), generator=torch.Generator().manual_seed(0))
    stock = make("llama", **fields).lm(ids).logits
    assert torch.equal(logits_of(replaced(make("llama", **fields)), ids), stock)
    assert not torch.allclose(stock, make("llama").lm(ids).logits, atol=1e-3) or (
        scaling == "dynamic" and length < 64
    )


@torch.no_grad()
def test_a_scheme_turns_pairs_as_it_turns_halves():
    """Cohere's head is Llama's with its channels in another order. A scheme must not notice."""
    layout = row_of(3, Grid(4, 2, 3), 5)
    positions, length = VideoRope().batch_positions([layout]), 3 + 24 + 5
    x, found = torch.zeros(1, length, 64), {}
    for model_type in ("llama", "cohere"):
        embedding = replaced(make(model_type, rope_theta=1e4), VideoRope()).decoder.rotary_emb
        embedding.axis_positions = positions[1:]
        found[model_type] = embedding(x, positions[0].long())
    for halves, pairs in zip(found["llama"], found["cohere"], strict=True):
        assert torch.equal(pairs, halves[..., :16].repeat_interleave(2, dim=-1))
        assert not torch.equal(pairs, halves)


@pytest.mark.parametrize(("model_type", "dtype"), [("llama", "bfloat16"), ("olmo2", "float32")])
def test_cos_and_sin_have_the_dtype_that_the_layers_expect(model_type, dtype):
    llm = replaced(make(model_type))
    cos, sin = llm.decoder.rotary_emb(torch.zeros(1, 5, 64).bfloat16(), torch.arange(5)[None])
    assert cos.dtype == sin.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("model_type", ["llama", "cohere", "olmo2"])
def test_on_the_meta_device_the_same_is_found(model_type):
    with torch.device("meta"):
        unmade = make(model_type)
        on_meta = replaced(unmade).decoder.rotary_emb
    assert next(unmade.parameters()).is_meta
    x, positions = torch.zeros(1, 9, 64).bfloat16(), torch.arange(9)[None]
    real = replaced(make(model_type)).decoder.rotary_emb
    for ours, expected in zip(on_meta(x, positions), real(x, positions), strict=True):
        assert torch.equal(ours, expected)
    assert unmade.logit_scale == make(model_type).logit_scale


class Doubled(torch.nn.Module):
    """A rotary module of a stranger: twice as fast from position 100 on."""

    rope_type = "default"

    def __init__(self, config):
        super().__init__()
        self.config = config

    @staticmethod
    def compute_default_rope_parameters(config):
        return 1e4 ** -(torch.arange(16) / 16), 1.0

    def forward(self, x, position_ids):
        frequencies, _ = self.compute_default_rope_parameters(self.config)
        angle = position_ids[..., None] * frequencies
        angle = torch.cat([angle, angle], dim=-1) * (1 + (position_ids[..., None] >= 100))
        return angle.cos(), angle.sin()


def test_what_shows_only_far_from_the_start_is_found():
    config = AutoConfig.for_model("llama", **{**SIZES, "max_position_embeddings": 64})
    with pytest.raises(ValueError, match="on text, the angles of Doubled differ"):
        Angles(Doubled(config))
    Angles(Doubled(AutoConfig.for_model("llama", **{**SIZES, "max_position_embeddings": 32})))


def test_a_second_rotary_module_is_refused():
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
    llm.model.layers[1].rotary_emb_local = type(llm.model.rotary_emb)(llm.config)
    with pytest.raises(
        ValueError, match=r"more than one rotary module .*layers\.1\.rotary_emb_local"
    ):
        check_rotary(llm.model, llm.config)


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_a_misspelt_rope_field_is_no_default(key):
    with pytest.raises(ValueError, match=rf"model\.llm\.config\.{key} has no 'theta'"):
        make("llama", **{key: {"rope_type": "default", "theta": 1e6}})


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 1e6},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 1.0}},
    ],
)
def test_every_way_to_name_theta_reaches_the_angles_and_the_saved_spec(fields):
    """transformers 5 renamed the fields. Older config.json files have the old names."""
    given = {key: dict(v) if isinstance(v, dict) else v for key, v in fields.items()}
    llm = replaced(make("llama", **fields))
    expected = 1e6 ** -(torch.arange(16) / 16)
    again = replaced(CausalLM(**{k: v for k, v in llm.to_spec().items() if k != "_target_"}))
    for found in (llm, again):
        frequencies, _ = found.decoder.rotary_emb.frequencies(torch.device("cpu"), 1)
        torch.testing.assert_close(frequencies, expected)
    assert fields == given, "a run's config is not written into"


def test_the_head_scales_logits_as_the_stock_model_does():
    assert make("cohere", logit_scale=0.25).logit_scale == 0.25
    assert make_llm(load("vanilla")).logit_scale == 1
