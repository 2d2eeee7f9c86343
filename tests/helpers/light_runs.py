"""Starts multiruns of the light test program, waits for them, and reads their results."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn
from hydra.types import HydraContext, RunMode

from experiments import CONFIG_DIR
from experiments.launcher.local import LocalLauncher

ROOT = Path(__file__).parents[2]
LIGHT = ROOT / "tests" / "experiments" / "launcher" / "cluster"
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(name="start")
def start_fixture(tmp_path, monkeypatch) -> Iterator[Start]:
    """`start(*overrides)` starts a multirun of the light program in the test's own directory."""
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


def end(process: subprocess.Popen[str], code: int = 0, limit_s: float = 60) -> str:
    output, _ = process.communicate(timeout=limit_s)
    assert process.returncode == code, output
    return output


def interrupt_twice(sweep: subprocess.Popen[str], run: Callable[[int], Any]) -> None:
    """Presses Ctrl-C while job 0, which ignores signals, runs; and again after two more steps."""
    until(lambda: len(run(0).steps) > 2)
    sweep.send_signal(signal.SIGINT)
    counted = len(run(0).steps)
    until(lambda: len(run(0).steps) > counted + 2)
    sweep.send_signal(signal.SIGINT)
    end(sweep, 130)


def until(happens: Callable[[], object], limit_s: float = 60) -> None:
    end = time.monotonic() + limit_s
    while not happens():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def read_until(process: subprocess.Popen[str], text: str) -> None:
    """Reads the output of a program up to the line with `text`."""
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return
    raise AssertionError(f"no {text!r} in {''.join(lines)}")


@contextmanager
def stopped(pid: int) -> Iterator[int]:
    """Pauses a process (SIGSTOP) inside the block, without ending it."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


class Run:
    """The files that the light program left in a job's run directory."""

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


@pytest.fixture(name="run")
def run_fixture(tmp_path) -> Callable[[int], Run]:
    return lambda seed: Run(tmp_path, seed)


@pytest.fixture(name="launched")
def launched_fixture(tmp_path, monkeypatch) -> Callable[..., Sequence[JobReturn]]:
    """`launched(*seeds)` runs a launcher in this process and returns what a sweeper gets."""
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
