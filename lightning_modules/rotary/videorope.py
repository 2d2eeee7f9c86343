"""VideoRoPE: slow frequencies for time, frames along the diagonal, and spaced time steps."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_modules.rotary.base import HEIGHT, TIME, WIDTH, RotaryScheme, split_sections
from lightning_modules.tokens import Layout


class VideoRope(RotaryScheme):
    """VideoRoPE (arXiv 2502.05173), with positions and frequencies as in its repository.

    Where paper and code differ, this follows the code. Height reads the even frequencies, width the
    odd ones. A frame is centred by (n - 1) // 2. Text after a video starts one position after the
    last time step (eq. 7 has a distance of `temporal_spacing` there). With all three parts off, it
    is M-RoPE.

    Args:
        low_frequency_temporal: time reads the slowest frequencies, and height and width alternate
            over the others (eq. 6). Otherwise time, height and width each have one block.
        diagonal_layout: height and width are centred and advance with time (eq. 7).
        temporal_spacing: distance between two time steps, δ in eq. 7.
        sections: numbers of frequencies for time, height and width; default 2 : 3 : 3.
    """

    def __init__(
        self,
        low_frequency_temporal: bool = True,
        diagonal_layout: bool = True,
        temporal_spacing: float = 2.0,
        sections: Sequence[int] | None = None,
    ):
        self.low_frequency_temporal = low_frequency_temporal
        self.diagonal_layout = diagonal_layout
        self.temporal_spacing = temporal_spacing
        self.sections = sections

    def place(self, visual: Layout, start: float) -> tuple[Float[Tensor, "a l"], float]:
        spacing, (t, h, w) = self.spacing_of(visual), visual.extent
        time, row, column = visual.coordinates.unbind(1)
        time = spacing * time
        last = spacing * (t - 1)
        if self.diagonal_layout:
            row = time + row - (h - 1) // 2
            column = time + column - (w - 1) // 2
        else:
            last = max(last, h - 1, w - 1)
        return start + torch.stack([time, row, column]), start + last + 1

    def spacing_of(self, visual: Layout) -> float:
        """Returns the distance between two time steps of a visual."""
        return self.temporal_spacing

    def axes(self, num_frequencies: int) -> Int[Tensor, " f"]:
        time, height, width = split_sections(self.sections, num_frequencies)
        if not self.low_frequency_temporal:
            return torch.arange(3).repeat_interleave(torch.tensor([time, height, width]))
        if height != width:
            raise ValueError(
                f"low_frequency_temporal alternates height and width, so their sections must be "
                f"equal, not {height} and {width}; change model.rotary.sections"
            )
        return torch.tensor([HEIGHT, WIDTH] * height + [TIME] * time)
