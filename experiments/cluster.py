"""What a process does last on a machine that may be taken away."""

import logging
import os
import re
import subprocess

logger = logging.getLogger(__name__)


def leave(reason: str, rank: int) -> int:
    """The exit code of a process that was told to go before it was finished.

    It is 75 (EX_TEMPFAIL): come back later. In a batch job of SLURM rank 0 asks for the job to be
    queued again, unless the user has cancelled it. Everything must have been saved before, for
    SLURM then kills what is left of the job.

    `reason` goes into the log alone, `rank` is the global one.
    """
    job = _slurm_job()
    if job and rank == 0:
        logger.warning("%s: %s", reason, requeue(job))
    # Rank 0 is killed as soon as another rank ends with a code that is not 0, by Lightning which has
    # started it or by srun --kill-on-bad-exit; torchrun starts only those again that have one.
    return 0 if rank and "TORCHELASTIC_RUN_ID" not in os.environ else os.EX_TEMPFAIL


def requeue(job: str) -> str:
    """Has the running batch job `job` queued again where that may be; says what became of it."""
    shown = _scontrol("show", "job", "-o", job)
    state = dict(re.findall(r"(\w+)=(\S*)", shown.stdout))
    if state.get("JobState") == "CANCELLED":
        return f"job {job} was cancelled, and stays so"
    if state.get("BatchFlag") == "0":
        return f"job {job} is interactive: the same command goes on"
    asked = _scontrol("requeue", job)
    if asked.returncode:
        why = asked.stderr.strip() or shown.stderr.strip()
        return f"job {job} is not queued again ({why}): submit it again with --requeue"
    return f"job {job} is queued again"


def process_rank() -> int:
    """The global rank of this process before anything distributed is set up."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


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
