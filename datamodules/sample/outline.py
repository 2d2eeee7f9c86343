"""The sizes of a sample without its contents: all that the work of a training step depends on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from datamodules.batch import IGNORE_INDEX, VISUAL_SLOT, Tiles


@dataclass(frozen=True)
class Outline:
    """
    Args:
        visuals: uint8 (t c h w), t of each its own; they may be fake or on the meta device.
        tiles: of each visual, as in `VideoBatch`.
        words: tokens of its text, visuals left out.
        learnt: how many of them are labelled, at the end.
    """

    visuals: Sequence[Tensor]
    tiles: Sequence[Tiles | None]
    words: int
    learnt: int

    @property
    def input_ids(self) -> list[int]:
        return [VISUAL_SLOT] * len(self.visuals) + [1] * self.words

    @property
    def labels(self) -> list[int]:
        unlearnt = len(self.visuals) + self.words - self.learnt
        return [IGNORE_INDEX] * unlearnt + [1] * self.learnt

    def tokens(self, per_frame: float | int, per_image: float | int | None) -> int:
        """Of the LLM, where the pooler leaves so many; None: of an image as of a frame."""
        of_image = per_frame if per_image is None else per_image
        visual = 0.0
        for frames, tiles in zip(map(len, self.visuals), self.tiles, strict=True):
            visual += of_image if tiles or frames == 1 else per_frame * frames
        return self.words + math.ceil(visual)
