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


class TimedMRope(MRope):
    """M-RoPE of Qwen2.5-VL (arXiv 2502.13923 §2.1.2): time steps stand where their seconds are.

    A time step stands at its whole number of ticks after the first one. Without seconds, one second
    lies between two steps, as in the published code.

    Args:
        tokens_per_second: ticks of a second.
        sections: as in `MRope`.
    """

    def __init__(self, tokens_per_second: float = 2.0, sections: Sequence[int] | None = None):
        super().__init__(sections)
        self.tokens_per_second = tokens_per_second

    def place(self, visual: Layout, start: float) -> tuple[Float[Tensor, "a l"], float]:
        step, row, column = visual.coordinates.unbind(1)
        seconds = step if visual.seconds is None else visual.shown_at
        ticks = (seconds * self.tokens_per_second).floor()
        t, h, w = visual.extent
        last = float(t - 1) if visual.seconds is None else visual.seconds[-1] - visual.seconds[0]
        # In float32, like the ticks above.
        last = (torch.tensor(last, dtype=torch.float32) * self.tokens_per_second).floor().item()
        return start + torch.stack([ticks, row, column]), start + max(last, h - 1, w - 1) + 1
