"""ropelab-train as a batch job of two ranks."""

import csv
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[4]

SCRIPT = """#!/bin/bash
#SBATCH --ntasks-per-node=2 --requeue --open-mode=append --output={folder}/job.log
srun --kill-on-bad-exit=1 {command} hydra.run.dir={folder}
"""


@pytest.fixture
def submit(cluster, tiny, monkeypatch):
    """`submit(folder, partition)` submits a run of 40 steps by sbatch and srun; returns its id."""
    for name, value in {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",  # no name server knows the nodes
        "GLOO_SOCKET_IFNAME": "lo",
    }.items():
        monkeypatch.setenv(name, value)
    options = ["trainer=ddp_sim", "data.global_batch_size=8", "data.training.samples=320"]
    options += ["test=false"]
    command = [sys.executable, "-m", "experiments.start", *tiny, *options]
    quoted = " ".join(f"'{word}'" for word in command)

    def begin(folder: Path, partition: str) -> str:
        folder.mkdir()
        script = folder / "job.sh"
        script.write_text(SCRIPT.format(folder=folder, command=quoted))
        return cluster.ask("sbatch", "--parsable", f"--partition={partition}", str(script))

    return begin


def train_steps(folder: Path) -> list[int]:
    path = folder / "metrics.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row.get("train/loss")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", ["scancel --signal=USR1", "preemption"])
def test_a_run_that_is_queued_again_ends_like_one_that_is_not(
    how, cluster, submit, until, tmp_path
):
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    job, other = submit(cut, "low"), submit(whole, "high")
    until(lambda: len(train_steps(cut)) > 4 or cluster.state(job) == "FAILED")
    assert cluster.state(job) == "RUNNING", (cut / "job.log").read_text()
    if how == "preemption":  # one of 8 cores more than the runs leave
        cluster.ask("srun", "--partition=high", "--ntasks=5", "true")
    else:
        cluster.ask("scancel", "--signal=USR1", job)
    done = [folder / "done.json" for folder in (cut, whole)]
    until(lambda: all(path.is_file() for path in done) or cluster.state(job) == "FAILED", 270)
    assert all(path.is_file() for path in done), (cut / "job.log").read_text()
    until(lambda: cluster.state(job) == cluster.state(other) == "COMPLETED")
    log = (cut / "job.log").read_text()
    assert f"job {job} is requeued" in log
    assert f"Requeuing JobId={job}" in cluster.log()
    assert "Restarts=1" in cluster.ask("scontrol", "show", "job", job)
    assert train_steps(cut) == train_steps(whole) == list(range(40))
    torch.testing.assert_close(weights(cut), weights(whole), rtol=0, atol=0)
