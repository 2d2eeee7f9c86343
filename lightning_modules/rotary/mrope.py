"""M-RoPE: time, height and width each have their own block of frequencies."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_modules.rotary.base import RotaryScheme, split_sections
from lightning_modules.tokens import Layout


class MRope(RotaryScheme):
    """M-RoPE (Qwen2-VL, arXiv 2409.12191 §2.1; frequencies: VideoRoPE eq. 4).

    Args:
        sections: numbers of frequencies for time, height and width, fastest first; default
            2 : 3 : 3.
    """

    def __init__(self, sections: Sequence[int] | None = None):
        self.sections = sections

    def place(self, visual: Layout, start: float) -> tuple[Float[Tensor, "a l"], float]:
        return start + visual.coordinates.mT, start + max(visual.extent)

    def axes(self, num_frequencies: int) -> Int[Tensor, " f"]:
        return torch.arange(3).repeat_interleave(
            torch.tensor(split_sections(self.sections, num_frequencies))
        )
