"""Benchmarks packed rows against one padded row per sample, forward and backward of the LLM.

The sixteen samples are mixed as in instruction data: text, images of 64 tokens, and two videos of
1,024. Both ways read the same real tokens, so the ratio of times is the ratio of tokens per second.
The LLM is `llm=tiny`. In a larger LLM, attention is a smaller share of the work. Packed rows waste
time only in attention, which also computes the masked pairs.
"""

import torch
from harness import Row, at_most, compare, table
from omegaconf import OmegaConf
from torch import Tensor

from datamodules.batch import Grid
from experiments import CONFIG_DIR
from lightning_modules.llm.base import LanguageModel
from lightning_modules.rotary.base import RotaryEmbedding
from lightning_modules.rotary.videorope import VideoRope
from lightning_modules.spec import build
from lightning_modules.splice.packing import Placement, one_a_row, pack
from lightning_modules.tokens import Layout
from lightning_modules.tokens import Row as Segments

VIDEO, IMAGE = Layout.full(Grid(16, 8, 8)), Layout.full(Grid(1, 8, 8))
PACKING = 2048
TEXTS = [180, 90, 420, 60, 250, 130, 310, 75]
SAMPLES: list[Segments] = [
    *([length] for length in TEXTS),
    *([20, IMAGE, length] for length in (110, 45, 200, 80)),
    *([20, IMAGE, 30, IMAGE, length] for length in (60, 150)),
    *([20, VIDEO, length] for length in (90, 35)),
]


def make_llm(scheme: VideoRope) -> LanguageModel:
    spec = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "llm" / "tiny.yaml"))
    assert isinstance(spec, dict)
    llm: LanguageModel = build({str(key): value for key, value in spec.items()})
    llm.replace_rotary(lambda original: RotaryEmbedding(scheme, original))
    return llm


def run() -> list[Row]:
    torch.manual_seed(0)
    scheme = VideoRope()
    llm = make_llm(scheme)
    samples = scheme.batch_positions(SAMPLES)  # a1 n l
    lengths = [sum(n if isinstance(n, int) else len(n) for n in row) for row in SAMPLES]
    tokens = torch.randn(sum(lengths), llm.width)
    weight = torch.randn(sum(lengths), llm.width)

    def read(rows: Placement, packed: bool) -> list[Tensor]:
        leaf = tokens.clone().requires_grad_()
        mask = None if packed else rows.spread(torch.ones(len(leaf), dtype=torch.bool))
        hidden = llm(rows.spread(leaf), mask, rows.positions(samples))
        found = torch.cat([hidden[row, start:stop] for row, start, stop in rows.spans])
        (found * weight).sum().backward()
        assert leaf.grad is not None
        return [found.detach(), leaf.grad / leaf.grad.abs().max()]

    rows, padded = pack(lengths, PACKING), one_a_row(lengths)
    name = "packed rows"
    speed = compare(
        f"{name}, the same tokens",
        lambda: read(rows, True),
        lambda: read(padded, False),
        at_least=1.5,
    )
    sizes = [placement.rows * placement.width for placement in (rows, padded)]
    return [speed, at_most(f"{name}, tokens with padding", *sizes, share=0.5, unit="tokens")]


if __name__ == "__main__":
    print(table(run()))
