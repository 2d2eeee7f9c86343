"""Which samples make micro-batch m of an epoch: arithmetic over counts, no data is touched.

Kept by chunk and never by sample, so that a place is found fast in a set of any size.
"""

import copy
import math
from dataclasses import dataclass

import numpy as np

from datamodules.index import Manifest

_DEFAULT_STREAMS = 48


@dataclass(frozen=True)
class StreamOptions:
    """How samples are shuffled and read.

    Attributes:
        virtual_streams: V; the number of ranks must divide it. `None` takes 48, or less where the
            set is small: the largest divisor of 48 that leaves a twentieth or less over.
        window: samples that are shuffled among each other inside a stream. Shards in a pipe are
            held in memory for that long, others are not.
        chunk: samples in a row inside a shard that the epoch's shuffle moves as one.
        timeout_s: after so many seconds without data a remote shard counts as stalled.
        index_cache: folder for indexes that cannot lie beside their shard.
    """

    seed: int = 0
    virtual_streams: int | None = None
    window: int = 64
    chunk: int = 8
    timeout_s: float = 30.0
    index_cache: str | None = None


class FileOrder:
    """One stream: every sample once, as it stands in the shards. The last micro-batch is short."""

    streams = 1

    def __init__(self, manifest: Manifest, micro_batch: int):
        if micro_batch < 1:
            raise ValueError(f"batch_size is {micro_batch}; set it to 1 or more")
        self.micro_batch = micro_batch
        self.samples = len(manifest)
        if not self.samples:
            reasons = ", ".join(str(fault) for fault in manifest.faults[:3]) or "all are empty"
            raise ValueError(f"no sample in {len(manifest.shards)} shards: {reasons}")
        counts = np.array([shard.count for shard in manifest.shards], dtype=np.int64)
        self._set_chunks(np.arange(len(counts)), np.zeros_like(counts), counts)

    def _set_chunks(self, shard: np.ndarray, start: np.ndarray, length: np.ndarray) -> None:
        self._shard, self._start = shard, start
        self._ends = np.cumsum(length)
        self._begins = self._ends - length

    def __len__(self) -> int:
        """Micro-batches of an epoch, all ranks together."""
        return math.ceil(self.samples / self.micro_batch)

    @property
    def stream_length(self) -> int:
        return self.samples

    def check_world(self, world: int) -> None:
        """Any number of ranks: those that would run out of batches repeat the first ones."""

    def epoch(self, epoch: int) -> "FileOrder":
        """The order of one epoch."""
        return self

    def rows(self, m: int) -> tuple[int, range]:
        """The stream of micro-batch m, and its rows there."""
        first = (m // self.streams) * self.micro_batch
        return m % self.streams, range(first, min(first + self.micro_batch, self.stream_length))

    def locate(self, stream: int, row: int) -> tuple[int, int]:
        """(shard, sample in it) at a row of a stream."""
        return self._at(row)

    def window_of(self, stream: int, row: int) -> list[tuple[int, int]]:
        """All places of the window around a row, as they stand in the shards."""
        return [self._at(row)]

    def _at(self, position: int) -> tuple[int, int]:
        chunk = int(np.searchsorted(self._ends, position, side="right"))
        sample = self._start[chunk] + position - self._begins[chunk]
        return int(self._shard[chunk]), int(sample)


class ShuffledOrder(FileOrder):
    """Another order each epoch, in V virtual streams of the same length.

    The rest, fewer than V micro-batches and other samples each epoch, is left out: so every rank
    has the same number of batches, whatever the number of ranks.
    """

    def __init__(self, manifest: Manifest, micro_batch: int, options: StreamOptions):
        super().__init__(manifest, micro_batch)
        if options.window < 1 or options.chunk < 1:
            raise ValueError("window and chunk of data.stream are counts of 1 or more")
        self._options, self._epoch = options, 0
        self.streams = _count_streams(self.samples // micro_batch, options.virtual_streams)
        self._sizes = [
            shard.count if shard.in_order else options.chunk for shard in manifest.shards
        ]
        self._counts = [shard.count for shard in manifest.shards]

    def __len__(self) -> int:
        return self.samples // self.micro_batch // self.streams * self.streams

    @property
    def stream_length(self) -> int:
        return len(self) // self.streams * self.micro_batch

    def check_world(self, world: int) -> None:
        if self.streams % world:
            raise ValueError(
                f"{self.streams} virtual streams cannot be shared by {world} ranks; "
                f"set data.stream.virtual_streams to a multiple of {world}"
            )

    def epoch(self, epoch: int) -> "ShuffledOrder":
        counts = np.array(self._counts, dtype=np.int64)
        sizes = np.maximum(np.array(self._sizes, dtype=np.int64), 1)
        chunks = -(-counts // sizes)
        shard = np.repeat(np.arange(len(counts)), chunks)
        nth = np.arange(len(shard)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
        start = nth * sizes[shard]
        length = np.minimum(sizes[shard], counts[shard] - start)
        # RandomState, unlike Generator, is frozen: a newer NumPy draws the same numbers
        moved = np.random.RandomState([self._options.seed, epoch]).permutation(len(shard))
        order = copy.copy(self)
        order._epoch = epoch
        order._set_chunks(shard[moved], start[moved], length[moved])
        return order

    def locate(self, stream: int, row: int) -> tuple[int, int]:
        block, width = self._block(row)
        window = self._options.window
        seed = [self._options.seed, self._epoch, stream, block]
        shuffled = np.random.RandomState(seed).permutation(width)
        first = stream * self.stream_length + block * window
        return self._at(first + int(shuffled[row % window]))

    def window_of(self, stream: int, row: int) -> list[tuple[int, int]]:
        block, width = self._block(row)
        first = stream * self.stream_length + block * self._options.window
        return [self._at(position) for position in range(first, first + width)]

    def _block(self, row: int) -> tuple[int, int]:
        window = self._options.window
        block = row // window
        return block, min(window, self.stream_length - block * window)


def _count_streams(micro_batches: int, asked: int | None) -> int:
    if asked is not None:
        if not 1 <= asked <= micro_batches:
            raise ValueError(
                f"{micro_batches} micro-batches cannot fill {asked} virtual streams; "
                f"set data.stream.virtual_streams to {max(micro_batches, 1)} or less, "
                "or a smaller batch_size"
            )
        return asked
    if not micro_batches:
        raise ValueError("fewer samples than one batch; set a smaller batch_size")
    return max(
        v
        for v in range(1, _DEFAULT_STREAMS + 1)
        if _DEFAULT_STREAMS % v == 0 and 20 * (micro_batches % v) <= micro_batches >= v
    )
