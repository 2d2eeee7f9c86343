"""Multiruns on this machine: one process per job, frozen configs, stopped and continued jobs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import HydraContext, RunMode
from omegaconf import open_dict

from experiments import CONFIG_DIR
from experiments.launcher.job import Job, compose
from experiments.run.compose import plain
from experiments.run.files import FROZEN
from experiments.run.process import leave, requeue
from tests.helpers.light_runs import (  # noqa: F401 - the fixtures
    ROOT,
    end,
    interrupt_twice,
    launched_fixture,
    read_until,
    run_fixture,
    start_fixture,
    until,
)

# Frozen configs


@pytest.fixture
def freeze(tiny, tmp_path, monkeypatch):
    """`freeze(*overrides)` returns a frozen job of ropelab-train and its composition."""

    def made(*overrides: str) -> Job:
        words = [*tiny, "paths.runs=runs", *overrides]
        with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            sweep = loader.load_configuration("train", words, RunMode.MULTIRUN)
            job = compose(HydraContext(loader, None), sweep, words, 3, "#3")  # pyright: ignore[reportArgumentType]
        job.freeze()
        return job

    monkeypatch.chdir(tmp_path)
    return made


def thaw(folder: Path):
    """Returns the frozen config as the program gets it, and Hydra's node."""
    with hydra.initialize_config_dir(str(folder / ".hydra"), version_base="1.3"):
        config = hydra.compose(FROZEN, return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    node = config.hydra
    with open_dict(config):
        del config["hydra"]
    return config, node


@pytest.mark.parametrize(
    "overrides",
    [
        ["rotary=mrope", "seed=1", "launcher=slurm_array", "hydra.launcher.partition=low"],
        ["debug=profile", "trainer=ddp_sim", "~callbacks.generations", "tags=[a,'b c']"],
        ["logger=default", "optim.optimizer.lr=1e-5", "run_name='a, b=c'", "+new.key='${seed}x'"],
    ],
)
def test_a_frozen_config_is_the_one_that_was_composed(overrides, freeze, monkeypatch):
    job = freeze(*overrides)
    monkeypatch.setenv("ROPELAB_DATA", "changed since")
    config, node = thaw(job.folder)
    assert plain(config) == job.plain(job.task)
    assert plain(config)["paths"]["run"] == str(job.folder)
    assert node.run.dir == str(job.folder)
    assert node.runtime.choices.rotary == job.config.hydra.runtime.choices.rotary
    level = job.config.hydra.job_logging.loggers["lightning.pytorch"].level
    assert node.job_logging.loggers["lightning.pytorch"].level == level
    wanted = [word for word in job.config.hydra.overrides.task if "launcher=" not in word]
    assert list(node.overrides.task) == wanted
    text = (job.folder / ".hydra" / f"{FROZEN}.yaml").read_text()
    frozen = yaml.safe_load(text)
    logging = frozen["hydra"].pop("job_logging")
    assert "${" not in json.dumps(frozen)
    assert "${hydra.job.name}" in json.dumps(logging), "ranks would write into one log"


def test_edits_during_the_queue_change_nothing_that_is_queued(start, run, tmp_path):
    sweep = start("seed=0,1", "steps=10")
    until(lambda: run(0).starts)
    path = tmp_path / "configs/light.yaml"
    path.write_text(path.read_text().replace("value: 1", "value: 2"))
    end(sweep)
    values = [yaml.safe_load((run(n).path / "config.yaml").read_text())["value"] for n in (0, 1)]
    assert values == [1, 1]
    assert run(1).starts[0]["time"] > run(0).done["time"]


# Jobs


def test_one_that_fails_does_not_stop_the_others(start, run):
    output = end(start("seed=0,1,2", "fails=[0,2]"), 1)
    assert "error: asked to fail" in output
    assert f"2 of 3 jobs failed:\n  #0 seed=0: exit code 1; {run(0).path}\n" in output
    assert f"  #2 seed=2: exit code 1; {run(2).path}\n" in output
    assert run(1).done


def test_the_same_command_again_starts_what_is_not_finished(start, run):
    end(start("seed=0,1"))
    assert end(start("seed=0,1,2")).count("already finished") == 2
    assert [len(run(n).starts) for n in range(3)] == [1, 1, 1]
    end(start("seed=0,1", "value=2"))  # the program must decide whether that is another run
    end(start("seed=2", "resume=false"))
    assert [len(run(n).starts) for n in range(3)] == [2, 2, 2]


def test_sweepers_get_the_scores(start, launched):
    end(start("seed=3"))  # one that exists already, and one that does not
    returned = launched(3, 4)
    assert [each.return_value for each in returned] == [3.0, 4.0]
    assert [each.cfg.seed for each in returned if each.cfg] == [3, 4]


def test_jobs_that_would_share_a_directory_are_refused(start, run):
    output = end(start("seed=0,1", "run_name=same"), 1)
    assert "jobs #0 seed=0 and #1 seed=1 would both run in" in output
    assert "Traceback" not in output


def test_so_many_run_at_a_time_and_share_the_gpus(start, run):
    options = ["hydra.launcher.n_jobs=2", "hydra.launcher.gpus=[0,1,2,3]"]
    output = end(start("launcher=local_parallel", *options, "seed=0,1,2,3", "step_s=0.5"))
    assert "counted" not in output
    assert "counted 3" in (run(0).path / "stdout.log").read_text()
    spans = [(run(n).starts[0]["time"], run(n).done["time"]) for n in range(4)]
    together = [sum(a <= begin < b for a, b in spans) for begin, _ in spans]
    assert max(together) == 2
    assert {run(n).starts[0]["gpus"] for n in range(4)} == {"0,1", "2,3"}


def test_gpus_that_cannot_be_shared_are_one_line(start):
    options = ["hydra.launcher.n_jobs=2", "hydra.launcher.gpus=[0]"]
    output = end(start("launcher=local_parallel", *options, "seed=0"), 1)
    assert "error: 1 GPUs cannot be shared evenly by 2 jobs at a time: change" in output


# Stopping


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 75, marks=pytest.mark.slow)],
)
def test_a_signal_stops_the_jobs_and_the_same_command_goes_on(number, code, start, run):
    count = 2
    command = ["launcher=local_parallel", f"hydra.launcher.n_jobs={count}", "seed=0,1,2"]
    sweep = start(*command, "steps=20")
    until(lambda: all(len(run(n).steps) > 2 for n in range(count)))
    sweep.send_signal(number)
    output = end(sweep, code)
    assert f"stopped, {3 - count} jobs not started" in output
    assert not any(run(n).done for n in range(3))
    end(start(*command, "steps=20"))
    for n in range(3):
        assert run(n).steps == list(range(20))
        assert len(run(n).starts) == (2 if n < count else 1)


def test_a_job_that_is_interrupted_while_it_starts_has_not_failed(start, run):
    """Before the program handles signals, Python itself ends it."""
    sweep = start("seed=0")
    read_until(sweep, "seed=0: starts in")
    sweep.send_signal(signal.SIGINT)
    output = end(sweep, 130)
    assert "seed=0: stopped" in output
    assert "failed" not in output
    assert not run(0).starts


def test_a_second_ctrl_c_kills(start, run):
    sweep = start("seed=0,1", "stubborn=true", "steps=1000")
    interrupt_twice(sweep, run)
    (only,) = run(0).starts
    until(lambda: not Path(f"/proc/{only['pid']}").exists())
    assert not run(1).starts


LIMITS = "RunTime={} TimeLimit={} BatchFlag={}"


@pytest.mark.parametrize(
    ("shown", "said"),
    [
        ("JobState=RUNNING " + LIMITS.format("00:10:00", "01:00:00", 1), "is requeued"),
        ("JobState=SUSPENDED " + LIMITS.format("00:10:00", "01:00:00", 1), "is requeued"),
        ("JobState=COMPLETING " + LIMITS.format("00:10:00", "01:00:00", 1), "was cancelled"),
        ("JobState=COMPLETING " + LIMITS.format("01:00:00", "01:00:00", 1), "is requeued"),
        # a limit of days in SLURM's format: 26 hours are more than the 25 that have passed
        ("JobState=COMPLETING " + LIMITS.format("1-01:00:00", "1-02:00:00", 1), "was cancelled"),
        ("JobState=COMPLETING " + LIMITS.format("23:59:59", "1-00:00:00", 1), "was cancelled"),
        ("JobState=COMPLETING " + LIMITS.format("2-00:00:30", "2-00:00:00", 1), "is requeued"),
        ("JobState=COMPLETING " + LIMITS.format("00:10:00", "UNLIMITED", 1), "was cancelled"),
        ("JobState=RUNNING " + LIMITS.format("00:10:00", "01:00:00", 0), "is interactive"),
    ],
)
def test_a_job_is_queued_again_unless_its_user_has_ended_it(shown, said, monkeypatch):
    asked = []

    def scontrol(*arguments):
        asked.append(arguments)
        return subprocess.CompletedProcess(arguments, 0, shown, "")

    monkeypatch.setattr("datamodules.common.slurm.scontrol", scontrol)
    assert said in requeue("7")
    assert (("requeue", "7") in asked) == (said == "is requeued")


@pytest.mark.parametrize(
    ("environment", "rank", "code"),
    [
        ({}, 0, 75),
        ({}, 1, 0),  # from Lightning's launcher, which kills rank 0 when another rank fails
        ({"TORCHELASTIC_RUN_ID": "1"}, 1, 75),
    ],
)
def test_the_exit_code_of_a_preempted_process(environment, rank, code, monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    handlers = {number: signal.getsignal(number) for number in signal.Signals}
    try:
        assert leave("SIGTERM", rank) == code
    finally:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, handlers[number])


def test_a_run_that_is_told_to_go_while_it_starts_goes(tmp_path):
    """Before PyTorch is imported, and so before our code handles signals."""
    run = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "experiments.start"],
        cwd=tmp_path,
        text=True,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert run.stderr
    next(line for line in run.stderr if "experiments.run.process" in line)
    next(line for line in run.stderr if "torch" in line)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    assert run.returncode == 75


# The program itself


@pytest.mark.slow
def test_jobs_of_two_ranks_each_in_one_multirun(tiny, tmp_path):
    command = [sys.executable, "-m", "experiments.start", "-m", *tiny, "logger=csv", "test=false"]
    command += ["trainer=ddp_sim", "seed=0,1", "run_name=seed${seed}", "paths.runs=runs"]
    command += ["data.global_batch_size=8"]  # 2 ranks, 4 samples each
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    folders = sorted(tmp_path.glob("runs/*/seed*"))
    assert [folder.name for folder in folders] == ["seed0", "seed1"]
    for folder in folders:
        assert json.loads((folder / "done.json").read_text())["steps"] == 6  # 48 samples
        assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["devices"] == 2
        words = (folder / "command.txt").read_text().split()
        assert words[0] == "ropelab-train"
        assert words[-1] == f"hydra.run.dir=runs/vniah_d_tiny/{folder.name}"
        assert f"seed={folder.name[-1]}" in words
