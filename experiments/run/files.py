"""Reads files of run directories safely, because anybody may have made them. Imports no torch."""

import csv
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

#: Name of the config that a launcher writes for a job, in .hydra/ of the run directory.
FROZEN = "frozen"

#: Subfolders of a run directory in which the programs write files.
_FOLDERS = (".hydra", "checkpoints")

#: Limits of a YAML file. Our own configs have a few kilobytes, ten levels and no aliases.
_MAX_BYTES = 4_000_000
_MAX_DEPTH = 100

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def inside(folder: Path, name: str) -> Path:
    """Returns `folder / name`.

    Raises:
        ValueError: the path is a link that leads out of the folder. The run must neither show nor
            overwrite a file outside.
    """
    path = folder / name
    try:
        leads_to = path.resolve()
    except (OSError, RuntimeError):  # a link to itself
        raise ValueError(f"{path} is a link that leads nowhere: remove it") from None
    if not leads_to.is_relative_to(folder.resolve()):
        raise ValueError(
            f"{path} is a link to {leads_to}, outside of its folder: put the file there"
        )
    return path


def check_files(folder: Path) -> None:
    """Checks the entries of a run directory before a program opens files there.

    Raises:
        ValueError: a link leads out of the directory or to nothing, so that the run could overwrite
            foreign files; or an entry is neither file nor folder, such as a pipe.
    """
    for name in ("", *_FOLDERS):
        for entry in _entries(folder / name):
            path = Path(entry.path)
            if entry.is_symlink() and (name or entry.name in _FOLDERS or not path.is_dir()):
                inside(folder, str(path.relative_to(folder)))
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise ValueError(f"{path} is neither a file nor a folder: remove it")


def open_file(path: Path, flags: int) -> int:
    """Opens the file at `path` and returns its descriptor. Never follows a link.

    Args:
        flags: flags of `os.open`.

    Raises:
        ValueError: the path is a link or not a regular file. Never waits for a pipe.
    """
    # Checked before opening, because opening a device may have effects.
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"{path} is a link or not a file: remove it")
    file = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise ValueError(f"{path} is a link or not a file: remove it")
    return file


def read_yaml(path: Path) -> Any:
    """Returns the content of a YAML file of a run directory, or None if there is no such file.

    Raises:
        ValueError: the file is damaged, or our programs cannot have written it: it is too large or
            too deep, or it has aliases, which can stand for billions of nodes.
    """
    if not path.is_file():
        return None
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise ValueError(
            f"{path} has {size} bytes, more than {_MAX_BYTES}: no program of ropelab wrote it"
        )
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
            raise ValueError(f"{path} has aliases (& or *): replace them by their values")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise ValueError(
                f"{path} is nested deeper than {_MAX_DEPTH} levels: no program of ropelab wrote it"
            )


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    if folder.is_dir():
        with os.scandir(folder) as entries:
            yield from entries


def printable(text: str) -> str:
    """Returns the text in one line, without control characters of a terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.splitlines()))


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns the (step, value) pairs of each metric in a `metrics.csv`.

    Lightning writes one row per kind of metric. The cells of the other metrics are empty.
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
