"""A CSV logger that a resumed run continues."""

import csv
import io
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from datamodules.common.atomic import write_whole


class ResumableCSVLogger(Logger):
    """Writes `metrics.csv` in `save_dir`; a resumed run continues the same file.

    Each call is a row. The columns are the sorted names of all metrics so far. A resumed run
    replaces the rows of steps that it repeats. Hyperparameters are not written, because the run's
    `config.yaml` holds them.
    """

    def __init__(self, save_dir: str | Path):
        super().__init__()
        self._folder = Path(save_dir)
        self._columns: list[str] | None = None  # None: the file has not been opened yet

    @property
    def save_dir(self) -> str:
        return str(self._folder)

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *arguments: Any, **options: Any) -> None:
        """Does nothing."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        values = {k: v.item() if isinstance(v, Tensor) else v for k, v in metrics.items()}
        if self._columns is None:
            rows = self._read()
            kept = rows if step is None else _before(rows, step, values.keys())
            if len(kept) < len(rows):
                self._write_all(kept)
            step = len(kept) if step is None else step
        row = {**values, "step": step}
        assert self._columns is not None
        if new := row.keys() - self._columns:
            rows = self._read()
            self._columns = sorted([*self._columns, *new])
            self._write_all(rows)
        with open(self._path, "a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    @property
    def _path(self) -> Path:
        return self._folder / "metrics.csv"

    def _read(self) -> list[dict[str, str]]:
        self._folder.mkdir(parents=True, exist_ok=True)
        if not self._path.is_file():
            self._columns = []
            return []
        with open(self._path, newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            self._columns = list(reader.fieldnames or [])
        return rows

    def _write_all(self, rows: list[dict[str, str]]) -> None:
        assert self._columns is not None
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, self._columns)
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self._path, file.getvalue())


def _before(rows: list[dict[str, str]], step: int, keys: Collection[str]) -> list[dict[str, str]]:
    """Returns the rows before the first one that is logged again.

    A run that was stopped before a validation resumes with it, and the training row of that step
    stays.
    """
    names = set(keys) - {"epoch", "step"}
    for number, row in enumerate(rows):
        there = float(row["step"] or 0)
        if there > step or (there == step and any(row.get(name) for name in names)):
            return rows[:number]
    return rows
