"""Recipes train here by their own commands, and reach the numbers in `expected`."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from experiments import CONFIG_DIR
from experiments.run.files import read_curves
from lightning_modules.checkpoint.weights import read_checkpoint

SCALED = sorted(path.stem for path in (CONFIG_DIR / "scale" / "tiny").glob("*.yaml"))

#: Each starts from the run of the recipe before it, at the tiny scale.
ROW = ("clip_context", "ppllava_vicuna7b_video", "ppllava_dpo")


def train(name: str, folder: Path, *words: str) -> list[float]:
    """Trains as a user would, in its own process, and returns the training losses."""
    command = [sys.executable, "-m", "experiments.train", f"experiment={name}", *words]
    quiet = [f"hydra.run.dir={folder}", "print_config=false"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    done = subprocess.run([*command, *quiet], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    print(f"{name}: {time.monotonic() - began:.0f} s")
    assert json.loads((folder / "done.json").read_text())["steps"] > 0
    losses = [value for _, value in read_curves(folder / "metrics.csv")["train/loss"]]
    assert losses[-1] < 0.8 * losses[0]
    return losses


def check_expected(folder: Path) -> None:
    """Compares the metrics of a run with the numbers of its recipe, which its config has."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    done = json.loads((folder / "done.json").read_text())
    assert config["expected"]
    measured = {name: done["metrics"][name] for name in config["expected"]}
    assert measured == pytest.approx(config["expected"], rel=config["expected_within"])


@pytest.mark.slow  # first, because it takes longest
@pytest.mark.timeout(1200)
def test_the_three_stages_of_training_in_a_row(tmp_path):
    """Weights that a stage freezes equal those of the stage before, bit for bit."""
    folders = [tmp_path / name for name in ROW]
    losses = [train(ROW[0], folders[0], "scale=tiny")]
    check_expected(folders[0])
    for name, folder, before in zip(ROW[1:], folders[1:], folders, strict=False):
        losses.append(train(name, folder, "scale=tiny", f"init={before}"))
    aligned, tuned, preferred = map(weights, folders)

    kept = ("encoder.vision.", "encoder.visual_projection.", "encoder.text")
    frozen = {name for name in tuned if name.startswith(kept)}
    assert frozen == aligned.keys() & tuned.keys()
    assert all(torch.equal(tuned[name], aligned[name]) for name in frozen)

    assert preferred.keys() == tuned.keys()
    frozen = {name for name in tuned if not name.startswith("llm.")}
    assert all(torch.equal(preferred[name], tuned[name]) for name in frozen)
    # Each weight moves by less than 40 steps of 0.001. Any other start would be further away.
    moved = {name: (preferred[name] - tuned[name]).abs().max() for name in tuned.keys() - frozen}
    assert all(0 < change < 0.04 for change in moved.values())
    assert losses[2][0] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-5), "its reference"


@pytest.mark.slow  # a minute each
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name in SCALED if name != ROW[0]])
def test_a_recipe_gives_at_the_tiny_scale_what_it_says(name, tmp_path):
    train(name, tmp_path, "scale=tiny")
    check_expected(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_probe_gives_what_it_says(tmp_path):
    train("resume_probe", tmp_path)
    check_expected(tmp_path)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """The folder for `paths.data`, with the shards of the demo."""
    data = tmp_path_factory.mktemp("data")
    command = [sys.executable, "-m", "experiments.shards", "demo", str(data / "vniah")]
    subprocess.run(command, cwd=Path(__file__).parents[3], check=True)
    return data


@pytest.mark.slow  # three and seven minutes
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["vniah_d_tiny", "smollm2_lora"])
def test_a_recipe_gives_on_the_videos_of_the_demo_what_it_says(name, demo, tmp_path):
    train(name, tmp_path, f"paths.data={demo}")
    check_expected(tmp_path)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the weights by their names in the network."""
    state = read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]
    return {name.removeprefix("model."): value for name, value in state.items()}
