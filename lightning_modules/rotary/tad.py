"""Temporal-aware dual RoPE: the position is the token's index plus the index of its frame."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from datamodules.batch import Grid
from lightning_modules.rotary.base import TIME, RotaryScheme, grid_coordinates


class TadRope(RotaryScheme):
    """TAD-RoPE (TC-LLaVA, arXiv 2409.03206), as VideoRoPE's repository computes it.

    Every text token counts as a frame of its own. So text advances by 2, and so does each new
    frame.
    """

    text_step = 2.0

    def place(self, grid: Grid, start: float) -> Float[Tensor, "3 l"]:
        frame = grid_coordinates(grid)[TIME]
        return (start + torch.arange(grid.size).float() + frame).expand(3, -1)

    def advance(self, placed: Float[Tensor, "3 l"]) -> float:
        return placed.max().item() + self.text_step

    def axes(self, num_frequencies: int) -> Int[Tensor, " f"]:
        return torch.full((num_frequencies,), TIME)
