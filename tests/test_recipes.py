"""Every twin of a recipe trains here as its own command says, and learns."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import CONFIG_DIR
from experiments.report_data import read_curves

NAMES = {path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml")}
TWINS = sorted(name for name in NAMES if name.removesuffix("_tiny") in NAMES - {name})


@pytest.mark.slow  # half a minute each
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", TWINS)
def test_a_twin_trains_and_learns(name, tmp_path):
    command = [sys.executable, "-m", "experiments.train", f"experiment={name}"]
    options = [f"hydra.run.dir={tmp_path}", "print_config=false"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    done = subprocess.run([*command, *options], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    print(f"{name}: {time.monotonic() - began:.0f} s")
    assert json.loads((tmp_path / "done.json").read_text())["steps"] > 0
    losses = [value for _, value in read_curves(tmp_path / "metrics.csv")["train/loss"]]
    assert losses[-1] < 0.8 * losses[0]
