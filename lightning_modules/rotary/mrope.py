"""M-RoPE: time, height and width each have their own block of frequencies."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from datamodules.batch import Grid
from lightning_modules.rotary.base import RotaryScheme, grid_coordinates, split_sections


class MRope(RotaryScheme):
    """M-RoPE (Qwen2-VL, arXiv 2409.12191 §2.1; frequencies: VideoRoPE eq. 4).

    Args:
        sections: numbers of frequencies for time, height and width, fastest first; default
            2 : 3 : 3.
    """

    def __init__(self, sections: Sequence[int] | None = None):
        self.sections = sections

    def place(self, grid: Grid, start: float) -> Float[Tensor, "3 l"]:
        return start + grid_coordinates(grid)

    def advance(self, placed: Float[Tensor, "3 l"]) -> float:
        return placed.max().item() + 1

    def axes(self, num_frequencies: int) -> Int[Tensor, " f"]:
        return torch.arange(3).repeat_interleave(
            torch.tensor(split_sections(self.sections, num_frequencies))
        )
