"""The template process of a multirun: imports what every job imports, and forks once for each job.

    python -m experiments.launcher.warm.template SOCKET PROGRAM

The imports of a training take longer than the rest of its start. A forked job has them already.

PROGRAM is the module that every job runs. It may name more modules to import in `JOB_IMPORTS`.
SOCKET is the file descriptor of a socket to the launcher. Each message is one JSON object:

- to the launcher, once: `{"ready": true}`.
- to the template: `{"job", "command", "environment"}`, with the file descriptors of the job's
  standard output and standard error. `environment` is added to that of the template.
- to the launcher: `{"job", "pid"}` when the job starts, `{"job", "code"}` when it has ended, with a
  negative code after a signal, or `{"job", "error"}` if it could not be forked.

When the launcher has ended, the template starts no more jobs, and ends after the last one.

A fork copies one thread only, and CUDA does not survive it. So nothing here computes, and the
template ends with an error if an import has started a thread. A forked job must run on the CPU.
"""

import gc
import importlib
import json
import os
import runpy
import select
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from experiments.launcher.warm import MESSAGE_BYTES

_LOOK_S = 0.05  # seconds between checks for jobs that have ended


def main() -> None:
    control, program = socket.socket(fileno=int(sys.argv[1])), sys.argv[2]
    import_all(program)
    folders = give_up_temporary_folders()
    gc.freeze()  # jobs then share this memory: their garbage collections do not touch it
    request = serve(control)
    if request is None:
        os._exit(0)  # has nothing to save
    # From here on this is the job. What the program raises ends the process, as it would without a
    # template: Python prints the traceback and chooses the exit code.
    become(request)
    for folder in folders:
        folder.__init__()
    runpy.run_module(program, run_name="__main__", alter_sys=True)


def import_all(program: str) -> None:
    """Imports the program and its `JOB_IMPORTS`.

    Raises:
        RuntimeError: an import has started a thread, which a forked job would not have.
    """
    gc.disable()  # nothing that is imported becomes garbage
    for name in getattr(importlib.import_module(program), "JOB_IMPORTS", ()):
        importlib.import_module(name)
    del sys.modules[program]  # as in a process of its own, where the program is only `__main__`
    gc.enable()
    if threading.active_count() > 1:
        raise RuntimeError(f"an import has started a thread: {threading.enumerate()}")


def give_up_temporary_folders() -> list[tempfile.TemporaryDirectory]:
    """Removes the temporary folders that imports have made, and returns their objects.

    W&B makes one. Each job makes its own again: the first job that ends would remove a shared one.
    """
    folders = [each for each in gc.get_objects() if type(each) is tempfile.TemporaryDirectory]
    for folder in folders:
        folder.cleanup()
    return folders


def serve(control: socket.socket) -> dict[str, Any] | None:
    """Forks a job for each request. Returns the request in the job, and None in the template."""
    jobs: dict[int, int] = {}  # number of the job by process
    _tell(control, ready=True)
    listening = True
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while listening or jobs:
        if not listening:
            time.sleep(_LOOK_S)
        for _, event in poll.poll(_LOOK_S * 1000 if jobs else None) if listening else ():
            if event & (select.POLLHUP | select.POLLERR):  # requests of a dead launcher are dropped
                listening = False
            elif (request := _fork(control, jobs)) is not None:
                return request
        for pid, code in _ended(jobs):
            _tell(control, job=jobs.pop(pid), code=code)
    return None


def _fork(control: socket.socket, jobs: dict[int, int]) -> dict[str, Any] | None:
    """Forks for the next request. Returns it in the job, and None in the template."""
    message, outputs, _, _ = socket.recv_fds(control, MESSAGE_BYTES, 2)
    request = json.loads(message)
    try:
        pid = os.fork()
    except OSError as error:
        _tell(control, job=request["job"], error=str(error))
        pid = None
    if pid == 0:
        os.setsid()
        _redirect(*outputs)
        # The job says that it lives, not the template, which may be killed right after the fork.
        control.send(json.dumps({"job": request["job"], "pid": os.getpid()}).encode())
        control.close()
        return request
    for file in outputs:
        os.close(file)
    if pid is not None:
        jobs[pid] = request["job"]
    return None


def _redirect(output: int, error: int) -> None:
    """Makes the files the standard output and error, and repeats there what the imports printed."""
    sys.stdout.flush()
    said = os.pread(1, MESSAGE_BYTES, 0)
    for file, standard in ((output, 1), (error, 2)):
        os.dup2(file, standard)
        os.close(file)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # pyright: ignore[reportAttributeAccessIssue]
    os.write(2, said)


def _ended(jobs: dict[int, int]) -> Iterator[tuple[int, int]]:
    for pid in list(jobs):
        if (found := os.waitpid(pid, os.WNOHANG))[0]:
            yield pid, os.waitstatus_to_exitcode(found[1])


def _tell(control: socket.socket, **message: Any) -> None:
    with suppress(OSError):  # the launcher has been killed
        control.send(json.dumps(message).encode())


def become(request: dict[str, Any]) -> None:
    """Gives this process the arguments and the environment of the job."""
    os.environ.update(request["environment"])
    sys.orig_argv[:] = request["command"]
    sys.argv[1:] = request["command"][3:]  # behind `python -m program`; run_module sets argv[0]
    if numpy := sys.modules.get("numpy"):  # Python's own generator does this itself
        numpy.random.seed()


if __name__ == "__main__":
    main()
