"""The class of a plot of the report, the style of all plots, and code that they share."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.reporting.tables import Group
from experiments.run.files import printable

#: The colours of Okabe and Ito (2008), which every kind of colour vision can tell apart. Yellow is
#: left out, because it is too pale for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^DvPX*"  # one more than colours, so that pairs of both repeat late
LINES = ("-", "--", ":")  # one for each pass through the colours
HEATMAP = matplotlib.colormaps["cividis"]

STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#8a8f98",
    "axes.grid": True,
    "axes.labelcolor": "#3d4450",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "font.size": 10,
    "grid.color": "#e6e8eb",
    "hatch.color": "#b9bec6",
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "ropelab",  # the same runs give the same bytes
    "text.color": "#1c2128",
    "xtick.color": "#3d4450",
    "ytick.color": "#3d4450",
}


@dataclass(frozen=True)
class Plot:
    """A plot with its own section in the report.

    Attributes:
        title: heading of the section.
        alt: what a reader who cannot see the picture must know.
        note: text below the picture; may be empty.
        draw: returns the SVG text, or None if the runs have no data for it.
    """

    title: str
    alt: str
    note: str
    draw: Callable[[list[Group]], str | None]


@contextmanager
def new_figure(rows: int, columns: int, width: float, height: float) -> Iterator[Figure]:
    """Yields a figure in the report's style. Avoids pyplot because of its global state."""
    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=(columns * width, rows * height), layout="constrained")


def to_svg(figure: Figure) -> str:
    """Returns the figure as SVG text."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def plain_text(text: str) -> str:
    """Escapes `$` in a label, which would start a formula. Keeps line breaks."""
    return "\n".join(map(printable, text.split("\n"))).replace("$", r"\$")


def line_style(group: Group) -> dict[str, Any]:
    """Returns the colour and dashes of a group, the same in every plot."""
    turn, colour = divmod(group.index, len(COLOURS))
    return {"color": COLOURS[colour], "ls": LINES[turn % len(LINES)]}


def draw_legend(figure: Figure, axes: list[Axes]) -> None:
    """Draws one legend below all axes. The longest label decides the number of columns."""
    handles = {
        label: handle
        for ax in axes
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    columns = max(1, int(figure.get_figwidth() * 9) // (max(map(len, handles)) + 8))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)


def smooth(points: list[tuple[int, float]], most: int = 120) -> np.ndarray:
    """Returns (steps, values) as means of at most `most` equal parts, to smooth out noise."""
    parts = np.array_split(np.array(points, dtype=float), min(most, len(points)))
    return np.array([part.mean(axis=0) for part in parts]).T
