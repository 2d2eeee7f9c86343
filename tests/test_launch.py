"""Multiruns on this machine: a process a job, frozen when it was asked for, stopped and gone on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import hydra
import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.types import HydraContext, RunMode
from omegaconf import open_dict

from experiments import CONFIG_DIR, lock
from experiments.cluster import leave
from experiments.launcher.job import FROZEN, Job, compose
from experiments.launcher.local import LocalLauncher
from experiments.run import plain

ROOT = Path(__file__).parents[1]
LIGHT = ROOT / "tests" / "cluster"
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path, monkeypatch) -> Iterator[Start]:
    """`start(*overrides)`: a multirun of the light program in a directory of the test's own."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{LIGHT}")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/light.yaml").write_text((LIGHT / "configs/light.yaml").read_text())
    command = [sys.executable, "-m", "light", "--config-dir", "configs", "-m"]
    made: list[subprocess.Popen[str]] = []

    def begin(*overrides: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*command, "run_name=${seed}", *overrides],
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


def end(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    return output


def until(happens: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def read_until(process: subprocess.Popen[str], text: str) -> None:
    """Reads what a program prints, up to the line with `text`."""
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return
    raise AssertionError(f"no {text!r} in {''.join(lines)}")


@contextmanager
def stopped(pid: int) -> Iterator[int]:
    """Inside, the process stands still, and lives."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


class Run:
    """What the light program left in the directory of a job."""

    def __init__(self, folder: Path, seed: int):
        self.path = folder / "runs" / "light" / str(seed)

    @property
    def steps(self) -> list[int]:
        path = self.path / "steps.txt"
        return [int(line) for line in path.read_text().split()] if path.is_file() else []

    @property
    def starts(self) -> list[dict]:
        path = self.path / "starts.jsonl"
        return list(map(json.loads, path.read_text().splitlines())) if path.is_file() else []

    @property
    def done(self) -> dict | None:
        path = self.path / "done.json"
        return json.loads(path.read_text()) if path.is_file() else None


@pytest.fixture
def run(tmp_path) -> Callable[[int], Run]:
    return lambda seed: Run(tmp_path, seed)


# Frozen configs


@pytest.fixture
def freeze(tiny, tmp_path, monkeypatch):
    """`freeze(*overrides)`: a frozen job of ropelab-train and how it was composed."""

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
    """The frozen config as the program gets it, and Hydra's node."""
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
    assert end(start("seed=0,1,2")).count("finished before") == 2
    assert [len(run(n).starts) for n in range(3)] == [1, 1, 1]
    end(start("seed=0,1", "value=2"))  # the program has to say whether that is another run
    end(start("seed=2", "resume=false"))
    assert [len(run(n).starts) for n in range(3)] == [2, 2, 2]


@pytest.fixture
def launched(tmp_path, monkeypatch) -> Callable[..., Sequence[JobReturn]]:
    """`launched(*seeds)`: a launcher in this process, and what a sweeper gets from it."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{LIGHT}")
    monkeypatch.chdir(tmp_path)

    def launch(*seeds: int) -> Sequence[JobReturn]:
        with hydra.initialize_config_dir(str(LIGHT / "configs"), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            words = [f"hydra.searchpath=[file://{CONFIG_DIR}]", "run_name=${seed}"]
            launcher = LocalLauncher()
            launcher.program = "light"
            launcher.config = loader.load_configuration("light", words, RunMode.MULTIRUN)
            launcher.hydra_context = HydraContext(loader, None)  # pyright: ignore[reportArgumentType]
            return launcher.launch([["run_name=${seed}", f"seed={n}"] for n in seeds], 0)

    return launch


def test_sweepers_get_the_scores(start, launched):
    end(start("seed=3"))  # one that is there already, and one that is not
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


def test_a_second_ctrl_c_kills(start, run):
    sweep = start("seed=0,1", "stubborn=true", "steps=1000")
    until(lambda: len(run(0).steps) > 2)
    sweep.send_signal(signal.SIGINT)
    counted = len(run(0).steps)
    until(lambda: len(run(0).steps) > counted + 2)
    sweep.send_signal(signal.SIGINT)
    end(sweep, 130)
    (only,) = run(0).starts
    until(lambda: not Path(f"/proc/{only['pid']}").exists())
    assert not run(1).starts


def test_a_launcher_that_is_killed_leaves_its_job_to_the_next(start, run):
    """It lives on, and counts as the one job that may run at a time."""
    command = ["seed=0,1", "steps=10"]
    sweep = start(*command)
    until(lambda: run(0).steps)
    with stopped(run(0).starts[0]["pid"]) as pid:
        sweep.kill()
        sweep.wait()
        again = start(*command)
        read_until(again, f"#0 seed=0: runs already, process {pid} on ")
        time.sleep(1)
        assert not run(1).starts
    assert "#0 seed=0: finished elsewhere" in end(again)
    assert [len(run(n).starts) for n in (0, 1)] == [1, 1]
    assert all(run(n).steps == list(range(10)) for n in (0, 1))


def test_a_job_that_lives_keeps_its_gpus(start, run):
    """The next launcher gives its other jobs the other GPUs."""
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
    """Another process takes the lock when the launcher has looked already."""
    run(3).path.mkdir(parents=True)
    holder = os.fork()
    if holder == 0:
        lock.take(run(3).path)
        time.sleep(60)
        os._exit(0)
    until(lambda: lock.holder(run(3).path))
    looks = iter([None, None])  # before it freezes the job, and before it starts it
    ask = lock.holder
    monkeypatch.setattr(lock, "holder", lambda folder: next(looks, None) or ask(folder))

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


@pytest.mark.parametrize(
    ("environment", "rank", "code"),
    [
        ({}, 0, 75),
        ({}, 1, 0),  # of Lightning's launcher, which kills rank 0 when another rank fails
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
    """Before PyTorch is imported, and so before anything of ours listens."""
    run = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "experiments.start"],
        cwd=tmp_path,
        text=True,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert run.stderr
    next(line for line in run.stderr if "experiments.cluster" in line)
    next(line for line in run.stderr if "torch" in line)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    assert run.returncode == 75


# The program itself


def test_a_training_outlives_its_launcher_and_the_next_takes_its_result(tiny, tmp_path):
    command = [sys.executable, "-m", "experiments.start", "-m", *tiny, "logger=csv", "test=false"]
    command += ["run_name=only", "paths.runs=runs"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    folder = tmp_path / "runs" / "vniah_d_tiny" / "only"
    first = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    until(lambda: lock.holder(folder))
    with stopped((lock.holder(folder) or {})["pid"]) as pid:
        first.kill()
        first.wait()
        again = subprocess.Popen(command, cwd=tmp_path, env=environment, **output)
        read_until(again, f"runs already, process {pid} on ")
    assert "finished elsewhere" in end(again)
    assert json.loads((folder / "status.json").read_text())["starts"] == 1
    assert json.loads((folder / "done.json").read_text())["steps"] == 12


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
