"""Atomic checkpoints: gives a checkpoint its name when it is whole, and finds whole checkpoints.

A checkpoint is a `torch.save` file, whose records have checksums, or a folder of shards, which is
whole if it contains its marker.
"""

import json
import logging
import shutil
import zipfile
from pathlib import Path

import torch

from datamodules.common.atomic import sync, write_whole

logger = logging.getLogger(__name__)

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"

#: A file in a folder of shards: the size in bytes of every other file, by name. Written last.
MARKER = "whole.json"


def newest_whole(folder: Path) -> Path | None:
    """Returns the checkpoint to resume from; None if none was ever written.

    Raises:
        ValueError: there are checkpoints, but none of them is whole.
    """
    last, previous = folder / LAST, folder / PREVIOUS
    wrong = what_is_wrong(last)
    if wrong is None:
        return last
    if not (last.exists() or previous.exists()):
        return None
    wrong_before = what_is_wrong(previous)
    if wrong_before is None:
        logger.warning("%s %s: going on from the checkpoint before it, %s", last, wrong, PREVIOUS)
        return previous
    raise ValueError(
        f"no checkpoint in {folder} is complete ({LAST} {wrong}, {PREVIOUS} {wrong_before}): start "
        "anew with resume=false"
    )


def what_is_wrong(checkpoint: Path) -> str | None:
    """Reads all of a checkpoint; returns None if it is whole, else the reason why not.

    The reason continues a message after the checkpoint's name, such as "is missing".
    """
    if checkpoint.is_dir():
        return _wrong_folder(checkpoint)
    if not checkpoint.is_file():  # reading a pipe would never end
        return "is not a file" if checkpoint.exists() else "is missing"
    if not zipfile.is_zipfile(checkpoint):
        return f"is truncated or not a checkpoint ({checkpoint.stat().st_size} bytes)"
    try:
        with zipfile.ZipFile(checkpoint) as records:
            damaged = records.testzip()
        if damaged is not None:
            return f"is damaged in {damaged}"
        # The zip directory has no checksum, but PyTorch's reader checks it strictly. No tensor is
        # read.
        torch.load(checkpoint, mmap=True, map_location="meta", weights_only=True)
    except Exception as error:  # a flipped bit can cause any error in a zip reader
        return f"is damaged ({type(error).__name__}: {str(error).splitlines()[0]:.200})"
    return None


def _wrong_folder(folder: Path) -> str | None:
    marker = folder / MARKER
    if not marker.is_file():
        return f"is not complete (no {MARKER})"
    try:
        sizes = json.loads(marker.read_text())
    except (OSError, ValueError) as error:
        return f"is damaged ({MARKER}: {error})"
    for name, size in sizes.items():
        file = folder / name
        there = file.stat().st_size if file.is_file() else 0
        if there != size:
            return f"is damaged ({name} has {there} of {size} bytes)"
    return None


def publish(partial: Path, target: Path, previous: Path | None = None) -> None:
    """Renames `partial` to `target`; the old `target` becomes `previous`, or is removed.

    At every moment, `target` or `previous` is whole.
    """
    if partial.is_dir():
        _seal(partial)
    stale = (previous or target).with_suffix(".stale.partial")
    if previous is not None and target.exists():
        if previous.exists():
            previous.rename(stale)
        target.rename(previous)
    elif target.is_dir():  # a rename cannot replace a folder
        target.rename(stale)
    partial.rename(target)
    sync(target.parent)
    remove(stale)


def remove_leftovers(folder: Path) -> None:
    for partial in folder.glob("*.partial"):
        remove(partial)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _seal(folder: Path) -> None:
    """Marks a folder of shards as whole, after all its files are on disk."""
    files = sorted(file for file in folder.iterdir() if file.name != MARKER)
    for file in files:
        sync(file)
    write_whole(folder / MARKER, json.dumps({file.name: file.stat().st_size for file in files}))
    sync(folder)
