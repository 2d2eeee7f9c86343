"""HoPE: VideoRoPE's positions, but time turns nothing."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from lightning_modules.rotary.base import STILL, TIME
from lightning_modules.rotary.videorope import VideoRope
from lightning_modules.tokens import Layout

#: The distances between time steps that training draws from (`get_dynamic_rope_index`).
SPACINGS = (0.5, 0.75, 1.0, 1.25, 1.5)


class HopeRope(VideoRope):
    """HoPE (arXiv 2505.20444), with positions and frequencies as in its repository.

    The slowest quarter of the frequencies, which read time in VideoRoPE, does not turn, not even
    for text. Height and width advance with time, so time steps still differ. In training, each
    visual with a `draw` takes one of `SPACINGS`.

    Args:
        temporal_spacing: distance between two time steps of a visual without a draw. The authors
            take 1.5 for understanding and 0.75 for retrieval.
        sections: as in `VideoRope`; time's section does not turn.
    """

    draws = True

    def __init__(self, temporal_spacing: float = 1.5, sections: Sequence[int] | None = None):
        super().__init__(temporal_spacing=temporal_spacing, sections=sections)

    def spacing_of(self, visual: Layout) -> float:
        if visual.draw is None:
            return self.temporal_spacing
        return SPACINGS[int(visual.draw * len(SPACINGS))]

    def axes(self, num_frequencies: int) -> Int[Tensor, " f"]:
        axes = super().axes(num_frequencies)
        return torch.where(axes == TIME, STILL, axes)
