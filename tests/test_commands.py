"""The commands of the README and of docs/: all are accepted, and those of the README run in order.

A block ```sh runs as printed. A word behind `sh` says why a block does not run in the test: `make`
(it has its own job in CI), `hub` (it downloads), `cluster` (it needs SLURM or several GPUs).
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from experiments import CONFIG_DIR
from experiments.command.values import check_values

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
#: tests/test_extend.py adds the files of docs/extend.md first, and runs its commands.
PAGES = [
    ROOT / "README.md",
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.stem != "extend"),
]
_BLOCK = re.compile(r"^```sh(?: (\w+))?\n(.*?)^```$", flags=re.M | re.S)
_REASONS = {None, "make", "hub", "cluster"}
#: Options of Hydra that are no overrides.
_FLAGS = {"-m", "--multirun", "--dry-run"}


def blocks(page: Path) -> list[tuple[str | None, str]]:
    """Returns the reason not to run, or None, and the text of each block of commands."""
    return [(match[1], match[2]) for match in _BLOCK.finditer(page.read_text())]


def commands(page: Path) -> list[list[str]]:
    """Returns the words of each command that calls a program of ropelab, from its name on."""
    found = []
    for _, text in blocks(page):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            starts = [n for n, word in enumerate(words) if word.startswith("ropelab-")]
            found += [words[starts[0] :]] if starts else []
    return found


COMMANDS = {f"{page.stem}: {' '.join(words)}": words for page in PAGES for words in commands(page)}


class _ParsedError(Exception):
    """Ends a program after it has read its options."""


@pytest.fixture(name="parse")
def parse_fixture(monkeypatch, capsys):
    """`parse(program, words)` reads the options of a program with argparse, and stops there."""
    read = argparse.ArgumentParser.parse_args

    def stop(*arguments):
        read(*arguments)
        raise _ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)

    def parse(program, words):
        main = import_module(SCRIPTS[program].partition(":")[0]).main
        try:
            main(words)
        except _ParsedError:
            return
        except SystemExit:
            pytest.fail(capsys.readouterr().err)
        pytest.fail("it reads no options")

    return parse


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_block_that_does_not_run_says_why(page):
    assert {reason for reason, _ in blocks(page)} <= _REASONS


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_every_command_is_accepted(words, parse, compose, tmp_path):
    """Of a multirun, the job with the last value of each list. A word with `…` is left out."""
    program, *words = [word for word in words if "…" not in word]
    config = program.removeprefix("ropelab-")
    if not (CONFIG_DIR / f"{config}.yaml").is_file():
        parse(program, words)
        return
    words = [re.sub(r"=[^\[{]*,", "=", word) for word in words if word not in _FLAGS]
    words = [word.replace("experiment=local/mine", "experiment=my_videos") for word in words]
    # ropelab-evaluate replays the words of a run. Here the folder may have its recipe's name.
    for name in re.findall(r"\brun=runs/(\w+)/", " ".join(words)):
        if (CONFIG_DIR / "experiment" / f"{name}.yaml").is_file():
            words.insert(0, f"experiment={name}")
    check_values(compose(words, tmp_path, config))


@pytest.mark.slow  # twenty minutes
@pytest.mark.timeout(3600)
def test_the_readme_runs_from_top_to_bottom(tmp_path):
    """Every block that has no reason not to run, in one folder, in the printed order."""
    programs = Path(sys.executable).parent
    env = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    env |= {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    for reason, text in blocks(ROOT / "README.md"):
        if reason is None:
            done = subprocess.run(
                ["bash", "-euc", text], cwd=tmp_path, env=env, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            assert "%|" not in done.stdout + done.stderr  # a bar in a file
