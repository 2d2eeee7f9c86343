"""Jobs that outlive their launcher: the next launcher waits for them and reads their results."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from experiments.run import lock
from tests.helpers.light_runs import (  # noqa: F401 - the fixtures
    ROOT,
    end,
    launched_fixture,
    read_until,
    run_fixture,
    start_fixture,
    stopped,
    until,
)


def test_a_launcher_that_is_killed_leaves_its_job_to_the_next(start, run):
    """It keeps running, and counts as the one job that may run at a time."""
    command = ["seed=0,1", "steps=10"]
    sweep = start(*command)
    until(lambda: run(0).steps)
    with stopped(run(0).starts[0]["pid"]) as pid:
        sweep.kill()
        sweep.wait()
        again = start(*command)
        read_until(again, f"#0 seed=0: already running, process {pid} on ")
        time.sleep(1)
        assert not run(1).starts
    assert "#0 seed=0: finished elsewhere" in end(again)
    assert [len(run(n).starts) for n in (0, 1)] == [1, 1]
    assert all(run(n).steps == list(range(10)) for n in (0, 1))


def test_a_job_that_lives_keeps_its_gpus(start, run):
    """The next launcher gives the other GPUs to its other jobs."""
    command = ["launcher=local_parallel", "hydra.launcher.n_jobs=2", "hydra.launcher.gpus=[0,1]"]
    sweep = start(*command, "seed=0", "steps=1000")
    until(lambda: run(0).steps)
    with stopped(run(0).starts[0]["pid"]) as pid:
        sweep.kill()
        sweep.wait()
        again = start(*command, "seed=0,1,2", "steps=1")
        until(lambda: run(1).done and run(2).done)
        assert [run(n).starts[0]["gpus"] for n in (0, 1, 2)] == ["0", "1", "1"]
        os.kill(pid, signal.SIGKILL)
    end(again)
    assert run(0).done


def test_whoever_loses_the_race_for_a_directory_waits(launched, run, tmp_path, monkeypatch):
    """Another process takes the lock after the launcher has looked."""
    run(3).path.mkdir(parents=True)
    holder = os.fork()
    if holder == 0:
        lock.take(run(3).path)
        time.sleep(60)
        os._exit(0)
    until(lambda: lock.holder(run(3).path))
    ask, looks = lock.holder, []

    def look(folder: Path) -> dict | None:
        """No process holds the lock when the job is frozen, nor just before its start."""
        looks.append(folder)
        return ask(folder) if len(looks) > 2 else None

    monkeypatch.setattr(lock, "holder", look)

    def let_go() -> None:
        until(lambda: run(3).starts)
        time.sleep(3)  # longer than the job waits for the lock
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)

    letting_go = threading.Thread(target=let_go)
    letting_go.start()
    (returned,) = launched(3)
    letting_go.join()
    assert returned.return_value == 3.0
    assert len(run(3).starts) == 2


def test_a_training_outlives_its_launcher_and_the_next_takes_its_result(tiny, tmp_path):
    command = [sys.executable, "-m", "experiments.start", "-m", *tiny, "logger=csv", "test=false"]
    command += ["run_name=only", "paths.runs=runs"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    folder = tmp_path / "runs" / "vniah_d_tiny" / "only"
    first = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    try:
        until(lambda: lock.holder(folder), limit_s=200)  # it imports PyTorch first
        with stopped((lock.holder(folder) or {})["pid"]) as pid:
            first.kill()
            first.wait()
            again = subprocess.Popen(command, cwd=tmp_path, env=environment, **output)
            read_until(again, f"already running, process {pid} on ")
        assert "finished elsewhere" in end(again, limit_s=200)
    finally:
        first.kill()
        first.wait()
    assert json.loads((folder / "status.json").read_text())["starts"] == 1
    assert json.loads((folder / "done.json").read_text())["steps"] == 12
