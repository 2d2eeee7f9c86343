"""Atomic writes: a kill leaves the old file or the new one, never half a file.

bytes -> a file beside it -> fsync -> rename to its name
"""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

#: A failed write to a disk raises these without the name of the file.
_OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


def write_whole(path: Path, content: str | bytes, shared: bool = False) -> None:
    """Writes a file atomically and waits until it is on disk.

    Args:
        shared: see `whole`.

    Raises:
        OSError: the file cannot be written; the error names it, also if the disk is full.
    """
    with whole(path, shared) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole(path: Path, shared: bool = False) -> Iterator[BinaryIO]:
    """Opens a file for writing that replaces `path` when the body ends, and is removed if it fails.

    Args:
        shared: whether other processes may write the same file at the same time. Each of them then
            writes a file of its own beside it. Otherwise the next write replaces what a kill left.

    Raises:
        OSError: the file cannot be written; the error names it, also if the disk is full.
    """
    own = f".{secrets.token_hex(4)}" if shared else ""
    beside = path.with_name(f".{path.name}{own}.partial")
    try:
        try:
            beside.unlink(missing_ok=True)  # never written through: it may be a link
            with open(beside, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    except OSError as error:
        if error.errno in _OF_DISKS and error.filename is None:
            error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems raise it for a folder
            raise
    finally:
        os.close(descriptor)
