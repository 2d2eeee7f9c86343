"""VideoRoPE: slow frequencies for time, frames along the diagonal, frames spaced apart."""

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
    """VideoRoPE (arXiv 2502.05173), positions and frequencies as its repository computes them.

    Where paper and code differ, this is the code: height reads the even and width the odd
    frequencies; a frame is centred by (n - 1) // 2; text after a video starts one behind its last
    time step (eq. 7 leaves `temporal_spacing` there). With all three parts off it is M-RoPE.

    Args:
        low_frequency_temporal: time reads the slowest frequencies, height and width alternate
            over the others (eq. 6); else blocks of time, height, width.
        diagonal_layout: height and width are centred and move on with time (eq. 7).
        temporal_spacing: distance of two time steps, δ of eq. 7.
        sections: frequencies for time, height and width; without it 2 : 3 : 3.
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
