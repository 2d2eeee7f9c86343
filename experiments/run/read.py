"""Reads the states of run directories. Reads only small files, and imports no torch."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.run import lock
from experiments.run.files import inside
from experiments.run.settings import CONFIG_FILE, FROZEN_FILE, Settings, find_runs

#: States that a run writes when it ends before its end, with a reason.
ENDED_EARLY = ("stopped", "cancelled", "preempted", "failed")

#: Longest time in seconds without a heartbeat for a live run on a file system without locks.
_SILENCE_S = 60


@dataclass(frozen=True)
class RunState:
    """The state of one run directory.

    `state` is one of: done, running, stale (a process holds the lock but writes no heartbeat),
    queued, stopped (by Ctrl-C, a kill or the loss of its node), cancelled (by the user), preempted
    (by the scheduler), failed, damaged, not started. `reason` says more about how it ended.
    """

    folder: Path
    state: str
    settings: Settings
    step: int | None = None
    total_steps: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    last_sign: float | None = None  # time of the last heartbeat, in seconds since 1970
    starts: int = 0
    reason: str = ""


def read_runs(roots: Iterable[Path], stale_after_s: float = 600) -> list[RunState]:
    """Returns every run at or below `roots`.

    Raises:
        ValueError: a root is missing or has no run.
    """
    folders = find_runs(roots)
    jobs = _live_jobs() if any((f / "slurm.json").is_file() for f in folders) else None
    return [_read(folder, jobs, stale_after_s) for folder in folders]


def _read(folder: Path, jobs: set[str] | None, stale_after_s: float) -> RunState:
    try:
        settings = Settings.read(folder, strict=False)
        status, done = _json(inside(folder, "status.json")), _json(inside(folder, "done.json"))
        if done:
            step, last_sign = done["steps"], (folder / "done.json").stat().st_mtime
            metrics, state, reason = {**status.get("metrics", {}), **done["metrics"]}, "done", ""
        else:
            step, last_sign = status.get("step"), status.get("time")
            metrics = status.get("metrics", {})
            state, reason = _unfinished(folder, status, jobs, stale_after_s)
    except (ValueError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        return RunState(folder, "damaged", Settings(folder, {}, strict=False), reason=reason)
    return RunState(
        folder,
        state,
        settings,
        step=step,
        total_steps=step if done else status.get("total_steps"),
        metrics=metrics,
        last_sign=last_sign,
        starts=status.get("starts", 0),
        reason=reason,
    )


def _unfinished(
    folder: Path, status: dict[str, Any], jobs: set[str] | None, stale_after_s: float
) -> tuple[str, str]:
    """Returns the state of a run without `done.json`, and the reason why it ended."""
    age = time.time() - status.get("time", (folder / _mark(folder)).stat().st_mtime)
    if lock.holder(folder) is not None:
        return ("running" if age < stale_after_s else "stale"), ""
    last, reason = "not started", ""
    if status.get("state") in ENDED_EARLY:
        last, reason = status["state"], status.get("reason", "")
    elif status and not (folder / "run.lock").is_file() and age < _SILENCE_S:
        return "running", ""
    elif (folder / "config.yaml").is_file():
        last, reason = "stopped", "killed" if status else "no step"
    job = _json(inside(folder, "slurm.json")).get("job_id")
    queued = last == "not started" if jobs is None else job in jobs
    return ("queued", "") if job and queued else (last, reason)


def _mark(folder: Path) -> str:
    return CONFIG_FILE if (folder / CONFIG_FILE).is_file() else FROZEN_FILE


def _live_jobs() -> set[str] | None:
    """Returns the SLURM jobs and array tasks of this user, or None if squeue gives no answer."""
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--me", "--array", "--noheader", "--format=%i"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return None
    return set(shown.stdout.split()) if shown.returncode == 0 else None


def _json(path: Path) -> dict[str, Any]:
    """Reads a JSON file. The result is empty if there is no such file.

    Raises:
        ValueError: the file is not valid JSON.
    """
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is not valid JSON, line {error.lineno}") from error
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None
