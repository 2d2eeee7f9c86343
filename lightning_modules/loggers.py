"""Loggers that a resumed run goes on with."""

import csv
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only


class ResumableCSVLogger(CSVLogger):
    """`metrics.csv` in `save_dir` itself; a resumed run goes on in the same file.

    Rows of steps that it takes again are replaced. Hyperparameters are not written: the run's
    `config.yaml` holds them.
    """

    def __init__(self, save_dir: str | Path):
        super().__init__(save_dir, name="", version="", flush_logs_every_n_steps=1)

    @property
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = _ResumingWriter(self.log_dir)
        return self._experiment

    def log_hyperparams(self, params: Any = None) -> None:
        pass


class _ResumingWriter(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        """Keeps the file that is there, where Lightning's writer deletes it."""
        self._rows: list[dict[str, str]] = []
        if Path(self.metrics_file_path).is_file():
            with open(self.metrics_file_path, newline="") as file:
                reader = csv.DictReader(file)
                self._rows = list(reader)
                self.metrics_keys = list(reader.fieldnames or [])

    def log_metrics(self, metrics_dict: dict[str, Any], step: int | None = None) -> None:
        if self._rows and step is not None:
            earlier = self._before(step, metrics_dict.keys())
            if len(earlier) < len(self._rows):
                with open(self.metrics_file_path, "w", newline="") as file:
                    writer = csv.DictWriter(file, self.metrics_keys)
                    writer.writeheader()
                    writer.writerows(earlier)
            self._rows = []
        super().log_metrics(metrics_dict, step)

    def _before(self, step: int, keys: Collection[str]) -> list[dict[str, str]]:
        """Rows up to the one that is logged again.

        A run that was stopped before a validation goes on with it, and its step's training row
        stays.
        """
        names = set(keys) - {"epoch", "step"}
        for number, row in enumerate(self._rows):
            there = float(row["step"] or 0)
            if there > step or (there == step and any(row.get(name) for name in names)):
                return self._rows[:number]
        return self._rows


class ResumableWandbLogger(WandbLogger):
    """One W&B run for a run directory: its id lies there in `run_id`.

    `options` are those of Lightning's `WandbLogger`.
    """

    def __init__(self, save_dir: str | Path, **options: Any):
        path = Path(save_dir) / "run_id"
        if not path.is_file() and rank_zero_only.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(secrets.token_hex(4))
        super().__init__(
            save_dir=save_dir,
            id=path.read_text() if path.is_file() else None,
            resume="allow",
            settings=wandb.Settings(quiet=True, console="off"),
            **options,
        )
        # Lightning hands on an argument that W&B has done away with, and W&B warns of it.
        self._wandb_init.pop("anonymous", None)
