"""Tar bytes -> samples. Strict where `tarfile` is silent: a cut or damaged header is an error.

Untarring and grouping are webdataset's own; nothing is ever written to disk, and links, devices
and folders are never followed. A sample is the run of members that share a key, `a/b.0.jpg`
being member `0.jpg` of key `a/b`.
"""

import io
import re
import tarfile
from pathlib import PurePosixPath
from typing import Any

from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from datamodules.batch import BadSampleError

_META = re.compile(r"__[^/]*__($|/)")  # members that webdataset and Energon both pass over
_END = bytes(2 * tarfile.BLOCKSIZE)


class StrictTarInfo(tarfile.TarInfo):
    """Raises where `tarfile` would take a broken header for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "StrictTarInfo":
        info = super().frombuf(buf, encoding, errors)
        if info.size < 0:  # would send the reader backwards for ever
            raise tarfile.InvalidHeaderError("negative size")  # pyright: ignore
        return info

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "StrictTarInfo":
        start = tarfile_.offset == 0
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # pyright: ignore - the regular end: a block of zeros
            raise
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError) as error:  # pyright: ignore
            empty = start and isinstance(error, tarfile.EmptyHeaderError)  # pyright: ignore
            reason = "tar_empty" if empty else "not_a_tar" if start else "tar_truncated"
            raise BadSampleError(reason, f"no header at byte {tarfile_.offset}") from None
        except (tarfile.HeaderError, ValueError, OverflowError) as error:
            reason = "not_a_tar" if start else "tar_corrupt"
            raise BadSampleError(reason, f"{error} at byte {tarfile_.offset}") from None


def sample_offsets(file: Any, *, seekable: bool = True) -> tuple[list[int], BadSampleError | None]:
    """Where each sample starts, and where the last one ends: n + 1 offsets for n samples.

    `file` needs no more than `read`, unless `seekable`.

    The samples that are whole stay usable: what is wrong with the rest is returned, not raised.
    Entries are those of `energon prepare` (Megatron-Energon, `WebdatasetPreparator`).
    """
    offsets: list[int] = []
    end, key = 0, None
    try:
        with tarfile.open(
            fileobj=file, mode="r:" if seekable else "r|", tarinfo=StrictTarInfo
        ) as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # pyright: ignore - forget it, as webdataset does
                end = tar.offset
                prefix, _ = base_plus_ext(member.name)
                if not member.isreg() or prefix is None or _META.match(member.name):
                    continue
                if prefix != key:
                    offsets.append(member.offset)
                    key = prefix
            if not _only_zeros(tar.fileobj):
                raise BadSampleError("tar_corrupt", f"data after the end mark at byte {end}")
    except BadSampleError as error:
        return [*offsets, end], error
    except (tarfile.TarError, EOFError) as error:
        # The payload of the last member is cut: its sample is lost, and starts where the rest ends.
        whole = offsets[:-1]
        return [*whole, offsets[-1] if offsets else 0], BadSampleError("tar_truncated", str(error))
    fault = None if offsets else BadSampleError("tar_empty", "no sample in it")
    return [*offsets, end], fault


def _only_zeros(file: Any) -> bool:
    while block := file.read(1 << 16):
        if block.count(0) != len(block):
            return False
    return True


def untar_sample(data: bytes, url: str) -> dict[str, Any]:
    """One sample from the bytes between two offsets: `__key__`, `__url__`, bytes by suffix.

    Raises:
        BadSampleError: tar_corrupt, unsafe_member (absolute or parent path, or a sparse file, which
            may claim any size), duplicate_member.
    """
    padded = data + _END
    _check_members(padded, len(data))
    try:
        files = tar_file_expander([{"url": url, "stream": io.BytesIO(padded)}])
        samples = list(group_by_keys(files))
    except ValueError as error:
        raise BadSampleError("duplicate_member", str(error.args[0])) from None
    except (tarfile.TarError, OSError) as error:
        raise BadSampleError("tar_corrupt", str(error.args[0])) from None
    if len(samples) != 1:
        raise BadSampleError("tar_corrupt", f"{len(samples)} samples where the index has one")
    return samples[0]


def _check_members(padded: bytes, size: int) -> None:
    """Reads headers only; webdataset's pass over the same bytes then meets no surprise."""
    try:
        with tarfile.open(fileobj=io.BytesIO(padded), mode="r:", tarinfo=StrictTarInfo) as tar:
            while (member := tar.next()) is not None:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts or member.issparse():
                    raise BadSampleError("unsafe_member", member.name)
            end = tar.offset
    except tarfile.TarError as error:
        raise BadSampleError("tar_corrupt", str(error)) from None
    except BadSampleError as error:
        if error.reason == "unsafe_member":
            raise
        raise BadSampleError("tar_corrupt", error.detail) from None
    if end != size:
        raise BadSampleError("tar_corrupt", f"headers end at byte {end} of {size}")
