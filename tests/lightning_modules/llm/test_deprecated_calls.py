"""Our calls of an LLM of transformers are not deprecated, before 5.24 and since then.

A deprecation warning fails every test (see deprecations.py). This file makes all our calls of an
LLM once, and also reads the warnings that libraries log.
"""

import logging
from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging as transformers_logging

from lightning_modules.llm.causal_lm import CausalLM
from lightning_modules.lora import add_lora
from lightning_modules.rotary.base import RotaryEmbedding
from lightning_modules.rotary.videorope import VideoRope
from lightning_modules.spec import build
from lightning_modules.training.tuning import recompute

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
LIBRARIES = ("transformers", "peft", "accelerate", "lightning", "torch")


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """Returns the warnings that libraries log. transformers logs some only once per process."""
    transformers_logging.warning_once.cache_clear()  # pyright: ignore[reportFunctionMemberAccess]
    records = Records()
    for name in LIBRARIES:
        logging.getLogger(name).addHandler(records)
    yield records.messages
    for name in LIBRARIES:
        logging.getLogger(name).removeHandler(records)


def make(family: str) -> CausalLM:
    torch.manual_seed(0)
    llm = CausalLM(config={"model_type": family, **SIZES})
    llm.replace_rotary(lambda original: RotaryEmbedding(VideoRope(), original))
    return llm.eval()


def inputs(llm: CausalLM, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 64, (2, length), generator=generator)
    return llm.embed(ids), VideoRope().batch_positions([[length], [length]])


def test_the_log_is_read(logged):
    transformers_logging.get_logger("transformers.models").warning_once("`x` is deprecated")
    assert logged == ["`x` is deprecated"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step(family, checkpointing, logged):
    llm = make(family).train()
    for block in llm.blocks() if checkpointing else []:
        recompute(block)
    embeds, positions = inputs(llm, 9)
    padded = llm(embeds, torch.ones(2, 9, dtype=torch.bool), positions)
    packed = llm(embeds, None, positions)
    (padded + packed).sum().backward()
    assert not logged


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_cache_that_is_read_on_from(family, logged):
    llm = make(family)
    embeds, positions = inputs(llm, 9)
    whole = llm(embeds, None, positions)
    cache = DynamicCache()
    llm(embeds[:1, :6], None, positions[:, :1, :6], cache)
    assert cache.get_seq_length() == 6  # a wrong argument name is ignored without a message
    cache.crop(-2)
    cache.batch_repeat_interleave(2)
    mask = torch.ones(2, 9, dtype=torch.bool)
    again = llm(embeds[:1, 4:].expand(2, -1, -1), mask, positions[..., 4:], cache)
    torch.testing.assert_close(again, whole[:1, 4:].expand(2, -1, -1), atol=1e-5, rtol=0)
    assert not logged


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_generation(family, beams, logged):
    llm = make(family)
    embeds, positions = inputs(llm, 5)
    mask = torch.ones(2, 5, dtype=torch.bool)
    behind = positions[1, :, -1] + 1
    options = {"max_new_tokens": 3, "num_beams": beams, "do_sample": False}
    ids = llm.generate(embeds, mask, positions, behind, **options)
    assert ids.shape[0] == 2
    assert not logged


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_saved_and_opened_again(family, logged, tmp_path):
    llm = make(family)
    again = build(llm.to_spec()).eval()
    again.load_state_dict(llm.state_dict())
    llm.lm.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    opened = CausalLM(source=str(tmp_path)).eval()
    embeds = torch.randn(1, 4, 32)
    assert torch.equal(opened.head(embeds), llm.head(embeds))
    assert torch.equal(again.head(embeds), llm.head(embeds))
    assert not logged


@pytest.mark.parametrize("family", FAMILIES)
def test_lora(family, logged):
    network = torch.nn.ModuleDict({"llm": make(family).train()})
    add_lora(network, targets=["q_proj", "v_proj"], rank=2, alpha=4)
    llm = network["llm"]
    embeds, positions = inputs(llm, 6)
    llm(embeds, None, positions).sum().backward()
    behind = positions[1, :, -1] + 1
    llm.generate(embeds, torch.ones(2, 6).bool(), positions, behind, max_new_tokens=2)
    assert not logged
