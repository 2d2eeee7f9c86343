"""Vanilla RoPE: each token, text or visual, has one position; the LLM's own rotary embedding."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from datamodules.batch import Grid
from lightning_modules.rotary.base import TIME, RotaryScheme


class VanillaRope(RotaryScheme):
    """RoPE (arXiv 2104.09864) on flattened visual tokens."""

    def place(self, grid: Grid, start: float) -> Float[Tensor, "3 l"]:
        return (start + torch.arange(grid.size).float()).expand(3, -1)

    def advance(self, placed: Float[Tensor, "3 l"]) -> float:
        return placed.max().item() + 1

    def axes(self, num_frequencies: int) -> Int[Tensor, " f"]:
        return torch.full((num_frequencies,), TIME)
