"""layout -> positions -> cos, sin. The contract of the third stage.

A scheme states three facts: where the tokens of one visual stand (`place`), where the next text
token stands (`advance`), and which axis each rotary frequency reads (`axes`). Everything else is
the same for all of them and lives here: the walk over a layout, padding, and the angles.
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
    """Positions on three axes (time, height, width) for text and visuals in any order.

    `text_step` is the distance between two text tokens, on all axes.
    """

    text_step: float = 1.0

    @abstractmethod
    def place(self, grid: Grid, start: float) -> Float[Tensor, "3 l"]:
        """Positions of a visual whose turn comes at `start`: time by time, row by row."""

    @abstractmethod
    def advance(self, placed: Float[Tensor, "3 l"]) -> float:
        """Where the first text token after a visual placed at `placed` stands."""

    @abstractmethod
    def axes(self, num_frequencies: int) -> Int[Tensor, " f"]:
        """The axis (TIME, HEIGHT, WIDTH) that each frequency reads, fastest frequency first.

        Raises:
            ValueError: the scheme cannot share out so many frequencies.
        """

    def positions(self, layout: Layout) -> Float[Tensor, "3 l"]:
        """Positions of one row, in the units of the scheme."""
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
        """What transformers' decoders take as `position_ids`: row 0 counts tokens, for masks.

        Rows 1 to 3 are the axes in units of `text_step`, so that text moves on by 1.
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
        """Where one more text token stands behind each row, in the units of `batch_positions`.

        Behind text it is the last position + 1. Behind a visual only the scheme knows.
        """
        behind = [self.positions([*layout, 1])[:, -1] for layout in layouts]
        return torch.stack(behind, dim=1) / self.text_step


class RotaryEmbedding(nn.Module):
    """Takes the place of a transformers decoder's rotary module, for all its layers at once.

    Frequencies, with whatever scaling the LLM's `rope_parameters` name (linear, dynamic, YaRN, …),
    and the order of their channels stay the LLM's own; the scheme decides what they multiply. The
    module keeps no tensors: it would see them cast to bfloat16 or left on the meta device.
    Everything is float32 until the end.

    Raises:
        ValueError: on text alone it would not give what `original` gives, or the scheme cannot
            share out so many frequencies.
    """

    def __init__(self, scheme: RotaryScheme, original: Any):
        super().__init__()
        self.scheme = scheme
        self.angles = Angles(original)
        #: Rows 1 to 3 of the positions, put here by the LLM for the length of one forward.
        self.axis_positions: Float[Tensor, "3 b l"] | None = None
        with torch.device("cpu"):  # also while a model is made on the meta device
            scheme.axes(self.frequencies(torch.device("cpu"), 1)[0].numel())  # a misfit stops here

    def frequencies(
        self, device: torch.device, length: int | Int[Tensor, ""]
    ) -> tuple[Float[Tensor, " f"], float]:
        """Radians per position, fastest first, and the factor on cos and sin that YaRN asks for."""
        return self.angles.frequencies(device, length)

    @torch.no_grad()
    def forward(
        self, x: Float[Tensor, "b l m"], position_ids: Num[Tensor, "b2 l"]
    ) -> tuple[Float[Tensor, "b2 l a"], Float[Tensor, "b2 l a"]]:
        """cos and sin as the LLM's own module gives them, in the dtype of `x` or in float32.

        Text alone (`position_ids`) moves all axes together.
        """
        axes = self.axis_positions
        if axes is None:
            axes = position_ids.float().expand(3, -1, -1)
        # The length decides only the scalings that depend on it; others must not wait for it.
        length = position_ids.max() + 1 if self.angles.depends_on_length else 0
        frequencies = self.frequencies(x.device, length)
        reads = self.scheme.axes(frequencies[0].numel()).to(x.device)
        places = axes.float().movedim(0, -1)[..., reads] * self.scheme.text_step  # b l f
        return self.angles.turn(x, places, frequencies)


def split_sections(sections: Sequence[int] | None, num_frequencies: int) -> tuple[int, int, int]:
    """How many frequencies time, height and width get; without `sections` 2 : 3 : 3 as Qwen2-VL.

    Raises:
        ValueError: the sections do not add up to `num_frequencies`.
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
    """Time step, row and column of every token of a grid, time by time, row by row."""
    t, h, w = (torch.arange(n).float() for n in grid)
    return torch.stack(torch.meshgrid(t, h, w, indexing="ij")).flatten(1)
