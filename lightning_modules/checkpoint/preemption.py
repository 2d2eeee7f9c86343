"""Handles requests to stop: signals, the time limit and Ctrl-C."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from lightning import Trainer
from torch.distributed import ReduceOp

from datamodules.common import slurm
from lightning_modules.private.lightning import install_no_signal_handlers

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

#: Reasons to stop a run. If ranks have different reasons, the later one in this list counts for
#: all. So Ctrl-C has priority, and no requeue follows it.
_REASONS = ("walltime", "SIGUSR1", "SIGUSR2", "SIGTERM", "SIGINT")

#: The terminal sends Ctrl-C to all processes, and torchrun sends it to all once more within this
#: time (seconds).
_ECHO_S = 1.0

_STARTED = time.time()


def _start_again() -> None:
    global _STARTED
    _STARTED = time.time()


os.register_at_fork(after_in_child=_start_again)  # a job of a multirun may be a fork


class Preempted(BaseException):
    """Raised when a run stops on request.

    It is not a subclass of Exception, so that no handler treats it as an error. `reason` is
    `SIGTERM`, `SIGUSR1`, `SIGUSR2` or `walltime`. Within a training it may be `SIGINT`, which
    `StopSignals.listen` turns into KeyboardInterrupt.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class StopSignals:
    """Handles the signals that ask a process to stop.

    Signal handlers belong to the process, so there is one object. `received` is the first signal.
    Later signals have no effect, except that a second Ctrl-C kills the process.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._deferred = False
        self._pid = os.getpid()
        self._interrupted_at: float | None = None

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Makes signals raise `Preempted` or KeyboardInterrupt at once; use it around a program.

        Lightning turns KeyboardInterrupt into an exit with code 1 and kills the other ranks. This
        context turns it back into KeyboardInterrupt.
        """
        with self._handling():
            try:
                yield
            except Preempted as stop:
                if stop.reason == "SIGINT":
                    raise KeyboardInterrupt from None
                raise
            except SystemExit as stop:
                if isinstance(stop.__context__, KeyboardInterrupt):
                    raise KeyboardInterrupt from None
                raise

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Makes signals only set `received`; use it around a training.

        An exception in the middle of an optimizer step would leave weights that are ahead of the
        counters.
        """
        with self._handling():
            outer, self._deferred = self._deferred, True
            try:
                yield
            finally:
                self._deferred = outer

    @contextmanager
    def _handling(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread gets signals in Python
            return
        former = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        if self._handle not in former.values():  # not nested
            self.received, self._interrupted_at, self._pid = None, None, os.getpid()
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            _as_before(number)
            return
        if number == signal.SIGINT and self._is_second():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if self.received is None:
            self.received = signal.Signals(number).name
            if not self._deferred:
                raise KeyboardInterrupt if number == signal.SIGINT else Preempted(self.received)

    def _is_second(self) -> bool:
        """Returns whether this is a second Ctrl-C, and not torchrun's copy of the first."""
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
            return False
        echo = "TORCHELASTIC_RUN_ID" in os.environ and now - self._interrupted_at < _ECHO_S
        return not echo


def _as_before(number: int) -> None:
    """Handles a signal in a forked child: SIGTERM kills it, as its parent expects; others don't."""
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


signals = StopSignals()


def agree(trainer: Trainer, reason: str | None) -> str | None:
    """Returns the reason for all ranks to stop, or None; takes one all-reduce of one number."""
    code = torch.tensor(0 if reason is None else _REASONS.index(reason) + 1)
    code = code.to(trainer.strategy.root_device)
    highest: Any = trainer.strategy.reduce(code, reduce_op=ReduceOp.MAX)  # pyright: ignore[reportArgumentType]
    return _REASONS[int(highest) - 1] if int(highest) else None


def way_to_end(reason: str) -> str:
    """Returns how a run ended that was stopped for `reason`.

    - `stopped`: Ctrl-C.
    - `cancelled`: somebody ended it for good: `scancel`, or SIGTERM outside of a batch job.
    - `preempted`: the scheduler needs the machine or the time is over; a batch job is requeued.
    """
    if reason == "SIGINT":
        return "stopped"
    if reason != "SIGTERM":
        return "preempted"
    job = slurm.this_job()
    cancelled = job is None or slurm.is_cancelled(slurm.show_job(job))
    return "cancelled" if cancelled else "preempted"


def stops_at(walltime: str | float | int | None, margin_s: float | int) -> float | None:
    """Returns the time to stop before the time limit, in seconds since 1970; None: no limit known.

    It is `margin_s` before the limit, but not in the first half of the remaining time, so that a
    short job still makes progress.

    Args:
        walltime: seconds or `[days-]hours:minutes:seconds` since the process started; None: SLURM's
            limit.
        margin_s: seconds between the stop and the limit.

    Raises:
        ValueError: `walltime` has neither format, or is not positive.
    """
    end, now = _end(walltime), time.time()
    if end is None or end < now:  # inherited from the shell of an earlier job
        return None
    return max(end - margin_s, (now + end) / 2)


def _end(walltime: str | float | int | None) -> float | None:
    if walltime is None:
        end = os.environ.get("SLURM_JOB_END_TIME")
        return float(end) if end else None
    if isinstance(walltime, str):
        given, walltime = walltime, slurm.seconds(walltime)
        if walltime == math.inf:
            raise ValueError(f"walltime={given} is not a duration: write it as 24:00:00")
    if walltime <= 0:
        raise ValueError(f"walltime={walltime} must be more than 0: write it as 24:00:00")
    return _STARTED + walltime


def leave_signals_to_us(trainer: Trainer) -> None:
    """Prevents Lightning from installing its own signal handlers.

    Its SIGTERM handler waits in a broadcast for ranks that got no signal. Its handler of SLURM's
    requeue signal saves in the middle of a step.
    """
    install_no_signal_handlers(trainer)
