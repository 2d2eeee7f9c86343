"""Which samples make micro-batch m of an epoch: arithmetic over counts, no data is touched.

Kept by chunk and never by sample, so that a place is found fast in a set of any size.
"""

import copy
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from datamodules.stream.index import Manifest

_MIXED_STREAMS = 48  # so many places of the set meet in neighbouring micro-batches, or a few more
_MOST_CHUNKS = 2**21  # of an epoch: 30 MB a process


@dataclass(frozen=True)
class StreamOptions:
    """How samples are shuffled and read.

    Attributes:
        virtual_streams: V; the number of ranks must divide it. `None` takes the multiple of the
            micro-batches of an optimizer step that is next to 48, or less where the set is small:
            so that a twentieth or less is left over. A mixture needs none.
        window: samples that are shuffled among each other inside a stream. Shards in a pipe are
            held in memory for that long, others are not.
        chunk: samples in a row inside a shard that the epoch's shuffle moves as one; doubled
            until an epoch has two million of them or less.
        num_workers: processes that read and decode, a rank.
        timeout_s: after so many seconds without data a remote shard counts as stalled.
        index_cache: folder for indexes that cannot lie beside their shard.
        on_bad_sample: `skip` counts a bad sample and takes the next good one, `raise` stops;
            `None` skips in training and raises in evaluation.
        max_bad_rate: the share of bad samples above which a training stops.
        on_changed: `stop` refuses a checkpoint of other data or settings, `go_on` takes it.
        max_tokens: of a micro-batch, by the lengths that `ropelab-shards measure` keeps; `None`
            counts samples alone.
        tokens_per_frame, tokens_per_image: what the pooler leaves of a video's frame on average,
            and of an image (`None`: as of a frame).
    """

    seed: int = 0
    virtual_streams: int | None = None
    window: int = 64
    chunk: int = 8
    num_workers: int = 0
    timeout_s: float = 30.0
    index_cache: str | None = None
    on_bad_sample: str | None = None
    max_bad_rate: float = 0.05
    on_changed: str = "stop"
    max_tokens: int | None = None
    tokens_per_frame: float | int | None = None
    tokens_per_image: float | int | None = None

    def __post_init__(self) -> None:
        if self.window < 1 or self.chunk < 1:
            raise ValueError("window and chunk of data.stream are counts of 1 or more")
        if not 0 <= self.max_bad_rate <= 1:
            raise ValueError(
                f"data.stream.max_bad_rate is {self.max_bad_rate}; set a share from 0 to 1"
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(
                f"data.stream.max_tokens is {self.max_tokens}; set a number of tokens, or null"
            )
        if self.max_tokens is not None and self.tokens_per_frame is None:
            raise ValueError(
                "data.stream.max_tokens needs data.stream.tokens_per_frame: the tokens that the "
                "pooler leaves of a frame on average"
            )


class Row(NamedTuple):
    """Where one sample of a micro-batch stands: a row of a stream of some order."""

    order: "FileOrder"
    stream: int
    row: int


class FileOrder:
    """One stream: every sample once, as it stands in the shards. The last micro-batch is short.

    Attributes:
        number: of the epoch.
        part: of a mixture that this order is, its shards counting from `first_shard` on.
    """

    streams, number, part, first_shard = 1, 0, 0, 0

    def __init__(self, manifest: Manifest, micro_batch: int):
        if micro_batch < 1:
            raise ValueError(f"data.batch_size is {micro_batch}; set it to 1 or more")
        self.micro_batch = micro_batch
        self.samples = len(manifest)
        if not self.samples:
            reasons = ", ".join(str(fault) for fault in manifest.faults[:3]) or "all are empty"
            raise ValueError(f"no sample in {len(manifest.shards)} shards: {reasons}")
        counts = manifest.counts
        self._set_chunks(np.arange(len(counts)), np.zeros_like(counts), counts)

    def _set_chunks(self, shard: np.ndarray, start: np.ndarray, length: np.ndarray) -> None:
        self._shard, self._start = shard.astype(np.int32), start.astype(np.int32)
        self._ends = np.cumsum(length, dtype=np.int64)

    def __len__(self) -> int:
        """Micro-batches of an epoch, all ranks together."""
        return math.ceil(self.samples / self.micro_batch)

    @property
    def stream_length(self) -> int:
        return self.samples

    def check_world(self, world: int) -> None:
        """Any number of ranks: those that would run out of batches repeat the first ones."""

    def epoch(self, number: int) -> "FileOrder":
        """The order of one epoch."""
        return self

    def rows(self, m: int) -> list[Row]:
        """The rows of micro-batch m."""
        first = (m // self.streams) * self.micro_batch
        last = min(first + self.micro_batch, self.stream_length)
        return [Row(self, m % self.streams, row) for row in range(first, last)]

    def locate(self, stream: int, row: int) -> tuple[int, int]:
        """(shard, sample in it) at a row of a stream."""
        return self._at(row)

    def window_of(self, stream: int, row: int) -> list[tuple[int, int]]:
        """All places of the window around a row, as they stand in the shards."""
        return [self._at(row)]

    def _at(self, position: int) -> tuple[int, int]:
        chunk = int(np.searchsorted(self._ends, position, side="right"))
        begin = int(self._ends[chunk - 1]) if chunk else 0
        shard = self.first_shard + int(self._shard[chunk])
        return shard, int(self._start[chunk]) + position - begin


class ShuffledOrder(FileOrder):
    """Another order each epoch, in V virtual streams of the same length.

    The rest is left out, other samples each epoch: fewer than V micro-batches that do not fill
    the streams, and fewer than `per_step` that do not fill an optimizer step (none where V is a
    multiple of it, as by default). So every rank has the same number of batches and every step the
    same samples, whatever the number of ranks.

    Args:
        per_step: micro-batches of one optimizer step, all ranks together.
    """

    def __init__(
        self,
        manifest: Manifest,
        micro_batch: int,
        options: StreamOptions,
        per_step: int = 1,
        *,
        part: int = 0,
        first_shard: int = 0,
    ):
        super().__init__(manifest, micro_batch)
        self.per_step, self.part, self.first_shard = per_step, part, first_shard
        batches = self.samples // micro_batch
        if batches < per_step:
            raise ValueError(
                f"{self.samples} samples are fewer than the {per_step * micro_batch} of one "
                "optimizer step; set a smaller batch_size or data.global_batch_size"
            )
        self.streams = _count_streams(batches, per_step, options.virtual_streams)
        self._rows = batches // self.streams * micro_batch
        self._batches = batches // self.streams * self.streams // per_step * per_step
        if not self._batches:
            raise ValueError(
                f"{self.streams} virtual streams leave no whole optimizer step of {per_step} "
                f"micro-batches; set data.stream.virtual_streams to a multiple of {per_step}"
            )
        self._seed, self._window = options.seed, options.window
        self._counts = manifest.counts
        self._sizes = _chunk_sizes(manifest, options.chunk)

    def __len__(self) -> int:
        return self._batches

    @property
    def stream_length(self) -> int:
        return self._rows

    @property
    def described(self) -> str:
        """What the order depends on beside the options, for a fingerprint."""
        return f"streams {self.streams}"

    def check_world(self, world: int) -> None:
        check_ranks(self.per_step, world)
        if self.streams % world:
            legal = [n for n in divisors(self.streams) if self.per_step % n == 0]
            raise ValueError(
                f"{self.streams} virtual streams cannot be shared by {world} ranks; set "
                f"data.stream.virtual_streams to a multiple of {world}, or take {listed(legal)} "
                "ranks"
            )

    def epoch(self, number: int) -> "ShuffledOrder":
        chunks = -(-self._counts // self._sizes)
        shard = np.repeat(np.arange(len(chunks), dtype=np.int32), chunks)
        nth = np.arange(len(shard)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
        # RandomState, unlike Generator, is frozen: a newer NumPy draws the same numbers
        moved = np.random.RandomState([self._seed, self.part, number]).permutation(len(shard))
        shard, nth = shard[moved], nth[moved]
        sizes = self._sizes[shard]
        start = nth * sizes
        order = copy.copy(self)
        order.number = number
        order._set_chunks(shard, start, np.minimum(sizes, self._counts[shard] - start))
        return order

    def locate(self, stream: int, row: int) -> tuple[int, int]:
        block, width = self._block(row)
        shuffled = _shuffle((self._seed, self.part, self.number, stream, block), width)
        first = stream * self.stream_length + block * self._window
        return self._at(first + int(shuffled[row % self._window]))

    def window_of(self, stream: int, row: int) -> list[tuple[int, int]]:
        block, width = self._block(row)
        first = stream * self.stream_length + block * self._window
        return [self._at(position) for position in range(first, first + width)]

    def numbers(self) -> Int64[np.ndarray, " s"]:
        """The samples of the epoch in the order of its micro-batches, each by its number.

        Numbers count on through all shards.
        """
        counts, firsts = np.diff(self._ends, prepend=0), np.cumsum(self._counts) - self._counts
        at = np.repeat(firsts[self._shard] + self._start - (self._ends - counts), counts)
        at += np.arange(len(at))  # by position in the epoch
        rows = np.empty((self.streams, self._rows), dtype=np.int64)
        draw = np.random.RandomState()  # seeded anew for each window; to make one takes far longer
        for stream, block in np.ndindex(self.streams, -(-self._rows // self._window)):
            first, width = block * self._window, self._block(block * self._window)[1]
            draw.seed((self._seed, self.part, self.number, stream, block))
            window = at[stream * self._rows + first :][:width]
            rows[stream, first : first + width] = window[draw.permutation(width)]
        by_batch = rows.reshape(self.streams, -1, self.micro_batch).swapaxes(0, 1)
        return by_batch.reshape(-1)[: self._batches * self.micro_batch]

    def _block(self, row: int) -> tuple[int, int]:
        block = row // self._window
        return block, min(self._window, self.stream_length - block * self._window)


@lru_cache(maxsize=1024)  # a stream comes back to its window after all others
def _shuffle(seed: tuple[int, ...], width: int) -> np.ndarray:
    return np.random.RandomState(seed).permutation(width)


def _chunk_sizes(manifest: Manifest, chunk: int) -> np.ndarray:
    """Samples of a chunk, for each shard; a shard that can only be read on is one chunk."""
    counts = manifest.counts
    while True:
        sizes = np.maximum(np.where(manifest.in_order, counts, chunk), 1)
        if chunk >= counts.max() or (-(-counts // sizes)).sum() <= _MOST_CHUNKS:
            return sizes
        chunk *= 2


def _count_streams(batches: int, per_step: int, asked: int | None) -> int:
    if asked is not None:
        if not 1 <= asked <= batches:
            raise ValueError(
                f"{batches} micro-batches cannot fill {asked} virtual streams; "
                f"set data.stream.virtual_streams to {batches} or less, or a smaller batch_size"
            )
        return asked
    possible = [per_step * n for n in divisors(-(-_MIXED_STREAMS // per_step))]
    return max([v for v in possible if 20 * (batches % v) <= batches >= v], default=per_step)


def check_ranks(per_step: int, world: int) -> None:
    """Whether so many ranks can share the micro-batches of an optimizer step.

    Raises:
        ValueError: they cannot.
    """
    if per_step % world:
        raise ValueError(
            f"{per_step} micro-batches of an optimizer step cannot be shared by {world} ranks; "
            f"take {listed(divisors(per_step))} ranks, or another data.batch_size"
        )


def divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def listed(numbers: list[int]) -> str:
    """`1, 2, 3`"""
    return ", ".join(map(str, numbers))
