"""Locks a run directory so that one process at a time trains in it.

`take` takes the lock. `holder` returns the process that has it.

The kernel holds the lock, on the file `run.lock`, and releases it when the process ends in any way.
It is a POSIX record lock (`lockf`), which also works between machines on a network file system.
`flock` is another kind of lock, and the two kinds ignore each other. Forked DataLoader workers
inherit an `flock`, so it would outlive a killed run by seconds. Nothing else in the project may
lock this file.

A process loses a POSIX lock when it closes any of its file descriptors of the file. So a process
that has taken a lock must not call `holder` on the same directory.
"""

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from experiments.run.files import check_files, open_file

_NAME = "run.lock"
_PATIENCE_S = 2.0  # `holder` in another process also takes the lock for a moment


def take(folder: Path) -> None:
    """Takes the lock of a run directory until this process ends, and records the process in it.

    If the file system has no locks, no lock is taken and the file is removed.

    Raises:
        ValueError: another process holds the lock, or the directory has an entry that a run must
            not open.
    """
    check_files(folder)
    file = open_file(folder / _NAME, os.O_RDWR | os.O_CREAT)  # closed when the process ends
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            held = error.errno in (errno.EACCES, errno.EAGAIN)
            if held and time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            os.close(file)
            if held:
                raise ValueError(_refusal(folder)) from None
            (folder / _NAME).unlink(missing_ok=True)  # an unlocked file means that nobody trains
            return
    about = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(about).encode(), 0)


def holder(folder: Path) -> dict[str, Any] | None:
    """Returns what `take` recorded about the process that holds the lock, or None if it is free.

    The process may run on another machine. It must not be this process: see the module docstring.

    Raises:
        ValueError: the lock file is a link or not a regular file.
    """
    try:
        with os.fdopen(open_file(folder / _NAME, os.O_RDONLY)) as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                return _read(file.read()) if error.errno in (errno.EACCES, errno.EAGAIN) else None
    except FileNotFoundError:
        pass
    return None


def describe(about: dict[str, Any]) -> str:
    """Returns a readable name of the process that `holder` returned."""
    job = f", SLURM job {about['slurm_job_id']}" if about.get("slurm_job_id") else ""
    return f"process {about.get('pid', '?')} on {about.get('host', '?')}{job}"


def _refusal(folder: Path) -> str:
    who = describe(_read((folder / _NAME).read_text()))
    return (
        f"{folder} is in use by {who}: wait until it ends, or choose another directory with "
        "hydra.run.dir=…"
    )


def _read(text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {}
