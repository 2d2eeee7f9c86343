"""Draws groups of runs as SVG text that needs no fonts, scripts or other files."""

from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from experiments.reporting.data import ABSENT, Run
from experiments.reporting.measured import NEEDLES, Cell, Needle
from experiments.reporting.sentences import named
from experiments.reporting.style import (
    COLOURS,
    HEATMAP,
    MARKERS,
    Plot,
    draw_legend,
    line_style,
    new_figure,
    plain_text,
    smooth,
    to_svg,
)
from experiments.reporting.tables import CONDITIONS, Group, Ranking, columns_of, conditions_of
from lightning_modules.metrics.bootstrap import bootstrap_interval


def draw_all(groups: list[Group], ranking: Ranking | None = None) -> dict[str, str]:
    """Returns the SVG text by name of every picture for which the runs have data."""
    pictures = {f"heatmap-{c}": heatmaps(groups, c) for c in conditions_of(groups)}
    if ranking and ranking.with_best:
        pictures["comparison"] = comparison(ranking)
    if ranking and ranking.metric != NEEDLES and columns_of(groups, ranking.metric):
        pictures["categories"] = categories(ranking)
    drawn = {name: plot.draw(groups) for name, plot in PLOTS.items()}
    return pictures | {name: svg for name, svg in drawn.items() if svg is not None}


def heatmaps(groups: list[Group], condition: str) -> str:
    """Draws a heatmap of frames x depth for each group, all on one colour scale from 0 to 1."""
    shown = [group for group in groups if _cells(group, condition)]
    everything = [cell for group in shown for cell in _cells(group, condition)]
    frames = sorted({cell.frames for cell in everything})
    depths = sorted({cell.depth for cell in everything})
    columns = min(len(shown), 4)
    rows = -(-len(shown) // columns)
    with new_figure(rows, columns, 3.0, 0.9 + 0.3 * len(depths)) as figure:
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
        return to_svg(figure)


def comparison(ranking: Ranking) -> str:
    """Draws the difference of the best setting and each other one, with both intervals."""
    compared = ranking.with_best
    with new_figure(1, 1, 8.6, 1.1 + 0.38 * len(compared)) as figure:
        ax = figure.subplots()
        colours = {row.group.label: line_style(row.group)["color"] for row in ranking.rows}
        for place, one in enumerate(compared):
            _, low, high = one.difference.over_samples
            colour, mean = colours[one.second], one.difference.mean
            if not one.difference.one_run:
                _, least, most = one.difference.interval
                ax.plot([least, most], [place, place], color=colour, lw=1.2, alpha=0.8)
            ax.plot([low, high], [place, place], color=colour, lw=5, alpha=0.45)
            runs = one.difference.by_run
            ax.plot(runs, [place] * len(runs), "|", color=colour, ms=11, mew=1.6)
            ax.plot(mean, place, "o", color=colour, ms=7)
        ax.axvline(0, color="#3d4450", ls="--", lw=1.2)
        names = [plain_text(fill(f"than {one.second}", 40)) for one in compared]
        ax.set_yticks(range(len(compared)), names)
        ax.set(ylim=(len(compared) - 0.5, -0.5))
        better = plain_text(f"{compared[0].first} is better by, in {named(ranking.metric)}")
        ax.set_xlabel(fill(better, 90))
        return to_svg(figure)


def categories(ranking: Ranking) -> str:
    """Draws the mean of each setting by category, with its interval over clusters of samples."""
    columns = list(dict.fromkeys(column for row in ranking.rows for column in row.scores))
    rows = ranking.rows
    with new_figure(1, 1, max(5.6, 1.6 + 0.28 * len(columns) * len(rows)), 3.7) as figure:
        ax = figure.subplots()
        for number, row in enumerate(rows):
            shift = (number - (len(rows) - 1) / 2) * 0.8 / len(rows)
            known = [n for n, column in enumerate(columns) if column in row.scores]
            mean, low, high = np.array([row.scores[columns[n]].interval for n in known]).T
            ax.errorbar(
                np.array(known) + shift,
                mean,
                np.array([mean - low, high - mean]),
                color=line_style(row.group)["color"],
                fmt=MARKERS[row.group.index % len(MARKERS)],
                ms=6,
                lw=2,
                label=plain_text(row.group.label),
            )
        ax.set_xticks(range(len(columns)), [plain_text(fill(c.title, 20)) for c in columns])
        ax.set(ylabel=plain_text(named(ranking.metric)), xlim=(-0.5, len(columns) - 0.5))
        draw_legend(figure, [ax])
        return to_svg(figure)


def save_heatmap(needle: Needle, path: Path) -> Path:
    """Saves one run's heatmaps as a PNG, one for each condition, on the common colour scale."""
    conditions = list(needle.cells)
    everything = [cell for cells in needle.cells.values() for cell in cells]
    frames = sorted({cell.frames for cell in everything})
    depths = sorted({cell.depth for cell in everything})
    with new_figure(1, len(conditions), 3.0, 0.9 + 0.3 * len(depths)) as figure:
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
    with new_figure(1, len(runs), 3.6, 2.9) as figure:
        axes = figure.subplots(1, len(runs), squeeze=False)[0]
        for number, (ax, run) in enumerate(zip(axes, runs, strict=True)):
            for name, look in (("train/loss", {"lw": 1.3}), ("val/loss", {"lw": 0, "marker": "o"})):
                if name in run.curves:
                    colour = COLOURS[0] if name == "train/loss" else COLOURS[1]
                    steps, values = smooth(run.curves[name])
                    ax.plot(steps + 1, values, color=colour, label=name, ms=5, **look)
            title = f"{number + 1}. {run.settings.config.get('name', run.folder.name)}"
            ax.set(title=plain_text(title), xlabel="optimiser step", xlim=(0, None), ylim=(0, None))
        axes[0].set_ylabel("loss")
        draw_legend(figure, list(axes))
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


def accuracy_by_length(groups: list[Group]) -> str | None:
    """Draws each group's line with its 95 % band over needles, and the score of blind guessing."""
    conditions = list(conditions_of(groups))
    if not conditions:
        return None
    shown = [group for group in groups if group.tested]
    with new_figure(1, len(conditions), 5.6, 3.7) as figure:
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
        draw_legend(figure, list(axes))
        return to_svg(figure)


def _accuracy_line(ax: Axes, group: Group, cells: list[Cell]) -> None:
    lengths = sorted({cell.frames for cell in cells})
    if not lengths:
        return
    by_length = [[c for c in cells if c.frames == length] for length in lengths]
    intervals = [
        bootstrap_interval([c.correct for c in some], [c.needle for c in some])
        for some in by_length
    ]
    mean, low, high = np.array(intervals).T
    ax.fill_between(lengths, low, high, color=line_style(group)["color"], alpha=0.14, lw=0)
    marker = MARKERS[group.index % len(MARKERS)]
    ax.plot(
        lengths,
        mean,
        **line_style(group),
        marker=marker,
        ms=5,
        lw=1.8,
        label=plain_text(group.label),
    )


def _length_axis(ax: Axes, lengths: list[int], trained: tuple[int, int]) -> None:
    ax.set_xscale("log", base=2)
    ax.axvspan(*trained, color="#8a8f98", alpha=0.16, lw=0, label="lengths trained on")
    ax.set_xticks(lengths, [str(length) for length in lengths])
    ax.minorticks_off()
    ax.set_xlabel("frames of the haystack")


def loss_curves(groups: list[Group]) -> str | None:
    """Draws one thin line for each run, in the colour of its group."""
    known = {name for group in groups for run in group.runs for name in run.curves}
    names = [name for name in ("train/loss", "val/loss") if name in known]
    if not names:
        return None
    with new_figure(1, len(names), 5.6, 3.3) as figure:
        axes = figure.subplots(1, len(names), squeeze=False)[0]
        for ax, name in zip(axes, names, strict=True):
            for group in groups:
                for i, run in enumerate(r for r in group.runs if name in r.curves):
                    steps, values = smooth(run.curves[name])
                    label = plain_text(group.label) if i == 0 else None
                    few = {"marker": MARKERS[group.index % len(MARKERS)]} if len(steps) < 5 else {}
                    ax.plot(
                        steps, values, **line_style(group), **few, lw=1.3, alpha=0.85, label=label
                    )
            ax.set(title=name, xlabel="optimiser step", xlim=(0, None), ylim=(0, None))
        axes[0].set_ylabel("nats a token")
        draw_legend(figure, list(axes))
        return to_svg(figure)


#: The plots that have a section of their own, in the order of the page.
PLOTS = {
    "accuracy": Plot(
        title="How far it reaches",
        alt="Share found by frames of the haystack, one line for each setting",
        note="Mean over depths, needles and seeds, with its 95 % interval over needles.",
        draw=accuracy_by_length,
    ),
    "loss": Plot(
        title="Training",
        alt="Loss by step, one line for each run",
        note="",
        draw=loss_curves,
    ),
}
