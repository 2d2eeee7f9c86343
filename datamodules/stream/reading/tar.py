"""Tar bytes -> samples. Unlike `tarfile`, it raises an error for a cut or damaged header.

After damage, the reader searches for the next whole header, so later samples are not lost.
Nothing is written to disk, decompressed or unpickled. Links, devices and folders are never
followed; links and devices are reported. A sample is a run of members with the same key:
`a/b.0.jpg` is member `0.jpg` of key `a/b`. webdataset does the grouping, but not the untarring: it
takes a member whose name begins with gzip's magic number for a compressed archive, and it stops
silently at a broken header. Sidecar files of macOS and Windows are ignored.
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

_META = re.compile(r"__[^/]*__($|/)")  # members that webdataset and Energon both ignore
_END = bytes(2 * tarfile.BLOCKSIZE)
_MAGIC, _MAGIC_AT = b"ustar", 257
_PIECE = 1 << 16

# Headers that hold a long name or attributes of the next header. They are read into memory.
_EXTENSIONS = (b"x", b"g", b"X", b"L", b"K")
_LARGEST_EXTENSION = 1 << 20
_MOST_EXTENSIONS = 8  # per member


@runtime_checkable
class TarBytes(Protocol):
    """A shard from its first byte on.

    If it is not seekable, `seek` only moves forward, and `push_back` returns bytes that were read
    too far.
    """

    def read(self, size: int, /) -> bytes: ...
    def seek(self, position: int, /) -> int: ...
    def tell(self) -> int: ...
    def seekable(self) -> bool: ...


class StrictTarInfo(tarfile.TarInfo):
    """A tar header that raises an error where `tarfile` would silently end the archive."""

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
        depth = getattr(tarfile_, "extensions", 0)  # `tarfile` recurses for extension headers
        tarfile_.extensions = depth + 1  # pyright: ignore[reportAttributeAccessIssue]
        try:
            if depth > _MOST_EXTENSIONS:
                raise tarfile.InvalidHeaderError("a chain of long names")  # pyright: ignore
            info = super().fromtarfile(tarfile_)
            _check_size(info)  # again: extended attributes may change the size
            return info
        except tarfile.EOFHeaderError:  # pyright: ignore - the normal end: a block of zeros
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
    """Refuses a bad size: a negative one would make the reader loop, a huge one exceeds any file.

    Raises:
        tarfile.InvalidHeaderError: the size is negative, or 2^60 or more.
    """
    if not 0 <= info.size < 1 << 60:
        raise tarfile.InvalidHeaderError(f"a size of {info.size}")  # pyright: ignore


def sample_offsets(file: TarBytes) -> tuple[list[int], BadSampleError | None]:
    """Returns the start of each sample and the end of the last one, and the shard's fault or None.

    For n samples there are n + 1 offsets. Whole samples stay usable, so a fault is returned, not
    raised. Damage in the middle is an entry of its own; reading it raises the reason. (If damage
    follows a member that is itself a tar, the members of that tar also count as samples.)
    The offsets are those of `energon prepare` (Megatron-Energon, `WebdatasetPreparator`), except
    that Energon counts sidecars such as `._a.json` as samples. Here they are ignored.

    Faults of a shard with whole headers: tar_unsorted (the members of a key are not consecutive),
    link_member (a link or device, whose data is not in the shard).
    """
    walk, fault = _Walk(), None
    while True:
        try:
            walk.go(file)
            break
        except BadSampleError as error:
            found = _next_header(file, walk.payload)
            if found == walk.end:  # the header is whole, but its content does not match it
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
    """Walks through a shard from header to header."""

    def __init__(self) -> None:
        self.offsets: list[int] = []
        self.end = 0  # end of the last whole member
        self.payload = 0  # start of the last member's data: damage can only be after it
        self._key: str | None = None
        self._damaged = False  # damage was found after the last whole member
        self._suffixes: dict[str, frozenset[str]] = {}  # suffixes of each finished key
        self._run: set[str] = set()  # suffixes of the current key
        self._scattered: list[str] = []  # keys whose members are not consecutive, with suffixes
        self._links: list[str] = []
        self._led: tuple[str, int] | None = None  # key and offset of links since the last file

    def fault(self) -> BadSampleError | None:
        """Returns the fault of a shard that was read to its end, or None."""
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
        """Walks to the end of the archive.

        Raises:
            BadSampleError: the archive is damaged at this point.
        """
        member = None
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=StrictTarInfo) as tar:  # pyright: ignore
                while (member := tar.next()) is not None:
                    tar.members = []  # pyright: ignore - saves memory, as in webdataset
                    self._take(member)
                    self.payload, self.end = member.offset_data, tar.offset
                    self._damaged = False
                if not _only_zeros(tar.fileobj):
                    raise BadSampleError("tar_corrupt", f"data after the end at byte {self.end}")
        except (tarfile.TarError, EOFError) as error:
            # The data of the last member is cut: its sample is lost, and the archive ends there.
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
            # Include the links before it, so that reading the sample reports the missing member.
            led = self._led if self._led and self._led[0] == key else None
            self.offsets.append(led[1] if led else member.offset)
            self._key = key
        self._led = None
        self._run.add(suffix.lower())

    def _leave(self) -> None:
        """Stores the suffixes of the key that ends here.

        If the key was already stored with other suffixes, its members are not consecutive. With a
        suffix in common, it is another sample of the same name.
        """
        if self._key is None:
            return
        run, self._run = frozenset(self._run), set()
        former = self._suffixes.setdefault(self._key, run)
        if former is not run and not former & run:
            found = [f".{suffix}" for suffix in (*sorted(former), *sorted(run))]
            self._scattered.append(f"{self._key!r} ({', '.join(found)})")

    def go_on_at(self, found: int) -> None:
        """Continues at `found`, after damage. A member that extends past `found` is damaged too."""
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
    """Moves to the first whole header after `start` and returns its offset, or None.

    A pipe cannot go back, so there the search starts at the current offset.
    """
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
        # A header read too early, with zeros before it, has a valid checksum but an empty name.
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
    """Returns the sample between two offsets: `__key__`, `__url__`, and the bytes by suffix.

    Raises:
        BadSampleError: tar_corrupt, unsafe_member (absolute or parent path, or a sparse file, which
            may claim any size), duplicate_member, link_member, index_stale (it counts sidecars).
    """
    links: dict[str, str] = {}
    files = list(_files(data, url, links))
    try:
        samples = list(group_by_keys(files))
    except ValueError:
        # Suffixes ignore case, so the two names may differ in case.
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
    """Yields the regular files of a sample in the form that webdataset groups.

    Puts the first link of each key into `links`.
    """
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
                    # Names in old archives may have any encoding, and they are written to logs.
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
