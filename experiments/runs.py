"""ropelab-runs: lists the runs below some folders with their states, and what a sweep still lacks.

ropelab-runs runs/vniah_d_tiny
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.command.overrides import read_value, short_keys
from experiments.run.files import printable
from experiments.run.process import end_with_the_reader, run_alone
from experiments.run.read import ENDED_EARLY, RunState, read_runs
from experiments.run.settings import factors

_COLOURS = {
    "done": "green",
    "running": "cyan",
    "queued": "blue",
    "stale": "yellow",
    "stopped": "yellow",
    "cancelled": "yellow",
    "preempted": "yellow",
    "failed": "red",
    "damaged": "red",
    "not started": "dim",
}

_GAP = 2  # characters between two columns

#: States of runs that the same command would run again.
_TO_GO = ("not started", *ENDED_EARLY, "damaged")

#: Default metrics. The first one that a run has is shown.
_METRICS = ("score", "val/loss", "train/loss")


def main(arguments: Sequence[str] | None = None) -> int:
    run_alone("ropelab-runs")
    end_with_the_reader()
    options = _parser().parse_args(arguments)
    try:
        runs = read_runs(options.folders, options.stale)
        metric = choose_metric(runs, options.metric)
    except (ValueError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    axes = factors([run.settings for run in runs])
    if options.json:
        print(json.dumps([as_json(run, n, axes) for n, run in enumerate(runs)], indent=1))
        return 0
    runs, axes = by_factors(runs, axes)
    console = Console()
    console.print(Text(_cut(printable(str(_above(runs))), console.width), style="dim"))
    console.print(make_table(runs, axes, metric, console.width))
    for line in (*what_failed(runs), *what_is_missing(runs)):
        console.print(Text(printable(line)), no_wrap=True, overflow="ellipsis")
    return 0


def choose_metric(runs: list[RunState], name: str | None) -> str:
    """Returns the metric to show: `name`, or a default.

    Raises:
        ValueError: no run has the metric `name`.
    """
    known = dict.fromkeys(key for run in runs for key in run.metrics)
    if name is not None and name not in known:
        raise ValueError(f"no run has a metric {name!r}; there are: {', '.join(sorted(known))}")
    return name or next((metric for metric in _METRICS if metric in known), _METRICS[0])


def by_factors(
    runs: list[RunState], axes: dict[str, list[str | None]]
) -> tuple[list[RunState], dict[str, list[str | None]]]:
    """Returns runs and their factors, sorted by the factors; numbers are sorted by value."""

    def key(number: int) -> list[tuple[bool, float, str]]:
        texts = [values[number] or "" for values in axes.values()]
        numbers = [read_value(text) for text in texts]
        return [
            (False, float(value), text) if isinstance(value, (int, float)) else (True, 0.0, text)
            for value, text in zip(numbers, texts, strict=True)
        ]

    order = sorted(range(len(runs)), key=key)
    return (
        [runs[n] for n in order],
        {axis: [values[n] for n in order] for axis, values in axes.items()},
    )


def as_json(run: RunState, number: int, axes: dict[str, list[str | None]]) -> dict:
    return {
        "folder": str(run.folder),
        "state": run.state,
        "axes": {axis: values[number] for axis, values in axes.items()},
        "step": run.step,
        "total_steps": run.total_steps,
        "metrics": run.metrics,
        "last_sign": run.last_sign,
        "resumes": max(0, run.starts - 1),
        "reason": run.reason,
    }


@dataclass
class Column:
    """A column of the table: one text a run. `cut` columns may be shortened."""

    name: str
    cells: list[str]
    style: str = ""
    right: bool = False
    cut: bool = False

    @property
    def width(self) -> int:
        return max(map(cell_len, (self.name, *self.cells)))


def make_table(
    runs: list[RunState], axes: dict[str, list[str | None]], metric: str, width: int = 80
) -> Table:
    """Returns the table, one line a run, at most `width` characters wide.

    The factors name the runs. Where they do not, the directory does. A column that is the same for
    all runs is left out, unless it is the state. The wider the terminal, the more columns.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = fit(_needed(runs, axes, metric), _optional(runs), width)
    for column in columns:
        table.add_column(
            Text(column.name),
            style=column.style,
            justify="right" if column.right else "left",
            no_wrap=True,
            overflow="ellipsis",
        )
    for number, run in enumerate(runs):
        table.add_row(
            *(
                Text(
                    column.cells[number],
                    style=_COLOURS[run.state] if column.name == "state" else "",
                )
                for column in columns
            )
        )
    return table


def fit(needed: list[Column], optional: list[Column], width: int) -> list[Column]:
    """Returns the columns that fit: the needed ones, shortened if they must be, then others."""
    room = width - _GAP * (len(needed) - 1)
    fixed = sum(column.width for column in needed if not column.cut)
    free = [column for column in needed if column.cut]
    longest = max((column.width for column in free), default=0)
    while longest > 4 and fixed + sum(min(c.width, longest) for c in free) > room:
        longest -= 1
    columns = [_shorten(column, longest) if column.cut else column for column in needed]
    for column in optional:
        taken = sum(c.width + _GAP for c in columns)
        if taken + column.width <= width:
            columns.append(column)
    return columns


def _shorten(column: Column, longest: int) -> Column:
    cells = [_cut(cell, longest) for cell in column.cells]
    return replace(column, name=_cut(column.name, longest), cells=cells)


def _needed(runs: list[RunState], axes: dict[str, list[str | None]], metric: str) -> list[Column]:
    labels = short_keys(axes)
    names = [
        Column(printable(labels[axis]), [printable(v or "-") for v in values], "magenta", cut=True)
        for axis, values in axes.items()
    ]
    if len(set(zip(*(column.cells for column in names), strict=True))) < len(runs):
        names = [_directories(runs)]
    shown = [f"{run.metrics[metric]:.4g}" if metric in run.metrics else "-" for run in runs]
    numbers = [
        Column("step", list(map(_progress, runs)), right=True),
        Column(printable(metric), shown, right=True),
    ]
    told = [column for column in numbers if {*column.cells} != {"-"}]
    return [*names, Column("state", list(map(_state, runs))), *told]


def _optional(runs: list[RunState]) -> list[Column]:
    """Returns the columns for which there must be room, the most important first."""
    now = time.time()
    ages = ["-" if run.last_sign is None else as_age(now - run.last_sign) for run in runs]
    resumes = [str(max(0, run.starts - 1) or "-") for run in runs]
    columns = [
        Column("last sign", ages, right=True),
        Column("resumes", resumes, right=True),
        _directories(runs),
    ]
    return [column for column in columns if {*column.cells} != {"-"}]


def _directories(runs: list[RunState]) -> Column:
    above = _above(runs)
    names = [printable(str(run.folder.relative_to(above))) for run in runs]
    return Column("run", names, cut=True)


def _above(runs: list[RunState]) -> Path:
    return Path(os.path.commonpath([run.folder.parent for run in runs]))


def _state(run: RunState) -> str:
    return (
        f"stopped ({printable(run.reason)})" if run.state == "stopped" and run.reason else run.state
    )


def _cut(text: str, longest: int) -> str:
    """Shortens a text in its middle, because values often differ at their ends."""
    if cell_len(text) <= longest:
        return text
    end = (longest - 1) // 2
    return f"{text[: longest - 1 - end]}…{text[len(text) - end :]}"


def what_failed(runs: list[RunState]) -> list[str]:
    """Returns one line for each run that failed or is damaged, with the reason."""
    broken = [run for run in runs if run.state in ("failed", "damaged")]
    return [printable(f"{run.folder.name}: {run.state}, {run.reason}") for run in broken]


def what_is_missing(runs: list[RunState]) -> list[str]:
    """Returns one line for each folder of several runs: how many are done or still to run."""
    sweeps: dict[Path, list[RunState]] = {}
    for run in runs:
        sweeps.setdefault(run.folder.parent, []).append(run)
    lines = []
    for folder, members in sweeps.items():
        counts = Counter(run.state for run in members)
        to_go = sum(counts[state] for state in _TO_GO)
        line = f"{counts['done']} of {len(members)} done"
        if others := [f"{counts[s]} {s}" for s in ("running", "queued", "stale") if counts[s]]:
            line += f", {', '.join(others)}"
        if to_go:
            line += f", {to_go} to go: the same command runs them"
        if len(members) > 1:
            lines.append(f"{_cut(folder.name, 24)}: {line}")
    return lines


def as_age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def _progress(run: RunState) -> str:
    if run.step is None:
        return "-"
    return str(run.step) + (f"/{run.total_steps}" if run.total_steps else "")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ropelab-runs", description="Lists run directories.")
    help_folders = "folders that hold runs (default: runs)"
    default = [Path("runs")]
    parser.add_argument(
        "folders", nargs="*", type=Path, default=default, metavar="FOLDER", help=help_folders
    )
    parser.add_argument("--metric", help="the metric that is shown (default: score, or a loss)")
    parser.add_argument("--json", action="store_true", help="a list of runs instead of a table")
    help_stale = "a running process without a heartbeat for this long is stale (default: 600)"
    parser.add_argument("--stale", type=float, default=600, metavar="SECONDS", help=help_stale)
    return parser


if __name__ == "__main__":
    sys.exit(main())
