"""Reads the states of run directories. Reads only small files, and imports no torch."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.command.overrides import DELETED, read_overrides, show_value
from experiments.run import lock
from experiments.run.files import inside, read_yaml

#: Files that mark a run directory: written by a launcher for a job, and by a job that has started.
_MARKS = (".hydra/frozen.yaml", "config.yaml")

#: Folders that hold no runs and may be very large.
_NOT_RUNS = {".hydra", "slurm", "wandb"}

#: Overrides that do not change what a run computes.
_NOT_AXES = ("hydra", "paths", "logger", "callbacks", "launcher", "print_config", "resume", "name")
_NOT_AXES += ("expected", "expected_within")

#: Longest time in seconds without a heartbeat for a live run on a file system without locks.
_SILENCE_S = 60


@dataclass(frozen=True)
class RunState:
    """The state of one run directory.

    `state` is one of: done, running, stale (a process holds the lock but writes no heartbeat),
    queued, stopped (by a signal, a kill or the loss of its node), failed, damaged, not started.
    """

    folder: Path
    state: str
    overrides: dict[str, Any] = field(default_factory=dict)  # values by key or group
    step: int | None = None
    total_steps: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    last_sign: float | None = None  # time of the last heartbeat, in seconds since 1970
    starts: int = 0
    reason: str = ""

    def value(self, axis: str) -> str | None:
        """Returns the value of a factor as text, from the command line or from the config.

        It is None if the run has no such key.
        """
        if axis in self.overrides:
            value = self.overrides[axis]
            return None if value is DELETED else show_value(value)
        if axis in self.choices:
            return self.choices[axis]
        node: Any = self.config
        for key in axis.split("."):
            if not isinstance(node, dict) or key not in node:
                return None
            node = node[key]
        return show_value(node)

    @cached_property
    def choices(self) -> dict[str, str]:
        """The chosen option of every config group."""
        hydra = _mapping(self.folder, ".hydra/hydra.yaml") or self._frozen
        choices = hydra.get("hydra", {}).get("runtime", {}).get("choices", {})
        return {group: show_value(v) for group, v in choices.items() if "hydra" not in group}

    @cached_property
    def config(self) -> dict[str, Any]:
        return _mapping(self.folder, "config.yaml") or self._frozen

    @cached_property
    def _frozen(self) -> dict[str, Any]:
        return _mapping(self.folder, _MARKS[0])


def read_runs(roots: Iterable[Path], stale_after_s: float = 600) -> list[RunState]:
    """Returns every run at or below `roots`.

    Raises:
        ValueError: a root is missing or has no run.
    """
    folders: dict[Path, None] = {}
    for root in roots:
        if not root.is_dir():
            raise ValueError(f"no folder {str(root)!r}; name one that holds run directories")
        found = dict.fromkeys(_find(root))
        if not found:
            raise ValueError(f"no run in {str(root)!r}: a run is a folder with a config.yaml")
        folders |= found
    jobs = _live_jobs() if any((f / "slurm.json").is_file() for f in folders) else None
    return [_read(folder, jobs, stale_after_s) for folder in folders]


def differing_axes(runs: list[RunState]) -> dict[str, list[str | None]]:
    """Returns the overrides that differ between runs, `seed` last, with a value for each run."""
    keys = dict.fromkeys(key for run in runs for key in run.overrides)
    axes = [key for key in keys if key.partition(".")[0].partition("/")[0] not in _NOT_AXES]
    values = {axis: [run.value(axis) for run in runs] for axis in axes}
    differing = {axis: seen for axis, seen in values.items() if len(set(seen)) > 1}
    return dict(sorted(differing.items(), key=lambda item: item[0] == "seed"))


def _find(folder: Path) -> Iterator[Path]:
    if any((folder / mark).is_file() for mark in _MARKS):
        yield folder
        return
    for child in sorted(folder.iterdir()):
        if child.name not in _NOT_RUNS and child.is_dir() and not child.is_symlink():
            yield from _find(child)


def _read(folder: Path, jobs: set[str] | None, stale_after_s: float) -> RunState:
    try:
        overrides = _overrides(folder)
        status, done = _json(inside(folder, "status.json")), _json(inside(folder, "done.json"))
        if done:
            step, last_sign = done["steps"], (folder / "done.json").stat().st_mtime
            metrics, state = {**status.get("metrics", {}), **done["metrics"]}, "done"
        else:
            step, last_sign = status.get("step"), status.get("time")
            metrics = status.get("metrics", {})
            state = _unfinished(folder, status, jobs, stale_after_s)
    except (ValueError, KeyError, AttributeError) as error:
        return RunState(folder, "damaged", reason=str(error).splitlines()[0])
    return RunState(
        folder,
        state,
        overrides,
        step=step,
        total_steps=step if done else status.get("total_steps"),
        metrics=metrics,
        last_sign=last_sign,
        starts=status.get("starts", 0),
        reason=status.get("reason", "") if state in ("failed", "stopped") else "",
    )


def _unfinished(
    folder: Path, status: dict[str, Any], jobs: set[str] | None, stale_after_s: float
) -> str:
    age = time.time() - status.get("time", (folder / _mark(folder)).stat().st_mtime)
    if lock.holder(folder) is not None:
        return "running" if age < stale_after_s else "stale"
    if status.get("state") in ("failed", "stopped"):
        last = status["state"]
    elif status and not (folder / "run.lock").is_file() and age < _SILENCE_S:
        return "running"
    else:
        last = "stopped" if (folder / "config.yaml").is_file() else "not started"
    job = _json(inside(folder, "slurm.json")).get("job_id")
    queued = last == "not started" if jobs is None else job in jobs
    return "queued" if job and queued else last


def _mark(folder: Path) -> str:
    return next(mark for mark in reversed(_MARKS) if (folder / mark).is_file())


def _overrides(folder: Path) -> dict[str, Any]:
    lines = read_yaml(inside(folder, ".hydra/overrides.yaml"))
    if lines is None:
        frozen = read_yaml(inside(folder, _MARKS[0])) or {}
        lines = frozen.get("hydra", {}).get("overrides", {}).get("task", [])
    return read_overrides(lines)


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


def _mapping(folder: Path, name: str) -> dict[str, Any]:
    """Reads a YAML file of a run. An unreadable one counts as empty, so other runs are listed."""
    try:
        found = read_yaml(inside(folder, name))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
