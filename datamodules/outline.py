"""The sizes of a sample without its contents: all that the work of a training step depends on."""

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

    def tokens(self, per_frame: float, per_image: float) -> float:
        """Of the LLM, where so many are what the pooler leaves."""
        frames = [len(visual) for visual in self.visuals]
        whole = [tiles or count == 1 for tiles, count in zip(self.tiles, frames, strict=True)]
        visual = [
            per_image if image else per_frame * count
            for image, count in zip(whole, frames, strict=True)
        ]
        return self.words + sum(visual)
