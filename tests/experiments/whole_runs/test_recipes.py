"""Every twin of a recipe trains here as its own command says, and learns."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from experiments import CONFIG_DIR
from experiments.run.files import read_curves
from lightning_modules.checkpoint.weights import read_checkpoint

NAMES = {path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml")}
TWINS = sorted(name for name in NAMES if name.removesuffix("_tiny") in NAMES - {name})

#: Each starts from the run of the one before.
ROW = ("clip_context_tiny", "ppllava_vicuna7b_video_tiny", "ppllava_dpo_tiny")


def train(name: str, folder: Path, *options: str) -> list[float]:
    """Trains as a user would, in a process of its own; the losses of training."""
    command = [sys.executable, "-m", "experiments.train", f"experiment={name}", *options]
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


@pytest.mark.slow  # first, as it takes longest
@pytest.mark.timeout(1200)
def test_the_three_stages_of_training_in_a_row(tmp_path):
    """What a stage freezes is to the bit what the stage before has learnt."""
    folders = [tmp_path / name for name in ROW]
    losses = [train(ROW[0], folders[0])]
    for name, folder, before in zip(ROW[1:], folders[1:], folders, strict=False):
        losses.append(train(name, folder, f"init={before}"))
    aligned, tuned, preferred = map(weights, folders)

    kept = ("encoder.vision.", "encoder.visual_projection.", "encoder.text")
    frozen = {name for name in tuned if name.startswith(kept)}
    assert frozen == aligned.keys() & tuned.keys()
    assert all(torch.equal(tuned[name], aligned[name]) for name in frozen)

    assert preferred.keys() == tuned.keys()
    frozen = {name for name in tuned if not name.startswith("llm.")}
    assert all(torch.equal(preferred[name], tuned[name]) for name in frozen)
    # Each weight by less than 40 steps of 0.001: from anywhere else it would be further.
    moved = {name: (preferred[name] - tuned[name]).abs().max() for name in tuned.keys() - frozen}
    assert all(0 < change < 0.04 for change in moved.values())
    assert losses[2][0] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-5), "its reference"


@pytest.mark.slow  # a minute each
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name in TWINS if name not in ROW])
def test_a_twin_trains_and_learns(name, tmp_path):
    train(name, tmp_path)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """By the names that they have in the network."""
    state = read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]
    return {name.removeprefix("model."): value for name, value in state.items()}
