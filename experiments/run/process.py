"""Exit codes, signals and requeues of processes, and checks of how many processes were started."""

import logging
import os
import signal
import sys
import time
from types import FrameType
from typing import NoReturn

from datamodules.common import slurm

logger = logging.getLogger(__name__)

#: Seconds that the other ranks wait for rank 0 to print the error.
_PATIENCE_S = 5.0
_PARENT = os.getppid()
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def leave(reason: str, rank: int) -> int:
    """Returns the exit code of a process that was stopped before its end; requeues a SLURM job.

    The code is 75 (EX_TEMPFAIL, "try again later"). In a SLURM batch job, rank 0 requeues the job
    unless the user has cancelled it. Save everything before: SLURM then kills the rest of the job.

    Args:
        reason: text for the log.
        rank: global rank.
    """
    for number in _SIGNALS:  # SLURM signals a requeued job again, and this process ends anyway
        signal.signal(number, signal.SIG_IGN)
    job = slurm.this_job()
    if job and rank == 0:
        logger.warning("%s: %s", reason, requeue(job))
    return exit_code(os.EX_TEMPFAIL, rank)


def exit_code(code: int, rank: int) -> int:
    """Returns `code` on rank 0 and under torchrun, else 0.

    Lightning and srun --kill-on-bad-exit kill rank 0 as soon as another rank ends with a nonzero
    code. Only torchrun needs the codes of all ranks.
    """
    return 0 if rank and "TORCHELASTIC_RUN_ID" not in os.environ else code


def fail(line: str, rank: int) -> NoReturn:
    """Ends this process with an error line that only one rank prints.

    Rank 0 prints it. The other ranks wait, because rank 0 may be killed when one of them ends (see
    `exit_code`). Usually their parent ends them meanwhile. If it does not, rank 1 prints the line
    too.
    """
    deadline = time.monotonic() + (_PATIENCE_S if rank else 0)
    while time.monotonic() < deadline:
        if os.getppid() != _PARENT:  # the parent was Lightning's rank 0, and it has ended
            sys.exit(1)
        time.sleep(0.1)
    sys.exit(line if rank < 2 else 1)


def leave_on_signals() -> None:
    """Makes stop signals end the process at once. While it starts it has nothing to save.

    Handlers that are set later replace this.
    """
    for number in _SIGNALS:
        signal.signal(number, _leave_at_once)


def _leave_at_once(number: int, frame: FrameType | None) -> None:
    os._exit(leave(signal.Signals(number).name, process_rank()))


def requeue(job: str) -> str:
    """Requeues the running batch job `job` if allowed, and returns a line about the result."""
    field = slurm.show_job(job)
    if slurm.is_cancelled(field):
        return f"job {job} was cancelled and is not requeued"
    if field.get("BatchFlag") == "0":
        return f"job {job} is interactive: run the same command again to go on"
    asked = slurm.scontrol("requeue", job)
    if asked.returncode:
        why = asked.stderr.strip()
        return f"job {job} was not requeued ({why}): submit it again with --requeue"
    return f"job {job} is requeued"


def process_rank() -> int:
    """Returns the global rank of this process, before torch.distributed is set up."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def launched_tasks() -> int:
    """Returns the number of processes that torchrun, srun or mpirun started.

    It is 1 for a program that a user typed, also in a shell that SLURM opened on a node.
    """
    tasks = "RANK" in os.environ and os.environ.get("WORLD_SIZE")
    if not tasks and "SLURM_PROCID" in os.environ:
        # Tasks of the SLURM step, which only srun sets. A batch script and the shell of salloc have
        # one task. Lightning also treats jobs with these names as shells.
        shell = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
        tasks = None if shell else os.environ.get("SLURM_STEP_NUM_TASKS")
    tasks = tasks or os.environ.get("OMPI_COMM_WORLD_SIZE") or "1"
    return int(tasks) if tasks.isdecimal() else 1


def refuse_lone_ranks(world_size: int = 1) -> None:
    """Refuses several processes if the program does not share its work among them.

    Args:
        world_size: number of processes that share the work.

    Raises:
        ValueError: each process would do the same work and write the same files.
    """
    tasks = launched_tasks()
    if world_size > 1 or tasks == 1:
        return
    launcher = "torchrun" if "RANK" in os.environ else "srun or mpirun"
    raise ValueError(
        f"{launcher} started {tasks} processes, and each would do all the work: choose trainer=ddp "
        f"or trainer=fsdp, or start one process without {launcher}"
    )


def end_with_the_reader() -> None:
    """Lets a program that only prints end without a word when its reader ends: `… | head`."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def run_alone(program: str) -> None:
    """Ends a single-process program with an error if torchrun or srun started several processes."""
    if (tasks := launched_tasks()) > 1:
        line = f"error: {program} is one process, {tasks} were started: leave torchrun or srun out"
        fail(line, process_rank())
