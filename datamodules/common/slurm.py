"""Asks SLURM about the job of this process. Imports no torch."""

import math
import os
import re
import subprocess


def this_job() -> str | None:
    """Returns the SLURM job of this process; in an array, the one task and not the whole array."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def show_job(job: str) -> dict[str, str]:
    """Returns what SLURM knows about a job, by field; empty if it does not answer."""
    return dict(re.findall(r"(\w+)=(\S*)", scontrol("show", "job", "-o", job).stdout))


def is_cancelled(job: dict[str, str]) -> bool:
    """Returns whether a user has cancelled a running job or requeued it.

    Args:
        job: result of `show_job`.
    """
    # A preempted job is RUNNING until its grace time ends. A job that was cancelled or requeued by
    # somebody else is COMPLETING. So is a job at its time limit: its run time equals the limit.
    ending = job.get("JobState", "RUNNING") not in ("RUNNING", "SUSPENDED", "STOPPED", "TIMEOUT")
    return ending and seconds(job["RunTime"]) < seconds(job["TimeLimit"])


def scontrol(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `scontrol`. Its return code is 1 if there is no such program or no answer."""
    command = ["scontrol", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def seconds(duration: str) -> float:
    """Converts `[days-]hours:minutes:seconds` to seconds. Other text (UNLIMITED) is infinity."""
    parts = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", duration)
    if parts is None:
        return math.inf
    days, hours, minutes, rest = (int(part or 0) for part in parts.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + rest)
