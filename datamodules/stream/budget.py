"""Micro-batches of about equal length: cuts an order of samples by tokens.

samples   in the order of the run, for any number of ranks: 310 | 80 | 95 | 2040 | 77 | ...  tokens
   |  consecutive samples that fit into `max_tokens`, at most `batch_size`
   v
micro-batch m   [310 80 95] [2040] [77 ...]
"""

import copy
import logging

import numpy as np
from jaxtyping import Int, Int32, Int64

from datamodules.common.digest import digest
from datamodules.stream.mixture import MixtureOrder
from datamodules.stream.order import Row, ShuffledOrder, check_ranks

logger = logging.getLogger(__name__)


class BudgetOrder:
    """Micro-batches of at most `max_tokens` tokens. A longer sample is a micro-batch of its own.

    The cut is a pure function of the order of samples, their lengths and `max_tokens`. It does not
    depend on ranks or workers. Every epoch has as many micro-batches as the first one, without
    those that do not fill an optimizer step. If the order of a later epoch makes fewer, the
    micro-batches with the most samples are halved. If it makes more, its last samples are left out.

    Any rank may get any sample, so every rank reads a pipe from start to end. Prefer files.
    The order keeps 4 bytes per sample and 8 per micro-batch. Computing an epoch takes 56 bytes per
    sample and 0.5 s per million samples in every rank. The design limit is 10^8 samples.

    Attributes:
        described: the facts that the order depends on, as text for a fingerprint.
        trained: number of micro-batches per epoch that are trained on, from the first one.

    Args:
        order: an order with micro-batches of one sample.
        tokens: tokens of every sample, in shard order.
        micro_batch: maximum samples of a micro-batch.
        per_step: micro-batches per optimizer step, over all ranks.
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
        lengths = digest(tokens.astype("<i4").tobytes())
        self.described = f"{order.described} tokens {max_tokens} of {lengths}"
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
        self._samples: dict[int, int] = {}  # trained samples of each epoch computed so far
        self.trained = self._batches
        self._newest = self

    def __len__(self) -> int:
        """Returns the number of micro-batches per epoch, over all ranks."""
        return self._batches

    @property
    def too_long(self) -> int:
        """Number of samples that are longer than `max_tokens`."""
        return int((self._tokens > self._max_tokens).sum())

    def check_world(self, world: int) -> None:
        check_ranks(self.per_step, world)

    def epoch(self, number: int) -> "BudgetOrder":
        """Returns the order of one epoch."""
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
        """Returns the rows of micro-batch m."""
        samples = range(int(self._cuts[m]), int(self._cuts[m + 1]))
        return [row for sample in samples for row in self._order.rows(sample)]

    def samples_before(self, epoch: int, micro_batches: int) -> int:
        """Returns the samples of all epochs before `epoch` plus its first `micro_batches`."""
        for number in {*range(epoch)} - self._samples.keys():
            self._samples[number] = int(self.epoch(number)._cuts[self.trained])
        whole = sum(self._samples[number] for number in range(epoch))
        return whole + (int(self.epoch(epoch)._cuts[micro_batches]) if micro_batches else 0)

    def _cut(self, order: ShuffledOrder | MixtureOrder) -> Int64[np.ndarray, " c"]:
        return cut(self._tokens[order.numbers()], self._max_tokens, self.micro_batch)


def cut(tokens: Int[np.ndarray, " s"], max_tokens: int, most: int) -> Int64[np.ndarray, " c"]:
    """Returns the start of each micro-batch, and the end of the last one.

    Each micro-batch takes as many samples as fit.
    """
    ends = np.cumsum(tokens, dtype=np.int64)
    here = np.arange(len(tokens))
    stops = np.searchsorted(ends, ends - tokens + max_tokens, side="right")
    stops = np.maximum(np.minimum(stops, here + most), here + 1)
    cuts = [0]
    while cuts[-1] < len(tokens):
        cuts.append(int(stops[cuts[-1]]))
    return np.array(cuts, dtype=np.int64)


def halve(cuts: Int64[np.ndarray, " c"], batches: int) -> Int64[np.ndarray, " c2"]:
    """Halves the largest micro-batches until there are `batches`, or each holds one sample."""
    while len(cuts) <= batches and (sizes := np.diff(cuts)).max() > 1:
        largest = np.argsort(-sizes, kind="stable")[: batches + 1 - len(cuts)]
        largest = largest[sizes[largest] > 1]
        cuts = np.sort(np.append(cuts, cuts[largest] + sizes[largest] // 2))
    return cuts
