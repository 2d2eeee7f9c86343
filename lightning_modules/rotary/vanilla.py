"""Vanilla RoPE: each token, text or visual, has one position; the LLM's own rotary embedding."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_modules.rotary.base import RotaryScheme
from lightning_modules.tokens import Layout


class VanillaRope(RotaryScheme):
    """RoPE (arXiv 2104.09864) on flattened visual tokens: a token's position is its number."""

    num_axes = 1

    def place(self, visual: Layout, start: float) -> tuple[Float[Tensor, "a l"], float]:
        return (start + visual.number)[None], start + visual.extent.size

    def axes(self, num_frequencies: int) -> Int[Tensor, " f"]:
        return torch.zeros(num_frequencies, dtype=torch.long)
