"""Manifest -> batches, in an order that does not depend on ranks or workers.

    manifest     shards and the number of samples in each
       |  shuffle chunks (runs of samples inside a shard), cut into V equal virtual streams
       v
    streams      each shuffled within windows of a fixed number of samples
       |  micro-batch m of the epoch comes from stream m mod V
       v
    micro-batch  rank r takes m = r, r + world, ...; its DataLoader workers take turns.
       |         global_batch_size / batch_size micro-batches in a row make one optimizer step
       |  read a byte range, untar, decode; the next good sample replaces a bad one
       v
    batch

The order is a pure function of (manifest, seed, epoch, V, micro-batch size, window, chunk), and of
the sample lengths if `budget.py` cuts micro-batches by tokens. The order, and the samples of each
optimizer step, are the same for every number of ranks and workers. The caller gives the stream
position as (epoch, micro-batches done by all ranks together); nothing here stores it.
"""

import logging
import math
import os
import signal
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any, Protocol, cast, runtime_checkable

from lightning import Trainer
from torch.utils.data import DataLoader, Dataset

from datamodules.batch import data_rank
from datamodules.errors import BadSampleError
from datamodules.stream.budget import BudgetOrder
from datamodules.stream.index import Manifest, Shard
from datamodules.stream.mixture import MixtureOrder
from datamodules.stream.order import FileOrder, Row
from datamodules.stream.reading.source import Source, open_source
from datamodules.stream.reading.tar import untar_sample

logger = logging.getLogger(__name__)

_BAD_IN_A_ROW = 100
_JUDGED_FROM = 200

_Lane = tuple[int, int]  # part of a mixture, stream


class Faults:
    """Counts and skips bad samples, or raises them at once.

    Attributes:
        new: counts by reason in this process, not yet merged with other ranks.
        agreed: counts of all ranks, including those before a resume.
        shards: counts of damaged shards; every rank has the same.
    """

    def __init__(self, on_bad_sample: str, max_rate: float = 1.0):
        if on_bad_sample not in ("skip", "raise"):
            raise ValueError(
                f"data.stream.on_bad_sample is {on_bad_sample!r}; set it to 'skip' or 'raise'"
            )
        self._raise, self._max_rate = on_bad_sample == "raise", max_rate
        self.new, self.agreed, self.shards = (Counter[str]() for _ in range(3))

    def add(self, fault: BadSampleError) -> None:
        self._count(fault, self.new)

    def add_shards(self, faults: Iterable[BadSampleError], seen: int) -> None:
        """Counts the faults of whole shards, out of `seen` shards.

        Raises:
            BadSampleError: too_many_bad.
        """
        for fault in faults:
            self._count(fault, self.shards)
        self._judge(self.shards, seen, "shards")

    def _count(self, fault: BadSampleError, counts: Counter[str]) -> None:
        if self._raise:
            raise fault
        counts[fault.reason] += 1
        if counts.total() <= 10:
            logger.warning("skipped: %s", fault)

    def merge(self, ranks: Iterable[Mapping[str, int]]) -> None:
        """Adds the `new` counts of all ranks, including this one, to `agreed`."""
        for counts in ranks:
            self.agreed.update(counts)
        self.new.clear()

    @property
    def counts(self) -> Counter[str]:
        """All counts that this process knows, by reason."""
        return self.shards + self.agreed + self.new

    def judge(self, seen: int) -> None:
        """Stops the training if too many of the samples seen by all ranks were bad.

        Raises:
            BadSampleError: too_many_bad, with the most common reasons.
        """
        self._judge(self.agreed + self.new, seen, "samples")

    def _judge(self, bad: Counter[str], seen: int, what: str) -> None:
        if seen >= _JUDGED_FROM and bad.total() > self._max_rate * seen:
            raise BadSampleError(
                "too_many_bad",
                f"{bad.total()} of {seen} {what} ({_by_reason(bad, 3)}); repair the data, or set "
                f"data.stream.max_bad_rate above {self._max_rate:g}",
            )

    def summary(self) -> str:
        """Returns `3 bad samples skipped: video_unreadable 2, missing_field 1`, or ""."""
        counts = self.counts
        return f"{counts.total()} bad samples skipped: {_by_reason(counts)}" if counts else ""


def _by_reason(counts: Counter[str], most: int | None = None) -> str:
    return ", ".join(f"{reason} {n}" for reason, n in counts.most_common(most))


class ShardReader:
    """Reads samples by shard and number. Each process keeps its last used shards open."""

    def __init__(self, manifest: Manifest, timeout_s: float, keep_open: int = 64):
        self._shards, self._timeout_s, self._keep = manifest.shards, timeout_s, keep_open
        self._open: OrderedDict[tuple[int, _Lane], tuple[Source, Any]] = OrderedDict()

    def read(self, shard: int, sample: int, lane: _Lane = (0, 0)) -> bytes:
        """Returns the raw tar bytes of a sample.

        Each lane opens a pipe of its own. Otherwise one lane could force another to restart it.
        """
        key = (shard, lane if self._shards[shard].in_order else (0, 0))
        if key not in self._open:
            self._open[key] = self._open_shard(self._shards[shard])
            if len(self._open) > self._keep:
                self._open.popitem(last=False)[1][0].close()
        self._open.move_to_end(key)
        source, offsets = self._open[key]
        return source.read(int(offsets[sample]), int(offsets[sample + 1]))

    def _open_shard(self, shard: Shard) -> tuple[Source, Any]:
        offsets = shard.read_offsets()
        if len(offsets) != shard.count + 1:
            detail = f"{len(offsets) - 1} samples, but {shard.count} when it was listed"
            raise BadSampleError("index_stale", detail)
        return open_source(shard.url, self._timeout_s), offsets

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1][0].close()


class EpochStream(Dataset):
    """The micro-batches of one epoch, by number m. It runs in a DataLoader worker."""

    def __init__(
        self,
        manifest: Manifest,
        order: FileOrder | MixtureOrder | BudgetOrder,
        decode: Callable[[dict[str, Any]], Any],
        collate: Callable[[list[Any]], Any],
        timeout_s: float,
    ):
        self._manifest, self._order = manifest, order
        self._decode, self._collate = decode, collate
        self._reader = ShardReader(manifest, timeout_s)
        self._held: OrderedDict[tuple[_Lane, int, tuple[int, int]], dict] = OrderedDict()

    def __getitem__(self, m: int) -> tuple[Any, list[BadSampleError]]:
        """Returns the batch and the bad samples that were replaced.

        The batch is None if no good sample was found for a row.
        """
        samples, faults = [], []
        for row in self._order.rows(m % len(self._order)):
            sample, fault = self._first_good(row)
            faults += [fault] if fault else []
            if sample is None:
                return None, faults
            samples.append(sample)
        return self._collate(samples), faults

    def close(self) -> None:
        self._reader.close()

    def _first_good(self, at: Row) -> tuple[Any, BadSampleError | None]:
        """Returns the sample at a row, or the next good one of its stream.

        All other samples keep their stream positions.
        """
        fault, length = None, at.order.stream_length
        for step in range(min(_BAD_IN_A_ROW, length)):
            row = at._replace(row=(at.row + step) % length)
            place = row.order.locate(row.stream, row.row)
            shard = self._manifest.shards[place[0]]
            key = f"#{place[1]}"
            try:
                raw = untar_sample(self._bytes(row, place, shard), shard.url)
                key = raw["__key__"]
                return self._decode(raw), fault
            except BadSampleError as error:
                fault = fault or BadSampleError(
                    error.reason, error.detail, shard=shard.url, key=key
                )
        return None, fault

    def _bytes(self, at: Row, place: tuple[int, int], shard: Shard) -> bytes:
        if not shard.in_order:
            return self._reader.read(*place)
        lane = at.order.part, at.stream
        window = at.order.window_of(at.stream, at.row)
        key = lane, at.order.number, window[0]
        held = self._held.get(key)
        if held is None:
            held = self._held[key] = {where: self._try_read(lane, where) for where in window}
            if sum(other[0] == lane for other in self._held) > 2:
                del self._held[next(other for other in self._held if other[0] == lane)]
        data = held[place]
        if isinstance(data, BadSampleError):
            raise data
        return data

    def _try_read(self, lane: _Lane, place: tuple[int, int]) -> bytes | BadSampleError | None:
        if not self._manifest.shards[place[0]].in_order:
            return None  # a seekable shard in the same window; it is read only when needed
        try:
            return self._reader.read(*place, lane=lane)
        except BadSampleError as error:
            return error


@runtime_checkable
class MicroBatches(Protocol):
    """A source of micro-batches by number m. Each comes with its bad samples."""

    def __getitem__(self, m: int) -> tuple[Any, list[BadSampleError]]: ...

    def close(self) -> None: ...


@runtime_checkable
class Order(Protocol):
    def __len__(self) -> int:
        """Returns the number of micro-batches per epoch, over all ranks."""
        ...

    def check_world(self, world: int) -> None:
        """Raises ValueError if `world` ranks cannot share the micro-batches."""
        ...


def trained_on(trainer: Trainer | None) -> tuple[int, int]:
    """Returns (epoch, micro-batches of all ranks trained on in it), as the trainer counts.

    Returns (0, 0) with Lightning's `overfit_batches`, which trains on the same batches each epoch.
    """
    if trainer is None or trainer.overfit_batches:  # pyright: ignore[reportAttributeAccessIssue]
        return 0, 0
    current = trainer.fit_loop.epoch_loop.batch_progress.current
    done = current.processed  # pyright: ignore[reportAttributeAccessIssue]
    return trainer.current_epoch, done * data_rank(trainer)[1]


class StreamLoader:
    """Loads the batches of one rank. Each iteration is one epoch of `len()` batches.

    It is not a DataLoader, so Lightning does not replace its sampler. It calls `position` only at
    the first batch, because a trainer that resumes knows the stream position late.
    """

    def __init__(
        self,
        stream_at: Callable[[int], MicroBatches],
        order: Order,
        faults: Faults,
        *,
        rank: int = 0,
        world: int = 1,
        num_workers: int = 0,
        position: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ):
        order.check_world(world)
        self.order, self.world = order, world
        self._stream_at, self._faults, self._position = stream_at, faults, position
        self._rank, self._workers = rank, num_workers
        self._batches = math.ceil(len(order) / world)

    def __len__(self) -> int:
        return self._batches

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty state. Lightning sees from this method that the loader can resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing: `position` returns where to continue."""

    def __iter__(self) -> Iterator[Any]:
        epoch, done = self._position()
        mine = range(done + self._rank, self._batches * self.world, self.world)
        stream = self._stream_at(epoch)
        loader = DataLoader(
            cast(Dataset, stream),
            sampler=mine,
            batch_size=None,
            num_workers=self._workers,
            collate_fn=_as_it_is,
            worker_init_fn=outlive_stop_signals,
        )
        try:
            for batch, faults in loader:
                for fault in faults:
                    self._faults.add(fault)
                if batch is None:
                    raise BadSampleError(
                        "no_good_sample",
                        f"too many samples in a row are bad, the last one: {faults[-1]}",
                    )
                yield batch
        finally:
            stream.close()


def _as_it_is(item: Any) -> Any:
    return item


def outlive_stop_signals(worker_id: int) -> None:
    """Makes a DataLoader worker ignore the stop signals of a job (a `worker_init_fn`).

    Schedulers and terminals signal every process of a job. If a worker dies, the training fails
    before it can save. So the worker ignores the first SIGTERM. It ends at the second one, or if
    the training process no longer exists.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()

    def first(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getppid() != parent:
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, first)
