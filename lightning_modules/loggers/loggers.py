"""CSV and W&B loggers that a resumed run continues."""

import csv
import io
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

from datamodules.common.atomic import write_whole
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

#: Values that come with every row, but are no reason to log a row.
_BESIDE = {"epoch"}

_MODES = ("online", "offline", "disabled", "shared")

#: Seconds until W&B flushes rows to disk. By default it waits for 32 KiB, so a kill would lose all
#: rows of a small run.
_FLUSH_S = 0.1


class ResumableCSVLogger(CSVLogger):
    """Writes `metrics.csv` in `save_dir` itself; a resumed run continues the same file.

    A resumed run replaces the rows of steps that it repeats. Hyperparameters are not written,
    because the run's `config.yaml` holds them.
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
        """Keeps an existing file, which Lightning's writer would delete."""
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
        """Returns the rows before the first one that is logged again.

        A run that was stopped before a validation resumes with it, and the training row of that
        step stays.
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
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, self.metrics_keys)
        writer.writeheader()
        writer.writerows(rows)
        write_whole(Path(self.metrics_file_path), file.getvalue())


class ResumableWandbLogger(WandbLogger):
    """Logs to one W&B run per run directory, across all interruptions; `run_id` there holds its id.

    W&B's own step continues after a resume, offline too. A metric is stored once per trainer step,
    although steps are repeated after an interruption. Only rows on disk count as stored, so a
    resumed run first logs what a kill has lost. Online, these are rows that the server has not
    received, including those of offline fragments. In both modes, these are also the last rows
    before the kill, which are still in `metrics.csv` and `tables.jsonl` in `save_dir`.

    Args:
        save_dir: the run directory.
        best: `min` or `max` by metric name: the value that the summary keeps, as `name.min`.
        init_timeout: seconds to wait for the server before the run continues offline.
        finish_timeout: seconds that the end of a run waits for uploads. The rest is sent when the
            run is resumed.
        options: arguments of Lightning's `WandbLogger`.
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
        # Lightning passes an argument that W&B has removed, and W&B warns about it.
        self._wandb_init.pop("anonymous", None)
        self._folder, self._best = Path(save_dir), dict(best or {})
        self._stored: dict[str, int] = {}  # last stored trainer step of each metric
        self._ends: dict[str, int] = {}  # the same when this process began
        self._next = 0  # W&B's step for the first row; 0 after that row is logged
        self._waiting: list[tuple[Mapping[str, Any], int | None]] = []  # rows not yet sent

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            # Set the id here, not in the constructor: a run that is refused earlier leaves no id.
            self._id = self._wandb_init["id"] = _keep_id(self._folder / "run_id")
            fragments = find_fragments(self._folder, str(self._id))
            run = self._experiment = self._begin()
            run.define_metric(TRAINER_STEP)
            run.define_metric("*", step_metric=TRAINER_STEP, step_sync=True)
            for name, end in self._best.items():  # no globs: W&B fails on the `min` of a table
                run.define_metric(name, step_metric=TRAINER_STEP, step_sync=True, summary=end)
            self._go_on(run, fragments)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        run = self.experiment  # also fills `_stored`
        if step is not None:
            again = {k: v for k, v in metrics.items() if step <= self._stored.get(k, -1)}
            # A finished run may be started again at its last step, for example for another test.
            ends = {k: v for k, v in again.items() if self._ends.get(k) == step}
            if newest := _numbers({k: ends[k] for k in ends.keys() - self._best - _BESIDE}):
                run.summary.update(newest)
            metrics = {k: v for k, v in metrics.items() if k not in again or k in _BESIDE}
            if metrics.keys() <= _BESIDE:
                return
            self._note(metrics, step)
        if self._next:
            # Offline, W&B starts at step 0 unless it gets a step, even in an empty row.
            run.log({}, step=self._next, commit=False)
            self._next = 0
        try:
            if len(_numbers(metrics)) == len(metrics):
                super().log_metrics(metrics, step)
            else:
                self._log_media(metrics, step)
        except OSError as error:
            # A scheduler also stops W&B's own process. The resumed run logs the lost rows.
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
        """Logs a table; first writes a copy to `tables.jsonl`, because W&B writes its own later."""
        if columns is not None and data is not None and step is not None:
            append_table(self._folder, Table(key, columns, data, step))
        super().log_table(key, columns, data, dataframe, step)

    def _log_media(self, metrics: Mapping[str, Any], step: int | None) -> None:
        """Logs media; if the server does not answer, they wait for the next call."""
        self._waiting.append((metrics, step))
        try:
            while self._waiting:
                super().log_metrics(*self._waiting[0])
                del self._waiting[0]
        except CommError as error:
            reason = str(error).splitlines()[0]
            logger.warning("W&B does not answer, %d tables wait: %s", len(self._waiting), reason)

    def _begin(self) -> Any:
        """Starts the W&B run; offline if the server does not answer.

        Raises:
            ValueError: W&B refuses the API key, or there is none.
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
            wandb.teardown()  # the failed start still holds the id
            return wandb.init(**{**self._wandb_init, "mode": "offline"})

    def _go_on(self, run: Any, fragments: list[Path]) -> None:
        """Sets the number of the next row to follow those in `fragments`, and logs lost rows."""
        last, unsent = -1, {}
        for row in read_rows(fragments):
            last = max(last, row.wandb_step)
            if row.trainer_step is not None:
                self._note(row.keys(), row.trainer_step)
            if not run.offline and row.wandb_step >= run.starting_step:
                unsent[row.wandb_step] = row  # an earlier killed start may have sent it
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
    """Ends the W&B run of this process, if there is one.

    Args:
        exit_code: exit code of the program.
        preempted: W&B shows the run as preempted, not as failed, until it is resumed.
    """
    if wandb.run is not None and preempted:
        wandb.run.mark_preempting()
    wandb.finish(exit_code=exit_code)


def _check(mode: str | None, best: dict[str, str], init_timeout: int, finish_timeout: int) -> None:
    """Checks settings that W&B would refuse only when the run begins.

    Raises:
        ValueError: a setting is wrong.
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
    """Returns the id of the run directory; only rank 0 needs it, and creates it if missing."""
    if not path.is_file() and rank_zero_only.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, secrets.token_hex(4))
    return path.read_text() if path.is_file() else None


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in metrics.items() if isinstance(v, (int, float, Tensor))}
