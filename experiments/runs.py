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
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.command.overrides import short_keys
from experiments.run.files import printable
from experiments.run.process import run_alone
from experiments.run.read import RunState, read_runs
from experiments.run.settings import factors

_COLOURS = {
    "done": "green",
    "running": "cyan",
    "queued": "blue",
    "stale": "yellow",
    "stopped": "yellow",
    "failed": "red",
    "damaged": "red",
    "not started": "dim",
}

#: States of runs that the same command would run again.
_TO_GO = ("not started", "stopped", "failed", "damaged")

#: Default metrics. The first one that a run has is shown.
_METRICS = ("score", "val/loss", "train/loss")


def main(arguments: Sequence[str] | None = None) -> int:
    run_alone("ropelab-runs")
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
    console = Console()
    console.print(make_table(runs, axes, metric))
    for line in what_is_missing(runs):
        console.print(printable(line), soft_wrap=True, highlight=False, markup=False)
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


def make_table(runs: list[RunState], axes: dict[str, list[str | None]], metric: str) -> Table:
    above = Path(os.path.commonpath([run.folder.parent for run in runs]))
    table = Table("run", title=Text(printable(str(above))), title_justify="left", title_style="dim")
    table.box, table.pad_edge, table.header_style = None, False, "bold"
    table.columns[0].overflow = "fold"
    for name in short_keys(axes).values():
        table.add_column(Text(printable(name)), style="magenta")
    table.add_column("state")
    for name in ("step", printable(metric), "last sign", "resumes"):
        table.add_column(Text(name), justify="right")
    now = time.time()
    for number, run in enumerate(runs):
        state = Text(run.state, style=_COLOURS[run.state])
        if run.reason:
            state.append(f" ({printable(run.reason)})", style="dim")
        table.add_row(
            Text(printable(str(run.folder.relative_to(above)))),
            *(Text(printable(values[number] or "-")) for values in axes.values()),
            state,
            _progress(run),
            f"{run.metrics[metric]:.4g}" if metric in run.metrics else "-",
            "-" if run.last_sign is None else as_age(now - run.last_sign),
            str(max(0, run.starts - 1) or "-"),
        )
    return table


def what_is_missing(runs: list[RunState]) -> list[str]:
    """Returns one line for each folder of several runs: how many are done or still to run."""
    sweeps: dict[Path, list[RunState]] = {}
    for run in runs:
        sweeps.setdefault(run.folder.parent, []).append(run)
    lines = []
    for folder, members in sweeps.items():
        to_go = [run.folder.name for run in members if run.state in _TO_GO]
        counts = Counter(run.state for run in members)
        others = [f"{counts[s]} {s}" for s in ("running", "queued", "stale") if counts[s]]
        if to_go:
            named = ", ".join(to_go[:5]) + (", …" if len(to_go) > 5 else "")
            line = (
                f"{len(to_go)} of {len(members)} still to run: {named}; the same command runs them"
            )
        else:
            line = f"{counts['done']} of {len(members)} done"
        if len(members) > 1:
            lines.append(f"{folder.name}: {line}" + (f" ({', '.join(others)})" if others else ""))
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
