"""ropelab-dashboard: makes a W&B workspace for an ablation from the runs in a folder.

ropelab-dashboard runs/vniah_d_tiny --metric needle/periodic --save

The workspace is written as JSON beside the runs, without a network. --save also makes it a view of
the W&B project and prints its URL. A second start updates the same view.
"""

import argparse
import csv
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.private.wandb import as_plain, take_place_of
from experiments.run.files import inside, printable
from experiments.run.process import run_alone
from experiments.run.read import RunState, read_runs
from experiments.run.settings import factors

try:
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as ws
    from wandb.errors import Error as WandbError
    from wandb_workspaces.expr import And
    from wandb_workspaces.reports.v2.interface import Layout, ParallelCoordinatesPlotColumn
except ModuleNotFoundError:
    sys.exit("error: ropelab-dashboard needs wandb-workspaces: pip install 'ropelab[dashboard]'")

_STEP = "trainer/global_step"

#: Default metrics for the ranking. The first one that was logged is used.
_HEADLINES = ("needle/periodic", "needle/plain", "val/accuracy", "val/loss", "train/loss")

_SYSTEM = {
    "GPU use, %": "system/gpu.0.gpu",
    "GPU memory, %": "system/gpu.0.memoryAllocated",
    "CPU use, %": "system/cpu",
    "memory, %": "system/memory_percent",
}


def main(arguments: Sequence[str] | None = None) -> int:
    run_alone("ropelab-dashboard")
    options = _parser().parse_args(arguments)
    try:
        # 1. The runs and their logged metrics
        runs = read_runs([options.folder])
        logged = read_logged(runs)
        axes = choose_axes(runs, options.axis)
        metric = choose_metric(logged, options.metric)

        # 2. The workspace. Building it checks it.
        workspace = make_workspace(runs, axes, metric, logged)
        workspace.entity, workspace.project = place(runs[0], options.entity, options.project)
        output = options.output or inside(options.folder, "dashboard.json")
        same_view(workspace, output)

        # 3. The output: a view of the W&B project, and a file
        if options.save:
            workspace.save()
            print(workspace.url)
        output.write_text(json.dumps(as_plain(workspace), indent=1))
    except (ValueError, OSError, WandbError) as error:
        print(f"error: {printable(str(error).strip().splitlines()[0])}", file=sys.stderr)
        return 2
    print(output)
    return 0


def make_workspace(
    runs: list[RunState], axes: list[str], metric: str, logged: list[str]
) -> ws.Workspace:
    """Builds the workspace, grouped by the factors `axes`.

    Its sections are the ranking, curves, heatmaps, generations, throughput and system metrics.

    Args:
        logged: metrics and media that at least one run has.
    """
    best = _setting(runs[0], "logger.wandb.best") or {}
    settings = [axis for axis in axes if axis != "seed"]
    lower = best.get(metric) == "min" or "loss" in metric
    sections = [
        ws.Section(name="Ranking", panels=_ranking(runs, settings, metric, best), is_open=True),
        ws.Section(name="Validation", panels=_curves(logged, "val/", "needle/"), is_open=True),
        ws.Section(name="Training", panels=_curves(logged, "train/", "lr-", "pooler/")),
        ws.Section(name="Heatmaps", panels=[_heatmaps()], is_open=True),
        ws.Section(name="Generations", panels=[_generations()]),
        ws.Section(name="Throughput", panels=[_curve(n) for n in logged if n.endswith("_per_s")]),
        ws.Section(
            name="System",
            panels=[panels.LinePlot(title=t, x="_runtime", y=[n]) for t, n in _SYSTEM.items()],
        ),
    ]
    return ws.Workspace(
        entity="",
        project="",
        name=f"{_setting(runs[0], 'name') or runs[0].folder.parent.name}: {', '.join(axes)}",
        sections=[section for section in sections if section.panels],
        settings=ws.WorkspaceSettings(x_axis=_STEP, max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=_filters(runs),
            groupby=[ws.Config(_config_key(runs[0], axis)) for axis in settings],
            order=[ws.Ordering(ws.Summary(_summary(metric, best)), ascending=lower)],
        ),
    )


def read_logged(runs: list[RunState]) -> list[str]:
    """Returns the metrics of all runs, read from the header lines of their `metrics.csv`.

    Raises:
        ValueError: no run has logged anything yet.
    """
    names: dict[str, None] = {}
    for run in runs:
        path = inside(run.folder, "metrics.csv")
        if path.is_file():
            with path.open(newline="") as file:
                names |= dict.fromkeys(next(csv.reader(file), []))
        names |= dict.fromkeys(run.metrics.keys() - {"score"})
    logged = sorted(names.keys() - {"step", "epoch"})
    if not logged:
        raise ValueError("no run has logged anything yet: no metrics.csv")
    return logged


def choose_metric(logged: list[str], name: str | None) -> str:
    """Returns the metric that ranks the runs: `name`, or a default.

    Raises:
        ValueError: no run has logged `name`.
    """
    if name is not None and name not in logged:
        raise ValueError(f"no run has logged {name!r}; there are: {', '.join(logged)}")
    return name or next((headline for headline in _HEADLINES if headline in logged), logged[0])


def choose_axes(runs: list[RunState], names: list[str] | None) -> list[str]:
    """Returns the named factors, or all factors in which the runs differ.

    Raises:
        ValueError: the runs do not differ in a named factor.
    """
    differing = list(factors([run.settings for run in runs]))
    for name in names or []:
        if len({run.settings.value(name) for run in runs}) < 2:
            known = ", ".join(differing) or "nothing"
            raise ValueError(f"the runs do not differ in {name!r}; they do in: {known}")
    return names or differing


def place(run: RunState, entity: str | None, project: str | None) -> tuple[str, str]:
    """Returns the entity and project of the runs. An empty entity means that of the user's key."""
    return (
        entity or _setting(run, "logger.wandb.entity") or os.environ.get("WANDB_ENTITY", ""),
        project or _setting(run, "logger.wandb.project") or "ropelab",
    )


def same_view(workspace: ws.Workspace, output: Path) -> None:
    """Gives `workspace` the name and id of the view in `output`, so that it replaces that view."""
    if output.is_file():
        take_place_of(workspace, json.loads(output.read_text()))


def _ranking(
    runs: list[RunState], settings: list[str], metric: str, best: dict[str, str]
) -> list[Any]:
    """Returns one bar plot for each factor, then plots of all factors together.

    A bar is the mean for one value; its error bar is the deviation over seeds and other factors.
    """
    name = _summary(metric, best)
    spread: dict[str, Any] = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
    bars: list[Any] = [
        panels.BarPlot(
            title=f"{name} by {axis}: mean and standard deviation",
            metrics=[name],
            groupby=panels.Config(_config_key(runs[0], axis)),
            **spread,
        )
        for axis in settings
    ]
    if len(settings) != 1:  # one bar for each combination, or for each run without factors
        bars.append(panels.BarPlot(title=name, metrics=[name], **spread))
    if len(settings) > 1:
        keys = [panels.Config(_config_key(runs[0], axis)) for axis in settings]
        columns = [ParallelCoordinatesPlotColumn(k) for k in keys]
        columns.append(ParallelCoordinatesPlotColumn(panels.SummaryMetric(name)))
        bars.append(panels.ParallelCoordinatesPlot(title="axes together", columns=columns))
    return bars


def _curves(logged: list[str], *prefixes: str) -> list[Any]:
    return [_curve(n) for n in logged if n.startswith(prefixes) and not n.endswith("_per_s")]


def _curve(name: str) -> Any:
    spread: dict[str, Any] = {"groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}
    return panels.LinePlot(title=name, x=_STEP, y=[name], **spread)


def _heatmaps() -> Any:
    return panels.MediaBrowser(title="needles found", media_keys=["needle/heatmap"], num_columns=4)


def _generations() -> Any:
    layout = Layout(w=24, h=10)
    return panels.WeavePanelSummaryTable(table_name="val/generations", layout=layout)


def _filters(runs: list[RunState]) -> Any:
    """Returns W&B filters for the group of the runs, and for their job type if all share one."""
    group = _setting(runs[0], "logger.wandb.group") or _setting(runs[0], "name")
    kinds = {_setting(run, "job_type") for run in runs} - {None}
    filters = [ws.Metric("Group") == str(group)] if group else []
    filters += [ws.Metric("JobType") == str(kind) for kind in kinds if len(kinds) == 1]
    return And(*filters) if filters else ""


def _config_key(run: RunState, axis: str) -> str:
    """Returns the W&B config key of a factor. Group options and the seed are under `choice`."""
    return f"choice.{axis}" if axis == "seed" or axis in run.settings.choices else axis


def _summary(metric: str, best: dict[str, str]) -> str:
    return f"{metric}.{best[metric]}" if metric in best else metric


def _setting(run: RunState, key: str) -> Any:
    node: Any = run.settings.config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _parser() -> argparse.ArgumentParser:
    what = "Writes a W&B workspace for an ablation."
    parser = argparse.ArgumentParser(prog="ropelab-dashboard", description=what)
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="folder with the runs of an ablation"
    )
    parser.add_argument(
        "--metric", help="the metric that ranks the runs (default: needle/… or a loss)"
    )
    parser.add_argument(
        "--axis",
        action="append",
        help="a factor, by its config key (default: all in which the runs differ)",
    )
    parser.add_argument("--project", help="in W&B (default: that of the runs)")
    parser.add_argument("--entity", help="in W&B (default: WANDB_ENTITY)")
    parser.add_argument("--output", type=Path, help="default: FOLDER/dashboard.json")
    parser.add_argument(
        "--save", action="store_true", help="save it to W&B as a view of the project"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
