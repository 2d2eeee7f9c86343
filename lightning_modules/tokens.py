"""Visual tokens and their layout: what the components of a model pass to each other."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from datamodules.batch import Grid


@dataclass(frozen=True, eq=False)
class Layout:
    """Holds the places of one visual's tokens. A rotary scheme knows nothing else of a visual.

    Only `coordinates` may be on a GPU and depend on the data. The other fields follow from the
    sizes of the visual. A scheme computes the start of the next text from these other fields, so
    it never waits for a GPU.

    Attributes:
        coordinates: time step, row and column of the centre of each token, on `extent`. The centre
            of a token that was made of several patches may be a fraction.
        extent: the regular grid that the coordinates refer to.
        seconds: the time of each of the `extent.t` time steps; None for an image.
        draw: a random number in [0, 1), for schemes whose settings are random in training; None:
            the scheme's fixed setting.
        continues: this visual continues the one before it: one video with text between its parts.
    """

    coordinates: Float[Tensor, "l 3"]
    extent: Grid
    seconds: tuple[float, ...] | None = None
    draw: float | None = None
    continues: bool = False

    def __len__(self) -> int:
        return len(self.coordinates)

    @classmethod
    def full(cls, extent: Grid, seconds: tuple[float, ...] | None = None, **known) -> "Layout":
        """Returns the layout of tokens that fill a grid. `known` holds the other fields."""
        return cls(grid_coordinates(extent), extent, seconds, **known)

    @property
    def number(self) -> Float[Tensor, " l"]:
        """Returns the number of each token in the reading order of `extent`.

        The number is (t * h + i) * w + j. It is a fraction for a token between two grid points.
        """
        t, i, j = self.coordinates.unbind(1)
        return (t * self.extent.h + i) * self.extent.w + j

    @property
    def shown_at(self) -> Float[Tensor, " l"]:
        """Returns the seconds from the first time step to each token, linear between time steps.

        Without `seconds` they are 0.
        """
        if self.seconds is None:
            return torch.zeros_like(self.coordinates[:, 0])
        # Subtracted in double precision: after ten hours, float32 rounds to 4 ms. The result is
        # float32 by name, because in bf16-true the default dtype is bfloat16.
        since = [second - self.seconds[0] for second in self.seconds]
        times = torch.tensor(since, dtype=torch.float32, device=self.coordinates.device)
        step = self.coordinates[:, 0]
        below = step.floor().long().clamp(0, len(times) - 1)
        above = (below + 1).clamp(max=len(times) - 1)
        return times[below] + (step - below) * (times[above] - times[below])


#: One row from left to right: a number of text tokens, or the layout of a visual.
Row = Sequence[int | Layout]


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """The tokens of one visual, in the order in which the LLM reads them.

    Attributes:
        features: one row for each token; d is the width of the current component.
        layout: where the tokens are.
        grid: the grid that the tokens fill after `reindex`; its size is the number of tokens. Right
            after the encoder it is `layout.extent`.
    """

    features: Float[Tensor, "l d"]
    layout: Layout
    grid: Grid

    def __len__(self) -> int:
        return len(self.features)

    @classmethod
    def on_grid(cls, features: Float[Tensor, "t h w d"], **known) -> "VisualTokens":
        """Returns the tokens that fill a grid. `known` holds other fields of `Layout`."""
        grid = Grid(*features.shape[:3])
        return cls(features.flatten(0, 2), Layout.full(grid, **known), grid)

    def as_grid(self) -> Float[Tensor, "t h w d"]:
        """Returns the features on the grid that the tokens fill."""
        return self.features.view(*self.grid, -1)

    def moved(
        self, features: Float[Tensor, "l2 m"], coordinates: Float[Tensor, "l2 3"], grid: Grid
    ) -> "VisualTokens":
        """Returns other tokens of the same visual: same extent, new features and coordinates."""
        return VisualTokens(features, replace(self.layout, coordinates=coordinates), grid)

    def reindex(self) -> "VisualTokens":
        """Returns the same tokens, numbered 0, 1, 2, … on the grid that they fill.

        A time step of that grid is shown at the centre of the time steps that it was made of.
        """
        seconds = self.layout.seconds
        if seconds is not None:
            first = self.layout.shown_at[:: self.grid.h * self.grid.w]  # one token per time step
            seconds = tuple((seconds[0] + first).tolist())
        layout = replace(
            self.layout,
            coordinates=grid_coordinates(self.grid),
            extent=self.grid,
            seconds=seconds,
        )
        return replace(self, layout=layout)


def grid_coordinates(grid: Grid) -> Float[Tensor, "l 3"]:
    """Returns time step, row and column of every point of a grid, in order time, row, column."""
    return product([torch.arange(n).float() for n in grid])


def product(axes: Sequence[Float[Tensor, " _"]]) -> Float[Tensor, "l 3"]:
    """Returns every combination of a time step, a row and a column, in this order."""
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1).mT  # t h w -> l 3
