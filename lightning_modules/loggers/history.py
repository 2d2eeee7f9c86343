"""Reads the rows that a W&B run has stored on disk, from all fragments of an interrupted run.

Each process that logs into a run writes its own transaction log,
`wandb/[offline-]run-<time>-<id>/run-<id>.wandb`. It is read with the program behind
`wandb leet inspect`, which stops without an error at a record that a kill has cut off. The command
itself would take more than a second per log, and would report to the server.
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

#: Lightning's name for the x-axis of W&B plots.
TRAINER_STEP = "trainer/global_step"

#: Copies of the logged tables, one per line. Copies of numbers are in `metrics.csv`.
_TABLES = "tables.jsonl"


@dataclass(frozen=True)
class Row:
    """The values of one call of `run.log`.

    Nested values are flattened: a table under `val/generations` is `val/generations._type`, ….
    """

    values: dict[str, Any]
    files: Path  # folder that paths of media are relative to

    @property
    def wandb_step(self) -> int:
        return int(self.values["_step"])

    @property
    def trainer_step(self) -> int | None:
        """Returns the trainer step; None if the row was logged without one."""
        step = self.values.get(TRAINER_STEP)
        return None if step is None else int(step)

    def keys(self) -> Iterator[str]:
        """Yields the names of the logged metrics, and other names that come from flattening."""
        for key in self.values:
            yield key
            if "." in key:
                yield key.rpartition(".")[0]

    def as_logged(self) -> dict[str, Any]:
        """Returns values to log this row again: numbers, and tables and images that still exist."""
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
    """Returns the run's transaction logs below `folder`, oldest first."""
    found = folder.glob(f"wandb/*run-*-{run_id}/run-{run_id}.wandb")
    return sorted(found, key=lambda path: path.parent.name.removeprefix("offline-"))


def read_rows(fragments: Iterable[Path]) -> Iterator[Row]:
    """Yields every complete row in logging order; 100,000 rows take about 13 s.

    Damaged blocks are skipped. A file that is not a transaction log is skipped with a warning:
    logging problems must not stop a run.
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
    """Yields (step, metrics) for each row of a `metrics.csv`, if the file exists."""
    if path.is_file():
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                if row.get("step"):
                    step = int(float(row.pop("step")))
                    yield step, {key: float(text) for key, text in row.items() if text}


class Table(NamedTuple):
    """A logged table."""

    key: str
    columns: list[str]
    data: list[list[Any]]
    step: int


def append_table(folder: Path, table: Table) -> None:
    """Appends a table to its file; after the call, a kill of this process cannot lose it."""
    with open(folder / _TABLES, "ab+") as file:
        file.seek(max(0, file.tell() - 1))
        if file.read() not in (b"", b"\n"):
            file.write(b"\n")  # ends a line that a kill has cut off
        file.write(json.dumps(table._asdict()).encode() + b"\n")


def read_tables(folder: Path) -> Iterator[Table]:
    """Yields every complete table in logging order."""
    if (folder / _TABLES).is_file():
        for line in (folder / _TABLES).read_bytes().splitlines():
            try:
                yield Table(**json.loads(line))
            except (ValueError, TypeError):
                logger.debug("a kill has torn a table in %s", folder / _TABLES)
