"""Output of ropelab-train before it trains: its help, its config."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import CONFIG_DIR

ROOT = Path(__file__).parents[2]


def start(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", "experiments.start", *words]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("words", [["--help"], ["--cfg", "job"], ["--cfg=job"], ["--version"]])
def test_what_is_only_shown_needs_no_pytorch(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = start(*words)
    assert done.returncode == 0, done.stderr[-1000:]
    imported = set(re.findall(r"\|\s+(\w+)$", done.stderr, flags=re.M))
    assert "hydra" in imported
    assert not imported & {"torch", "lightning", "transformers", "wandb"}
    assert not list(tmp_path.iterdir())


def test_help_has_a_line_for_every_group_and_no_other():
    text = start("--help").stdout
    told = set(re.findall(r"^  (\w+) {2,}\S", text, flags=re.M))
    assert told == {path.name for path in CONFIG_DIR.iterdir() if path.is_dir()} - {"local"}
    commands = re.findall(r"^  (ropelab-train .*?) {2,}", text, flags=re.M)
    assert len(commands) == 5
    for option in re.findall(r"(?:experiment|rotary)=([\w,]+)", " ".join(commands)):
        for word in option.split(","):
            assert list(CONFIG_DIR.glob(f"*/{word}.yaml")), word
