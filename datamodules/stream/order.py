"""The order of samples: computes the samples of micro-batch m from counts, without reading data.

Orders store chunks, not samples, so lookup is fast in a data set of any size.
"""

import copy
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from datamodules.stream.index import Manifest

_MIXED_STREAMS = 48  # default number of virtual streams; slightly more if steps do not divide it
_MOST_CHUNKS = 2**21  # per epoch; 30 MB per process


@dataclass(frozen=True)
class StreamOptions:
    """Options for shuffling and reading samples.

    Attributes:
        virtual_streams: V; the number of ranks must divide it. `None` chooses a multiple of the
            micro-batches per optimizer step near 48. A small data set gets fewer, so that at most
            5 % of the samples are left over. A mixture ignores it.
        window: number of consecutive samples of a stream that are shuffled together. A window of
            samples from a pipe is held in memory.
        chunk: consecutive samples of a shard that the epoch's shuffle moves together; doubled
            until an epoch has at most two million chunks.
        num_workers: processes per rank that read and decode.
        timeout_s: seconds without data after which a remote shard counts as stalled.
        index_cache: folder for indexes that cannot be stored beside their shard.
        on_bad_sample: `skip` counts a bad sample and takes the next good one, `raise` stops;
            `None` skips in training and raises in evaluation.
        max_bad_rate: the training stops if the fraction of bad samples is higher.
        on_changed: `stop` refuses a checkpoint of other data or settings, `go_on` accepts it.
        max_tokens: maximum tokens of a micro-batch, from the lengths that `ropelab-shards measure`
            stores; `None`: micro-batches are cut by samples only.
        tokens_per_frame, tokens_per_image: average tokens that the pooler keeps of a video frame
            and of an image (`None`: the same as of a frame).
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
            raise ValueError("data.stream.window and data.stream.chunk must be 1 or more")
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
                "data.stream.max_tokens needs data.stream.tokens_per_frame: the average number of "
                "tokens that the pooler leaves of a frame"
            )


class Row(NamedTuple):
    """The stream position of one sample: an order, a stream and a row in it."""

    order: "FileOrder"
    stream: int
    row: int


class FileOrder:
    """One stream with every sample once, in shard order. The last micro-batch may be shorter.

    Attributes:
        number: the epoch.
        part: the index of this order in a mixture; its shards are numbered from `first_shard`.
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
        """Returns the number of micro-batches per epoch, over all ranks."""
        return math.ceil(self.samples / self.micro_batch)

    @property
    def stream_length(self) -> int:
        return self.samples

    def check_world(self, world: int) -> None:
        """Accepts any number of ranks: a rank that runs out of batches repeats the first ones."""

    def epoch(self, number: int) -> "FileOrder":
        """Returns the order of one epoch."""
        return self

    def rows(self, m: int) -> list[Row]:
        """Returns the rows of micro-batch m."""
        first = (m // self.streams) * self.micro_batch
        last = min(first + self.micro_batch, self.stream_length)
        return [Row(self, m % self.streams, row) for row in range(first, last)]

    def locate(self, stream: int, row: int) -> tuple[int, int]:
        """Returns (shard, sample in it) at a row of a stream."""
        return self._at(row)

    def window_of(self, stream: int, row: int) -> list[tuple[int, int]]:
        """Returns (shard, sample) of all samples in the window of a row, before the shuffle."""
        return [self._at(row)]

    def _at(self, position: int) -> tuple[int, int]:
        chunk = int(np.searchsorted(self._ends, position, side="right"))
        begin = int(self._ends[chunk - 1]) if chunk else 0
        shard = self.first_shard + int(self._shard[chunk])
        return shard, int(self._start[chunk]) + position - begin


class ShuffledOrder(FileOrder):
    """A new random order each epoch, in V virtual streams of equal length.

    The remainder is left out, with different samples each epoch: fewer than V micro-batches that
    do not fill the streams, and fewer than `per_step` that do not fill an optimizer step (none if V
    is a multiple of `per_step`, as by default). So every rank has the same number of batches, and
    the samples of a step do not depend on the number of ranks.

    Args:
        per_step: micro-batches per optimizer step, over all ranks.
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
                f"{self.streams} virtual streams do not hold a whole optimizer step of {per_step} "
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
        """Text for a fingerprint: the facts that the order depends on, besides the options."""
        return f"streams {self.streams}"

    def check_world(self, world: int) -> None:
        check_ranks(self.per_step, world)
        if self.streams % world:
            legal = [n for n in divisors(self.streams) if self.per_step % n == 0]
            raise ValueError(
                f"{self.streams} virtual streams cannot be shared by {world} ranks; set "
                f"data.stream.virtual_streams to a multiple of {world}, or use {listed(legal)} "
                "ranks"
            )

    def epoch(self, number: int) -> "ShuffledOrder":
        chunks = -(-self._counts // self._sizes)
        shard = np.repeat(np.arange(len(chunks), dtype=np.int32), chunks)
        nth = np.arange(len(shard)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
        # RandomState draws the same numbers in every version of NumPy; Generator may not
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
        """Returns the sample numbers of the epoch in the order of its micro-batches.

        Samples are numbered consecutively through all shards.
        """
        counts, firsts = np.diff(self._ends, prepend=0), np.cumsum(self._counts) - self._counts
        at = np.repeat(firsts[self._shard] + self._start - (self._ends - counts), counts)
        at += np.arange(len(at))  # sample number at each stream position of the epoch
        rows = np.empty((self.streams, self._rows), dtype=np.int64)
        draw = np.random.RandomState()  # reseeded for each window: much faster than a new object
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


@lru_cache(maxsize=1024)  # a stream uses its window again only after all other streams
def _shuffle(seed: tuple[int, ...], width: int) -> np.ndarray:
    return np.random.RandomState(seed).permutation(width)


def _chunk_sizes(manifest: Manifest, chunk: int) -> np.ndarray:
    """Returns the chunk size of each shard. A shard without seek is one chunk."""
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
    """Checks that `world` ranks can share the micro-batches of an optimizer step.

    Raises:
        ValueError: they cannot.
    """
    if per_step % world:
        raise ValueError(
            f"{per_step} micro-batches of an optimizer step cannot be shared by {world} ranks; use "
            f"{listed(divisors(per_step))} ranks, or another data.batch_size"
        )


def divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def listed(numbers: list[int]) -> str:
    """Returns the numbers as text: `1, 2, 3`."""
    return ", ".join(map(str, numbers))
