"""Prints the results of a run from the files in its directory."""

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from experiments.directory.run_directory import read_done
from lightning_modules.metrics.answers import FULL

_WORSE_IF_HIGHER = " (lower is better)"


def tell_results(folder: Path, commands: Sequence[str] = ()) -> None:
    """Prints the stored results, the run directory and the next commands, on rank 0.

    Args:
        folder: the directory of a training or an evaluation.
        commands: commands to type next.
    """
    if rank_zero_only.rank:
        return
    print(f"\nresults of {short_path(folder)}")
    for title, rows in _tables(folder):
        print(f"\n{title}")
        for line in _aligned(rows):
            print(f"  {line}")
    if commands:
        print("\nnext:")
        for command in commands:
            print(f"  {command}")


def next_commands(folder: Path, module: str) -> list[str]:
    """Returns the commands that use a trained run.

    Args:
        folder: the run directory.
        module: class of the stage of training, as a dotted name. An encoder alone is not exported.
    """
    folder = short_path(folder)
    commands = [f"ropelab-evaluate run={folder}", f"ropelab-report {folder.parent}"]
    if not module.endswith("ClipContextModule"):
        below = folder.parts[1:] if folder.parts[0] == "runs" else [folder.name]
        commands.insert(1, f"ropelab-export {folder} {Path('models', *below)}")
    return commands


def short_path(folder: Path) -> Path:
    """Returns the folder relative to the current one if it lies below it."""
    here, path = Path.cwd(), folder.absolute()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _tables(folder: Path) -> Iterator[tuple[str, list[list[str]]]]:
    """Yields the title and the rows of each table: scores, needles, and other metrics."""
    validations = _read(folder / "scores.json") or []
    shown = set()
    if validations:
        step = validations[-1]["step"]
        latest = [validation for validation in validations if validation["step"] == step]
        yield f"scores at step {step}", _score_rows(latest)
        shown = {
            f"{'val' if (name := v.get('condition') or FULL) == FULL else name}/{row['name']}"
            for v in latest
            for row in v["scores"]
        }
    if needle := _read(folder / "needle.json"):
        yield f"needles found, at step {needle['step']}", _needle_rows(needle)
    metrics = (read_done(folder) or {}).get("metrics", {})
    rest = {name: value for name, value in metrics.items() if name not in {*shown, "score"}}
    if rest:
        yield "last metrics", [[name, _number(value)] for name, value in rest.items()]


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def _score_rows(validations: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Returns a row for each score, with the conditions of one step as columns."""
    columns: dict[str, dict[str, Any]] = {}
    for validation in validations:
        condition = validation.get("condition") or FULL
        columns[condition] = {row["name"]: row for row in validation["scores"]}
    rows = [["score", *columns, "count"]]
    for name in dict.fromkeys(name for scores in columns.values() for name in scores):
        found = [scores.get(name, {}) for scores in columns.values()]
        higher = next((row["higher_is_better"] for row in found if "higher_is_better" in row), None)
        counts = [str(row["count"]) for row in found if row.get("count") is not None]
        count = " / ".join(count for count, _ in groupby(counts))
        label = f"{name}{_WORSE_IF_HIGHER if higher is False else ''}"
        rows.append([label, *(_number(row.get("value")) for row in found), count])
    return rows


def _needle_rows(needle: dict[str, Any]) -> list[list[str]]:
    rows = [["condition", "found", "95 %", "count"]]
    facts = {name: (c, len(c["cells"])) for name, c in needle["conditions"].items()}
    for name in ("blind", "ceiling"):
        if canary := needle["canaries"].get(name):
            facts[name] = canary, canary["n"]
    for name, (fact, count) in facts.items():
        low, high = map(_number, fact["interval"])
        rows.append([name, _number(fact["mean"]), f"{low} to {high}", str(count)])
    return rows


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "-" if value is None else str(value)
    return f"{value:.4g}"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yields the rows as lines with columns of equal width; numbers stand to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join([first.ljust(widths[0]), *cells])
