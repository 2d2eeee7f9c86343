"""Benchmarks position ids of a long row in a few tensor operations, against a loop over tokens.

The loop serves to check the results. No training runs it, and its time is not that of published
code. VideoRoPE's published functions are tensor operations, too. Against them the gain at this
length is 6.5 to 14 x.

The loop follows the papers' formulas, and the published code where it differs (see
docs/schemes.md). It does not use `place`. The row has 100,000 tokens: five videos, an
image, and text between them.
"""

from collections.abc import Callable

import torch
from harness import Row as Result
from harness import compare, table
from torch import Tensor

from datamodules.batch import Grid
from lightning_modules.rotary.base import RotaryScheme
from lightning_modules.rotary.mrope import MRope
from lightning_modules.rotary.tad import TadRope
from lightning_modules.rotary.vanilla import VanillaRope
from lightning_modules.rotary.videorope import VideoRope
from lightning_modules.tokens import Layout, Row

CLIP = Grid(128, 12, 12)
#: Numbers of text tokens, and the grids of visuals.
Segments = list[int | Grid]
SEGMENTS: Segments = [64, CLIP, 200, CLIP, CLIP, 7, Grid(1, 24, 24), 500, CLIP]
SEGMENTS += [Grid(200, 10, 12), 925]
SPACING = 2


def read(segments: Segments) -> Row:
    """Returns the same row with the layouts of its visuals."""
    return [Layout.full(s) if isinstance(s, Grid) else s for s in segments]


def vanilla(segments: Segments) -> Tensor:
    """Returns positions that are the number of the token."""
    ids = []
    for segment in segments:
        for _ in range(segment.size if isinstance(segment, Grid) else segment):
            ids.append([len(ids)])
    return torch.tensor(ids).T


def tad(segments: Segments) -> Tensor:
    """Returns the number of the token plus that of its frame. Each text token counts as a frame."""
    ids, frame = [], 0
    for segment in segments:
        t, h, w = segment if isinstance(segment, Grid) else (segment, 1, 1)
        for _ in range(t):
            for _ in range(h * w):
                ids.append([len(ids) + frame])
            frame += 1
    return torch.tensor(ids).T


def mrope(segments: Segments) -> Tensor:
    """Returns M-RoPE's positions.

    Text continues from the largest position so far. Visuals count time, row and column from there.
    """
    ids, start = [], 0
    for segment in segments:
        if isinstance(segment, int):
            ids += [[start + n] * 3 for n in range(segment)]
        else:
            for t in range(segment.t):
                for y in range(segment.h):
                    for x in range(segment.w):
                        ids.append([start + t, start + y, start + x])
        start += max(segment) if isinstance(segment, Grid) else segment
    return torch.tensor(ids).T


def videorope(segments: Segments) -> Tensor:
    """Returns frames `SPACING` apart on the diagonal, with rows and columns centred on them."""
    ids, start = [], 0
    for segment in segments:
        if isinstance(segment, int):
            ids += [[start + n] * 3 for n in range(segment)]
        else:
            up, left = (segment.h - 1) // 2, (segment.w - 1) // 2
            for t in range(segment.t):
                time = start + SPACING * t
                for y in range(segment.h):
                    for x in range(segment.w):
                        ids.append([time, time + y - up, time + x - left])
        start = ids[-1][0] + 1
    return torch.tensor(ids).T


def run() -> list[Result]:
    schemes: list[tuple[str, RotaryScheme, Callable[[Segments], Tensor]]] = [
        ("vanilla", VanillaRope(), vanilla),
        ("tad", TadRope(), tad),
        ("mrope", MRope(), mrope),
        ("videorope", VideoRope(temporal_spacing=SPACING), videorope),
    ]
    tokens = sum(s.size if isinstance(s, Grid) else s for s in SEGMENTS)
    return [
        compare(
            f"positions of {tokens:,} tokens, {name}, against a loop over tokens",
            lambda scheme=scheme: scheme.positions(read(SEGMENTS))[0],
            lambda loop=loop: loop(SEGMENTS),
            at_least=10,
            tolerance=0,
        )
        for name, scheme, loop in schemes
    ]


if __name__ == "__main__":
    print(table(run()))
