"""The contract of a rotary scheme: layout -> positions -> cos, sin.

A scheme defines three things: the positions of one visual's tokens (`place`), the position of the
next text token (`advance`), and the axis that each rotary frequency reads (`axes`). Everything else
is the same for all schemes and is here: the loop over a layout, padding, and the angles.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from datamodules.batch import Grid
from lightning_modules.rotary.angles import Angles

#: One row of a batch from left to right: a number of text tokens, or the grid of a visual.
Layout = Sequence[int | Grid]

TIME, HEIGHT, WIDTH = range(3)


class RotaryScheme(ABC):
    """Computes positions on three axes (time, height, width) for text and visuals in any order.

    `text_step` is the distance between two text tokens, on all axes.
    """

    text_step: float = 1.0

    @abstractmethod
    def place(self, grid: Grid, start: float) -> Float[Tensor, "3 l"]:
        """Returns the positions of a visual that begins at `start`, in order time, row, column."""

    @abstractmethod
    def advance(self, placed: Float[Tensor, "3 l"]) -> float:
        """Returns the position of the first text token after a visual with positions `placed`."""

    @abstractmethod
    def axes(self, num_frequencies: int) -> Int[Tensor, " f"]:
        """Returns the axis (TIME, HEIGHT, WIDTH) that each frequency reads, fastest first.

        Raises:
            ValueError: the scheme cannot distribute `num_frequencies` over its axes.
        """

    def positions(self, layout: Layout) -> Float[Tensor, "3 l"]:
        """Returns the positions of one row, in the units of the scheme."""
        start, parts = 0.0, [torch.zeros(3, 0)]
        for segment in layout:
            if isinstance(segment, Grid):
                part = self.place(segment, start)
                start = self.advance(part)
            else:
                part = (start + self.text_step * torch.arange(segment).float()).expand(3, -1)
                start += self.text_step * segment
            parts.append(part)
        return torch.cat(parts, dim=1)

    def batch_positions(
        self, layouts: Sequence[Layout], padding_side: str = "right"
    ) -> Float[Tensor, "4 b l"]:
        """Returns `position_ids` for transformers' decoders: row 0 counts tokens, for masks.

        Rows 1 to 3 are the axes, divided by `text_step`, so that text advances by 1.
        """
        rows = []
        for layout in layouts:
            axes = self.positions(layout) / self.text_step
            rows.append(torch.cat([torch.arange(axes.shape[1]).float()[None], axes]))  # 4 l
        width = max(row.shape[1] for row in rows)
        batch = torch.zeros(4, len(rows), width)
        for i, row in enumerate(rows):
            columns = (
                slice(width - row.shape[1], width)
                if padding_side == "left"
                else slice(row.shape[1])
            )
            batch[:, i, columns] = row
        return batch

    def batch_following(self, layouts: Sequence[Layout]) -> Float[Tensor, "3 b"]:
        """Returns the position of the next text token of each row, as in `batch_positions`.

        After text it is the last position + 1. After a visual the scheme decides.
        """
        behind = [self.positions([*layout, 1])[:, -1] for layout in layouts]
        return torch.stack(behind, dim=1) / self.text_step


class RotaryEmbedding(nn.Module):
    """Replaces the rotary module of a transformers decoder, for all its layers at once.

    The frequencies, their scaling (`rope_parameters`: linear, dynamic, YaRN, …) and the channel
    order stay the LLM's own. The scheme decides which positions the frequencies multiply. The
    module keeps no tensors, because they would be cast to bfloat16 or left on the meta device. All
    arithmetic is float32; the result is cast at the end.

    Raises:
        ValueError: on text alone, it would differ from `original`, or the scheme cannot distribute
            the frequencies over its axes.
    """

    def __init__(self, scheme: RotaryScheme, original: Any):
        super().__init__()
        self.scheme = scheme
        self.angles = Angles(original)
        #: Rows 1 to 3 of the positions, set by the LLM for the duration of one forward.
        self.axis_positions: Float[Tensor, "3 b l"] | None = None
        with torch.device("cpu"):  # even while a model is built on the meta device
            # Raises if the scheme does not fit the number of frequencies.
            scheme.axes(self.frequencies(torch.device("cpu"), 1)[0].numel())

    def frequencies(
        self, device: torch.device, length: int | Int[Tensor, ""]
    ) -> tuple[Float[Tensor, " f"], float]:
        """Returns radians per position, fastest first, and YaRN's factor for cos and sin."""
        return self.angles.frequencies(device, length)

    @torch.no_grad()
    def forward(
        self, x: Float[Tensor, "b l m"], position_ids: Num[Tensor, "b2 l"]
    ) -> tuple[Float[Tensor, "b2 l a"], Float[Tensor, "b2 l a"]]:
        """Returns cos and sin as the LLM's own module does, in the dtype of `x` or in float32.

        For text alone (`position_ids`), all axes have the same position.
        """
        axes = self.axis_positions
        if axes is None:
            axes = position_ids.float().expand(3, -1, -1)
        # Only some scalings need the length; for the others, avoid waiting for the GPU.
        length = position_ids.max() + 1 if self.angles.depends_on_length else 0
        frequencies = self.frequencies(x.device, length)
        reads = self.scheme.axes(frequencies[0].numel()).to(x.device)
        places = axes.float().movedim(0, -1)[..., reads] * self.scheme.text_step  # b l f
        return self.angles.turn(x, places, frequencies)


def split_sections(sections: Sequence[int] | None, num_frequencies: int) -> tuple[int, int, int]:
    """Returns the number of frequencies for time, height and width; default 2 : 3 : 3 (Qwen2-VL).

    Raises:
        ValueError: the sections do not add up to `num_frequencies`, or without `sections` it is
            not divisible by 8.
    """
    if sections is None:
        if num_frequencies % 8:
            raise ValueError(
                f"{num_frequencies} rotary frequencies (head size {2 * num_frequencies}) do not "
                "split 2 : 3 : 3; set model.rotary.sections=[time,height,width] to three numbers "
                f"that add up to {num_frequencies}"
            )
        return num_frequencies // 4, 3 * num_frequencies // 8, 3 * num_frequencies // 8
    if len(sections) != 3 or sum(sections) != num_frequencies or min(sections) < 0:
        raise ValueError(
            f"model.rotary.sections={list(sections)} must be three numbers that add up to "
            f"{num_frequencies}, half of the head size {2 * num_frequencies}"
        )
    time, height, width = sections
    return time, height, width


def grid_coordinates(grid: Grid) -> Float[Tensor, "3 l"]:
    """Returns time step, row and column of every token of a grid, in order time, row, column."""
    t, h, w = (torch.arange(n).float() for n in grid)
    return torch.stack(torch.meshgrid(t, h, w, indexing="ij")).flatten(1)
