"""Multiruns on a real SLURM: preemption, cancellation, dead nodes, dead launchers."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[3]
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(cluster, tmp_path, monkeypatch) -> Iterator[Start]:
    """`start(*overrides)` starts a multirun of the light program in the test's own directory."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{HERE}")
    command = [sys.executable, "-m", "light", "--config-dir", str(HERE / "configs"), "-m"]
    command += ["hydra.launcher.time=10", "hydra.launcher.poll_s=0.2", "steps=20", "step_s=0.1"]
    command += ["run_name=seed${seed}"]
    made: list[subprocess.Popen[str]] = []

    def begin(*overrides: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*command, *overrides],
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        made.append(process)
        return process

    yield begin
    for process in made:
        if process.poll() is None:
            process.kill()
        process.communicate()


def end(process: subprocess.Popen[str], code: int = 0, limit: float = 120) -> str:
    output, _ = process.communicate(timeout=limit)
    assert process.returncode == code, output
    return output


def runs(folder: Path, count: int) -> list[Path]:
    return [folder / "runs" / "light" / f"seed{seed}" for seed in range(count)]


def steps(run: Path) -> list[int]:
    path = run / "steps.txt"
    return [int(line) for line in path.read_text().split()] if path.is_file() else []


def starts(run: Path) -> list[dict[str, str]]:
    path = run / "starts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_preempted_jobs_come_back_and_go_on(cluster, start, until, tmp_path):
    """A partition of higher priority takes both nodes for a moment."""
    sweep = start("launcher=slurm_array", "seed=0,1")
    until(lambda: all(len(steps(run)) > 3 for run in runs(tmp_path, 2)))
    cluster.ask("srun", "--partition=high", "--nodes=2", "--exclusive", "true")
    output = end(sweep)
    assert "PENDING (BeginTime)" in output
    for seed, run in enumerate(runs(tmp_path, 2)):
        assert steps(run) == list(range(20))
        assert [each.get("SLURM_RESTART_COUNT") for each in starts(run)] == [None, "1"]
        (job,) = {each["SLURM_ARRAY_JOB_ID"] for each in starts(run)}
        assert f"Requeuing JobId={job}_{seed}" in cluster.log()


@pytest.mark.parametrize(
    "name",
    [
        "USR2",
        pytest.param("USR1", marks=pytest.mark.slow),
        pytest.param("TERM", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_task_of_an_array_queues_that_one_again(
    name, cluster, start, until, tmp_path
):
    """The first task of an array: its job id is that of the whole array once all have started."""
    sweep = start("launcher=slurm_array", "seed=0,1")
    until(lambda: all(len(steps(run)) > 3 for run in runs(tmp_path, 2)))
    (last,) = [run for run in runs(tmp_path, 2) if is_last_of_array(starts(run)[0])]
    job = json.loads((last / "slurm.json").read_text())["job_id"]
    cluster.ask("scancel", f"--signal={name}", job)
    end(sweep)
    for run in runs(tmp_path, 2):
        assert steps(run) == list(range(20))
        assert len(starts(run)) == (2 if run == last else 1)


def is_last_of_array(environment: dict[str, str]) -> bool:
    return environment["SLURM_JOB_ID"] == environment["SLURM_ARRAY_JOB_ID"]


def test_what_the_user_cancels_stays_cancelled(cluster, start, until, tmp_path):
    sweep = start("launcher=slurm", "seed=0,1")
    first, second = runs(tmp_path, 2)
    until(lambda: len(steps(first)) > 3)
    job = json.loads((first / "slurm.json").read_text())["job_id"]
    cluster.ask("scancel", job)
    output = end(sweep, 1)
    assert "1 of 2 jobs failed" in output
    assert f"job {job} is CANCELLED" in output
    assert str(first) in output
    assert cluster.state(job) == "CANCELLED"
    assert len(starts(first)) == 1
    log = (first.parent / "slurm" / f"{job}_0_log.out").read_text()
    assert f"job {job} was cancelled and is not requeued" in log
    assert (second / "done.json").is_file()


@pytest.mark.slow
def test_an_array_survives_its_launcher_and_only_what_is_missing_is_submitted(
    cluster, start, until, tmp_path
):
    """When the launcher is killed, one of four jobs is finished, one runs and one is queued."""
    command = ["launcher=slurm_array", "seed=0,1,2,3"]
    done = [run / "done.json" for run in runs(tmp_path, 4)]
    files = [run / "slurm.json" for run in runs(tmp_path, 4)]
    launcher = start(*command, "+hydra.launcher.additional_parameters.hold=true")
    until(lambda: all(path.is_file() for path in files))
    ids = [json.loads(path.read_text())["job_id"] for path in files]
    cluster.ask("scontrol", "release", ids[0])
    until(done[0].is_file)
    launcher.kill()
    launcher.wait()
    cluster.ask("scontrol", "release", ids[1])
    cluster.ask("scancel", ids[3])
    launcher = start(*command)
    assert launcher.stdout
    assert any("#2 seed=2: attached" in line for line in launcher.stdout)
    cluster.ask("scontrol", "release", ids[2])
    end(launcher)
    assert all(path.is_file() for path in done)
    for run, job in zip(runs(tmp_path, 3), ids, strict=False):
        (only,) = starts(run)
        assert f"{only['SLURM_ARRAY_JOB_ID']}_{only['SLURM_ARRAY_TASK_ID']}" == job
    (only,) = starts(runs(tmp_path, 4)[3])
    assert "SLURM_ARRAY_JOB_ID" not in only
    assert "already finished" in end(start(*command))
    assert [len(starts(run)) for run in runs(tmp_path, 4)] == [1] * 4


@pytest.mark.slow
def test_jobs_of_a_lost_node_run_on_another(cluster, start, until, tmp_path):
    sweep = start("launcher=slurm", "seed=0")
    (run,) = runs(tmp_path, 1)
    until(lambda: len(steps(run)) > 3)
    node = starts(run)[0]["SLURM_NODELIST"]
    cluster.lose_node(node)
    try:
        end(sweep)
    finally:
        cluster.find_node(node)
    assert sorted(set(steps(run))) == list(range(20))
    nodes = [each["SLURM_NODELIST"] for each in starts(run)]
    assert nodes[0] == node
    assert nodes[1:] == [name for name in ("n1", "n2") if name != node]


@pytest.mark.slow
@pytest.mark.parametrize("before_s", [45, 0])
def test_a_job_whose_time_is_over_goes_on_in_another(before_s, cluster, start, tmp_path):
    """By the signal before the end of its minute, and by SIGTERM if that signal comes too late."""
    limits = ["hydra.launcher.time=1", f"hydra.launcher.signal_delay_s={before_s}"]
    end(start("launcher=slurm", *limits, "seed=0", "steps=90", "step_s=1"), limit=240)
    (run,) = runs(tmp_path, 1)
    assert steps(run) == list(range(90))
    assert len(starts(run)) > 1


def test_without_waiting_the_ids_are_printed(cluster, start, until, tmp_path):
    output = end(start("launcher=slurm", "hydra.launcher.wait=false", "seed=0,1", "steps=1"))
    done = [run / "done.json" for run in runs(tmp_path, 2)]
    for run in runs(tmp_path, 2):
        job = json.loads((run / "slurm.json").read_text())["job_id"]
        assert f"job {job}, {run}" in output
    until(lambda: all(path.is_file() for path in done))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("trainer.devices=-1", "error: hydra.launcher.ntasks_per_node=-1 must be"),
        ("hydra.launcher.partition=none", "error: sbatch: .*partition"),
        ("+hydra.launcher.partitoin=low", "error: .*partitoin"),
    ],
)
def test_mistakes_are_one_line(override, line, start):
    output = end(start("launcher=slurm", "seed=0", override), 1)
    (shown,) = [row for row in output.splitlines() if row.startswith("error: ")]
    assert "Traceback" not in output
    assert re.search(line, shown)
