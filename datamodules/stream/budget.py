"""Micro-batches of about equal length: cut out of an order of samples by tokens.

samples   in the order of the run, whatever the ranks: 310 | 80 | 95 | 2040 | 77 | ...  tokens
   |  as many in a row as fit into `max_tokens`, and `batch_size` at most
   v
micro-batch m   [310 80 95] [2040] [77 ...]
"""

import copy
import hashlib
import logging

import numpy as np
from jaxtyping import Int, Int32, Int64

from datamodules.stream.mixture import MixtureOrder
from datamodules.stream.order import Row, ShuffledOrder, check_ranks

logger = logging.getLogger(__name__)


class BudgetOrder:
    """Micro-batches of at most `max_tokens` tokens, a longer sample being one of its own.

    A pure function of the order beneath, the lengths and `max_tokens`: not of ranks or workers. An
    epoch has the micro-batches of the first epoch, less those that do not fill an optimizer step.
    Where another epoch's order would make fewer, the ones of most samples are halved; where it
    would make more, its last samples are left out.

    Any rank may get any sample: shards in pipes are read whole by every rank, so name files.
    Keeps 4 bytes a sample and 8 a micro-batch. To lay out an epoch takes 56 bytes a sample and
    0.5 s a million, in every rank: what it is meant for ends at 10^8 samples.

    Attributes:
        described: what the order depends on, for a fingerprint.
        trained: the micro-batches of each epoch, from its first on, that are trained on.

    Args:
        order: of micro-batches of one sample.
        tokens: of every sample, in the order of the shards.
        micro_batch: samples of a micro-batch at most.
        per_step: micro-batches of one optimizer step, all ranks together.
    """

    def __init__(
        self,
        order: ShuffledOrder | MixtureOrder,
        tokens: Int32[np.ndarray, " s"],
        max_tokens: int,
        micro_batch: int,
        per_step: int = 1,
    ):
        self._epochs, self._tokens, self._max_tokens = order, tokens, max_tokens
        self.micro_batch, self.per_step, self.number = micro_batch, per_step, 0
        digest = hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()[:16]
        self.described = f"{order.described} tokens {max_tokens} of {digest}"
        self._order = order.epoch(0)
        self._cuts = self._cut(self._order)
        found = len(self._cuts) - 1
        self._batches = found // per_step * per_step
        if not self._batches:
            raise ValueError(
                f"{len(tokens)} samples make {found} micro-batches of {max_tokens} tokens, fewer "
                f"than the {per_step} of one optimizer step; set a smaller data.stream.max_tokens "
                "or data.global_batch_size"
            )
        self._cuts = self._cuts[: self._batches + 1]
        self._samples: dict[int, int] = {}  # trained on in each epoch that was laid out
        self.trained = self._batches
        self._newest = self

    def __len__(self) -> int:
        """Micro-batches of an epoch, all ranks together."""
        return self._batches

    @property
    def too_long(self) -> int:
        """Samples that alone are longer than `max_tokens`."""
        return int((self._tokens > self._max_tokens).sum())

    def check_world(self, world: int) -> None:
        check_ranks(self.per_step, world)

    def epoch(self, number: int) -> "BudgetOrder":
        """The order of one epoch."""
        if number == self.number:
            return self
        if self._newest.number != number:
            order = copy.copy(self)
            order.number, order._order = number, self._epochs.epoch(number)
            order._cuts = halve(self._cut(order._order), self._batches)[: self._batches + 1]
            self._samples[number] = int(order._cuts[self.trained])
            self._newest = order
        return self._newest

    def rows(self, m: int) -> list[Row]:
        """The rows of micro-batch m."""
        samples = range(int(self._cuts[m]), int(self._cuts[m + 1]))
        return [row for sample in samples for row in self._order.rows(sample)]

    def samples_before(self, epoch: int, micro_batches: int) -> int:
        """Samples of all epochs before one, and of so many micro-batches of it."""
        for number in {*range(epoch)} - self._samples.keys():
            self._samples[number] = int(self.epoch(number)._cuts[self.trained])
        whole = sum(self._samples[number] for number in range(epoch))
        return whole + (int(self.epoch(epoch)._cuts[micro_batches]) if micro_batches else 0)

    def _cut(self, order: ShuffledOrder | MixtureOrder) -> Int64[np.ndarray, " c"]:
        return cut(self._tokens[order.numbers()], self._max_tokens, self.micro_batch)


def cut(tokens: Int[np.ndarray, " s"], max_tokens: int, most: int) -> Int64[np.ndarray, " c"]:
    """Where micro-batches begin, and where the last one ends: each as long as it can be."""
    ends = np.cumsum(tokens, dtype=np.int64)
    here = np.arange(len(tokens))
    stops = np.searchsorted(ends, ends - tokens + max_tokens, side="right")
    stops = np.maximum(np.minimum(stops, here + most), here + 1)
    cuts = [0]
    while cuts[-1] < len(tokens):
        cuts.append(int(stops[cuts[-1]]))
    return np.array(cuts, dtype=np.int64)


def halve(cuts: Int64[np.ndarray, " c"], batches: int) -> Int64[np.ndarray, " c2"]:
    """Halves the micro-batches of most samples until there are so many, or no two samples meet."""
    while len(cuts) <= batches and (sizes := np.diff(cuts)).max() > 1:
        largest = np.argsort(-sizes, kind="stable")[: batches + 1 - len(cuts)]
        largest = largest[sizes[largest] > 1]
        cuts = np.sort(np.append(cuts, cuts[largest] + sizes[largest] // 2))
    return cuts
