"""ropelab-evaluate: the model as trained, from any folder, and another scheme only on request."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from experiments import evaluate
from experiments.reporting.data import load_run, load_runs


@pytest.fixture(scope="module")
def trained(tiny, needle_shards, tmp_path_factory):
    """A run as the program leaves it. The path of its data is relative to where it ran."""
    cwd = tmp_path_factory.mktemp("cwd")
    (cwd / "shards").symlink_to(needle_shards)
    words = [word for word in tiny if not word.startswith("paths.data")]
    command = [sys.executable, "-m", "experiments.train", *words, "paths.data=shards"]
    options = ["rotary=mrope", "logger=csv", "hydra.run.dir=run", "data.grid.frames=[4]"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([*command, *options], cwd=cwd, env=env, check=True, capture_output=True)
    return cwd / "run"


@pytest.fixture
def run_evaluate(tmp_path, monkeypatch):
    """Runs the program here, in its own directory, and returns the folder of its results."""

    def run(folder, *words):
        monkeypatch.chdir(tmp_path)
        before = set((folder / "evaluate").glob("*"))
        out = folder / "evaluate" / f"test{len(before)}"
        argv = ["ropelab-evaluate", f"run={folder}", *words, f"hydra.run.dir={out}"]
        monkeypatch.setattr(sys, "argv", argv)
        evaluate.main()
        return out

    return run


def test_the_same_test_again_gives_the_same_answers(trained, run_evaluate, tmp_path):
    before = load_run(trained)
    after = load_run(run_evaluate(trained))
    assert after.needle.cells == before.needle.cells
    assert (after.needle.rotary, after.needle.step) == ("mrope", before.needle.step)
    assert after.needle.step > 0
    assert not list(tmp_path.iterdir()), "results belong to the run"
    assert [run.folder for run in load_runs([trained])] == [trained]


def test_another_grid_and_no_other_model(trained, run_evaluate):
    out = run_evaluate(trained, "data.grid.frames=[9]", "experiment=vniah_d_tiny")
    assert {cell.frames for cell in load_run(out).needle.cells["plain"]} == {9}
    assert load_run(out).needle.rotary == "mrope"


def test_another_scheme_only_by_name_and_with_a_warning(trained, run_evaluate):
    assert type(evaluate.load(trained)[0].rotary).__name__ == "MRope"
    out = run_evaluate(trained, "rotary=vanilla", "data.grid.needles=2")
    assert load_run(out).needle.rotary == "vanilla"
    assert "trained with" in (out / "evaluate.log").read_text()


def test_a_saved_model_is_tested_as_it_is(trained, run_evaluate, tmp_path_factory):
    model, _ = evaluate.load(trained)
    saved = tmp_path_factory.mktemp("saved")
    model.save_pretrained(saved)
    overrides = yaml.safe_load((trained / ".hydra" / "overrides.yaml").read_text())
    words = [w for w in overrides if not w.startswith(("hydra.", "rotary=", "paths."))]
    data = f"paths.data={trained.parent / 'shards'}"
    out = run_evaluate(saved, *words, data)
    assert load_run(out).needle.cells == load_run(trained).needle.cells
    assert load_run(out).needle.rotary == "MRope"


def test_a_folder_without_a_checkpoint_is_one_line(run_evaluate, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(SystemExit, match=r"error: no checkpoint in .*run=") as caught:
        run_evaluate(tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run").iterdir())


def test_a_wrong_run_creates_nothing(run_evaluate, trained):
    with pytest.raises(
        SystemExit, match=r"^error: run=\S+rnu does not exist: did you mean run=\S+"
    ):
        run_evaluate(trained.parent / "rnu")
    assert not (trained.parent / "rnu").exists()


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("data.grid.frames=[0]", "frames"),  # refused by the data
        ("+optim.lr=5", "did you mean optim.optimizer.lr"),
        ("paths.data=nowhere", "nowhere"),  # noticed only when the test begins
    ],
)
def test_a_failed_evaluation_leaves_no_folder(word, line, trained, run_evaluate):
    before = set(trained.rglob("*"))
    with pytest.raises(SystemExit, match=f"^error: .*{line}"):
        run_evaluate(trained, word)
    assert {path for path in trained.rglob("*") if "run.lock" not in path.name} <= before


def test_a_checkpoint_names_only_stages_of_this_package(trained, tmp_path):
    checkpoint = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["stages"]["rotary"] = {"_target_": "os.system"}
    (tmp_path / "checkpoints").mkdir()
    torch.save(checkpoint, tmp_path / "checkpoints" / "last.ckpt")
    with pytest.raises(ValueError, match="refused"):
        evaluate.load(tmp_path)


def test_without_a_run_it_asks_for_one(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ropelab-evaluate"])
    with pytest.raises(SystemExit, match="error: which run"):
        evaluate.main()


def test_done_json_says_what_was_measured(trained, run_evaluate):
    out = run_evaluate(trained, "data.grid.needles=2")
    assert json.loads((out / "done.json").read_text())["metrics"].keys() == {"score"}


def test_a_pooler_cannot_be_changed_after_training(trained, monkeypatch):
    """It would run as trained, and the stored config would name another."""
    for word in ("pooler=none", "model.pooler.kernel=[1,2,2]"):
        monkeypatch.setattr("sys.argv", ["ropelab-evaluate", f"run={trained}", word])
        with pytest.raises(SystemExit, match="the pooler is that of the checkpoint"):
            evaluate.main()


def test_a_folder_of_configs_may_stand_anywhere():
    words = ["--config-dir", "mine", "run=runs/a", "rotary=tad"]
    assert evaluate._flags_last(words) == ["run=runs/a", "rotary=tad", "--config-dir", "mine"]
    assert evaluate._flags_last(words[2:]) == words[2:]
