"""What a W&B run has stored on disk, over all the fragments that its interruptions left.

Each process that logs into a run writes a transaction log of its own,
`wandb/[offline-]run-<time>-<id>/run-<id>.wandb`. They are read by what `wandb leet inspect` calls,
which stops without an error at a record that a kill has torn. The command itself would take more
than a second each, and tell the server of it.
"""

import csv
import json
import logging
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import wandb
from wandb.util import get_core_path

logger = logging.getLogger(__name__)

#: What W&B's rows are plotted over, as Lightning names it.
TRAINER_STEP = "trainer/global_step"

#: Copies of the tables that were logged, a line each; numbers have theirs in `metrics.csv`.
_TABLES = "tables.jsonl"


@dataclass(frozen=True)
class Row:
    """One call of `run.log`.

    Nested values come flat: a table under `val/generations` is `val/generations._type`, ….
    """

    values: dict[str, Any]
    files: Path  # what paths of media start at

    @property
    def wandb_step(self) -> int:
        return int(self.values["_step"])

    @property
    def trainer_step(self) -> int | None:
        """None for what was logged without one."""
        step = self.values.get(TRAINER_STEP)
        return None if step is None else int(step)

    def keys(self) -> Iterator[str]:
        """Of metrics: those that were logged, among others that they may be flattened to."""
        for key in self.values:
            yield key
            if "." in key:
                yield key.rpartition(".")[0]

    def as_logged(self) -> dict[str, Any]:
        """What logs this row again: numbers, and of the media those tables and images that are
        still there."""
        kinds = {k[: -len("._type")]: v for k, v in self.values.items() if k.endswith("._type")}
        logged = {"_timestamp": self.values["_timestamp"]}
        for key, value in self.values.items():
            if not key.startswith("_") and not any(key.startswith(f"{kind}.") for kind in kinds):
                logged[key] = float(value) if isinstance(value, str) else value  # "NaN"
        for key, kind in kinds.items():
            names = self.values.get(f"{key}.filenames") or [self.values.get(f"{key}.path")]
            paths = [self.files / name for name in names if name and (self.files / name).is_file()]
            if kind == "table-file" and paths:
                content = json.loads(paths[0].read_text())
                logged[key] = wandb.Table(columns=content["columns"], data=content["data"])
            elif kind == "images/separated" and paths:
                logged[key] = [wandb.Image(str(path)) for path in paths]
        return logged


def find_fragments(folder: Path, run_id: str) -> list[Path]:
    """Transaction logs of the run below `folder`, in the order in which they were begun."""
    found = folder.glob(f"wandb/*run-*-{run_id}/run-{run_id}.wandb")
    return sorted(found, key=lambda path: path.parent.name.removeprefix("offline-"))


def read_rows(fragments: Iterable[Path]) -> Iterator[Row]:
    """Every row that is whole, in the order in which it was logged; 100,000 take about 13 s.

    Blocks that the disk has damaged are left out, and so is a file that is no transaction log,
    with a warning: a run is not to end by what was seen of it.
    """
    for path in fragments:
        command = [get_core_path(), "leet", "inspect", "--no-observability", "--json"]
        command += ["--run-file", str(path), str(path.parents[1])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as shown:
            assert shown.stdout is not None
            assert shown.stderr is not None
            for line in shown.stdout:
                if b'"type":"history"' in line:
                    yield Row(json.loads(line)["history"]["item"], path.parent / "files")
            reason = shown.stderr.read().decode().strip()
        if shown.returncode:
            logger.warning("%s cannot be read, its rows may come twice: %s", path, reason)


def read_metrics(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Steps and metrics of a `metrics.csv`, where there is one, row by row."""
    if path.is_file():
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                if row.get("step"):
                    step = int(float(row.pop("step")))
                    yield step, {key: float(text) for key, text in row.items() if text}


class Table(NamedTuple):
    """A table as it was logged."""

    key: str
    columns: list[str]
    data: list[list[Any]]
    step: int


def append_table(folder: Path, table: Table) -> None:
    """Beyond what a kill of this process can take when it returns."""
    with open(folder / _TABLES, "ab+") as file:
        file.seek(max(0, file.tell() - 1))
        if file.read() not in (b"", b"\n"):
            file.write(b"\n")  # behind what a kill has torn
        file.write(json.dumps(table._asdict()).encode() + b"\n")


def read_tables(folder: Path) -> Iterator[Table]:
    """Every table that is whole, in the order in which they were logged."""
    if (folder / _TABLES).is_file():
        for line in (folder / _TABLES).read_bytes().splitlines():
            try:
                yield Table(**json.loads(line))
            except (ValueError, TypeError):
                logger.debug("a kill has torn a table in %s", folder / _TABLES)
