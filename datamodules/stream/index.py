"""Shard urls -> manifest: which shards there are, and where each of their samples stands.

An index `shard.tar.idx` holds n + 1 little-endian uint64 for n samples, byte for byte what
`energon prepare` writes. One that is missing is made by reading headers, and kept: beside the
shard, or in a cache folder where the shard is remote or its folder read-only. A folder of many
shards says in one file how many samples each holds, `.nv-meta/.info.json` as Energon has it; so
indexes are not opened before a sample is read.
"""

import glob
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import braceexpand
import numpy as np

from datamodules.errors import BadSampleError
from datamodules.stream.reading.source import find_remote, is_remote, open_source
from datamodules.stream.reading.tar import sample_offsets

logger = logging.getLogger(__name__)

INDEX_DTYPE = np.dtype("<u8")

_MANY = 1000  # shards of a folder whose counts are kept in one file
_FINGERPRINTED = 4096  # shards whose length is part of the fingerprint


@dataclass(frozen=True, slots=True)
class Shard:
    """`index` says where it lies, `None` is beside the shard.

    `offsets` is only set where no index could be kept, as the shard is damaged.
    """

    url: str
    count: int
    index: Path | None = None
    offsets: tuple[int, ...] | None = None

    @property
    def in_order(self) -> bool:
        """Whether it can only be read from its first byte on."""
        return _is_pipe(self.url)

    def read_offsets(self) -> Sequence[int] | np.ndarray:
        """Where each sample starts, and where the last one ends.

        Raises:
            BadSampleError: there is no index and none can be made.
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
    """Shards by number, made as they are asked for: a million objects would take seconds to make.

    Args:
        counts: samples of each, where `known` does not say.
        known: shards of which there is more to say, by number.
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
    """The shards in the order given, and what is wrong with those that are damaged."""

    shards: Sequence[Shard]
    faults: list[BadSampleError]

    def __len__(self) -> int:
        return int(self.counts.sum())

    @property
    def urls(self) -> list[str]:
        return self._columns.urls

    @property
    def counts(self) -> np.ndarray:
        """Samples of each shard."""
        return self._columns.counts

    @cached_property
    def _columns(self) -> Shards:
        return Shards.of(self.shards)

    @cached_property
    def in_order(self) -> np.ndarray:
        """Which shards can only be read from their first byte on."""
        return np.fromiter((_is_pipe(url) for url in self.urls), bool, len(self.urls))

    def fingerprint(self) -> str:
        """Says whether the shards are the same ones; their folder may move.

        Over name, samples and end of each; of more than 4,096 shards that many ends, evenly
        spread, because each is an index to open.
        """
        hashed = hashlib.sha256()
        step = -(-len(self.shards) // _FINGERPRINTED) or 1
        for number, (url, count) in enumerate(zip(self.urls, self.counts.tolist(), strict=True)):
            end = _end_of(self.shards[number]) if number % step == 0 else ""
            hashed.update(f"{url.rpartition('/')[2]} {count} {end}\n".encode())
        return hashed.hexdigest()[:16]


def join(manifests: Sequence[Manifest]) -> Manifest:
    """One manifest of all shards, in turn."""
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
    except BadSampleError:  # missing, unreadable: it differs from what it was
        return -1


def read_manifest(
    patterns: str | Iterable[str], *, timeout_s: float = 30.0, cache: str | Path | None = None
) -> Manifest:
    """Lists the shards of `patterns` and reads or makes their indexes.

    Args:
        patterns: paths, folders, globs, urls (http, s3, gs and others of fsspec) and `pipe:`
            commands, all with {braces}.
        cache: folder for indexes that cannot lie beside their shard; default
            `$XDG_CACHE_HOME/ropelab/index`.

    Raises:
        ValueError: a pattern that names no shard.
    """
    urls = expand_urls(patterns)
    place = Path(cache) if cache else _default_cache()
    counts, folders = _find_counts(urls)
    unknown = np.flatnonzero(counts < 0).tolist()
    with ThreadPoolExecutor(8) as pool:  # waits for storage, hardly computes
        opened = list(pool.map(lambda n: _open_shard(urls[n], timeout_s, place), unknown))
    known = {n: shard for n, (shard, _) in zip(unknown, opened, strict=True)}
    manifest = Manifest(Shards(urls, counts, known), [fault for _, fault in opened if fault])
    if not manifest.faults:
        _keep_counts(manifest, folders)
    return manifest


def _find_counts(urls: Sequence[str]) -> tuple[np.ndarray, set[str]]:
    """Samples of each shard as its folder has them, or -1; and the folders without such."""
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
    """Samples by name of shard as Energon has them, unless the folder changed since."""
    info = info_path(folder)
    try:
        if info.stat().st_mtime_ns < os.stat(folder or ".").st_mtime_ns:
            return {}
        counts = json.loads(info.read_bytes())["shard_counts"]
        if all(type(count) is int and count >= 0 for count in counts.values()):
            return counts
        raise ValueError("a count is no number")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s is not used: %s", info, error)
        return {}


def _keep_counts(manifest: Manifest, folders: Iterable[str]) -> None:
    """Writes the counts of folders with many shards that were all read."""
    for folder in folders if len(manifest.shards) >= _MANY else []:
        split = [(*shard.url.rpartition("/")[::2], shard.count) for shard in manifest.shards]
        counts = {name: count for parent, name, count in split if parent == folder}
        here = {name for name in os.listdir(folder or ".") if name.endswith(".tar")}
        if len(counts) < _MANY or here != counts.keys() or info_path(folder).exists():
            continue
        text = json.dumps({"shard_counts": counts}, indent=1)
        write_whole(text.encode(), info_path(folder))


def expand_urls(patterns: str | Iterable[str]) -> list[str]:
    """Braces, folders and globs -> one url a shard, sorted within each pattern.

    Raises:
        ValueError: nothing matches, unbalanced braces, or a scheme that cannot be read.
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
    # Never keep the index of a damaged shard: it would hide what is missing.
    return Shard(url, len(offsets) - 1, None, tuple(offsets)), fault


def _unless_beside(url: str, index: Path) -> Path | None:
    return None if index == index_path(url) else index


def index_shard(url: str, timeout_s: float = 30.0) -> tuple[list[int], BadSampleError | None]:
    """Reads a shard's headers; a remote one goes by once as a whole."""
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
    """Writes into the first place that can be written, whole or not at all."""
    data = np.asarray(offsets, dtype=INDEX_DTYPE).tobytes()
    return next((place for place in places if write_whole(data, place)), None)


def write_whole(data: bytes, place: Path) -> bool:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=place.parent, prefix=".idx-", delete=False) as file:
            file.write(data)
        os.chmod(file.name, 0o644)
        os.replace(file.name, place)
        return True
    except OSError as error:
        logger.debug("%s cannot be written: %s", place, error)
        return False


def index_path(shard: str | Path) -> Path:
    """`a/b.tar` -> `a/b.tar.idx`"""
    return Path(f"{shard}.idx")


def lengths_path(index: Path) -> Path:
    """`a/b.tar.idx` -> `a/b.tar.len`, see `lengths.py`."""
    return index.with_suffix(".len")


def _index_places(url: str, cache: Path) -> list[Path]:
    kept = cache / (hashlib.sha256(url.encode()).hexdigest()[:32] + ".tar.idx")
    if is_remote(url):
        return [kept]
    # The cached name of a local shard is that of its place, whatever the folder of the run.
    absolute = hashlib.sha256(os.path.abspath(url).encode()).hexdigest()[:32]
    return [index_path(url), cache / (absolute + ".tar.idx")]


def _is_current(url: str, index: Path) -> bool:
    """Whether an index speaks of the shard as it is: the tar's end mark stands where it says.

    A shard that is now missing or shorter keeps its index, so that the order of all other samples
    stays; its own samples are then reported one by one.
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
