"""A W&B logger that a resumed run continues."""

import logging
import secrets
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import wandb
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from wandb.errors import AuthenticationError, CommError, UsageError

from datamodules.common.atomic import write_whole
from lightning_modules.checkpoint.preemption import signals
from lightning_modules.loggers.journal import Journal, Row

logger = logging.getLogger(__name__)

#: Lightning's name for the x-axis of W&B plots.
TRAINER_STEP = "trainer/global_step"

#: Values that come with every row, but are no reason to log a row.
_BESIDE = {"epoch"}

#: Stop signals that W&B's own process does not need. It hears SIGTERM in any case.
_STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)

_MODES = ("online", "offline", "disabled", "shared")


class ResumableWandbLogger(WandbLogger):
    """Logs to one W&B run per run directory, across all interruptions; `run_id` there holds its id.

    A metric is stored once per trainer step, although steps are repeated after an interruption.
    W&B's own step is the row's number in the journal (`journal.py`), so a row has the same step
    whenever it is logged. A resumed run first logs what W&B lacks: online, the rows that the server
    has not received; offline, all rows, because each start writes a file of its own. So the newest
    offline file holds the whole run, except for images of earlier starts.

    Args:
        save_dir: the run directory.
        best: `min` or `max` by metric name: the value that the summary keeps, as `name.min`.
        init_timeout: seconds to wait for the server before the run continues offline.
        finish_timeout: seconds that the end of a run waits for uploads. The rest is sent when the
            run is resumed.
        log_model: whether to upload checkpoints, as in Lightning's logger.
        options: arguments of `wandb.init`, such as `project`, `name`, `tags` and `mode`.
    """

    def __init__(
        self,
        save_dir: str | Path,
        best: Mapping[str, str] | None = None,
        init_timeout: int = 30,
        finish_timeout: int = 60,
        log_model: bool = False,
        **options: Any,
    ):
        _check(options.get("mode"), dict(best or {}), init_timeout, finish_timeout)
        super().__init__(save_dir=save_dir, log_model=log_model)
        settings = wandb.Settings(
            quiet=True, console="off", init_timeout=init_timeout, finish_timeout=finish_timeout
        )
        self._options = {"dir": str(save_dir), "resume": "allow", "settings": settings, **options}
        self._folder, self._best = Path(save_dir), dict(best or {})
        self._journal = Journal(self._folder)
        self._run: Any = None
        self._count = 0  # rows in the journal
        self._stored: dict[str, int] = {}  # last stored trainer step of each metric
        self._ends: dict[str, int] = {}  # the same when this process began
        self._waiting: list[tuple[int, dict[str, Any]]] = []  # rows that the server must get first

    @property
    def name(self) -> str | None:
        return self._options.get("project")

    @property
    def version(self) -> str | None:
        return self._options.get("id")

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._run is None:
            # Set the id here, not in the constructor: a run that is refused earlier leaves no id.
            self._options["id"] = _keep_id(self._folder / "run_id")
            run = self._run = self._begin()
            run.define_metric(TRAINER_STEP)
            run.define_metric("*", step_metric=TRAINER_STEP, step_sync=True)
            for name, end in self._best.items():  # no globs: W&B fails on the `min` of a table
                run.define_metric(name, step_metric=TRAINER_STEP, step_sync=True, summary=end)
            self._go_on(run)
        return self._run

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
        numbers, tables = _numbers(metrics), _tables(metrics)
        others = {k: v for k, v in metrics.items() if k not in numbers and k not in tables}
        row = Row(step, time.time(), numbers, tables, list(others))
        self._journal.append(row)
        self._note(row)
        with _stopped_with_the_job():
            self._send(self._count - 1, _as_logged(row) | others, numbers.keys() != metrics.keys())

    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._waiting and signals.received is None:
            self._send_waiting()

    def _send(self, number: int, values: dict[str, Any], media: bool) -> None:
        """Logs a row; if the server does not answer, rows wait for the next ones with media."""
        self._waiting.append((number, values))
        if media or len(self._waiting) == 1:
            self._send_waiting()

    def _send_waiting(self) -> None:
        try:
            while self._waiting:
                number, values = self._waiting[0]
                self._run.log(values, step=max(number, self._run.step), commit=True)
                del self._waiting[0]
        except CommError as error:
            reason = str(error).splitlines()[0]
            logger.warning("W&B does not answer, %d rows wait: %s", len(self._waiting), reason)

    def _begin(self) -> Any:
        """Starts the W&B run; offline if the server does not answer.

        Raises:
            ValueError: W&B refuses the API key, or there is none.
        """
        try:
            with _no_stop_signals():
                return wandb.init(**self._options)
        except (UsageError, AuthenticationError) as error:
            raise ValueError(
                f"W&B refuses this run ({str(error).splitlines()[0]}): set WANDB_API_KEY, or keep "
                "the run here with WANDB_MODE=offline"
            ) from error
        except CommError as error:
            reason = str(error).splitlines()[0]
            logger.warning("W&B is not there, so this run is kept here, offline: %s", reason)
            wandb.teardown()  # the failed start still holds the id
            with _no_stop_signals():
                return wandb.init(**{**self._options, "mode": "offline"})

    def _go_on(self, run: Any) -> None:
        """Logs the rows of the journal that W&B lacks."""
        for row in self._journal.read():
            self._note(row)
            if self._count > run.starting_step:
                self._send(self._count - 1, _as_logged(row), media=bool(row.tables))
        self._ends = dict(self._stored)

    def _note(self, row: Row) -> None:
        self._count += 1
        if row.step is not None:
            self._stored |= {k: max(row.step, self._stored.get(k, -1)) for k in row.restored()}


@contextmanager
def _no_stop_signals() -> Iterator[None]:
    """Processes that start inside this context never receive SIGUSR1 and SIGUSR2.

    A scheduler sends them to all processes of a job before it stops them. W&B's own process would
    end at once, although the run still logs.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def finish_wandb(exit_code: int, preempted: bool = False) -> None:
    """Ends the W&B run of this process, if there is one.

    Args:
        exit_code: exit code of the program.
        preempted: W&B shows the run as preempted, not as failed, until it is resumed.
    """
    with _stopped_with_the_job():
        if wandb.run is not None and preempted:
            wandb.run.mark_preempting()
        wandb.finish(exit_code=exit_code)


@contextmanager
def _stopped_with_the_job() -> Iterator[None]:
    """Ignores all errors of W&B inside the context, once a stop signal has come.

    A scheduler sends SIGTERM also to W&B's own process. The resumed run logs the lost rows.
    """
    try:
        yield
    except Exception as error:  # W&B has no common class for errors of its process
        if signals.received is None:
            raise
        logger.debug("the W&B process has already exited: %r", error)
        with suppress(Exception):
            wandb.teardown()  # otherwise it tries again at the exit, with a traceback


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


def _as_logged(row: Row) -> dict[str, Any]:
    tables = {
        name: wandb.Table(columns=table["columns"], data=table["data"])
        for name, table in row.tables.items()
    }
    step = {} if row.step is None else {TRAINER_STEP: row.step}
    return {**row.numbers, **tables, **step, "_timestamp": row.time}


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in metrics.items() if isinstance(v, (int, float, Tensor))}


def _tables(metrics: Mapping[str, Any]) -> dict[str, dict[str, list[Any]]]:
    """Returns the tables that the journal can hold: plain values in rows."""
    tables = {k: v for k, v in metrics.items() if isinstance(v, wandb.Table)}
    return {k: {"columns": list(v.columns), "data": list(v.data)} for k, v in tables.items()}
