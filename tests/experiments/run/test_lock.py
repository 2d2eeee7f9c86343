"""One process at a time in a run directory."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

from experiments.run import lock

HOLD = """
import os, sys, time
from pathlib import Path
from experiments.run import lock
lock.take(Path(sys.argv[1]))
if os.fork() == 0:  # as a DataLoader worker, which may outlive its parent by seconds
    time.sleep(20)
print("held", flush=True)
time.sleep(20)
"""


@pytest.fixture
def process(tmp_path):
    """Returns a process that holds the lock, and a child forked from it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_the_second_is_refused_and_told_who_is_first(process, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE_S", 0.0)
    with pytest.raises(ValueError, match=f"in use by process {process.pid} on .*hydra.run.dir"):
        lock.take(tmp_path)
    about = lock.holder(tmp_path)
    assert about is not None
    assert about["pid"] == process.pid


def test_kill_9_frees_it_although_a_forked_child_lives_on(process, tmp_path):
    process.kill()
    process.wait()
    assert lock.holder(tmp_path) is None
    lock.take(tmp_path)


def test_looking_does_not_keep_a_run_from_starting(tmp_path):
    look = "from pathlib import Path; from experiments.run import lock; import sys\n"
    look += "while True: lock.holder(Path(sys.argv[1]))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    looking = subprocess.Popen([sys.executable, "-c", look, str(tmp_path)], env=env)
    try:
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            lock.take(tmp_path)
            held = os.open(tmp_path / "run.lock", os.O_RDONLY)
            os.close(held)  # a process's lock ends when any of its file handles is closed
        assert looking.poll() is None
    finally:
        looking.kill()
        looking.wait()


def test_where_the_file_system_has_no_locks_nothing_says_that_nobody_trains(tmp_path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    lock.take(tmp_path)
    assert not (tmp_path / "run.lock").exists()
    assert lock.holder(tmp_path) is None


def test_nobody_holds_what_is_not_there(tmp_path):
    assert lock.holder(tmp_path) is None
