"""Draws groups of runs as SVG text that needs no fonts, scripts or other files."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from experiments.reporting.data import ABSENT, Cell, Needle, Run
from experiments.reporting.tables import CONDITIONS, Group, conditions_of, score
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


@contextmanager
def _figure(rows: int, columns: int, width: float, height: float) -> Iterator[Figure]:
    """Yields a figure in the report's style. Avoids pyplot because of its global state."""
    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=(columns * width, rows * height), layout="constrained")


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def plain_text(text: str) -> str:
    """Escapes `$` in a label, which would start a formula. Keeps line breaks."""
    return "\n".join(map(printable, text.split("\n"))).replace("$", r"\$")


def draw_all(groups: list[Group]) -> dict[str, str]:
    """Returns the SVG text by name of every picture for which the runs have data."""
    conditions = list(conditions_of(groups))
    pictures = {f"heatmap-{c}": heatmaps(groups, c) for c in conditions}
    if conditions:
        pictures["accuracy"] = accuracy_by_length(groups, conditions)
    names = [
        n for n in ("train/loss", "val/loss") if any(n in r.curves for g in groups for r in g.runs)
    ]
    if names:
        pictures["loss"] = loss_curves(groups, names)
    return pictures


def heatmaps(groups: list[Group], condition: str) -> str:
    """Draws a heatmap of frames x depth for each group, all on one colour scale from 0 to 1."""
    shown = [group for group in groups if _cells(group, condition)]
    everything = [cell for group in shown for cell in _cells(group, condition)]
    frames = sorted({cell.frames for cell in everything})
    depths = sorted({cell.depth for cell in everything})
    columns = min(len(shown), 4)
    rows = -(-len(shown) // columns)
    with _figure(rows, columns, 3.0, 0.9 + 0.3 * len(depths)) as figure:
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for ax in axes.flat[len(shown) :]:
            ax.set_visible(False)
        for ax, group in zip(axes.flat, shown, strict=False):
            _heatmap(ax, cell_means(_cells(group, condition), frames, depths), frames, depths)
            ax.set_title(plain_text(fill(group.label, 26)))
            _mark_training_length(ax, group, frames)
        for ax in axes[:, 0]:
            ax.set_ylabel("depth of the needle")
        for ax in axes.flat[max(len(shown) - columns, 0) : len(shown)]:
            ax.set_xlabel("frames of the haystack")
        bar = ScalarMappable(Normalize(0, 1), HEATMAP)
        figure.colorbar(bar, ax=axes, label="share found", shrink=0.9, aspect=14, pad=0.015)
        return _svg(figure)


def save_heatmap(needle: Needle, path: Path) -> Path:
    """Saves one run's heatmaps as a PNG, one for each condition, on the common colour scale."""
    conditions = list(needle.cells)
    everything = [cell for cells in needle.cells.values() for cell in cells]
    frames = sorted({cell.frames for cell in everything})
    depths = sorted({cell.depth for cell in everything})
    with _figure(1, len(conditions), 3.0, 0.9 + 0.3 * len(depths)) as figure:
        axes = figure.subplots(1, len(conditions), squeeze=False, sharey=True)[0]
        for ax, condition in zip(axes, conditions, strict=True):
            _heatmap(ax, cell_means(needle.cells[condition], frames, depths), frames, depths)
            ax.set_title(plain_text(condition))
            ax.set_xlabel("frames of the haystack")
        axes[0].set_ylabel("depth of the needle")
        bar = ScalarMappable(Normalize(0, 1), HEATMAP)
        figure.colorbar(bar, ax=axes, label="share found", shrink=0.9, aspect=14, pad=0.015)
        figure.savefig(path, dpi=150)
    return path


def save_stages(runs: list[Run], path: Path) -> Path:
    """Saves a PNG with the loss curves of runs that continue one another, side by side.

    Losses of different stages are not comparable, so each stage has its own axis.
    """
    with _figure(1, len(runs), 3.6, 2.9) as figure:
        axes = figure.subplots(1, len(runs), squeeze=False)[0]
        for number, (ax, run) in enumerate(zip(axes, runs, strict=True)):
            for name, look in (("train/loss", {"lw": 1.3}), ("val/loss", {"lw": 0, "marker": "o"})):
                if name in run.curves:
                    colour = COLOURS[0] if name == "train/loss" else COLOURS[1]
                    steps, values = _smooth(run.curves[name])
                    ax.plot(steps + 1, values, color=colour, label=name, ms=5, **look)
            title = f"{number + 1}. {run.settings.config.get('name', run.folder.name)}"
            ax.set(title=plain_text(title), xlabel="optimiser step", xlim=(0, None), ylim=(0, None))
        axes[0].set_ylabel("loss")
        _legend(figure, list(axes))
        figure.savefig(path, dpi=110)
    return path


def _cells(group: Group, condition: str) -> list[Cell]:
    return [c for run in group.tested if run.needle for c in run.needle.cells.get(condition, [])]


def cell_means(cells: list[Cell], frames: list[int], depths: list[float]) -> np.ndarray:
    """Returns the mean over needles and seeds (depths x frames), NaN for cells without results."""
    total = np.zeros((len(depths), len(frames)))
    found = np.zeros_like(total)
    for cell in cells:
        at = depths.index(cell.depth), frames.index(cell.frames)
        total[at] += 1
        found[at] += cell.correct
    return np.divide(found, total, out=np.full_like(total, np.nan), where=total > 0)


def _heatmap(ax: Axes, grid: np.ndarray, frames: list[int], depths: list[float]) -> None:
    ax.set_facecolor("#f1f2f4")
    ax.grid(False)
    ax.pcolormesh(np.ma.masked_invalid(grid), cmap=HEATMAP, vmin=0, vmax=1, ec="white", lw=0.8)
    ax.set_xticks(np.arange(len(frames)) + 0.5, [str(f) for f in frames])
    ax.set_yticks(np.arange(len(depths)) + 0.5, [f"{depth:.0%}" for depth in depths])
    ax.tick_params(length=0)
    if not ax.yaxis_inverted():  # depth grows downwards; the axes share y, so invert it once
        ax.invert_yaxis()
    ax.spines[:].set_visible(False)
    if len(frames) > 9:  # the cells are too narrow for readable numbers
        return
    for (row, column), value in np.ndenumerate(grid):
        text = ABSENT if np.isnan(value) else f"{value:.2f}".lstrip("0") if value < 1 else "1"
        colour = "#1c2128" if np.isnan(value) or value > 0.55 else "white"
        ax.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=colour, size=8)


def _mark_training_length(ax: Axes, group: Group, frames: list[int]) -> None:
    longest = _training_range(group)[1]
    edge = sum(length <= longest for length in frames)
    if 0 < edge < len(frames):
        ax.axvline(edge, color="#D55E00", lw=2)


def _training_range(group: Group) -> tuple[int, int]:
    return next(run.needle.train_frames for run in group.runs if run.needle)


def accuracy_by_length(groups: list[Group], conditions: list[str]) -> str:
    """Draws each group's line with its 95 % band over needles, and the score of blind guessing."""
    shown = [group for group in groups if group.tested]
    with _figure(1, len(conditions), 5.6, 3.7) as figure:
        axes = figure.subplots(1, len(conditions), squeeze=False, sharey=True)[0]
        for ax, condition in zip(axes, conditions, strict=True):
            for group in shown:
                _accuracy_line(ax, group, _cells(group, condition))
            lengths = sorted({c.frames for g in shown for c in _cells(g, condition)})
            _length_axis(ax, lengths, _training_range(shown[0]))
            needles = [run.needle for group in shown for run in group.tested if run.needle]
            blind = sum(needle.blind.mean for needle in needles) / len(needles)
            ax.axhline(blind, color="#3d4450", ls="--", lw=1.2, label="blind (no needle)")
            ax.set(title=plain_text(CONDITIONS.get(condition, condition)), ylim=(-0.02, 1.04))
        axes[0].set_ylabel("share found")
        _legend(figure, list(axes))
        return _svg(figure)


def _accuracy_line(ax: Axes, group: Group, cells: list[Cell]) -> None:
    lengths = sorted({cell.frames for cell in cells})
    intervals = [s.interval for n in lengths if (s := score([[c for c in cells if c.frames == n]]))]
    if not intervals:
        return
    mean, low, high = np.array(intervals).T
    ax.fill_between(lengths, low, high, color=_line(group)["color"], alpha=0.14, lw=0)
    marker = MARKERS[group.index % len(MARKERS)]
    ax.plot(
        lengths, mean, **_line(group), marker=marker, ms=5, lw=1.8, label=plain_text(group.label)
    )


def _line(group: Group) -> dict[str, Any]:
    turn, colour = divmod(group.index, len(COLOURS))
    return {"color": COLOURS[colour], "ls": LINES[turn % len(LINES)]}


def _length_axis(ax: Axes, lengths: list[int], trained: tuple[int, int]) -> None:
    ax.set_xscale("log", base=2)
    ax.axvspan(*trained, color="#8a8f98", alpha=0.16, lw=0, label="lengths trained on")
    ax.set_xticks(lengths, [str(length) for length in lengths])
    ax.minorticks_off()
    ax.set_xlabel("frames of the haystack")


def loss_curves(groups: list[Group], names: list[str]) -> str:
    """Draws one thin line for each run, in the colour of its group."""
    with _figure(1, len(names), 5.6, 3.3) as figure:
        axes = figure.subplots(1, len(names), squeeze=False)[0]
        for ax, name in zip(axes, names, strict=True):
            for group in groups:
                for i, run in enumerate(r for r in group.runs if name in r.curves):
                    steps, values = _smooth(run.curves[name])
                    label = plain_text(group.label) if i == 0 else None
                    few = {"marker": MARKERS[group.index % len(MARKERS)]} if len(steps) < 5 else {}
                    ax.plot(steps, values, **_line(group), **few, lw=1.3, alpha=0.85, label=label)
            ax.set(title=name, xlabel="optimiser step", xlim=(0, None), ylim=(0, None))
        axes[0].set_ylabel("nats a token")
        _legend(figure, list(axes))
        return _svg(figure)


def _legend(figure: Figure, axes: list[Axes]) -> None:
    """Draws one legend below all axes. The longest label decides the number of columns."""
    handles = {
        label: handle
        for ax in axes
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    columns = max(1, int(figure.get_figwidth() * 9) // (max(map(len, handles)) + 8))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)


def _smooth(points: list[tuple[int, float]], most: int = 120) -> np.ndarray:
    """Returns (steps, values) as means of at most `most` equal parts, to smooth out noise."""
    parts = np.array_split(np.array(points, dtype=float), min(most, len(points)))
    return np.array([part.mean(axis=0) for part in parts]).T
