"""Files and texts of run directories, which may come from anybody. Imports no torch."""

import csv
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

#: Name of the config that a launcher leaves for a job, in .hydra/ of the run directory.
FROZEN = "frozen"

#: Folders of a run directory whose files its programs write.
_FOLDERS = (".hydra", "checkpoints")

#: Limits of a YAML file. A config of ours has some kilobytes, ten levels and no aliases.
_MAX_BYTES = 4_000_000
_MAX_DEPTH = 100

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def inside(folder: Path, name: str) -> Path:
    """Returns `folder / name`.

    Raises:
        ValueError: it is a link that leads out of the folder. What lies there is not the run's to
            show, and not the run's to be written over.
    """
    path = folder / name
    try:
        leads_to = path.resolve()
    except (OSError, RuntimeError):  # a link to itself
        raise ValueError(f"{path} is a link that leads nowhere: remove it") from None
    if not leads_to.is_relative_to(folder.resolve()):
        raise ValueError(f"{path} is a link to {leads_to}, out of its folder: put the file there")
    return path


def check_files(folder: Path) -> None:
    """Checks what lies in a run directory before a program opens files there.

    Raises:
        ValueError: a link leads out to a file or to nothing, so that the run would write over what
            is not its own; or something is no file, such as a pipe that nobody else opens.
    """
    for name in ("", *_FOLDERS):
        for entry in _entries(folder / name):
            path = Path(entry.path)
            if entry.is_symlink() and (name or entry.name in _FOLDERS or not path.is_dir()):
                inside(folder, str(path.relative_to(folder)))
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise ValueError(f"{path} is no file and no folder: remove it")


def open_file(path: Path, flags: int) -> int:
    """Returns a descriptor of the file at `path`, which is not a link.

    Args:
        flags: those of `os.open`.

    Raises:
        ValueError: it is a link, or no file. A pipe is not waited for.
    """
    # Looked at before it is opened: opening a device may do something.
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"{path} is a link or no file: remove it")
    file = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise ValueError(f"{path} is a link or no file: remove it")
    return file


def read_yaml(path: Path) -> Any:
    """Returns what a YAML file of a run directory holds, None where there is no such file.

    Raises:
        ValueError: it is damaged, or it is not what our programs write: it has aliases, which can
            stand for billions of nodes, or it is too large or too deep.
    """
    if not path.is_file():
        return None
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise ValueError(f"{path} has {size} bytes, more than {_MAX_BYTES}: no program wrote it")
    try:
        text = path.read_text()
        _check_events(text, path)
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not valid YAML: {reason}") from error


def _check_events(text: str, path: Path) -> None:
    depth = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ValueError(f"{path} has aliases (& or *): write out what they stand for")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise ValueError(f"{path} is deeper than {_MAX_DEPTH} levels: no program wrote it")


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    if folder.is_dir():
        with os.scandir(folder) as entries:
            yield from entries


def printable(text: str) -> str:
    """The text in one line, without characters that a terminal takes for commands."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.splitlines()))


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns (step, value) of every metric of a `metrics.csv`.

    Lightning writes one row for every kind of metric, empty where the others stand.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    if path.is_file():
        with path.open(newline="") as file:
            for number, row in enumerate(csv.DictReader(file), start=2):
                try:
                    step = int(float(row["step"]))
                    for name, text in row.items():
                        if text and name not in ("step", "epoch"):
                            curves.setdefault(name, []).append((step, float(text)))
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(f"{path}, line {number}: not a row of metrics") from error
    return curves
