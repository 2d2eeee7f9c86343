"""Benchmarks the start of a job: until its first optimizer step, forked or as a process of its own.

The job is the demo's recipe with a small batch and W&B offline. A multirun on the CPU forks its
jobs from a template that has imported PyTorch. The template starts once, and is ready before the
clock starts. `floor` is a process that only imports torch, lightning and transformers.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Row, at_most, table
from lightning import Callback

from datamodules.shards.demo import write_demo
from experiments.launcher.warm.forks import Template, start_process

FOLDER = Path(__file__).resolve().parent
PROGRAM, LIBRARIES = "experiments.start", "import torch, lightning, transformers"
SMALL = ["global_batch_size=4", "batch_size=4", "training.samples=16"]
REPEATS = 5


class Clock(Callback):
    """Writes the time of the first optimizer step into `path`, in seconds since 1970."""

    def __init__(self, path: str):
        self.path = Path(path)

    def on_before_optimizer_step(self, *_: Any) -> None:
        if not self.path.exists():
            self.path.write_text(repr(time.time()))


def run(repeats: int = REPEATS) -> list[Row]:
    environment = {"PYTHONPATH": f"{FOLDER.parent}{os.pathsep}{FOLDER}", "WANDB_MODE": "offline"}
    times: dict[str, list[float]] = {"forked": [], "process": [], "floor": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_demo(folder / "vniah")
        template = Template(PROGRAM, environment)
        try:
            first_step(template.start, folder / "first", environment)  # waits until it is ready
            for repeat in range(repeats):
                for way, start in (("forked", template.start), ("process", start_process)):
                    taken = first_step(start, folder / f"{way}{repeat}", environment)
                    times[way].append(taken)
                began = time.time()
                subprocess.run([sys.executable, "-c", LIBRARIES], check=True)
                times["floor"].append(time.time() - began)
        finally:
            template.close()
    best = {way: 1000 * min(taken) for way, taken in times.items()}
    name = "start of a job until its first step"
    return [
        at_most(f"{name}, forked", best["forked"], best["process"], share=0.5, unit="ms"),
        at_most(f"{name}, against imports alone", best["forked"], best["floor"], 1.0, "ms"),
    ]


def first_step(start: Callable[..., Any], folder: Path, environment: dict[str, str]) -> float:
    """Returns the seconds from the start of a job to its first optimizer step."""
    folder.mkdir()
    words = [
        "experiment=vniah_d_tiny",
        f"paths.data={folder.parent}",
        f"hydra.run.dir={folder}/run",
    ]
    words += ["trainer.max_steps=1", "test=false", *(f"data.{word}" for word in SMALL)]
    words += ["+callbacks.clock._target_=startup.Clock", f"+callbacks.clock.path={folder}/clock"]
    with (folder / "log").open("w") as output:
        began = time.time()
        wait(start([sys.executable, "-m", PROGRAM, *words], environment, output))
    return float((folder / "clock").read_text()) - began


def wait(job: Any) -> None:
    while job.poll() is None:
        time.sleep(0.02)
    if job.returncode:
        raise RuntimeError(f"the job has ended with exit code {job.returncode}")


if __name__ == "__main__":
    print(table(run()))
