"""Jobs of a multirun on this machine."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from experiments.launcher.base import ProcessLauncher
from experiments.launcher.job import Job

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_STOPPED = {130, os.EX_TEMPFAIL}  # exit codes of a run that was stopped, and saved before


class LocalLauncher(ProcessLauncher):
    """`n_jobs` at a time; null takes half of the cores.

    With one at a time its output is passed through, else it goes to `stdout.log` in the directory
    of the job. `gpus`, such as [0, 1, 2, 3], are shared out among the jobs that run together.

    A signal goes on to the jobs once, which save and stop; a second one kills them.
    """

    def __init__(self, n_jobs: int | None = 1, gpus: list[int | str] | None = None):
        self.cores = len(os.sched_getaffinity(0))
        self.n_jobs = max(1, self.cores // 2) if n_jobs is None else n_jobs
        self.gpus = list(gpus or [])
        self._running: dict[int, tuple[Job, subprocess.Popen]] = {}  # by slot
        self._received: list[int] = []  # signals that are not passed on yet
        self._exit_code: int | None = None  # of the sweep, once it is being stopped

    def run(self, jobs: list[Job]) -> dict[Job, str]:
        if self.n_jobs < 1 or len(self.gpus) % self.n_jobs:
            raise ValueError(
                f"{len(self.gpus)} GPUs cannot be shared evenly by {self.n_jobs} jobs at a time: "
                "change hydra.launcher.n_jobs or hydra.launcher.gpus"
            )
        for job in jobs:
            job.freeze()
        failed: dict[Job, str] = {}
        waiting = list(jobs)
        with self._pass_signals_on():
            while self._running or (waiting and self._exit_code is None):
                self._pass_on()
                self._fill(waiting)
                for job, code in self._ended():
                    if why := self._judge(job, code):
                        failed[job] = why
                time.sleep(0.05)
        if self._exit_code is not None:
            left = len(waiting)
            logger.warning("stopped, %d jobs not started: the same command goes on", left)
            sys.exit(self._exit_code)
        return failed

    def _fill(self, waiting: list[Job]) -> None:
        free = [slot for slot in range(self.n_jobs) if slot not in self._running]
        for job in list(waiting):
            if not free or self._exit_code is not None:
                return
            if job.locked():  # another launcher's, or one that outlived its launcher
                continue
            waiting.remove(job)
            if job.done() is not None:
                logger.info("%s: finished elsewhere", job.name)
                continue
            self._start(job, free.pop(0))

    def _start(self, job: Job, slot: int) -> None:
        logger.info("%s: starts in %s", job.name, job.folder)
        with ExitStack() as files:
            output = None
            if self.n_jobs > 1:
                output = files.enter_context((job.folder / "stdout.log").open("a"))
            process = subprocess.Popen(
                job.command(self.program),
                env=os.environ | self._environment(slot),
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                process_group=0,  # out of reach of the terminal's Ctrl-C, which is passed on here
            )
        self._running[slot] = job, process

    def _environment(self, slot: int) -> dict[str, str]:
        share = {}
        if self.n_jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
            share["OMP_NUM_THREADS"] = str(max(1, self.cores // self.n_jobs))
        if self.gpus:
            count = len(self.gpus) // self.n_jobs
            own = self.gpus[slot * count : (slot + 1) * count]
            share["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, own))
        return share

    def _ended(self) -> Iterator[tuple[Job, int]]:
        for slot, (job, process) in list(self._running.items()):
            if process.poll() is not None:
                del self._running[slot]
                yield job, process.returncode

    def _judge(self, job: Job, code: int) -> str | None:
        """Why the job failed, if it did."""
        if code == 0:
            logger.info("%s: finished", job.name)
            return None
        if code in _STOPPED:
            logger.info("%s: stopped", job.name)
            self._exit_code = self._exit_code or code
            return None
        why = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
        logger.error("%s: failed, %s", job.name, why)
        return why

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
        """What was received since to the jobs; a second Ctrl-C kills them with all their ranks."""
        while self._received:
            number = self._received.pop(0)
            again = number == signal.SIGINT and self._exit_code == 130
            self._exit_code = 130 if number == signal.SIGINT else os.EX_TEMPFAIL
            for _, process in self._running.values():
                if again:
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    process.send_signal(number)
