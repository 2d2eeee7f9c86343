"""The sizes of a sample without its contents. They determine the cost of a training step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from datamodules.batch import IGNORE_INDEX, VISUAL_SLOT, Visual


@dataclass(frozen=True)
class Outline:
    """The sizes of one sample.

    Args:
        visuals: their frames may be fake tensors, or on the meta device.
        words: text tokens, without visuals.
        learnt: number of labelled tokens, at the end of the text.
    """

    visuals: Sequence[Visual]
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
        """Returns the LLM tokens of the sample, rounded up.

        Args:
            per_frame: tokens that the pooler keeps of a video frame.
            per_image: tokens that it keeps of an image; None: the same as of a frame.
        """
        of_image = per_frame if per_image is None else per_image
        visual = 0.0
        for each in self.visuals:
            frames = len(each.frames)
            visual += of_image if each.info.tiles or frames == 1 else per_frame * frames
        return self.words + math.ceil(visual)
