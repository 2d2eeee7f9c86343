"""ropelab-report: writes one page on which setting is better, by how much, and how sure that is."""

import argparse
import re
import sys
from base64 import b64encode
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiments.reporting import tables as tables
from experiments.reporting.data import ABSENT, Run, load_runs
from experiments.reporting.disagreements import disagreements, write_judge
from experiments.reporting.measured import NEEDLES
from experiments.reporting.plots import PLOTS, draw_all, save_stages
from experiments.reporting.sentences import cautions, headline, limits, named, verdict
from experiments.reporting.style import COLOURS
from experiments.run.files import inside, printable
from experiments.run.process import run_alone
from experiments.run.settings import factors

SHOWN_GENERATIONS = 8


def main(arguments: list[str] | None = None) -> None:
    run_alone("ropelab-report")
    parser = argparse.ArgumentParser("ropelab-report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders that hold runs")
    parser.add_argument("--output", type=Path, help="where to write (default: the first of RUNS)")
    parser.add_argument(
        "--stages", type=Path, metavar="PNG", help="only draw RUNS as stages in a row"
    )
    parser.add_argument("--metric", help="what to rank (default: needles, or a score)")
    parser.add_argument(
        "--judge", type=Path, metavar="JSON", help="only write the answers of one run for a judge"
    )
    options = parser.parse_args(arguments)
    try:
        runs = load_runs(options.runs)
        if options.judge:
            written = [write_judge(_only(runs), options.judge)]
        elif options.stages:
            print(*map(printable, describe_stages(runs).split("\n")), sep="\n")
            written = [save_stages(runs, options.stages)]
        else:
            written = write_report(runs, options.output or options.runs[0], options.metric)
            print(printable(tell(runs, options.metric)))
    except (ValueError, OSError) as error:
        sys.exit(f"ropelab-report: {printable(str(error))}")
    for path in written:
        print(path.resolve())


def _only(runs: list[Run]) -> Run:
    if len(runs) > 1:
        raise ValueError(f"--judge takes one run, but {len(runs)} are given")
    return runs[0]


def tell(runs: list[Run], metric: str | None = None) -> str:
    """Returns the headline of the page."""
    axes = list(factors([run.settings for run in runs]))
    return headline(choose(tables.group_runs(runs, axes), axes, metric))


def choose(
    groups: list[tables.Group], axes: list[str], metric: str | None = None
) -> tables.Ranking | None:
    """Returns the ranking by `metric`, or by a default; None if no run was scored.

    Raises:
        ValueError: no run has this metric.
    """
    known = tables.metrics_of(groups)
    if metric is not None and metric not in known:
        raise ValueError(f"no run has a metric {metric!r}; there are: {', '.join(known) or 'none'}")
    return tables.rank(groups, axes, metric or known[0]) if known else None


def write_report(runs: list[Run], output: Path, metric: str | None = None) -> list[Path]:
    """Writes report.html with everything in it, and report.md with its pictures in a folder."""
    pages = {suffix: inside(output, f"report.{suffix}") for suffix in ("html", "md")}
    folder = inside(output, "report_files")

    axes = list(factors([run.settings for run in runs]))
    groups = tables.group_runs(runs, axes)
    ranking = choose(groups, axes, metric)
    pictures = draw_all(groups, ranking)
    files = file_names(pictures)
    folder.mkdir(parents=True, exist_ok=True)
    for name, svg in pictures.items():
        inside(folder, files[name]).write_text(svg)

    facts: dict[str, Any] = describe(runs, groups, axes, ranking)
    facts |= {"pictures": pictures, "files": files}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "reporting"),
        autoescape=lambda name: bool(name) and "html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "data_uri": data_uri,
        "cell": table_cell,
        "fenced": fenced,
        "headline": headline,
        "in_order": in_order,
        "on_scale": scale_of(ranking.rows if ranking else []),
        "place": place,
        "spread": spread,
        "verdict": verdict,
    }
    for suffix, path in pages.items():
        path.write_text(environment.get_template(f"report.{suffix}.j2").render(facts))
    return list(pages.values())


def place(row: tables.Row) -> str:
    if row.places is None:
        return ABSENT
    best, worst = row.places
    return str(best) if best == worst else f"{best}–{worst}"  # noqa: RUF001


def spread(values: list[float]) -> str:
    """Returns up to three differences of single trainings; of more, the least and the largest."""
    if len(values) > 3:
        return f"{min(values):+.2f} to {max(values):+.2f}"
    return ", ".join(f"{value:+.2f}" for value in values)


def in_order(
    grouped: Iterable[tuple[str, list[tables.Column]]], columns: list[tables.Column]
) -> list[tuple[str, list[tables.Column]]]:
    """Returns groups of columns in the order of the columns; Jinja sorts them by name."""
    parts = list(dict.fromkeys(column.part for column in columns))
    return sorted(grouped, key=lambda item: parts.index(item[0]))


def scale_of(rows: list[tables.Row]) -> Callable[[float], float]:
    """Returns a function value -> place from 0 to 120 on the common scale of small pictures."""
    intervals = [s.interval for row in rows for s in (row.overall, *row.scores.values())]
    ends = [e for i in intervals for e in (i.low, i.high)]
    ends += [value for row in rows for value in row.beside.values()]
    low, high = min([0.0, *ends]), max([1.0, *ends])
    if min(ends, default=0.0) >= 0.0 and max(ends, default=1.0) > 1.0:
        low, high = min(ends), max(ends)
    return lambda value: round(120 * (value - low) / ((high - low) or 1.0), 2)


def file_names(pictures: Iterable[str]) -> dict[str, str]:
    """Returns a file name for each picture. Condition names may have any character, even `/`."""
    names = {name: re.sub(r"[^\w-]+", "_", name) for name in pictures}
    return {
        name: f"{safe}.svg" if safe == name else f"{safe}-{number}.svg"
        for number, (name, safe) in enumerate(names.items())
    }


def describe_stages(runs: list[Run]) -> str:
    """Returns a Markdown table of runs that continue one another, each from first to last step.

    Raises:
        ValueError: a run has no loss yet.
    """
    lines = ["| stage | steps | train/loss | val/loss | other metrics of the last validation |"]
    lines.append("|---|---|---|---|---|")
    for run in runs:
        if "train/loss" not in run.curves:
            raise ValueError(f"{run.folder}: {run.status}")
        spans = [_span(run.curves.get(name)) for name in ("train/loss", "val/loss")]
        others = [
            f"{name.removeprefix('val/')} {points[-1][1]:.3g}"
            for name, points in sorted(run.curves.items())
            if name.startswith("val/") and name != "val/loss"
        ]
        name, steps = run.settings.config.get("name", run.folder.name), run.last_step + 1
        lines.append(f"| {name} | {steps} | {' | '.join(spans)} | {', '.join(others)} |")
    return "\n".join(lines)


def _span(points: list[tuple[int, float]] | None) -> str:
    return f"{points[0][1]:.3f} → {points[-1][1]:.3f}" if points else ABSENT


def describe(
    runs: list[Run],
    groups: list[tables.Group],
    axes: list[str],
    ranking: tables.Ranking | None,
) -> dict:
    """Returns all variables of the templates except the pictures."""
    rows = ranking.rows if ranking else []
    metric = ranking.metric if ranking else NEEDLES
    example = ranking.example if ranking and rows else None
    others = [m for m in tables.metrics_of(groups) if m != metric]
    return {
        "title": title(runs, groups, axes),
        "headline": headline(ranking),
        "cautions": cautions(runs, ranking),
        "limits": limits(ranking) if ranking else "",
        "runs": runs,
        "groups": groups,
        "rows": rows,
        "ranked": any(row.places for row in rows),
        "best": ranking.with_best if ranking else [],
        "effects": ranking.effects if ranking else {},
        "others": [tables.rank(groups, axes, other) for other in others],
        "metric_name": named(metric),
        "unit": example.unit if example else "sample",
        "cluster": example.cluster_unit if example else "sample",
        "beside": list(dict.fromkeys(name for row in rows for name in row.beside)),
        "columns": tables.columns_of(groups, metric),
        "conditions": tables.CONDITIONS | tables.conditions_of(groups),
        "maps": any(run.needle for run in runs),
        "reaches": tables.REACHES,
        "canaries": tables.CANARIES,
        "plots": PLOTS,
        "colours": COLOURS,
        "disagreements": disagreements(ranking, groups) if ranking and rows else [],
        "generations": [] if metric != NEEDLES and rows else generations(groups),
        "commands": commands(runs),
        "versions": versions(runs),
    }


def versions(runs: list[Run]) -> dict[str, str]:
    """Returns package versions by name. If the runs differ, all of their versions are listed."""
    seen: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, number in run.versions.items():
            seen.setdefault(name, {})[number] = None
    return {name: " and ".join(numbers) for name, numbers in seen.items()}


def title(runs: list[Run], groups: list[tables.Group], axes: list[str]) -> str:
    settings = [axis for axis in axes if axis != "seed"]
    seeds = len({run.value("seed") for run in runs})
    what = " x ".join(settings) if settings else groups[0].label
    counts = [f"{len(groups)} settings"] if settings else []
    counts += [f"{seeds} seeds"] if seeds > 1 else []
    return f"{'Ablation of ' if settings else ''}{what}" + (f": {', '.join(counts)}" * bool(counts))


def generations(groups: list[tables.Group]) -> list[dict]:
    """Returns samples with each group's answer, from the group's first run that has answers."""
    answers = {g.label: next((r.generations for r in g.runs if r.generations), []) for g in groups}
    samples = {row["key"]: row for rows in answers.values() for row in rows}
    generated = {label: {r["key"]: r["generated"] for r in rows} for label, rows in answers.items()}
    return [
        row | {"by_group": {label: by_key.get(key) for label, by_key in generated.items()}}
        for key, row in list(samples.items())[:SHOWN_GENERATIONS]
    ]


def commands(runs: list[Run]) -> dict[str, list[Run]]:
    """Maps each command line to the runs that it started. A multirun starts several."""
    started: dict[str, list[Run]] = {}
    for run in runs:
        started.setdefault(run.command or "command.txt is missing", []).append(run)
    return started


def data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + b64encode(svg.encode()).decode()


def table_cell(text: object) -> str:
    """Escapes text so that it stays in its Markdown table cell and cannot become a link."""
    safe = re.sub(r"([|`\\])", r"\\\1", str(text)).replace("](", "]\\(").replace("<", "&lt;")
    return " ".join(safe.split())


def fenced(text: str) -> str:
    """Returns a Markdown code block. Its fence is longer than any run of backticks in `text`."""
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


if __name__ == "__main__":
    main()
