"""What is done when the cluster, its clock or a person wants the process to stop."""

import os
import re
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

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

#: Why a run stops. Where ranks have different reasons the later one counts for all: a person's
#: Ctrl-C is not followed by a requeue.
_REASONS = ("walltime", "SIGUSR1", "SIGUSR2", "SIGTERM", "SIGINT")

#: torchrun hands a Ctrl-C, which the terminal has given to all, on to all once more.
_ECHO_S = 1.0

_STARTED = time.time()


class Preempted(BaseException):
    """The run was told to stop, and did. Not an Exception: nobody may take it for a fault.

    `reason` is `SIGTERM`, `SIGUSR1`, `SIGUSR2` or `walltime`; within a training also `SIGINT`,
    which `StopSignals.listen` makes a KeyboardInterrupt.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class StopSignals:
    """The signals that ask a process to stop; handlers belong to it, so one object does.

    `received` is the first that came. Later ones change nothing, but a second Ctrl-C kills.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._deferred = False
        self._pid = os.getpid()
        self._interrupted_at: float | None = None

    @contextmanager
    def listen(self) -> Iterator[None]:
        """For the length of a program: a signal raises `Preempted` or KeyboardInterrupt at once.

        Lightning makes a KeyboardInterrupt an exit with code 1 and kills the other ranks; here it
        is one again.
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
        """For the length of a training: a signal sets `received` and nothing else.

        Raising between two bytecodes of an optimizer step would leave weights that are ahead of
        the counters.
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
            yield  # Python gives signals to the main thread alone
            return
        former = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        if self._handle not in former.values():  # not within another
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
        """Whether a Ctrl-C is another one than the first."""
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
            return False
        echo = "TORCHELASTIC_RUN_ID" in os.environ and now - self._interrupted_at < _ECHO_S
        return not echo


def _as_before(number: int) -> None:
    """In a forked child: dies of a SIGTERM, as its parent would have it, and of nothing else."""
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


signals = StopSignals()


def agree(trainer: Trainer, reason: str | None) -> str | None:
    """Why all ranks stop, where any of them has a reason: one all-reduce of one number."""
    code = torch.tensor(0 if reason is None else _REASONS.index(reason) + 1)
    code = code.to(trainer.strategy.root_device)
    highest: Any = trainer.strategy.reduce(code, reduce_op=ReduceOp.MAX)  # pyright: ignore[reportArgumentType]
    return _REASONS[int(highest) - 1] if int(highest) else None


def stops_at(walltime: str | float | int | None, margin_s: float | int) -> float | None:
    """When to stop before the scheduler does it, in seconds since 1970, where its plan is known.

    `margin_s` before the end, but not in the first half of the time that is left now: a short job
    should come to something.

    Args:
        walltime: seconds or `[days-]hours:minutes:seconds` since the process started; without it
            SLURM's own word is taken.

    Raises:
        ValueError: it is neither.
    """
    end, now = _end(walltime), time.time()
    if end is None or end < now:  # what a shell of an earlier job left
        return None
    return max(end - margin_s, (now + end) / 2)


def _end(walltime: str | float | int | None) -> float | None:
    if walltime is None:
        end = os.environ.get("SLURM_JOB_END_TIME")
        return float(end) if end else None
    if isinstance(walltime, str):
        parts = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", walltime)
        if parts is None:
            raise ValueError(f"walltime={walltime} is not a duration: write it as 24:00:00")
        days, hours, minutes, seconds = (int(part or 0) for part in parts.groups())
        walltime = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if walltime <= 0:
        raise ValueError(f"walltime={walltime} is no time: write it as 24:00:00")
    return _STARTED + walltime


def leave_signals_to_us(trainer: Trainer) -> None:
    """Keeps Lightning from putting its own handlers before these.

    Its SIGTERM handler waits in a broadcast for ranks that got no signal, and its handler of
    SLURM's requeue signal saves between two bytecodes of a step.
    """
    connector: Any = trainer._signal_connector
    connector.register_signal_handlers = lambda: None
