"""One process at a time trains in a run directory.

The lock is the kernel's, on the file `run.lock`: it ends with its process, however that dies.
A POSIX record lock and not `flock`, as forked DataLoader workers would inherit the latter and
outlive a killed run by seconds; and it holds across the machines of a network file system.
"""

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

_NAME = "run.lock"
_PATIENCE_S = 2.0  # whoever looks for a holder holds the lock for a moment too


def take(folder: Path) -> None:
    """Holds the lock of a run directory until the process ends; the file says who.

    Where the file system has no locks, nothing is held.

    Raises:
        ValueError: another process holds it.
    """
    file = os.open(folder / _NAME, os.O_RDWR | os.O_CREAT, 0o644)  # closed with the process
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
            return
    about = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
    }
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(about).encode(), 0)


def holder(folder: Path) -> dict[str, Any] | None:
    """Who trains in a run directory now. Not to be asked by the process that does: closing the
    file would give its lock away."""
    try:
        with open(folder / _NAME) as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                return _read(file.read()) if error.errno in (errno.EACCES, errno.EAGAIN) else None
    except FileNotFoundError:
        pass
    return None


def _refusal(folder: Path) -> str:
    about = _read((folder / _NAME).read_text())
    job = f", SLURM job {about['slurm_job_id']}" if about.get("slurm_job_id") else ""
    who = f"process {about.get('pid', '?')} on {about.get('host', '?')}{job}"
    return (
        f"{folder} is in use by {who}: wait until it ends, or choose another directory with "
        "hydra.run.dir=…"
    )


def _read(text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {}
