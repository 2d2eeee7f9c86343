"""Runs the jobs of a multirun on this machine."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from experiments.launcher.base import ProcessLauncher
from experiments.launcher.board import Board
from experiments.launcher.job import Job
from experiments.launcher.warm.forks import (
    LOST,
    ForkedJob,
    Template,
    can_fork,
    kill_session,
    start_process,
)
from experiments.run import lock

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_STOPPED = {130, os.EX_TEMPFAIL}  # exit codes of a run that was stopped after saving
_LOOK_S = 0.5  # seconds between checks of run directories that other processes hold
_TAIL = 65536  # bytes at the end of stdout.log that are searched for an error


class LocalLauncher(ProcessLauncher):
    """Runs `n_jobs` jobs at a time. If `n_jobs` is null, it is half the number of cores.

    A single job prints to the terminal. Parallel jobs write to `stdout.log` in their directories,
    and a table shows their progress. No job can read from the terminal. The jobs that run together
    share `gpus`, such as [0, 1, 2, 3].

    A job that another process already runs is waited for. It may belong to another launcher, or to
    one that was killed. If it runs on this machine, it counts as one of the `n_jobs`.

    A signal is passed on to the jobs, which save and stop. A second Ctrl-C kills them.

    Jobs that train on the CPU in one process are forked from a template process, which imports
    PyTorch once for all of them: `warm/template.py`. All others are started by their command line:
    jobs on GPUs, because CUDA does not survive a fork; jobs of several ranks, whose ranks are
    started by their command line anyway; and a job that is the only one. If the template ends
    early, its jobs live on, and the rest are started by their command lines.
    """

    def __init__(self, n_jobs: int | None = 1, gpus: list[int | str] | None = None):
        self.cores = len(os.sched_getaffinity(0))
        self.n_jobs = max(1, self.cores // 2) if n_jobs is None else n_jobs
        self.gpus = [str(gpu) for gpu in gpus or []]
        self._running: dict[int, tuple[Job, subprocess.Popen | ForkedJob]] = {}  # by slot
        self._forks = False  # whether there are jobs to fork
        self._template: Template | None = None
        self._elsewhere: dict[Job, dict[str, Any]] = {}  # what the lock holder recorded
        self._frozen: set[Job] = set()
        self._next_look = 0.0
        self._received: list[int] = []  # signals that are not yet passed on
        self._exit_code: int | None = None  # exit code of the sweep, once it is being stopped

    def run(self, jobs: list[Job]) -> dict[Job, str]:
        if self.n_jobs < 1 or len(self.gpus) % self.n_jobs:
            raise ValueError(
                f"{len(self.gpus)} GPUs cannot be shared evenly by {self.n_jobs} jobs at a time: "
                "change hydra.launcher.n_jobs or hydra.launcher.gpus"
            )
        for job in jobs:
            if lock.holder(job.folder) is None:  # a live run keeps its own frozen config
                self._freeze(job)
        failed: dict[Job, str] = {}
        waiting = list(jobs)
        self._board = Board(jobs, shown=self.n_jobs > 1)
        self._forks = sum(map(can_fork, jobs)) > 1
        with self._pass_signals_on(), self._closing_template(), self._board:
            while self._running or (waiting and self._exit_code is None):
                self._pass_on()
                self._fill(waiting)
                for job, code in self._ended():
                    if code not in (0, *_STOPPED) and lock.holder(job.folder) is not None:
                        waiting.append(job)  # another process took the lock first: wait for it
                    elif why := self._judge(job, code):
                        failed[job] = why
                self._board.refresh()
                time.sleep(0.05)
        if self._exit_code is not None:
            left = len(waiting)
            logger.warning("stopped, %d jobs not started: the same command goes on", left)
            sys.exit(self._exit_code)
        return failed

    def manner(self) -> str:
        return f"{self.n_jobs} at a time on this machine"

    def _freeze(self, job: Job) -> None:
        if job not in self._frozen:
            job.freeze()
            self._frozen.add(job)

    def _fill(self, waiting: list[Job]) -> None:
        """Starts waiting jobs in free slots, and removes jobs that others have finished."""
        if self._exit_code is not None or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK_S
        self._look_elsewhere(waiting)
        for job in [job for job in waiting if job not in self._elsewhere]:
            if job.done() is not None:
                waiting.remove(job)
                logger.info("%s: finished elsewhere", job.name)
                self._board.set(job, "finished")
            elif free := self._free_slots():
                waiting.remove(job)
                self._start(job, free[0])

    def _look_elsewhere(self, waiting: list[Job]) -> None:
        """Updates which jobs another process runs, such as one that outlived its launcher."""
        before, self._elsewhere = self._elsewhere, {}
        for job in waiting:
            if (about := lock.holder(job.folder)) is None:
                continue
            self._elsewhere[job] = about
            if job not in before:
                who = lock.describe(about)
                logger.info("%s: already running, %s: waiting until it ends", job.name, who)
                self._board.set(job, "running", "elsewhere")

    def _free_slots(self) -> list[int]:
        """Returns the slots that no job on this machine uses, of this or another launcher."""
        free = [slot for slot in range(self.n_jobs) if slot not in self._running]
        for about in self._elsewhere.values():
            if about.get("host") != socket.gethostname():
                continue
            held = set(filter(None, (about.get("gpus") or "").split(",")))
            if self.gpus and held:
                free = [slot for slot in free if not held.intersection(self._gpus_of(slot))]
            else:
                del free[:1]
        return free

    def _start(self, job: Job, slot: int) -> None:
        self._freeze(job)
        logger.info("%s: starts in %s", job.name, job.folder)
        with ExitStack() as files:
            output = None
            if self.n_jobs > 1:
                output = files.enter_context(_log(job).open("a"))
            process = self._starter(job, slot)(
                job.command(self.program), self._environment(slot), output
            )
        self._running[slot] = job, process
        self._board.set(job, "running")

    def _starter(self, job: Job, slot: int) -> Callable[..., subprocess.Popen | ForkedJob]:
        """Returns the function that starts a job. The first job that may be forked starts the
        template."""
        if not (self._forks and can_fork(job)):
            return start_process
        if self._template is None:
            self._template = Template(self.program, self._environment(slot))
        return start_process if self._template.ended else self._template.start

    def _environment(self, slot: int) -> dict[str, str]:
        share = {}
        if self.n_jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
            share["OMP_NUM_THREADS"] = str(max(1, self.cores // self.n_jobs))
        if self.gpus:
            share["CUDA_VISIBLE_DEVICES"] = ",".join(self._gpus_of(slot))
        return share

    def _gpus_of(self, slot: int) -> list[str]:
        count = len(self.gpus) // self.n_jobs
        return self.gpus[slot * count : (slot + 1) * count]

    def _ended(self) -> Iterator[tuple[Job, int]]:
        for slot, (job, process) in list(self._running.items()):
            if (code := process.poll()) is not None:
                del self._running[slot]
                self._next_look = 0.0
                if isinstance(process, ForkedJob) and code == LOST:
                    code = self._code_of_lost(job, process.asked_at)
                yield job, code

    def _code_of_lost(self, job: Job, asked_at: float) -> int:
        """Returns the exit code of a job that outlived its template, as its directory tells it."""
        done = job.folder / "done.json"
        written = done.is_file() and done.stat().st_mtime >= asked_at
        if written or job.done() is not None:
            return 0
        return LOST if self._exit_code is None else self._exit_code

    def _judge(self, job: Job, code: int) -> str | None:
        """Records how the job ended. Returns why it failed, or None if it did not fail."""
        if code == 0:
            logger.info("%s: finished", job.name)
            self._board.set(job, "finished")
            return None
        if code in _STOPPED or (code == -signal.SIGINT and self._exit_code is not None):
            logger.info("%s: stopped", job.name)
            self._board.set(job, "stopped")
            self._exit_code = self._exit_code or code
            return None
        why = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
        if code == LOST:
            why = "exit code unknown, because the template of the jobs was killed"
        if code > 0 and self.n_jobs > 1 and (line := last_error(_log(job))):
            why += f" ({line})"
        logger.error("%s: failed, %s", job.name, why)
        self._board.set(job, "failed", why)
        return why

    @contextmanager
    def _closing_template(self) -> Iterator[None]:
        try:
            yield
        finally:
            if self._template is not None:
                self._template.close()
                self._template = None

    @contextmanager
    def _pass_signals_on(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)

    def _pass_on(self) -> None:
        """Passes new signals on to the jobs. A second Ctrl-C kills them with all their ranks."""
        while self._received:
            number = self._received.pop(0)
            again = number == signal.SIGINT and self._exit_code == 130
            self._exit_code = 130 if number == signal.SIGINT else os.EX_TEMPFAIL
            for job, process in self._running.values():
                self._board.set(job, "stopping")
                if again:
                    kill_session(process)
                else:
                    process.send_signal(number)


def _log(job: Job) -> Path:
    """Returns the path of the file that takes a job's output."""
    return job.folder / "stdout.log"


def last_error(log: Path) -> str | None:
    """Returns the line of a log that says why its program ended, cut to 200 characters.

    It is the last line that starts with `error:`, else the last line, because a traceback ends with
    its exception.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        return None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines)[-1][:200] if lines else None
