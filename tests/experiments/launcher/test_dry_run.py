"""`ropelab-train --dry-run` lists what would run, and writes nothing."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from experiments.launcher import base, listing
from experiments.launcher.listing import take_dry_run
from tests.experiments.test_runs import hold_fixture  # noqa: F401

ROOT = Path(__file__).parents[3]
HERE = ["paths.runs=runs", "logger=csv", "run_name=s${seed}"]


LISTING = "hydra.sweeper._target_=hydra_plugins.ropelab.ListingSweeper"
SINGLE = "+hydra.sweeper.single=true"


@pytest.mark.parametrize(
    ("typed", "asked"),
    [
        (["-m", "a=1", "--dry-run"], ["-m", "a=1", LISTING]),
        (["dry_run=true", "a=1", "-m"], ["a=1", LISTING, "-m"]),
        (["+dry_run=True", "-m"], ["-m", LISTING]),
        (
            ["a=1", "--dry-run", "--config-dir", "b"],
            ["-m", "a=1", LISTING, SINGLE, "--config-dir", "b"],
        ),
    ],
)
def test_a_dry_run_is_asked_for_in_either_way(typed, asked):
    command = ["ropelab-train", *typed]
    assert take_dry_run(command)
    assert command == ["ropelab-train", *asked]


@pytest.mark.parametrize(
    "typed", [["a=1"], ["a=1", "dry_run=false"], ["dry_run=true", "dry_run=False"]]
)
def test_otherwise_the_command_stays_as_it_is(typed):
    plain = [word for word in typed if "dry" not in word]
    assert not take_dry_run(typed)
    assert typed == plain


@pytest.fixture
def program(tiny, tmp_path) -> Callable[..., tuple[int, list[str]]]:
    """`program(*words)` returns the exit code of ropelab-train and the lines that it prints."""

    def run(*words: str) -> tuple[int, list[str]]:
        command = [sys.executable, "-m", "experiments.start", *words, *tiny, *HERE]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            text=True,
            capture_output=True,
        )
        assert done.returncode < 2, done.stderr
        return done.returncode, (done.stdout + done.stderr).splitlines()

    return run


def snapshot(folder: Path) -> dict[str, tuple[float, int]]:
    paths = [folder, *folder.rglob("*")]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


def leave(folder: Path, config: dict, *, done: bool = False, step: int | None = None) -> None:
    """Writes what a run with this config has left, up to its progress."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if step is not None:
        (folder / "checkpoints").mkdir()
        torch.save({"global_step": step}, folder / "checkpoints" / "last.ckpt")
    if done:
        (folder / "done.json").write_text('{"steps": 12, "metrics": {}}')


def test_a_sweep_is_listed_with_what_would_become_of_each_job(
    program, compose, tiny, tmp_path, hold
):
    runs = tmp_path / "runs" / "vniah_d_tiny"

    def made_with(seed: int) -> dict:
        words = (f"seed={seed}", *tiny, *HERE)
        config = compose(words, runs / f"s{seed}")
        return yaml.safe_load(OmegaConf.to_yaml(config, resolve=True))

    leave(runs / "s0", made_with(0), done=True)
    leave(runs / "s1", made_with(1), step=7)
    other = made_with(2)
    other["model"]["llm"]["config"]["num_hidden_layers"] = 3
    leave(runs / "s2", other, step=7)
    leave(runs / "s3", {})
    hold(runs / "s3")
    before = snapshot(tmp_path)
    code, lines = program("-m", "--dry-run", "seed=0,1,2,3,4")
    assert snapshot(tmp_path) == before
    assert code == 1  # because of the refused job
    states = [
        "finished",
        "goes on from step 7",
        "refused: ",
        "running, process ",
        "new",
    ]
    *listed, last = lines
    for seed, (line, state) in enumerate(zip(listed, states, strict=True)):
        assert line.startswith(f"#{seed} seed={seed}  {state}")
        assert line.endswith(f"  runs/vniah_d_tiny/s{seed}")
    assert "model.llm.config.num_hidden_layers=3, this run has 2" in listed[2]
    assert last == "2 of 5 would run, 1 at a time on this machine; nothing was written"


def test_a_single_run_is_listed_too(program, tmp_path):
    assert program("--dry-run", "hydra.run.dir=here") == (
        0, ["new  here", "1 of 1 would run; nothing was written"]
    )  # fmt: skip
    assert program("seed=0,1", "dry_run=true") == (1, ["error: seed=0,1 asks for 2 runs: add -m"])
    assert list(tmp_path.iterdir()) == []


def test_what_would_be_refused_is_not_called_new(program, tmp_path):
    code, (bad, good, last) = program("-m", "--dry-run", "seed=-1,1")
    assert code == 1
    assert "refused: seed=-1 must be from 0" in bad
    assert "  new  " in good
    assert last.startswith("1 of 2 would run")
    (tmp_path / "file").write_text("")
    code, (line, _) = program("--dry-run", "hydra.run.dir=file/run")
    assert (code, "file/run cannot be written" in line) == (1, True)
    (tmp_path / "mine" / "checkpoints").mkdir(parents=True)
    code, (line, _) = program("--dry-run", "hydra.run.dir=mine", "resume=false")
    assert (code, "has checkpoints, but its config.yaml" in line) == (1, True)


def test_a_refused_job_of_a_multirun_leaves_its_directory_as_it_was(
    program, compose, tiny, tmp_path
):
    """Its frozen config must not change either: a queued run may use it."""
    run = tmp_path / "runs" / "vniah_d_tiny" / "s3"
    config = compose(("seed=3", *tiny, *HERE, "optim.optimizer.lr=0.5"), run)
    leave(run, yaml.safe_load(OmegaConf.to_yaml(config, resolve=True)), step=7)
    before = snapshot(run)
    code, lines = program("-m", "seed=3")
    assert code == 1
    assert any("optim.optimizer.lr=0.5, this run has" in line for line in lines)
    assert snapshot(run) == before


def test_an_earlier_run_is_compared_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(base, "check_former", lambda *each: (asked.append(each), {})[1])
    config = {"seed": 0, "paths": {"run": str(tmp_path)}, "resume": True}
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    job: Any = SimpleNamespace(
        folder=tmp_path, config=config, task=config, plain=lambda node: node, done=lambda: None
    )
    launcher: Any = SimpleNamespace(queued=lambda job: "")
    assert listing.describe(job, launcher) == "starts at step 0: no checkpoint there"
    (tmp_path / "done.json").write_text("{}")
    assert listing.describe(job, launcher) == "finished"
    assert len(asked) == 2, "once for each call"
