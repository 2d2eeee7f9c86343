"""Keeps what a command replaces in a run directory, until the command has taken its first step.

claim      config.yaml, done.json, …  are copied to .before/; with resume=false, all is moved there
fit        the first step is done: .before/ is removed
           anything fails before: what lies in .before/ comes back
kill -9    the next command in this directory brings it back before it looks at anything
"""

import shutil
from pathlib import Path

from experiments.directory.former import LEFTOVERS

_FOLDER = ".before"
_MOVED = "moved"  # an empty file in it: all leftovers have been moved
_RETURNING = "returning"  # an empty file in it: what was made since is removed

#: What every command writes anew.
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
    """Keeps what the run directory `run` has.

    Args:
        anew: the command starts anew, so that everything an earlier run left is moved away.
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
    """Brings back what was set aside, where anything was. A kill on the way loses nothing."""
    _remove(run / f"{_FOLDER}.partial")
    kept = run / _FOLDER
    if kept.is_symlink():  # no command has made it: what it leads to is not the run's
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
    _remove(kept)


def forget(run: Path) -> None:
    """Removes what was set aside."""
    kept = run / _FOLDER
    if kept.is_dir():
        # Renamed first: a kill on the way must not leave half of it to be given back.
        gone = run / f"{_FOLDER}.partial"
        _remove(gone)
        kept.rename(gone)
        _remove(gone)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
