"""What a process does last on a machine that may be taken away."""

import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import NoReturn

logger = logging.getLogger(__name__)

#: Seconds that other ranks give rank 0 to say why all of them end.
_PATIENCE_S = 5.0
_PARENT = os.getppid()
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def leave(reason: str, rank: int) -> int:
    """The exit code of a process that was told to go before it was finished.

    It is 75 (EX_TEMPFAIL): come back later. In a batch job of SLURM rank 0 asks for the job to be
    queued again, unless the user has cancelled it. Everything must have been saved before, for
    SLURM then kills what is left of the job.

    `reason` goes into the log alone, `rank` is the global one.
    """
    for number in _SIGNALS:  # a job that is queued again is killed, which is no news
        signal.signal(number, signal.SIG_IGN)
    job = _slurm_job()
    if job and rank == 0:
        logger.warning("%s: %s", reason, requeue(job))
    return exit_code(os.EX_TEMPFAIL, rank)


def exit_code(code: int, rank: int) -> int:
    """`code`, or 0 where it would do harm.

    Rank 0 is killed as soon as another rank ends with a code that is not 0, by Lightning that has
    started it or by srun --kill-on-bad-exit; torchrun goes by the codes of all.
    """
    return 0 if rank and "TORCHELASTIC_RUN_ID" not in os.environ else code


def fail(line: str, rank: int) -> NoReturn:
    """Ends a process of a program that is refused; all of its ranks together say one line.

    Rank 0 says it. The others wait, for rank 0 is killed as soon as one of them ends: see
    `exit_code`. Whoever started them ends them meanwhile. Where nobody did, rank 1 says it too.
    """
    deadline = time.monotonic() + (_PATIENCE_S if rank else 0)
    while time.monotonic() < deadline:
        if os.getppid() != _PARENT:  # rank 0 of Lightning's, which has ended
            sys.exit(1)
        time.sleep(0.1)
    sys.exit(line if rank < 2 else 1)


def leave_on_signals() -> None:
    """From now on, until other handlers are set: a process that starts has nothing to save."""
    for number in _SIGNALS:
        signal.signal(number, _leave_at_once)


def _leave_at_once(number: int, frame: FrameType | None) -> None:
    os._exit(leave(signal.Signals(number).name, process_rank()))


def requeue(job: str) -> str:
    """Has the running batch job `job` queued again where that may be; says what became of it."""
    shown = _scontrol("show", "job", "-o", job)
    field = dict(re.findall(r"(\w+)=(\S*)", shown.stdout))
    # A preempted job is RUNNING until its grace is over. One that was cancelled, or queued again by
    # somebody else, is COMPLETING; so is one whose time is over, which has run as long as it may.
    ending = field.get("JobState", "RUNNING") not in ("RUNNING", "SUSPENDED", "STOPPED", "TIMEOUT")
    if ending and _seconds(field["RunTime"]) < _seconds(field["TimeLimit"]):
        return f"job {job} was cancelled, and stays so"
    if field.get("BatchFlag") == "0":
        return f"job {job} is interactive: the same command goes on"
    asked = _scontrol("requeue", job)
    if asked.returncode:
        why = asked.stderr.strip() or shown.stderr.strip()
        return f"job {job} is not queued again ({why}): submit it again with --requeue"
    return f"job {job} is queued again"


def _seconds(duration: str) -> float:
    """Of `[days-]hours:minutes:seconds`; anything else, such as UNLIMITED, never ends."""
    parts = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", duration)
    if parts is None:
        return math.inf
    days, hours, minutes, seconds = (int(part or 0) for part in parts.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def process_rank() -> int:
    """The global rank of this process before anything distributed is set up."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def launched_tasks() -> int:
    """How many processes torchrun, srun or mpirun started this program as.

    1 for a program that was typed, also in a shell that SLURM has opened on a node.
    """
    tasks = "RANK" in os.environ and os.environ.get("WORLD_SIZE")
    if not tasks and "SLURM_PROCID" in os.environ:
        # Of the step, which only srun sets: a batch script and the shell of salloc have one task.
        # Lightning, too, takes a job of these names for a shell.
        shell = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
        tasks = None if shell else os.environ.get("SLURM_STEP_NUM_TASKS")
    tasks = tasks or os.environ.get("OMPI_COMM_WORLD_SIZE") or "1"
    return int(tasks) if tasks.isdecimal() else 1


def refuse_lone_ranks(world_size: int = 1) -> None:
    """Refuses several processes of a program that does not share its work among them.

    Args:
        world_size: processes that the program shares its work among.

    Raises:
        ValueError: each of the processes would do the same work, and write the same files.
    """
    tasks = launched_tasks()
    if world_size > 1 or tasks == 1:
        return
    launcher = "torchrun" if "RANK" in os.environ else "srun or mpirun"
    raise ValueError(
        f"{launcher} started {tasks} processes, and each would do all the work: choose trainer=ddp "
        f"or trainer=fsdp, or start one process without {launcher}"
    )


def run_alone(program: str) -> None:
    """Ends a program that is one process if torchrun or srun started several; else does nothing."""
    if (tasks := launched_tasks()) > 1:
        line = f"error: {program} is one process, {tasks} were started: leave torchrun or srun out"
        fail(line, process_rank())


def _slurm_job() -> str | None:
    """The job this process is part of; a task of an array by itself, not the whole array."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def _scontrol(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["scontrol", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))
