"""Qwen2.5-VL's vision tower as the encoder: most blocks attend inside windows."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)

from datamodules.batch import Grid, Visual
from lightning_modules.encoder.chunks import CHUNK_FRAMES

from .base import NativeEncoder
from .patches import Steps
from .source import load_tower, vision_sizes

_WHOLE, _WINDOWS = range(2)


class Qwen2_5VLEncoder(NativeEncoder):
    """Qwen2.5-VL's tower (arXiv 2502.13923 §2.1.1).

    The patches of a time step attend to those of their window of `window_size` pixels. In the
    blocks `fullatt_block_indexes` they attend to the whole step. Windows at the right and lower
    edge may be smaller. The blocks read the tokens window by window; the encoder returns them row
    by row.

    Give either `source` or `config`.

    Args:
        source: hub id or folder of a whole Qwen2.5-VL. Only its vision tower is read.
        config: sizes of a new tower with random weights, with the field names of transformers'
            `Qwen2_5_VLVisionConfig`.
        attention, chunk_frames, factor: as in `Qwen2VLEncoder`.

    Raises:
        ValueError: the arguments do not fit together, or `source` holds no such tower.
    """

    def __init__(
        self,
        source: str | None = None,
        config: Mapping[str, Any] | None = None,
        attention: str = "sdpa",
        chunk_frames: int | None = CHUNK_FRAMES,
        factor: int | None = None,
    ):
        kind = Qwen2_5_VisionTransformerPretrainedModel
        tower = load_tower(kind, "qwen2_5_vl", source, config)
        super().__init__(tower, attention, chunk_frames, factor)
        self.window = max(1, tower.config.window_size // self.factor)  # tokens along a side
        self.whole = set(tower.config.fullatt_block_indexes)

    @property
    def config(self) -> dict[str, Any]:
        # `out_hidden_size` is the width after the merger's linears, which are not in the encoder.
        kind = Qwen2_5_VLVisionConfig
        return vision_sizes(self.tower.config, kind, without=("out_hidden_size",))

    def attended(self, height: int, width: int) -> int | float:
        whole, windows = self._lengths(height, width)
        in_windows = sum(length**2 for length in windows) / sum(windows)
        depth = len(self.tower.blocks)
        number = len(self.whole & set(range(depth)))
        return (number * whole[0] + (depth - number) * in_windows) / depth

    def kind_of(self, number: int) -> int:
        return _WHOLE if number in self.whole else _WINDOWS

    def _cut(self, visual: Visual, extent: Grid, steps: Steps) -> Float[Tensor, "p pixels"]:
        patches = super()._cut(visual, extent, steps)
        by_token = rearrange(patches, "(t l m) x -> t l m x", t=steps.count, m=self.cut.merge**2)
        order, _ = window_order(*extent[1:], self.window)
        return by_token[:, order].flatten(0, 2)

    def _restore(
        self, patches: Float[Tensor, "p d"], sizes: Sequence[tuple[int, int, int]]
    ) -> Float[Tensor, "p d"]:
        by_token = patches.unflatten(0, (-1, self.cut.merge**2))  # l m d
        parts = by_token.split([count * height * width for count, height, width in sizes])
        restored = []
        for part, (count, height, width) in zip(parts, sizes, strict=True):
            order, _ = window_order(height, width, self.window)
            back = torch.tensor(order).argsort().to(patches.device, non_blocking=True)
            restored.append(part.unflatten(0, (count, -1))[:, back].flatten(0, 2))
        return restored[0] if len(restored) == 1 else torch.cat(restored)

    def _lengths(self, height: int, width: int) -> list[list[int]]:
        _, lengths = window_order(height, width, self.window)
        return [
            *super()._lengths(height, width),
            [length * self.cut.merge**2 for length in lengths],
        ]

    def _places(self, height: int, width: int, device: torch.device) -> Float[Tensor, "2 p"]:
        places = super()._places(height, width, device)
        by_token = places.unflatten(1, (height * width, -1))
        order, _ = window_order(height, width, self.window)
        return by_token[:, order].flatten(1)


@cache
def window_order(height: int, width: int, side: int) -> tuple[list[int], list[int]]:
    """Returns the numbers of the tokens of a step, window by window, and the sizes of the windows.

    Args:
        height, width: rows and columns of tokens.
        side: rows and columns of a window; the last ones may have fewer.
    """
    order, sizes = [], []
    for top in range(0, height, side):
        for left in range(0, width, side):
            rows = range(top, min(top + side, height))
            columns = range(left, min(left + side, width))
            order += [row * width + column for row in rows for column in columns]
            sizes.append(len(rows) * len(columns))
    return order, sizes
