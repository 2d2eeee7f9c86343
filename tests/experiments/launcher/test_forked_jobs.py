"""Multiruns whose jobs are forked: results, stops and kills are those of jobs of their own."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.conf import HydraConf
from omegaconf import OmegaConf

from experiments.launcher.job import Job
from experiments.launcher.warm.forks import can_fork
from tests.helpers.light_runs import (  # noqa: F401 - the fixtures
    ROOT,
    end,
    interrupt_twice,
    read_until,
    run_fixture,
    start_fixture,
    stopped,
    until,
)

CPU = "+trainer.accelerator=cpu"
PARALLEL = [CPU, "launcher=local_parallel", "hydra.launcher.n_jobs=2"]


def template_of(sweep: subprocess.Popen) -> int | None:
    """Returns the process that is the template of a running sweep."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = path.read_text().rpartition(")")[2].split()[1]
            command = (path.parent / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended meanwhile
        if int(parent) == sweep.pid and b"experiments.launcher.warm.template" in command:
            return int(path.parent.name)
    return None


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


# Which jobs are forked


@pytest.mark.parametrize(
    ("trainer", "forked"),
    [
        ({"accelerator": "cpu", "devices": 1}, True),
        ({"accelerator": "cpu", "devices": 1, "num_nodes": 1}, True),
        ({"accelerator": "cpu", "devices": 2}, False),
        ({"accelerator": "cpu", "devices": 1, "num_nodes": 2}, False),
        ({"accelerator": "cpu", "devices": "auto"}, False),
        ({"accelerator": "auto", "devices": 1}, False),
        ({"accelerator": "gpu", "devices": 1}, False),
        ({}, False),
        (None, False),
    ],
)
def test_only_one_process_on_the_cpu_is_forked(trainer, forked, tmp_path):
    node = OmegaConf.create({"hydra": OmegaConf.structured(HydraConf), "trainer": trainer})
    assert can_fork(Job("", tmp_path, node)) == forked


@pytest.mark.parametrize(
    "words", [["seed=0", CPU], ["seed=0,1", "+trainer.accelerator=gpu"], ["seed=0,1"]]
)
def test_without_two_jobs_to_fork_there_is_no_template(words, start, run):
    sweep = start(*words)
    end(sweep)
    for n in range(1 + words[0].count(",")):
        assert [begun["parent"] for begun in run(n).starts] == [sweep.pid]


# Results


def test_forked_jobs_end_as_others_do(start, run):
    sweep = start(*PARALLEL, "seed=0,1,2,3", "fails=[1]", "steps=20")
    until(lambda: run(2).steps)
    os.kill(run(2).starts[0]["pid"], signal.SIGKILL)
    output = end(sweep, 1)
    assert f"#1 seed=1: exit code 1 (error: asked to fail); {run(1).path}" in output
    assert f"#2 seed=2: killed by SIGKILL; {run(2).path}" in output
    assert "2 of 4 jobs failed" in output
    assert "counted" not in output
    assert "counted 20" in (run(0).path / "stdout.log").read_text()
    assert run(0).done
    assert run(3).done
    parents = {run(n).starts[0]["parent"] for n in range(4)}
    assert len(parents) == 1
    assert parents.isdisjoint({sweep.pid, os.getpid()})
    assert not any(run(n).starts[0]["terminal"] for n in range(4))
    assert gone(parents.pop())


def test_one_after_another_they_print_where_the_launcher_does(start, run):
    output = end(start(CPU, "seed=0,1", "fails=[1]"), 1)
    assert "counted 3" in output
    assert "error: asked to fail" in output
    assert f"1 of 2 jobs failed:\n  #1 seed=1: exit code 1; {run(1).path}\n" in output


def test_gpus_and_cores_are_shared_among_forked_jobs(start, run):
    end(start(*PARALLEL, "hydra.launcher.gpus=[0,1]", "seed=0,1", "steps=10"))
    assert [run(n).starts[0]["gpus"] for n in (0, 1)] == ["0", "1"]


# Stops


def test_ctrl_c_stops_forked_jobs_and_the_same_command_goes_on(start, run):
    command = [*PARALLEL, "seed=0,1,2"]
    sweep = start(*command, "steps=20")
    until(lambda: all(len(run(n).steps) > 2 for n in range(2)))
    template = run(0).starts[0]["parent"]
    sweep.send_signal(signal.SIGINT)
    assert "stopped, 1 jobs not started" in end(sweep, 130)
    assert gone(template)
    end(start(*command, "steps=20"))
    assert all(run(n).steps == list(range(20)) for n in range(3))


def test_a_stop_during_the_imports_is_heard(start, run, tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(60)")
    monkeypatch.setenv("LIGHT_IMPORTS", "slow")
    sweep = start(CPU, "seed=0,1")
    until(lambda: template_of(sweep))
    template = template_of(sweep) or 0
    sweep.send_signal(signal.SIGTERM)
    output = end(sweep, 75, limit_s=30)
    assert "seed=0: stopped" in output
    assert gone(template)
    assert not run(0).starts


def test_a_signal_that_one_forked_job_gets_stops_the_multirun(start, run):
    sweep = start(CPU, "seed=0,1", "steps=1000")
    until(lambda: run(0).steps)
    os.kill(run(0).starts[0]["pid"], signal.SIGTERM)
    assert "seed=0: stopped" in end(sweep, 75)


def test_a_second_ctrl_c_kills_forked_jobs(start, run):
    sweep = start(CPU, "seed=0,1", "stubborn=true", "steps=1000")
    interrupt_twice(sweep, run)
    assert gone(run(0).starts[0]["pid"])
    assert not run(1).starts


# Kills


def test_a_killed_template_costs_no_job(start, run):
    """Its jobs live on, and their directories tell how they ended. The next is started anew."""
    sweep = start(*PARALLEL, "seed=0,1,2", "steps=30")
    until(lambda: run(0).steps and run(1).steps)
    os.kill(run(0).starts[0]["parent"], signal.SIGKILL)
    until(lambda: run(1).steps[-1] > 5)
    os.kill(run(1).starts[0]["pid"], signal.SIGKILL)
    output = end(sweep, 1)
    assert "1 of 3 jobs failed" in output
    assert "#1 seed=1: exit code unknown, because the template of the jobs was killed" in output
    assert "#0 seed=0: finished" in output
    assert [len(run(n).starts) for n in range(3)] == [1, 1, 1]
    assert run(2).done
    assert run(2).starts[0]["parent"] == sweep.pid


def test_a_killed_template_does_not_hide_a_stop(start, run):
    sweep = start(CPU, "seed=0,1", "steps=1000")
    until(lambda: run(0).steps)
    os.kill(run(0).starts[0]["parent"], signal.SIGKILL)
    time.sleep(0.2)
    sweep.send_signal(signal.SIGINT)
    assert "seed=0: stopped" in end(sweep, 130)


def test_a_killed_launcher_leaves_its_forked_jobs_to_the_next(start, run):
    """The template starts no more of them, and ends after the last one."""
    command = [CPU, "seed=0,1", "steps=20"]
    sweep = start(*command)
    until(lambda: run(0).steps)
    template = run(0).starts[0]["parent"]
    with stopped(run(0).starts[0]["pid"]) as pid:
        sweep.kill()
        sweep.wait()
        again = start(*command)
        read_until(again, f"#0 seed=0: already running, process {pid} on ")
        assert not gone(template)
    assert "#0 seed=0: finished elsewhere" in end(again)
    assert [len(run(n).starts) for n in (0, 1)] == [1, 1]
    assert run(0).steps == list(range(20))
    until(lambda: gone(template))


# The program itself


def test_a_forked_training_has_the_numbers_of_one_of_its_own(tiny, tmp_path):
    """It is the second job: nothing of the first one may be left in it."""
    program = [sys.executable, "-m", "experiments.start"]
    words = [*tiny, "logger=csv", "test=false", "trainer.max_steps=3"]
    sweep = [*program, "-m", *words, "seed=0,1", "run_name=s${seed}", "paths.runs=runs"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for command in (sweep, [*program, *words, "seed=1", "hydra.run.dir=alone"]):
        subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    forked, own = tmp_path / "runs" / "vniah_d_tiny" / "s1", tmp_path / "alone"
    results = [json.loads((folder / "done.json").read_text()) for folder in (forked, own)]
    for name in ("steps", "samples", "weights_sha256"):
        assert results[0][name] == results[1][name]
    times = {"train/tokens_per_s", "train/data_wait"}
    texts = [(folder / "metrics.csv").read_text().splitlines() for folder in (forked, own)]
    rows = [list(csv.DictReader(lines)) for lines in texts]
    kept = [[{k: v for k, v in row.items() if k not in times} for row in table] for table in rows]
    assert kept[0] == kept[1]
    assert len(kept[0]) > 2
