"""VRoPE: four axes that run along the diagonals of a frame, from each of its corners."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_modules.rotary.base import RotaryScheme
from lightning_modules.tokens import Layout


class VRope(RotaryScheme):
    """VRoPE (arXiv 2502.11664), as its repository computes it (`vrope.py`).

    On each axis, a token's position is its distance in rows plus columns from one corner of the
    frame. So no corner is nearer to the text than the others. The signs of the paper do not appear
    in the code. Frequencies read the four axes in turn.
    """

    num_axes = 4

    def place(self, visual: Layout, start: float) -> tuple[Float[Tensor, "a l"], float]:
        t, h, w = visual.extent
        time, row, column = visual.coordinates.unbind(1)
        frame = start + time * (h + w - 1)
        from_bottom, from_right = h - 1 - row, w - 1 - column
        corners = [row + column, row + from_right, from_bottom + column, from_bottom + from_right]
        return frame + torch.stack(corners), start + t * (h + w - 1)

    def axes(self, num_frequencies: int) -> Int[Tensor, " f"]:
        return torch.arange(num_frequencies) % self.num_axes
