"""Makes the directory of a run, and removes it again if the command was refused."""

import shutil
from pathlib import Path

#: The directory that this process has made, and the highest folder that it made for it.
_made: dict[Path, Path] = {}

#: Files of a command that was refused before it wrote anything else.
_TRACES = ("run.lock", "*.log")

#: Files with results of an evaluation.
_RESULTS = ("done.json", "needle.json", "scores.json")


def make(folder: Path) -> None:
    """Creates a folder and its parents, and remembers which of them were missing.

    Raises:
        OSError: it cannot be created.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    if missing:
        _made[folder.absolute()] = missing[-1].absolute()


def remove_unused(folder: Path, evaluation: bool) -> None:
    """Removes a run directory that this process has made and that holds nothing of use.

    Args:
        evaluation: whether it is the directory of an evaluation, which is of no use without
            results. A training can go on from the rest of its files.
    """
    folder = folder.absolute()
    if (top := _made.pop(folder, None)) is None or not folder.is_dir():
        return
    if evaluation:
        useless = not any((folder / name).exists() for name in _RESULTS)
    else:
        useless = all(any(path.match(trace) for trace in _TRACES) for path in folder.iterdir())
    if not useless:
        return
    shutil.rmtree(folder, ignore_errors=True)
    while folder != top and folder.parent.is_dir() and not any(folder.parent.iterdir()):
        folder = folder.parent
        folder.rmdir()
