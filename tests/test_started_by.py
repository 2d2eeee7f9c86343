"""Who started a program, and as how many processes: torchrun, srun, mpirun, or a person."""

import os
import sys

import pytest

from experiments import (
    cluster,
    dashboard,
    export,
    import_weights,
    plan,
    reference,
    report,
    runs,
    shards,
    start,
)

TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
SRUN = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}


@pytest.fixture(autouse=True)
def nobody(monkeypatch):
    """No launcher, whatever runs the tests."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_")) or name in TORCHRUN:
            monkeypatch.delenv(name)


def pretend(monkeypatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "tasks"),
    [
        ({}, 1),
        (TORCHRUN, 2),
        (TORCHRUN | {"WORLD_SIZE": "1"}, 1),
        ({"WORLD_SIZE": "2"}, 1),  # of a container; nothing has a rank
        (SRUN, 4),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, 1),
        # the shell of salloc, and a batch script: tasks are planned, and this is none of a step
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, 1),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, 1),
        # srun --pty bash
        (SRUN | {"SLURM_JOB_NAME": "bash"}, 1),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, 3),
    ],
)
def test_how_many_were_started(variables, tasks, monkeypatch):
    pretend(monkeypatch, variables)
    assert cluster.launched_tasks() == tasks


@pytest.mark.parametrize(("variables", "name"), [(TORCHRUN, "torchrun"), (SRUN, "srun")])
def test_several_trainings_of_one_process_each_are_refused(variables, name, monkeypatch):
    pretend(monkeypatch, variables)
    cluster.refuse_lone_ranks(world_size=2)
    with pytest.raises(
        ValueError, match=f"{name}.* started .*trainer=ddp.* or start one"
    ) as caught:
        cluster.refuse_lone_ranks(world_size=1)
    assert "\n" not in str(caught.value)


def test_training_is_refused_before_it_writes(run_train, tmp_path, monkeypatch):
    pretend(monkeypatch, TORCHRUN)
    with pytest.raises(SystemExit, match=r"error: torchrun started 2 processes.*trainer=ddp"):
        run_train(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"run.lock"}


@pytest.mark.parametrize("program", [dashboard, export, import_weights, report, runs, shards])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_other_programs_are_one_process(program, rank, monkeypatch):
    pretend(monkeypatch, TORCHRUN | {"RANK": str(rank)})
    with pytest.raises(SystemExit) as caught:
        program.main([])
    said = str(caught.value)
    assert said == "1" if rank else "is one process, 2 were started: leave torchrun" in said


def test_programs_of_hydra_are_one_process(compose, tmp_path, monkeypatch):
    """A multirun is started once, too: its jobs are processes of their own."""
    config = compose(["experiment=resume_probe", "output=out"], tmp_path, "reference")
    monkeypatch.setattr(sys, "argv", ["ropelab", "-m"])
    pretend(monkeypatch, TORCHRUN)
    for begin in (plan.main, start.main, lambda: reference.main.__wrapped__(config)):
        with pytest.raises(SystemExit, match="is one process, 2 were started"):
            begin()
