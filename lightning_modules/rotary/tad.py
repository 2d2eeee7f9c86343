"""Temporal-aware dual RoPE: the position is the token's number plus the number of its frame."""

from jaxtyping import Float
from torch import Tensor

from lightning_modules.rotary.base import TIME
from lightning_modules.rotary.vanilla import VanillaRope
from lightning_modules.tokens import Layout


class TadRope(VanillaRope):
    """TAD-RoPE (TC-LLaVA, arXiv 2409.03206), as VideoRoPE's repository computes it.

    Every text token counts as a frame of its own. So text advances by 2, and so does each new
    frame.
    """

    text_step = 2.0

    def place(self, visual: Layout, start: float) -> tuple[Float[Tensor, "a l"], float]:
        placed = start + visual.number + visual.coordinates[:, TIME]
        last = start + (visual.extent.size - 1) + (visual.extent.t - 1)
        return placed[None], last + self.text_step
