"""Runs: their files, that stopping changes nothing, and that mistakes end in one line."""

import csv
import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from datamodules.haystack.datamodule import HaystackDataModule
from experiments import train
from experiments.reporting.data import load_run
from lightning_modules.checkpoint.preemption import Preempted, signals
from lightning_modules.training.instruct import VideoLLMModule

STEPS = 12


def weights(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True)["state_dict"]


#: Endings of metric names that depend on the clock.
CLOCK = ("_per_s", "/data_wait", "/mfu")


def metrics(folder: Path) -> list[dict[str, str]]:
    """Returns the rows of metrics.csv without values that depend on the clock."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.endswith(CLOCK)} for row in rows]


def program(*arguments: str, cwd: Path, name: str = "train") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"experiments.{name}", *arguments]
    root = str(Path(__file__).parents[2])
    env = os.environ | {"PYTHONPATH": root, "WANDB_SILENT": "false", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture
def at_batch(monkeypatch):
    """`at_batch(n, act)` calls `act` before the n-th training batch of the process, from 1."""

    def arrange(n, act):
        count, step = 0, VideoLLMModule.training_step

        def counting(self, batch, batch_idx):
            nonlocal count
            count += 1
            if count == n:
                act()
            return step(self, batch, batch_idx)

        monkeypatch.setattr(VideoLLMModule, "training_step", counting)

    return arrange


@pytest.fixture(scope="module")
def whole(run_train, tmp_path_factory):
    """A run without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    run_train(folder)
    return folder


def test_a_run_leaves_what_a_report_reads(whole):
    run = load_run(whole)
    assert run.status == "tested after step 12"
    assert run.needle
    assert (run.needle.rotary, run.needle.step, run.needle.train_frames) == (
        "videorope",
        STEPS,
        (3, 6),
    )
    assert [step for step, _ in run.curves["train/loss"]] == list(range(STEPS))
    assert [step for step, _ in run.curves["val/loss"]] == [STEPS - 1]
    assert run.generations
    assert run.command
    assert {"torch", "lightning", "transformers", "ropelab", "python"} <= run.versions.keys()
    assert yaml.safe_load((whole / "config.yaml").read_text())["data"]["batch_size"] == 4
    done = json.loads((whole / "done.json").read_text())
    assert done["steps"] == STEPS
    assert done["metrics"].keys() == {"train/loss", "val/loss", "val/perplexity", "score"}
    assert done["samples"] == 4 * STEPS
    assert {"torch", "lightning", "transformers", "ropelab", "python"} <= done["versions"].keys()
    assert not (whole / "hparams.yaml").exists()


def test_the_same_command_again_returns_what_is_there(whole, run_train, monkeypatch):
    monkeypatch.setattr(HaystackDataModule, "setup", None)  # no data is read
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    score = json.loads((whole / "done.json").read_text())["metrics"]["score"]
    assert run_train(whole) == score
    assert {path: path.read_bytes() for path in before} == before


def test_a_finished_run_with_another_grid_is_tested_again(whole, run_train, tmp_path):
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-r", whole, folder], check=True)
    run_train(folder, "data.grid.needles=3")
    assert {c.needle for c in load_run(folder).needle.cells["plain"]} == {0, 1, 2}
    torch.testing.assert_close(weights(folder), weights(whole), rtol=0, atol=0)


def test_a_killed_second_test_is_not_taken_for_the_first(whole, run_train, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-r", whole, folder], check=True)

    def die(*arguments):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(train, "test_needles", die)
        with pytest.raises(RuntimeError, match="killed"):
            run_train(folder, "data.grid.needles=3")
    run_train(folder, "data.grid.needles=3")
    assert {c.needle for c in load_run(folder).needle.cells["plain"]} == {0, 1, 2}


@pytest.mark.parametrize(
    ("batches", "killed_at"),
    [*(pytest.param(n, 7, marks=pytest.mark.slow) for n in (1, 2)), (3, 11)],
)
def test_a_killed_run_goes_on_to_the_same_end(batches, killed_at, run_train, tmp_path, at_batch):
    options = [f"data.global_batch_size={4 * batches}", "callbacks.checkpoint.every_n_steps=2"]
    run_train(tmp_path / "whole", *options, "test=false")

    def die():
        raise RuntimeError("killed")

    at_batch(killed_at, die)
    with pytest.raises(RuntimeError, match="killed"):
        run_train(tmp_path / "cut", *options, "test=false")
    saved = torch.load(tmp_path / "cut" / "checkpoints" / "last.ckpt", weights_only=True)
    assert 0 < saved["global_step"] < STEPS // batches
    assert len(metrics(tmp_path / "cut")) < len(metrics(tmp_path / "whole"))

    run_train(tmp_path / "cut", *options, "test=false")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    torch.testing.assert_close(
        weights(tmp_path / "cut"), weights(tmp_path / "whole"), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_told_to_stop_a_run_ends_the_step_saves_and_resumes(
    number, whole, run_train, tmp_path, at_batch
):
    handler = signal.getsignal(number)
    at_batch(7, lambda: os.kill(os.getpid(), number))
    with pytest.raises((SystemExit, KeyboardInterrupt, Preempted)), signals.listen():
        run_train(tmp_path)
    assert signal.getsignal(number) == handler
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 7
    assert not (tmp_path / "done.json").exists()

    run_train(tmp_path)
    assert metrics(tmp_path) == metrics(whole)
    torch.testing.assert_close(weights(tmp_path), weights(whole), rtol=0, atol=0)


def test_starting_anew_forgets_the_earlier_run(whole, run_train, tmp_path):
    run_train(tmp_path, "seed=1", "test=false")
    run_train(tmp_path, "resume=false", "test=false")
    losses = load_run(tmp_path).curves["train/loss"]
    assert losses == load_run(whole).curves["train/loss"]


def test_fewer_steps_than_a_checkpoint_takes_still_leave_one(run_train, tmp_path):
    run_train(tmp_path, "callbacks.checkpoint.every_n_steps=1000", "trainer.max_steps=3")
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 3


@pytest.mark.slow
def test_more_max_steps_go_on_within_the_epoch(run_train, tmp_path):
    """Equal to one run of the same number of steps, if the learning rate does not depend on it."""
    words = ["optim.scheduler.name=constant", "test=false"]
    for folder, ends in (("whole", [5]), ("cut", [2, 5])):
        for steps in ends:
            run_train(tmp_path / folder, *words, f"trainer.max_steps={steps}")
    cut, undisturbed = tmp_path / "cut", tmp_path / "whole"
    assert metrics(cut) == metrics(undisturbed)
    torch.testing.assert_close(weights(cut), weights(undisturbed), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["rotary=mrope"], "was trained with model.rotary._target_=.*VideoRope.*MRope.*resume="),
        (["pooler=none"], "was trained with model.pooler.*another directory"),
    ],
)
def test_a_directory_of_another_model_is_refused(whole, run_train, overrides, line, capsys):
    before = (whole / "config.yaml").read_text()
    with pytest.raises(SystemExit, match=line):
        run_train(whole, *overrides)
    assert (whole / "config.yaml").read_text() == before


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["pooler=average"], r"kernel.*"),
        (["model.llm.config.num_attention_heads=8"], "model.rotary.sections"),
        (["model.rotary.sections=[1,2,3]"], r"model.rotary.sections=\[1, 2, 3\] must be"),
        (
            ["+data.gird=1"],
            "data.gird: HaystackDataModule has no argument gird: did you mean data.grid",
        ),
        (["data.grid.conditions.periodic.period=0"], "data: .*period of distractors"),
        (["+callbacks.x._target_=lightning.no.Such"], "callbacks.x: "),
    ],
)
def test_mistakes_are_one_line_before_data_is_read(
    overrides, line, run_train, tmp_path, monkeypatch
):
    monkeypatch.setattr(HaystackDataModule, "setup", None)
    monkeypatch.setattr(HaystackDataModule, "prepare_data", None)
    with pytest.raises(SystemExit, match=line) as caught:
        run_train(tmp_path, *overrides)
    assert str(caught.value).startswith("error: ")
    assert "\n" not in str(caught.value)


def test_missing_shards_are_named_in_one_line(run_train, tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*nowhere/vniah/\S+\.tar") as caught:
        run_train(tmp_path, "paths.data=nowhere")
    assert "\n" not in str(caught.value)


def test_debug_fast_runs_one_batch_and_keeps_nothing(run_train, tmp_path):
    assert run_train(tmp_path, "debug=fast") is None
    assert not (tmp_path / "checkpoints").exists()
    assert not (tmp_path / "metrics.csv").exists()


def test_debug_overfit_learns_one_batch_by_heart(run_train, tmp_path):
    run_train(tmp_path, "debug=overfit", "trainer.max_epochs=20", "optim.optimizer.lr=1e-2")
    losses = [loss for _, loss in load_run(tmp_path).curves["train/loss"]]
    assert len(losses) == 20
    assert losses[-1] < 0.5 * losses[0]
    assert not (tmp_path / "checkpoints").exists()


def test_debug_profile_stops_and_shows_where_time_goes(run_train, tmp_path, caplog):
    # Lightning's logger passes nothing on if it was made before the root had a handler.
    lightning_logger = logging.getLogger("lightning.pytorch")
    caplog.set_level("INFO", logger=lightning_logger.name)
    lightning_logger.addHandler(caplog.handler)
    run_train(tmp_path, "debug=profile", "trainer.max_steps=2")
    lightning_logger.removeHandler(caplog.handler)
    assert "run_training_batch" in caplog.text


# The programs themselves, as processes


def inspect_wandb(folder: Path) -> dict:
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--summary", "--json"]
    shown = subprocess.run([*command, str(file)], capture_output=True, text=True, check=True)
    return json.loads(shown.stdout)


@pytest.mark.slow
def test_a_multirun_is_one_run_a_job_and_survives_a_bad_one(tiny, tmp_path):
    """4 frequencies cannot be split 2 : 3 : 3. The other scheme does not need that."""
    result = program(
        "-m",
        *tiny,
        "model.llm.config.num_attention_heads=8",
        "rotary=mrope,vanilla",
        "test=false",
        "hydra.sweep.dir=sweep",
        cwd=tmp_path,
        name="start",
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "error: 4 rotary frequencies" in result.stderr
    runs = {path.parent for path in tmp_path.glob("sweep/*/done.json")}
    assert len(runs) == 1
    for run in runs:
        seen = inspect_wandb(run)
        config = json.dumps(seen)
        assert (run / "run_id").read_text() in config
        assert "'_target_'" not in config, "a nested dict became a string"
    shown = result.stdout + result.stderr
    assert not re.findall(r"(?i)litlogger|LeafSpec|deprecat|anonymous", shown), shown
