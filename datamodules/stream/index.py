"""Shard urls -> manifest: lists the shards and the byte offsets of their samples.

An index `shard.tar.idx` holds n + 1 little-endian uint64 for n samples, byte for byte as
`energon prepare` writes it. A missing index is made from the tar headers and stored beside the
shard, or in a cache folder if the shard is remote or its folder read-only. A folder of many shards
keeps the sample counts in one file, `.nv-meta/.info.json`, as Energon does. So an index is opened
only when a sample is read.
"""

import glob
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np

from datamodules.common.atomic import write_whole
from datamodules.common.digest import digest
from datamodules.errors import BadSampleError
from datamodules.stream.reading.source import find_remote, is_remote, open_source
from datamodules.stream.reading.tar import sample_offsets

logger = logging.getLogger(__name__)

INDEX_DTYPE = np.dtype("<u8")

_MANY = 1000  # a folder with at least this many shards keeps its counts in one file
_FINGERPRINTED = 4096  # maximum number of shards whose length is part of the fingerprint


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard and its index.

    Attributes:
        index: path of the index; None means beside the shard.
        offsets: set only if the index could not be stored, for example of a damaged shard.
    """

    url: str
    count: int
    index: Path | None = None
    offsets: tuple[int, ...] | None = None

    @property
    def in_order(self) -> bool:
        """True if the shard can only be read from its first byte on (a pipe)."""
        return _is_pipe(self.url)

    def read_offsets(self) -> Sequence[int] | np.ndarray:
        """Returns the start of each sample, and the end of the last one, in bytes.

        Raises:
            BadSampleError: the index is missing and cannot be made.
        """
        if self.offsets is not None:
            return self.offsets or (0,)
        try:
            return np.fromfile(self.index or index_path(self.url), dtype=INDEX_DTYPE)
        except FileNotFoundError:
            offsets, fault = index_shard(self.url)
            if fault is not None:
                raise fault from None
            write_index(offsets, [index_path(self.url)])
            return offsets


class Shards(Sequence[Shard]):
    """A sequence of shards, created on access: a million objects would take seconds to make.

    Args:
        counts: samples of each shard that is not in `known`.
        known: shards with an index path or offsets of their own, by number.
    """

    def __init__(self, urls: list[str], counts: np.ndarray, known: Mapping[int, Shard]):
        self.urls, self._known = urls, known
        self.counts = counts.astype(np.int64)
        for number, shard in known.items():
            self.counts[number] = shard.count

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> "Shards":
        if isinstance(shards, Shards):
            return shards
        urls = [shard.url for shard in shards]
        return cls(urls, np.zeros(len(urls)), dict(enumerate(shards)))

    def __add__(self, other: "Shards") -> "Shards":
        more = {len(self) + number: shard for number, shard in other._known.items()}
        counts = np.concatenate([self.counts, other.counts])
        return Shards([*self.urls, *other.urls], counts, {**self._known, **more})

    def __len__(self) -> int:
        return len(self.urls)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        shard = self._known.get(number)
        return Shard(self.urls[number], int(self.counts[number])) if shard is None else shard

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shards) and list(self) == list(other)


@dataclass(frozen=True)
class Manifest:
    """The shards in the given order, and the faults of damaged shards."""

    shards: Sequence[Shard]
    faults: list[BadSampleError]

    def __len__(self) -> int:
        return int(self.counts.sum())

    @property
    def urls(self) -> list[str]:
        return self._columns.urls

    @property
    def counts(self) -> np.ndarray:
        """Number of samples of each shard."""
        return self._columns.counts

    @cached_property
    def _columns(self) -> Shards:
        return Shards.of(self.shards)

    @cached_property
    def in_order(self) -> np.ndarray:
        """For each shard, whether it can only be read from its first byte on."""
        return np.fromiter((_is_pipe(url) for url in self.urls), bool, len(self.urls))

    def fingerprint(self) -> str:
        """Returns a hash that identifies the shards. It does not depend on their folder.

        The hash covers the name, sample count and end of each shard. Each end needs an open
        index, so for more than 4,096 shards it covers at most 4,096 ends, evenly spread.
        """
        step = -(-len(self.shards) // _FINGERPRINTED) or 1
        lines = []
        for number, (url, count) in enumerate(zip(self.urls, self.counts.tolist(), strict=True)):
            end = _end_of(self.shards[number]) if number % step == 0 else ""
            lines.append(f"{url.rpartition('/')[2]} {count} {end}\n")
        return digest(*lines)


def join(manifests: Sequence[Manifest]) -> Manifest:
    """Returns one manifest with the shards of all manifests, in order."""
    if len(manifests) == 1:
        return manifests[0]
    shards = [Shards.of(manifest.shards) for manifest in manifests]
    return Manifest(
        reduce(add, shards), [fault for manifest in manifests for fault in manifest.faults]
    )


def _is_pipe(url: str) -> bool:
    return url.startswith("pipe:")


def _end_of(shard: Shard) -> int:
    try:
        return int(shard.read_offsets()[-1])
    except BadSampleError:  # missing or unreadable: the fingerprint must change
        return -1


def read_manifest(
    patterns: str | Iterable[str], *, timeout_s: float = 30.0, cache: str | Path | None = None
) -> Manifest:
    """Lists the shards of `patterns` and reads or makes their indexes.

    Args:
        patterns: paths, folders, globs, urls (http, s3, gs and others of fsspec) and `pipe:`
            commands, all with {braces}.
        cache: folder for indexes that cannot be stored beside their shard; default
            `$XDG_CACHE_HOME/ropelab/index`.

    Raises:
        ValueError: a pattern matches no shard.
    """
    urls = expand_urls(patterns)
    place = Path(cache) if cache else _default_cache()
    counts, folders = _find_counts(urls)
    unknown = np.flatnonzero(counts < 0).tolist()
    with ThreadPoolExecutor(8) as pool:  # threads mostly wait for storage
        opened = list(pool.map(lambda n: _open_shard(urls[n], timeout_s, place), unknown))
    known = {n: shard for n, (shard, _) in zip(unknown, opened, strict=True)}
    manifest = Manifest(Shards(urls, counts, known), [fault for _, fault in opened if fault])
    if not manifest.faults:
        _keep_counts(manifest, folders)
    return manifest


def _find_counts(urls: Sequence[str]) -> tuple[np.ndarray, set[str]]:
    """Returns the counts stored in the shards' folders (-1: none), and the folders without them."""
    infos: dict[str, dict[str, int]] = {}
    counts = np.empty(len(urls), dtype=np.int64)
    for number, url in enumerate(urls):
        folder, _, name = url.rpartition("/")
        if folder not in infos:
            infos[folder] = {} if is_remote(url) else read_counts(folder)
        counts[number] = infos[folder].get(name, -1)
    without = {
        folder for folder, info in infos.items() if not info and os.path.isdir(folder or ".")
    }
    return counts, without


def info_path(folder: str) -> Path:
    return Path(folder, ".nv-meta", ".info.json")


def read_counts(folder: str) -> dict[str, int]:
    """Returns samples by shard name from Energon's file; {} if the folder changed after it."""
    info = info_path(folder)
    try:
        if info.stat().st_mtime_ns < os.stat(folder or ".").st_mtime_ns:
            return {}
        counts = json.loads(info.read_bytes())["shard_counts"]
        if all(type(count) is int and count >= 0 for count in counts.values()):
            return counts
        raise ValueError("a count is not a number")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s is not used: %s", info, error)
        return {}


def _keep_counts(manifest: Manifest, folders: Iterable[str]) -> None:
    """Stores the counts of folders with many shards if all shards of the folder were read."""
    for folder in folders if len(manifest.shards) >= _MANY else []:
        split = [(*shard.url.rpartition("/")[::2], shard.count) for shard in manifest.shards]
        counts = {name: count for parent, name, count in split if parent == folder}
        here = {name for name in os.listdir(folder or ".") if name.endswith(".tar")}
        if len(counts) < _MANY or here != counts.keys() or info_path(folder).exists():
            continue
        text = json.dumps({"shard_counts": counts}, indent=1)
        _store(text.encode(), info_path(folder))


def expand_urls(patterns: str | Iterable[str]) -> list[str]:
    """Expands braces, folders and globs into one url per shard, sorted within each pattern.

    Raises:
        ValueError: nothing matches, braces are unbalanced, or a scheme cannot be read.
    """
    urls: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            parts = list(braceexpand.braceexpand(str(pattern)))
        except ValueError as error:
            raise ValueError(f"shards {pattern!r}: {error}") from None
        if _names_files(str(pattern)):
            urls += parts
            continue
        for part in parts:
            urls += find_remote(part) if is_remote(part) else _local_paths(part)
    if not urls:
        raise ValueError("no shards given; name a .tar file, a folder, a glob or a url")
    return urls


def _names_files(pattern: str) -> bool:
    return (
        pattern.endswith(".tar")
        and not glob.has_magic(pattern)
        and pattern[0] != "~"
        and ("://" not in pattern)
    )


def _local_paths(path: str) -> list[str]:
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        found = sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
        if not found:
            raise ValueError(f"no .tar file in the folder {path!r}")
        return found
    if glob.has_magic(path):
        found = sorted(glob.glob(path, recursive=True))
        if not found:
            raise ValueError(f"no file matches {path!r}")
        return found
    return [path]


def _open_shard(url: str, timeout_s: float, cache: Path) -> tuple[Shard, BadSampleError | None]:
    for index in _index_places(url, cache):
        if index.is_file() and _is_current(url, index):
            count = index.stat().st_size // INDEX_DTYPE.itemsize - 1
            return Shard(url, count, _unless_beside(url, index)), None
    offsets, fault = index_shard(url, timeout_s)
    if fault is None:
        index = write_index(offsets, _index_places(url, cache))
        if index is not None:
            return Shard(url, len(offsets) - 1, _unless_beside(url, index)), None
    # Never store the index of a damaged shard: it would hide the missing samples.
    return Shard(url, len(offsets) - 1, None, tuple(offsets)), fault


def _unless_beside(url: str, index: Path) -> Path | None:
    return None if index == index_path(url) else index


def index_shard(url: str, timeout_s: float = 30.0) -> tuple[list[int], BadSampleError | None]:
    """Returns a shard's offsets and its fault. Reads the headers; a remote shard is read whole."""
    offsets: list[int] = [0]
    fault: BadSampleError | None = None
    try:
        source = open_source(url, timeout_s)
        try:
            offsets, fault = sample_offsets(source.whole())
        finally:
            source.close()
    except BadSampleError as error:
        fault = error
    except OSError as error:
        fault = BadSampleError("shard_unreadable", error.strerror or str(error))
    if fault is not None:
        fault = BadSampleError(fault.reason, fault.detail, shard=url)
    return offsets, fault


def write_index(offsets: Sequence[int], places: Iterable[Path]) -> Path | None:
    """Writes the index to the first writable path by an atomic write. Returns the path or None."""
    data = np.asarray(offsets, dtype=INDEX_DTYPE).tobytes()
    return next((place for place in places if _store(data, place)), None)


def _store(data: bytes, place: Path) -> bool:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, data, shared=True)  # all ranks, and other runs, may index at once
        return True
    except OSError as error:
        logger.debug("%s cannot be written: %s", place, error)
        return False


def index_path(shard: str | Path) -> Path:
    """Returns the index path of a shard: `a/b.tar` -> `a/b.tar.idx`."""
    return Path(f"{shard}.idx")


def lengths_path(index: Path) -> Path:
    """Returns the path of the lengths: `a/b.tar.idx` -> `a/b.tar.len`, see `lengths.py`."""
    return index.with_suffix(".len")


def _index_places(url: str, cache: Path) -> list[Path]:
    kept = cache / (digest(url, length=32) + ".tar.idx")
    if is_remote(url):
        return [kept]
    # The cache key of a local shard is its absolute path: it must not depend on the run's folder.
    absolute = digest(os.path.abspath(url), length=32)
    return [index_path(url), cache / (absolute + ".tar.idx")]


def _is_current(url: str, index: Path) -> bool:
    """Returns True if the tar's end mark is at the offset that the index gives.

    A shard that is now missing or shorter keeps its index, so the order of all other samples
    stays the same. Its own samples are then reported one by one.
    """
    size = index.stat().st_size
    if size < 2 * INDEX_DTYPE.itemsize or size % INDEX_DTYPE.itemsize:
        return False
    if is_remote(url):
        return True
    end = int(np.fromfile(index, dtype=INDEX_DTYPE, offset=size - INDEX_DTYPE.itemsize)[0])
    try:
        with open(url, "rb") as file:
            file.seek(end)
            mark = file.read(512)
    except OSError:
        return True
    return not mark.strip(b"\0")


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ropelab" / "index"
