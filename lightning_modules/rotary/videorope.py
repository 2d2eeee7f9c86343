"""VideoRoPE: slow frequencies for time, frames along the diagonal, and spaced time steps."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from datamodules.batch import Grid
from lightning_modules.rotary.base import (
    HEIGHT,
    TIME,
    WIDTH,
    RotaryScheme,
    grid_coordinates,
    split_sections,
)


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

    def place(self, grid: Grid, start: float) -> Float[Tensor, "3 l"]:
        coordinates = grid_coordinates(grid)
        time = coordinates[TIME] * self.temporal_spacing
        if self.diagonal_layout:
            rows = time + coordinates[HEIGHT] - (grid.h - 1) // 2
            columns = time + coordinates[WIDTH] - (grid.w - 1) // 2
        else:
            rows, columns = coordinates[HEIGHT], coordinates[WIDTH]
        return start + torch.stack([time, rows, columns])

    def advance(self, placed: Float[Tensor, "3 l"]) -> float:
        return (placed[TIME] if self.diagonal_layout else placed).max().item() + 1

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
