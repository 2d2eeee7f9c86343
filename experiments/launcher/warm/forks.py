"""The launcher's side of the template process: starts it, and asks it for jobs.

`ForkedJob` is used like `subprocess.Popen`.
"""

import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from experiments.launcher.job import Job
from experiments.launcher.warm import MESSAGE_BYTES

logger = logging.getLogger(__name__)

#: Stands for the exit code of a job that ended after its template: nobody knows the code.
LOST = 256


def can_fork(job: Job) -> bool:
    """Returns whether a job may be forked: whether it runs on the CPU, in one process.

    CUDA does not work in a process that was forked after its start. A job with several ranks starts
    its command line once for each of them anyway.
    """
    trainer = job.plain(job.config.get("trainer")) or {}
    processes = (trainer.get("devices", 1), trainer.get("num_nodes", 1))
    return trainer.get("accelerator") == "cpu" and processes == (1, 1)


def start_process(
    command: list[str], environment: Mapping[str, str], output: IO[str] | int | None
) -> subprocess.Popen:
    """Starts a job as a process of its own.

    Args:
        command: its command line.
        environment: variables that are added to those of this process.
        output: file or file descriptor for what it prints; None: it prints where this process does.
    """
    return subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        # A new session has no terminal, so no job can wait there for input forever. Ctrl-C
        # reaches only the launcher, which passes it on.
        start_new_session=True,
    )


class ForkedJob:
    """A job that a template forks. If the template ends before that, the job is started without it.

    Attributes:
        pid: its process; None while the template still imports.
        returncode: exit code, or a negative signal, or `LOST`; None while it runs.
        asked_at: time of the request, in seconds since 1970.
    """

    def __init__(
        self,
        template: "Template",
        command: list[str],
        environment: Mapping[str, str],
        output: IO[str] | None,
    ):
        self.pid: int | None = None
        self.returncode: int | None = None
        self.asked_at = time.time()
        self._template, self._command, self._environment = template, command, dict(environment)
        self._process: subprocess.Popen | None = None
        self._output = None if output is None else os.dup(output.fileno())  # until it has started

    def poll(self) -> int | None:
        """Returns the exit code if the job has ended, else None."""
        if self.returncode is None and self._process is None:
            self._template.receive()
            if self.returncode is None and self._template.ended:
                self._go_on_without_template()
        if self._process is not None:
            self.returncode = self._process.poll()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal to the job, if it has not ended. A job that has not started never will."""
        if self.poll() is None and self._template.withdraw(self):
            self.returncode = -number if number == signal.SIGINT else os.EX_TEMPFAIL
            self._release()
        while self.poll() is None and self.pid is None:
            self._template.receive(wait=True)  # it forks in milliseconds
        if self.returncode is None and self.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def request(self, number: int) -> tuple[bytes, list[int]]:
        """Returns the message that asks for this job, and the file descriptors of its output."""
        about = {"job": number, "command": self._command, "environment": self._environment}
        files = [1, 2] if self._output is None else [self._output] * 2
        return json.dumps(about).encode(), files

    def take(self, message: dict[str, Any]) -> None:
        """Takes what the template says about this job."""
        self.pid = message.get("pid", self.pid)
        self.returncode = message.get("code", self.returncode)
        if "error" in message:
            logger.warning("not forked: %s", message["error"])
            self._start()
        self._release()

    def _go_on_without_template(self) -> None:
        if self.pid is None:
            self._start()
        elif not _lives(self.pid):
            self.returncode = LOST

    def _start(self) -> None:
        self._process = start_process(self._command, self._environment, self._output)
        self.pid = self._process.pid
        self._release()

    def _release(self) -> None:
        if self._output is not None:
            os.close(self._output)
            self._output = None


class Template:
    """Starts a template process for the jobs of `program`, and exchanges messages with it.

    It starts with the environment of the jobs, because libraries read some variables, such as
    OMP_NUM_THREADS, only once.

    Attributes:
        ready: whether it has imported everything. Requests wait here until then.
        ended: whether it has ended. Its jobs may live on.
    """

    def __init__(self, program: str, environment: Mapping[str, str]):
        self.ready = self.ended = False
        self._waiting: list[ForkedJob] = []  # until it is ready
        self._asked: dict[int, ForkedJob] = {}  # jobs that have not ended, by number
        self._count = 0
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - what it prints while it imports
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        module = "experiments.launcher.warm.template"
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(other.fileno()), program],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[other.fileno()],
            )

    def start(
        self, command: list[str], environment: Mapping[str, str], output: IO[str] | None
    ) -> ForkedJob:
        """Starts a job: see `start_process`. `command` begins with `python -m PROGRAM`."""
        job = ForkedJob(self, command, environment, output)
        self._waiting.append(job)
        self._ask()
        return job

    def withdraw(self, job: ForkedJob) -> bool:
        """Withdraws the request for a job if it still waits here. Returns whether it did."""
        if job not in self._waiting:
            return False
        self._waiting.remove(job)
        return True

    def receive(self, wait: bool = False) -> None:
        """Reads all messages that have come. With `wait`, at least one, or the template's end."""
        while not self.ended and select.select([self._socket], [], [], None if wait else 0)[0]:
            wait = False
            try:
                message = self._socket.recv(MESSAGE_BYTES)
            except ConnectionResetError:  # it was killed before it read everything
                continue
            if not message:
                self._process.wait()
                self.ended = True
                self._waiting.clear()
                logger.warning("%s: further jobs start without it", self._last_words())
                return
            about = json.loads(message)
            if "job" in about:
                self._asked[about["job"]].take(about)
            if "code" in about or "error" in about:
                del self._asked[about["job"]]
            self.ready = True
            self._ask()

    def close(self) -> None:
        """Ends the template, or leaves it to its jobs if some still run."""
        self._socket.close()
        self._said.close()
        if not self._asked:
            self._process.kill()  # it may still import
            self._process.wait()

    def _ask(self) -> None:
        while self.ready and self._waiting and not self.ended:
            job, self._count = self._waiting.pop(0), self._count + 1
            self._asked[self._count] = job
            message, files = job.request(self._count)
            with suppress(OSError):  # it has died: `receive` notices
                socket.send_fds(self._socket, [message], files)

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        code = self._process.returncode
        return f"the template of the jobs has ended, exit code {code}" + (
            f" ({lines[-1][:200]})" if lines else ""
        )


def kill_session(process: subprocess.Popen | ForkedJob) -> None:
    """Kills a job with all its ranks and workers."""
    process.send_signal(signal.SIGKILL)
    if process.pid is not None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _lives(pid: int) -> bool:
    """Returns whether a job runs that is no child of this process.

    Every job leads its own session. Another process that got the same number later does not.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    state, _, _, session = stat.rpartition(")")[2].split()[:4]
    return state not in "ZX" and int(session) == pid
