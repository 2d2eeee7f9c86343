"""A run that is killed at any time and in any way ends with the results of an undisturbed run."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_modules.checkpoint.weights import read_checkpoint

ROOT = Path(__file__).parents[3]
STEPS = 60


def start(folder: Path, *overrides: str) -> subprocess.Popen:
    """Starts `ropelab-train experiment=resume_probe` as its own process group."""
    command = [sys.executable, "-m", "experiments.train", "experiment=resume_probe"]
    quiet = ["print_config=false", "callbacks.progress=null", "trainer.enable_progress_bar=false"]
    # Not the W&B process of other tests, in which the id of a killed run would stay in use.
    env = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    return subprocess.Popen(
        [*command, *quiet, f"hydra.run.dir={folder}", *overrides],
        cwd=folder.parent,
        env=env | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(folder: Path, *overrides: str) -> dict:
    process = start(folder, *overrides)
    shown = process.communicate(timeout=240)[0]
    assert process.returncode == 0, shown
    return json.loads((folder / "done.json").read_text())


def samples(folder: Path) -> list[list[str]]:
    """Returns the keys of every step, each step once and in order."""
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["keys"] for row in rows]


def wait_for_step(folder: Path, process: subprocess.Popen, step: int) -> None:
    """Waits until samples.jsonl has this many steps."""
    path = folder / "samples.jsonl"
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if path.is_file() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    assert process.poll() == 0, "ended before that step, or took too long"


def kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The probe, undisturbed, in one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(folder)
    return folder


def done(folder: Path) -> dict:
    return json.loads((folder / "done.json").read_text())


def test_what_a_finished_run_says_of_itself(whole):
    said = done(whole)
    assert said["steps"] == STEPS
    assert said["samples"] == 8 * STEPS
    assert len(said["weights_sha256"]) == 64
    assert {"train/loss", "val/loss"} <= said["metrics"].keys()
    assert said["wall_s"] > 0
    assert {"torch", "lightning", "python"} <= said["versions"].keys()
    keys = samples(whole)
    assert [len(step) for step in keys] == [8] * STEPS
    for epoch in range(3):
        flat = [key for step in keys[20 * epoch : 20 * (epoch + 1)] for key in step]
        assert len(set(flat)) == len(flat) == 160


@pytest.mark.parametrize(
    "moments", [1, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
)
def test_kill_9_at_random_moments(moments, whole, tmp_path):
    """At moments over the run's whole life, start and end included. Every restart gets further."""
    rng = random.Random(moments)
    folder = tmp_path / "run"
    for moment in range(moments):
        process = start(folder)
        if rng.random() < 0.75:
            wait_for_step(folder, process, round(STEPS * (moment + 1) / (moments + 1)))
            time.sleep(rng.uniform(0, 0.6))
        else:
            time.sleep(rng.uniform(0, 12))
        kill(process)
    again = finish(folder)
    assert again["weights_sha256"] == done(whole)["weights_sha256"]
    assert again["metrics"] == done(whole)["metrics"]
    assert samples(folder) == samples(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "worlds"),
    [("ddp_sim", [(2, 12), (4, 33)]), ("fsdp_sim", [(2, 12), (4, 33)])],
)
def test_a_killed_rank_and_a_resume_on_more_and_fewer(trainer, worlds, whole, tmp_path):
    """One of 2 ranks is killed, then one of 4. Then one process continues to the end."""
    folder = tmp_path / "run"
    for devices, step in worlds:
        process = start(folder, f"trainer={trainer}", f"trainer.devices={devices}")
        wait_for_step(folder, process, step)
        os.kill(child(process, f"train_ddp_process_{devices - 1}"), signal.SIGKILL)
        shown = process.communicate(timeout=120)[0]  # the others end by themselves
        assert process.returncode != 0, shown
        kill(process)
    finish(folder, *(["trainer=fsdp_sim", "trainer.devices=1"] if trainer == "fsdp_sim" else []))
    assert samples(folder) == samples(whole)
    assert distance(folder, whole) < 1e-6


def child(process: subprocess.Popen, name: str) -> int:
    """Returns the rank that Lightning has started with this name."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        command = path.read_bytes()
        if f"hydra.job.name={name}".encode() in command and os.getpgid(int(path.parent.name)) == (
            process.pid
        ):
            return int(path.parent.name)
    raise AssertionError(f"no {name}")


def distance(a: Path, b: Path) -> float:
    """Returns the largest difference of any weight."""
    first, second = (
        read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"] for folder in (a, b)
    )
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)
