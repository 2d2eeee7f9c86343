"""Loggers that a resumed run goes on with."""

import csv
import logging
import secrets
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import wandb
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from wandb.errors import AuthenticationError, CommError, UsageError

from lightning_modules.checkpoint.preemption import signals
from lightning_modules.loggers.history import (
    TRAINER_STEP,
    Table,
    append_table,
    find_fragments,
    read_metrics,
    read_rows,
    read_tables,
)

logger = logging.getLogger(__name__)

#: Told with every row, and no reason to log one.
_BESIDE = {"epoch"}

_MODES = ("online", "offline", "disabled", "shared")

#: Seconds that rows are kept back from the disk. By default W&B waits for 32 KiB, so that a kill
#: leaves nothing of a small run.
_FLUSH_S = 0.1


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
                self._write_all(earlier)
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

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with open(self.metrics_file_path, newline="") as file:
            rows = list(csv.DictReader(file))
        self._write_all(rows)

    def _write_all(self, rows: list[dict[str, str]]) -> None:
        """Beside the file, so that a kill leaves the old one."""
        partial = Path(f"{self.metrics_file_path}.partial")
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(self.metrics_file_path)


class ResumableWandbLogger(WandbLogger):
    """One W&B run for a run directory, over all its interruptions: its id lies there in `run_id`.

    W&B's own step goes on, offline too, and a metric is stored once for a trainer step, although
    steps are taken again after an interruption. What counts as stored is what lies on the disk,
    so a resumed run first makes up for what a kill has lost: online, rows that the server has not
    received, those of offline fragments included; and the last rows before the kill, which
    `metrics.csv` and `tables.jsonl` in `save_dir` still have.

    Args:
        best: of metrics, which end of the run the summary keeps: `min` or `max`, as `name.min`.
        init_timeout: seconds; a server that does not answer by then has the run go on offline.
        finish_timeout: seconds that the end of a run waits for uploads. What is left is sent when
            the run is resumed.
        options: those of Lightning's `WandbLogger`.
    """

    def __init__(
        self,
        save_dir: str | Path,
        best: Mapping[str, str] | None = None,
        init_timeout: int = 30,
        finish_timeout: int = 60,
        **options: Any,
    ):
        _check(options.get("mode"), dict(best or {}), init_timeout, finish_timeout)
        super().__init__(
            save_dir=save_dir,
            resume="allow",
            settings=wandb.Settings(
                quiet=True,
                console="off",
                init_timeout=init_timeout,
                finish_timeout=finish_timeout,
                x_transaction_log_flush_interval=_FLUSH_S,
            ),
            **options,
        )
        # Lightning hands on an argument that W&B has done away with, and W&B warns of it.
        self._wandb_init.pop("anonymous", None)
        self._folder, self._best = Path(save_dir), dict(best or {})
        self._stored: dict[str, int] = {}  # by metric, the last trainer step
        self._ends: dict[str, int] = {}  # the same when this process began
        self._next = 0  # W&B's step of the first row, until that is logged
        self._waiting: list[tuple[Mapping[str, Any], int | None]] = []  # for the server

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            # Not when it is built: a run that is refused until then leaves no id.
            self._id = self._wandb_init["id"] = _keep_id(self._folder / "run_id")
            fragments = find_fragments(self._folder, str(self._id))
            run = self._experiment = self._begin()
            run.define_metric(TRAINER_STEP)
            run.define_metric("*", step_metric=TRAINER_STEP, step_sync=True)
            for name, end in self._best.items():  # no globs: `min` of a table breaks it
                run.define_metric(name, step_metric=TRAINER_STEP, step_sync=True, summary=end)
            self._go_on(run, fragments)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        run = self.experiment  # knows what is stored
        if step is not None:
            again = {k: v for k, v in metrics.items() if step <= self._stored.get(k, -1)}
            # The same end may be reached again, and another test be run there.
            ends = {k: v for k, v in again.items() if self._ends.get(k) == step}
            if newest := _numbers({k: ends[k] for k in ends.keys() - self._best - _BESIDE}):
                run.summary.update(newest)
            metrics = {k: v for k, v in metrics.items() if k not in again or k in _BESIDE}
            if metrics.keys() <= _BESIDE:
                return
            self._note(metrics, step)
        if self._next:
            # Offline, W&B starts at 0 unless told; and a row that is only told of is a row.
            run.log({}, step=self._next, commit=False)
            self._next = 0
        try:
            if len(_numbers(metrics)) == len(metrics):
                super().log_metrics(metrics, step)
            else:
                self._log_media(metrics, step)
        except OSError as error:
            # A scheduler tells W&B's own process to go as well. The resumed run makes up for it.
            if signals.received is None:
                raise
            logger.warning("W&B has gone before: %r", error)

    @rank_zero_only
    def log_table(
        self,
        key: str,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        """Keeps a copy in `tables.jsonl` first: W&B writes its own when it finds the time."""
        if columns is not None and data is not None and step is not None:
            append_table(self._folder, Table(key, columns, data, step))
        super().log_table(key, columns, data, dataframe, step)

    def _log_media(self, metrics: Mapping[str, Any], step: int | None) -> None:
        """A table asks the server, and fails where that does not answer: it waits for the next."""
        self._waiting.append((metrics, step))
        try:
            while self._waiting:
                super().log_metrics(*self._waiting[0])
                del self._waiting[0]
        except CommError as error:
            reason = str(error).splitlines()[0]
            logger.warning("W&B does not answer, %d tables wait: %s", len(self._waiting), reason)

    def _begin(self) -> Any:
        """The run of W&B, offline where the server does not answer.

        Raises:
            ValueError: W&B refuses the key, or there is none.
        """
        try:
            return wandb.init(**self._wandb_init)
        except (UsageError, AuthenticationError) as error:
            raise ValueError(
                f"W&B refuses this run ({str(error).splitlines()[0]}): set WANDB_API_KEY, or keep "
                "the run here with WANDB_MODE=offline"
            ) from error
        except CommError as error:
            reason = str(error).splitlines()[0]
            logger.warning("W&B is not there, so this run is kept here, offline: %s", reason)
            wandb.teardown()  # what was begun holds the id
            return wandb.init(**{**self._wandb_init, "mode": "offline"})

    def _go_on(self, run: Any, fragments: list[Path]) -> None:
        """Numbers the next row behind those in `fragments`; logs those that got lost."""
        last, unsent = -1, {}
        for row in read_rows(fragments):
            last = max(last, row.wandb_step)
            if row.trainer_step is not None:
                self._note(row.keys(), row.trainer_step)
            if not run.offline and row.wandb_step >= run.starting_step:
                unsent[row.wandb_step] = row  # sent before, maybe, by a run that was killed too
        for step, row in sorted(unsent.items()):
            run.log(row.as_logged(), step=step)
        self._next = max(last + 1, run.starting_step)
        rows: list[tuple[int, Any]] = list(read_metrics(self._folder / "metrics.csv"))
        rows += [(table.step, table) for table in read_tables(self._folder)]
        for step, row in sorted(rows, key=lambda row: row[0]):
            if isinstance(row, Table):
                super().log_table(row.key, row.columns, row.data, step=step)
            else:
                self.log_metrics(row, step)
        self._ends = dict(self._stored)

    def _note(self, metrics: Iterable[str], step: int) -> None:
        self._stored |= {key: max(step, self._stored.get(key, -1)) for key in metrics}


def finish_wandb(exit_code: int, preempted: bool = False) -> None:
    """Ends the W&B run of this process, where there is one.

    Args:
        preempted: W&B shows the run as that instead of as failed until it goes on.
    """
    if wandb.run is not None and preempted:
        wandb.run.mark_preempting()
    wandb.finish(exit_code=exit_code)


def _check(mode: str | None, best: dict[str, str], init_timeout: int, finish_timeout: int) -> None:
    """
    Raises:
        ValueError: a setting that W&B would refuse only when the run begins.
    """
    if mode not in (None, *_MODES):
        raise ValueError(f"mode={mode} must be {', '.join(_MODES)} (WANDB_MODE sets it)")
    for name, end in best.items():
        if end not in ("min", "max"):
            raise ValueError(f"best.{name}={end} must be min or max")
    if init_timeout <= 0 or finish_timeout < 0:
        raise ValueError(
            f"init_timeout={init_timeout} and finish_timeout={finish_timeout} are seconds: set 1 "
            "or more"
        )


def _keep_id(path: Path) -> str | None:
    """The id of the run directory, decided by rank 0 alone, which is the only one to need it."""
    if not path.is_file() and rank_zero_only.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name("run_id.partial")  # a kill leaves no empty one
        partial.write_text(secrets.token_hex(4))
        partial.replace(path)
    return path.read_text() if path.is_file() else None


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in metrics.items() if isinstance(v, (int, float, Tensor))}
