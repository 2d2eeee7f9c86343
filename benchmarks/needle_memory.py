"""Benchmarks the memory of long needle rows: one after the other on one KV cache, or all together.

A cell of the paper's longest video: 2,900 frames of 4 tokens, the needle in the middle, 5 needles.
The LLM is small (8 layers of width 256, random weights), but its KV cache is larger than all else.
Read together, each row has its own copy of the cache. The inputs exist before and do not count.
"""

import torch
from harness import Row, at_most, largest_difference, peak_memory, table
from torch import Tensor

from lightning_modules.llm.causal_lm import CausalLM
from lightning_modules.metrics.needle.prefix import PrefixCache
from lightning_modules.model import LanguageInputs
from lightning_modules.rotary.base import RotaryEmbedding
from lightning_modules.rotary.vanilla import VanillaRope

FRAMES, PER_FRAME, NEEDLES, QUESTION = 2900, 4, 5, 24
CHUNK, WIDTH, LAYERS = 1024, 256, 8
CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "intermediate_size": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


class _Model:
    """What `PrefixCache` reads of a model."""

    def __init__(self) -> None:
        self.llm = CausalLM(config=CONFIG).eval()
        self.llm.replace_rotary(lambda original: RotaryEmbedding(VanillaRope(), original))


def make_rows() -> list[LanguageInputs]:
    """Returns rows that differ in the frame in the middle and in the question."""
    length = FRAMES * PER_FRAME + QUESTION
    haystack = torch.randn(length, WIDTH)
    positions = torch.arange(length).float().expand(2, 1, -1)
    rows = []
    for _ in range(NEEDLES):
        embeds = haystack.clone()
        for part in (slice(length // 2, length // 2 + PER_FRAME), slice(-QUESTION, None)):
            embeds[part] = torch.randn_like(embeds[part])
        mask = torch.ones(1, length, dtype=torch.bool)
        rows.append(LanguageInputs(embeds[None], mask, mask.long(), positions, [], []))
    return rows


def together(rows: list[LanguageInputs]) -> LanguageInputs:
    return LanguageInputs(
        torch.cat([row.embeds for row in rows]),
        torch.cat([row.mask for row in rows]),
        torch.cat([row.labels for row in rows]),
        torch.cat([row.positions for row in rows], dim=1),
        [],
        [],
    )


@torch.no_grad()
def run() -> list[Row]:
    torch.manual_seed(0)
    model, rows = _Model(), make_rows()
    all_rows, first = together(rows), rows[0].mask.shape[1] - 2
    made: dict[str, Tensor] = {}
    cached = 0

    def ours() -> None:
        nonlocal cached
        prefixes = PrefixCache(model, CHUNK)  # pyright: ignore[reportArgumentType]
        made["ours"] = torch.cat([prefixes.hidden(row, first) for row in rows])
        cached = prefixes.cached_bytes()

    def baseline() -> None:
        prefixes = PrefixCache(model, CHUNK)  # pyright: ignore[reportArgumentType]
        made["baseline"] = prefixes.hidden(all_rows, first)

    name = f"needle test, {NEEDLES} needles in {FRAMES:,} frames"
    peaks = [peak_memory(way) / 2**20 for way in (ours, baseline)]
    difference = largest_difference(made["ours"], made["baseline"])
    assert difference < 1e-4, difference
    return [
        at_most(f"{name}, peak memory", *peaks, share=0.35, unit="MiB"),
        at_most(f"{name}, peak memory against one KV cache", peaks[0], cached / 2**20, 1.6, "MiB"),
    ]


if __name__ == "__main__":
    print(table(run()))
