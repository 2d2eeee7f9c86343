"""Tar bytes -> samples. Strict where `tarfile` is silent: a cut or damaged header is an error.

Behind damage the next whole header is sought, so that what stands there is not lost. Nothing is
ever written to disk, decompressed or unpickled, and links, devices and folders are never
followed; links and devices are reported. A sample is the run of members that share a key,
`a/b.0.jpg` being member `0.jpg` of key `a/b`; grouping is webdataset's own. (Its untarring is not:
it takes a member whose name begins with gzip's magic number for a compressed archive, and stops
without a word at a broken header.) Files that macOS and Windows put beside others are no members.
"""

import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, Protocol, runtime_checkable

from webdataset.tariterators import base_plus_ext, group_by_keys

from datamodules.errors import BadSampleError
from datamodules.file_names import is_sidecar

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
    Entries are those of `energon prepare` (Megatron-Energon, `WebdatasetPreparator`), which takes
    sidecars such as `._a.json` for samples, however; here they are passed over.

    Faults of a shard whose headers are whole: tar_unsorted (the members of a key do not stand
    together), link_member (a link or device, whose data is not in the shard).
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
    if fault is None:
        fault = walk.fault()
    return [*walk.offsets, walk.end], fault


class _Walk:
    """From header to header through a shard."""

    def __init__(self) -> None:
        self.offsets: list[int] = []
        self.end = 0  # of the last member that is whole
        self.payload = 0  # of the last member, where it starts: damage is behind that
        self._key: str | None = None
        self._damaged = False  # since the last whole member
        self._suffixes: dict[str, frozenset[str]] = {}  # of each key that has been left
        self._run: set[str] = set()  # suffixes of the key that is being read
        self._scattered: list[str] = []  # where members of one key stand apart: what was found
        self._links: list[str] = []
        self._led: tuple[str, int] | None = None  # key and offset of links since the last file

    def fault(self) -> BadSampleError | None:
        """What is wrong with a shard that could be read to its end."""
        if not self.offsets and not self._links:
            return BadSampleError("tar_empty", "no sample in it")
        self._leave()
        if self._scattered:
            more = f" and {len(self._scattered) - 1} more" if self._scattered[1:] else ""
            what = f"the members of {self._scattered[0]}{more} do not stand together"
            return BadSampleError("tar_unsorted", f"{what}: pack it anew with tar --sort=name")
        if self._links:
            what = f"{len(self._links)} links or devices, the first is {self._links[0]}"
            what += "" if self.offsets else "; no file in it"
            return BadSampleError("link_member", f"{what}; {_DEREFERENCE}")
        return None

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
        key, suffix = base_plus_ext(member.name)
        if key is None or suffix is None or not _counts(member.name) or member.isdir():
            return
        if not member.isreg():
            self._links.append(_described(member))
            if self._led is None or self._led[0] != key:
                self._led = key, member.offset
            return
        if key != self._key:
            self._leave()
            # with the links before it, so that reading the sample tells what it lacks
            led = self._led if self._led and self._led[0] == key else None
            self.offsets.append(led[1] if led else member.offset)
            self._key = key
        self._led = None
        self._run.add(suffix.lower())

    def _leave(self) -> None:
        """Notes the suffixes of the key that ends here. If it was left before with other suffixes,
        its members stand apart; with the same ones it is another sample of the same name."""
        if self._key is None:
            return
        run, self._run = frozenset(self._run), set()
        former = self._suffixes.setdefault(self._key, run)
        if former is not run and not former & run:
            found = [f".{suffix}" for suffix in (*sorted(former), *sorted(run))]
            self._scattered.append(f"{self._key!r} ({', '.join(found)})")

    def go_on_at(self, found: int) -> None:
        """Leaves a gap for damage; a member that reaches beyond `found` is part of it."""
        if self.end < found and not self._damaged and self.offsets[-1:] != [self.end]:
            self.offsets.append(self.end)
        self._leave()
        self.end, self.payload, self._key, self._damaged = found, found + 1, None, True
        self._led = None


def _counts(name: str) -> bool:
    return not _META.match(name) and not is_sidecar(name)


_DEREFERENCE = "pack with tar --dereference --hard-dereference"
_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.FIFOTYPE: "a named pipe",
}


def _described(member: tarfile.TarInfo) -> str:
    kind = _KINDS.get(member.type, "a device")
    return f"{member.name}, {kind}" + (f" to {member.linkname}" if member.linkname else "")


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
            may claim any size), duplicate_member, link_member, index_stale (it counts sidecars).
    """
    links: dict[str, str] = {}
    files = list(_files(data, url, links))
    try:
        samples = list(group_by_keys(files))
    except ValueError:
        # capitals of suffixes are the same, so that two names may differ
        shown = ", ".join(file["fname"] for file in files)
        raise BadSampleError("duplicate_member", f"a name stands twice in {shown}") from None
    if not samples and data:
        raise BadSampleError("index_stale", "it counts files that are no member: delete it")
    if len(samples) != 1:
        raise BadSampleError("tar_corrupt", f"{len(samples)} samples where the index has one")
    if link := links.get(samples[0]["__key__"]):
        raise BadSampleError("link_member", f"{link}; {_DEREFERENCE}")
    return samples[0]


def _files(data: bytes, url: str, links: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The regular files of a sample as webdataset groups them; the first link of each key goes
    into `links`."""
    file = io.BytesIO(data + _END)
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=StrictTarInfo) as tar:
            while (member := tar.next()) is not None:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts or member.issparse():
                    raise BadSampleError("unsafe_member", member.name)
                if not _counts(member.name) or member.isdir():
                    continue
                if not member.isreg():
                    links.setdefault(base_plus_ext(member.name)[0] or "", _described(member))
                else:
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
