"""Tar bytes -> samples. Strict where `tarfile` is silent: a cut or damaged header is an error.

Behind damage the next whole header is sought, so that what stands there is not lost. Nothing is
ever written to disk, decompressed or unpickled, and links, devices and folders are never
followed. A sample is the run of members that share a key, `a/b.0.jpg` being member `0.jpg` of key
`a/b`; grouping is webdataset's own. (Its untarring is not: it takes a member whose name begins
with gzip's magic number for a compressed archive, and stops without a word at a broken header.)
"""

import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, Protocol, runtime_checkable

from webdataset.tariterators import base_plus_ext, group_by_keys

from datamodules.batch import BadSampleError

_META = re.compile(r"__[^/]*__($|/)")  # members that webdataset and Energon both pass over
_END = bytes(2 * tarfile.BLOCKSIZE)
_MAGIC, _MAGIC_AT = b"ustar", 257
_PIECE = 1 << 16

# Headers that hold a long name or attributes for the next one; they are read into memory.
_EXTENSIONS = (b"x", b"g", b"X", b"L", b"K")
_LARGEST_EXTENSION = 1 << 20
_MOST_EXTENSIONS = 8  # of one member


@runtime_checkable
class TarBytes(Protocol):
    """A shard from its first byte on. Where it is not seekable, `seek` only goes on, and what was
    read too far is given back by `push_back`."""

    def read(self, size: int, /) -> bytes: ...
    def seek(self, position: int, /) -> int: ...
    def tell(self) -> int: ...
    def seekable(self) -> bool: ...


class StrictTarInfo(tarfile.TarInfo):
    """Raises where `tarfile` would take a broken header for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "StrictTarInfo":
        info = super().frombuf(buf, encoding, errors)
        _check_size(info)
        if info.type in _EXTENSIONS and info.size > _LARGEST_EXTENSION:
            raise tarfile.InvalidHeaderError("an absurdly long name")  # pyright: ignore
        return info

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "StrictTarInfo":
        start = tarfile_.offset == 0
        depth = getattr(tarfile_, "extensions", 0)  # `tarfile` comes here again for what follows
        tarfile_.extensions = depth + 1  # pyright: ignore[reportAttributeAccessIssue]
        try:
            if depth > _MOST_EXTENSIONS:
                raise tarfile.InvalidHeaderError("a chain of long names")  # pyright: ignore
            info = super().fromtarfile(tarfile_)
            _check_size(info)  # again, as attributes may say otherwise than the header itself
            return info
        except tarfile.EOFHeaderError:  # pyright: ignore - the regular end: a block of zeros
            raise
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError) as error:  # pyright: ignore
            empty = start and isinstance(error, tarfile.EmptyHeaderError)  # pyright: ignore
            reason = "tar_empty" if empty else "not_a_tar" if start else "tar_truncated"
            raise BadSampleError(reason, f"no header at byte {tarfile_.offset}") from None
        except (tarfile.HeaderError, ValueError, OverflowError) as error:
            reason = "not_a_tar" if start else "tar_corrupt"
            raise BadSampleError(reason, f"{error} at byte {tarfile_.offset}") from None
        finally:
            tarfile_.extensions = depth  # pyright: ignore[reportAttributeAccessIssue]


def _check_size(info: tarfile.TarInfo) -> None:
    """A negative size would send the reader backwards for ever, a huge one beyond any file."""
    if not 0 <= info.size < 1 << 60:
        raise tarfile.InvalidHeaderError(f"a size of {info.size}")  # pyright: ignore


def sample_offsets(file: TarBytes) -> tuple[list[int], BadSampleError | None]:
    """Where each sample starts, and where the last one ends: n + 1 offsets for n samples.

    The samples that are whole stay usable: what is wrong with the rest is returned, not raised.
    Damage in the middle takes a place of its own, and reading it tells the reason. (Where damage
    follows a member that is a tar itself, that one's members are taken for samples too.)
    Entries are those of `energon prepare` (Megatron-Energon, `WebdatasetPreparator`).
    """
    walk, fault = _Walk(), None
    while True:
        try:
            walk.go(file)
            break
        except BadSampleError as error:
            found = _next_header(file, walk.payload)
            if found == walk.end:  # whole, but not what it announces
                found = _next_header(file, walk.end + 1)
            if found is None:
                fault = fault or error
                break
            fault = fault or BadSampleError("tar_corrupt", error.detail)
            walk.go_on_at(found)
    if fault is None and not walk.offsets:
        fault = BadSampleError("tar_empty", "no sample in it")
    return [*walk.offsets, walk.end], fault


class _Walk:
    """From header to header through a shard."""

    def __init__(self) -> None:
        self.offsets: list[int] = []
        self.end = 0  # of the last member that is whole
        self.payload = 0  # of the last member, where it starts: damage is behind that
        self._key: str | None = None
        self._damaged = False  # since the last whole member

    def go(self, file: TarBytes) -> None:
        """To the end of the archive, or to what is wrong with it."""
        member = None
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=StrictTarInfo) as tar:  # pyright: ignore
                while (member := tar.next()) is not None:
                    tar.members = []  # pyright: ignore - forget it, as webdataset does
                    self._take(member)
                    self.payload, self.end = member.offset_data, tar.offset
                    self._damaged = False
                if not _only_zeros(tar.fileobj):
                    raise BadSampleError("tar_corrupt", f"data after the end at byte {self.end}")
        except (tarfile.TarError, EOFError) as error:
            # The payload of the last member is cut: its sample is lost and the rest ends with it.
            self.end = self.offsets.pop() if self.offsets else 0
            raise BadSampleError("tar_truncated", str(error)) from None

    def _take(self, member: tarfile.TarInfo) -> None:
        key, _ = base_plus_ext(member.name)
        if not member.isreg() or key is None or _META.match(member.name):
            return
        if key != self._key:
            self.offsets.append(member.offset)
            self._key = key

    def go_on_at(self, found: int) -> None:
        """Leaves a gap for damage; a member that reaches beyond `found` is part of it."""
        if self.end < found and not self._damaged and self.offsets[-1:] != [self.end]:
            self.offsets.append(self.end)
        self.end, self.payload, self._key, self._damaged = found, found + 1, None, True


def _next_header(file: TarBytes, start: int) -> int | None:
    """Goes to the first whole header behind `start`, or behind where a pipe stands."""
    if file.seekable():
        file.seek(start)
    at, data = file.tell(), b""
    while piece := file.read(_PIECE):
        data += piece
        magic = data.find(_MAGIC, _MAGIC_AT)
        while magic >= 0:
            first = magic - _MAGIC_AT
            if _is_header(data[first : first + tarfile.BLOCKSIZE]):
                _go_back(file, data[first:])
                return at + first
            magic = data.find(_MAGIC, magic + 1)
        kept = min(len(data), tarfile.BLOCKSIZE)
        at, data = at + len(data) - kept, data[-kept:]
    return None


def _go_back(file: TarBytes, data: bytes) -> None:
    if file.seekable():
        file.seek(file.tell() - len(data))
    else:
        file.push_back(data)  # pyright: ignore[reportAttributeAccessIssue]


def _is_header(block: bytes) -> bool:
    try:
        # A header that slid into the zeros before it keeps its checksum, but not its name.
        return StrictTarInfo.frombuf(block, "utf-8", "surrogateescape").name != ""
    except (tarfile.HeaderError, ValueError):
        return False


def _only_zeros(file: Any) -> bool:
    while block := file.read(1 << 16):
        if block.count(0) != len(block):
            _go_back(file, block)
            return False
    return True


def untar_sample(data: bytes, url: str) -> dict[str, Any]:
    """One sample from the bytes between two offsets: `__key__`, `__url__`, bytes by suffix.

    Raises:
        BadSampleError: tar_corrupt, unsafe_member (absolute or parent path, or a sparse file, which
            may claim any size), duplicate_member.
    """
    try:
        samples = list(group_by_keys(_files(data, url)))
    except ValueError as error:
        raise BadSampleError("duplicate_member", str(error.args[0])) from None
    if len(samples) != 1:
        raise BadSampleError("tar_corrupt", f"{len(samples)} samples where the index has one")
    return samples[0]


def _files(data: bytes, url: str) -> Iterator[dict[str, Any]]:
    """The regular files of a sample as webdataset groups them."""
    file = io.BytesIO(data + _END)
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=StrictTarInfo) as tar:
            while (member := tar.next()) is not None:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts or member.issparse():
                    raise BadSampleError("unsafe_member", member.name)
                if member.isreg() and not _META.match(member.name):
                    content = data[member.offset_data : member.offset_data + member.size]
                    # names of old archives may be in any encoding, and land in logs
                    name = member.name.encode("utf-8", "surrogateescape")
                    yield {
                        "fname": name.decode(errors="backslashreplace"),
                        "data": content,
                        "__url__": url,
                    }
            end = tar.offset
    except tarfile.TarError as error:
        raise BadSampleError("tar_corrupt", str(error)) from None
    except BadSampleError as error:
        if error.reason == "unsafe_member":
            raise
        raise BadSampleError("tar_corrupt", error.detail) from None
    if end != len(data):
        raise BadSampleError("tar_corrupt", f"headers end at byte {end} of {len(data)}")
