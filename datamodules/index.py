"""Shard urls -> manifest: which shards there are, and where each of their samples stands.

An index `shard.tar.idx` holds n + 1 little-endian uint64 for n samples, byte for byte what
`energon prepare` writes. One that is missing is made by reading headers, and kept: beside the
shard, or in a cache folder where the shard is remote or its folder read-only.
"""

import glob
import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

import braceexpand
import numpy as np

from datamodules.batch import BadSampleError
from datamodules.source import is_remote, open_source
from datamodules.tar import sample_offsets

logger = logging.getLogger(__name__)

INDEX_DTYPE = np.dtype("<u8")


@dataclass(frozen=True)
class Shard:
    """`offsets` is only set where no index could be kept, as the shard is damaged."""

    url: str
    count: int
    index: Path | None
    offsets: tuple[int, ...] | None = None

    @property
    def in_order(self) -> bool:
        """Whether it can only be read from its first byte on."""
        return self.url.startswith("pipe:")

    def read_offsets(self) -> Sequence[int] | np.ndarray:
        if self.index is None:
            return self.offsets or (0,)
        return np.fromfile(self.index, dtype=INDEX_DTYPE)


@dataclass(frozen=True)
class Manifest:
    """The shards in the order given, and what is wrong with those that are damaged."""

    shards: list[Shard]
    faults: list[BadSampleError]

    def __len__(self) -> int:
        return sum(shard.count for shard in self.shards)


def read_manifest(
    patterns: str | Iterable[str], *, timeout_s: float = 30.0, cache: str | Path | None = None
) -> Manifest:
    """Lists the shards of `patterns` and reads or makes their indexes.

    Args:
        patterns: paths, folders, globs, `http(s)://` and `pipe:` urls, all with {braces}.
        cache: folder for indexes that cannot lie beside their shard; default
            `$XDG_CACHE_HOME/ropelab/index`.

    Raises:
        ValueError: a pattern that names no shard.
    """
    urls = expand_urls(patterns)
    folder = Path(cache) if cache else _default_cache()
    with ThreadPoolExecutor(8) as pool:  # waits for storage, hardly computes
        opened = list(pool.map(lambda url: _open_shard(url, timeout_s, folder), urls))
    return Manifest([shard for shard, _ in opened], [fault for _, fault in opened if fault])


def expand_urls(patterns: str | Iterable[str]) -> list[str]:
    """Braces, folders and globs -> one url a shard, sorted within each pattern.

    Raises:
        ValueError: nothing matches, unbalanced braces, or a scheme that is not read.
    """
    urls: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            parts = list(braceexpand.braceexpand(str(pattern)))
        except ValueError as error:
            raise ValueError(f"shards {pattern!r}: {error}") from None
        for part in parts:
            urls += [part] if is_remote(part) else _local_paths(part)
    if not urls:
        raise ValueError("no shards given; name a .tar file, a folder, a glob or a url")
    return urls


def _local_paths(path: str) -> list[str]:
    if "://" in path:
        raise ValueError(
            f"shards {path!r}: only http(s) is read directly; "
            f"use a pipe, for instance 'pipe:aws s3 cp {path} -'"
        )
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
            return Shard(url, index.stat().st_size // INDEX_DTYPE.itemsize - 1, index), None
    offsets, fault = index_shard(url, timeout_s)
    if fault is None:
        index = write_index(offsets, _index_places(url, cache))
        if index is not None:
            return Shard(url, len(offsets) - 1, index), None
    # Never keep the index of a damaged shard: it would hide what is missing.
    return Shard(url, len(offsets) - 1, None, tuple(offsets)), fault


def index_shard(url: str, timeout_s: float = 30.0) -> tuple[list[int], BadSampleError | None]:
    """Reads a shard's headers; a remote one goes by once as a whole."""
    offsets: list[int] = [0]
    fault: BadSampleError | None = None
    try:
        source = open_source(url, timeout_s)
        try:
            offsets, fault = sample_offsets(source.whole(), seekable=not is_remote(url))
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
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile(dir=place.parent, prefix=".idx-", delete=False) as file:
                file.write(np.asarray(offsets, dtype=INDEX_DTYPE).tobytes())
            os.chmod(file.name, 0o644)
            os.replace(file.name, place)
            return place
        except OSError as error:
            logger.debug("index %s cannot be written: %s", place, error)
    return None


def index_path(shard: str | Path) -> Path:
    """`a/b.tar` -> `a/b.tar.idx`"""
    return Path(f"{shard}.idx")


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
