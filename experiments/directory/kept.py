"""Keeps a backup of what a command replaces in a run directory, until its first step is done.

claim      copies config.yaml, done.json, … to .before/; with resume=false, moves everything there
fit        after the first step: removes .before/
           on a failure before it: restores the files from .before/
kill -9    the next command in this directory restores them before it reads anything
"""

import shutil
from pathlib import Path

from experiments.directory.former import LEFTOVERS

_FOLDER = ".before"
_MOVED = "moved"  # this empty file in the backup says: all leftovers have been moved
_RETURNING = "returning"  # this empty file in the backup says: newer files have been removed

#: Files and folders that every command writes again.
_REPLACED = (
    "config.yaml",
    "command.txt",
    "versions.json",
    ".hydra",
    "run_id",
    "done.json",
    "status.json",
)


def set_aside(run: Path, anew: bool) -> None:
    """Makes the backup of the run directory `run`.

    Args:
        anew: whether the command starts anew. If so, everything an earlier run left is moved away.
    """
    kept = run / _FOLDER
    partial = run / f"{_FOLDER}.partial"
    _remove(partial)
    partial.mkdir()
    for name in _REPLACED:
        if (run / name).is_dir():
            shutil.copytree(run / name, partial / name, symlinks=True)
        elif (run / name).is_file():
            shutil.copy2(run / name, partial / name)
    partial.rename(kept)
    if anew:
        for name in LEFTOVERS:
            if (run / name).exists():
                if name in _REPLACED:
                    _remove(run / name)
                else:
                    (run / name).rename(kept / name)
        (kept / _MOVED).touch()


def give_back(run: Path) -> None:
    """Restores the backup if there is one. A kill in between loses nothing."""
    _remove(run / f"{_FOLDER}.partial")
    kept = run / _FOLDER
    if kept.is_symlink():  # not made by a command: its target does not belong to the run
        kept.unlink()
    if not kept.is_dir():
        return
    if not (kept / _RETURNING).exists():
        made = {*_REPLACED, *(LEFTOVERS if (kept / _MOVED).exists() else ())}
        for name in made:
            if not (kept / name).exists():
                _remove(run / name)
        (kept / _RETURNING).touch()
    for name in {*LEFTOVERS, *_REPLACED}:
        if (kept / name).exists():
            _remove(run / name)
            (kept / name).rename(run / name)
    forget(run)


def forget(run: Path) -> None:
    """Removes the backup."""
    kept = run / _FOLDER
    if kept.is_dir():
        # Renamed first, so that a kill in between leaves no half backup to restore.
        gone = run / f"{_FOLDER}.partial"
        _remove(gone)
        kept.rename(gone)
        _remove(gone)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
