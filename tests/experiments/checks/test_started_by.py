"""How a program was started, and as how many processes: torchrun, srun, mpirun, or by hand."""

import os
import subprocess
import sys
import time

import pytest

from experiments import (
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
from experiments.run import process

TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
SRUN = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}


@pytest.fixture(autouse=True)
def nobody(monkeypatch):
    """Removes all variables of launchers, whatever runs the tests."""
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
        ({"WORLD_SIZE": "2"}, 1),  # variables of a container; none of them is a rank
        (SRUN, 4),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, 1),
        # the shell of salloc, and a batch script: tasks are planned, this process is none of them
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, 1),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, 1),
        # srun --pty bash
        (SRUN | {"SLURM_JOB_NAME": "bash"}, 1),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, 3),
    ],
)
def test_how_many_were_started(variables, tasks, monkeypatch):
    pretend(monkeypatch, variables)
    assert process.launched_tasks() == tasks


@pytest.mark.parametrize(("variables", "name"), [(TORCHRUN, "torchrun"), (SRUN, "srun")])
def test_several_trainings_of_one_process_each_are_refused(variables, name, monkeypatch):
    pretend(monkeypatch, variables)
    process.refuse_lone_ranks(world_size=2)
    with pytest.raises(
        ValueError, match=f"{name}.* started .*trainer=ddp.* or start one"
    ) as caught:
        process.refuse_lone_ranks(world_size=1)
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
    monkeypatch.setattr(process, "_PATIENCE_S", 0.0)
    with pytest.raises(SystemExit, match="is one process, 2 were started: leave torchrun"):
        program.main([])


def test_a_rank_lets_rank_0_speak_first_and_speaks_where_it_did_not(monkeypatch):
    """torchrun kills rank 0 as soon as rank 1 ends, even if rank 0 has not begun."""
    monkeypatch.setattr(process, "_PATIENCE_S", 0.5)
    for rank, said, waits in ((0, "error: x", False), (1, "error: x", True), (2, 1, True)):
        began = time.monotonic()
        with pytest.raises(SystemExit) as caught:
            process.fail("error: x", rank)
        assert caught.value.code == said
        assert (time.monotonic() - began >= 0.5) == waits


def test_a_rank_of_a_rank_0_that_has_ended_says_nothing(monkeypatch):
    """Lightning's rank 0 has started the others, and has printed the line."""
    monkeypatch.setattr(process, "_PARENT", -1)
    with pytest.raises(SystemExit) as caught:
        process.fail("error: x", 1)
    assert caught.value.code == 1


def test_torchrun_shows_why_a_training_is_refused(tmp_path):
    """Rank 0 is late, as on a busy machine. Rank 1 is refused long before."""
    late = tmp_path / "late.py"
    late.write_text(
        "import os, sys, time\n"
        "from experiments.run import process\n"
        "if os.environ['RANK'] == '0': time.sleep(2)\n"
        "process.run_alone('this')\n"
    )
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", str(late)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.count("error: this is one process, 2 were started") == 1


def test_programs_of_hydra_are_one_process(compose, tmp_path, monkeypatch):
    """A multirun is a single process, too: its jobs are processes of their own."""
    config = compose(["experiment=resume_probe", "output=out"], tmp_path, "reference")
    monkeypatch.setattr(sys, "argv", ["ropelab", "-m"])
    pretend(monkeypatch, TORCHRUN)
    for begin in (plan.main, start.main, lambda: reference.main.__wrapped__(config)):
        with pytest.raises(SystemExit, match="is one process, 2 were started"):
            begin()
