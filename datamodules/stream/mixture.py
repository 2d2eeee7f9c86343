"""Several datasets in one order, by weight; nothing is drawn at random while it runs.

row R of the whole training = epoch * rows of an epoch + row in the epoch
   |  a fixed pattern of P rows, shuffled once, holds q rows of each dataset
   v
R = period * P + place     dataset d = pattern[place]
   |  rows of d before R: period * q[d] + those of d before place in the pattern
   v
row n of dataset d         its own epoch n // len(d), shuffled as if it were alone
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from math import gcd, lcm
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from datamodules.stream.index import Manifest
from datamodules.stream.order import Row, ShuffledOrder, StreamOptions, check_ranks

_PERIOD = 10_000


class Part(NamedTuple):
    """A dataset of a mixture. Without weights each counts by its samples."""

    name: str
    shards: Any
    weight: float | int | None


def read_parts(train: Mapping[str, Any]) -> list[Part]:
    """`{name: {shards: ..., weight: 2.0}}` -> the datasets, in the order given.

    Raises:
        ValueError: a key that is missing, unknown or makes no sense.
    """
    parts = []
    for name, node in train.items():
        known = isinstance(node, Mapping) and {"shards"} <= set(node) <= {"shards", "weight"}
        if not known:
            raise ValueError(f"data.train.{name}: give it `shards` and, if you like, `weight`")
        weight = node.get("weight")
        if weight is not None and not 0 < weight < float("inf"):
            raise ValueError(f"data.train.{name}.weight is {weight}; set a number above 0, or null")
        parts.append(Part(name, node["shards"], weight))
    without = [part.name for part in parts if part.weight is None]
    if without and len(without) < len(parts):
        raise ValueError(
            f"data.train: {', '.join(without)} has no weight, others have; give all one, or none"
        )
    if not parts:
        raise ValueError("data.train is an empty mapping; name a dataset")
    return parts


def count_quotas(weights: Sequence[float | int]) -> list[int]:
    """Rows of each dataset in a period: exactly by weight where 10,000 rows or fewer can be.

    Otherwise to a ten-thousandth, and never less than one row.
    """
    exact = [Fraction(weight).limit_denominator(_PERIOD) for weight in weights]
    scale = lcm(*(share.denominator for share in exact))
    whole = [int(share * scale) for share in exact]
    whole = [n // (gcd(*whole) or 1) for n in whole]
    if all(whole) and sum(whole) <= _PERIOD:
        return [n * (_PERIOD // sum(whole)) for n in whole]
    shares = [_PERIOD * Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    quotas = [max(1, int(share)) for share in shares]
    # What rounding down has left over goes to the largest remainders.
    by_remainder = sorted(range(len(shares)), key=lambda n: int(shares[n]) - shares[n])
    for n in by_remainder[: max(0, _PERIOD - sum(quotas))]:
        quotas[n] += 1
    return quotas


def mix(
    parts: Sequence[Part],
    manifests: Sequence[Manifest],
    options: StreamOptions,
    micro_batch: int,
    per_step: int,
) -> "MixtureOrder":
    """One order over the shards of all manifests, which are counted on."""
    alone = replace(options, virtual_streams=None)
    orders, first = [], 0
    for number, manifest in enumerate(manifests):
        orders.append(ShuffledOrder(manifest, 1, alone, part=number, first_shard=first))
        first += len(manifest.shards)
    weights = [
        order.samples if part.weight is None else part.weight
        for part, order in zip(parts, orders, strict=True)
    ]
    quotas = {part.name: n for part, n in zip(parts, count_quotas(weights), strict=True)}
    return MixtureOrder(orders, quotas, micro_batch, per_step, options.seed)


class MixtureOrder:
    """Rows of several orders by quota, each of which goes through epochs of its own.

    These go on from one epoch of the mixture to the next, so that each dataset shows all samples
    (but its own tail) before one of them again. An epoch of the mixture has as many samples as
    all datasets together; fewer than `per_step` micro-batches that would be left over belong to the
    next. Any rank may get any row: shards in pipes are read whole by every rank, so name files.

    Attributes:
        described: what the order depends on, for a fingerprint.

    Args:
        orders: one a dataset, with micro-batches of one sample.
        quotas: rows of each in a period, by the dataset's name.
    """

    def __init__(
        self,
        orders: Sequence[ShuffledOrder],
        quotas: Mapping[str, int],
        micro_batch: int,
        per_step: int = 1,
        seed: int = 0,
    ):
        self._orders, self._quotas = orders, list(quotas.values())
        streams = [order.streams for order in orders]
        self.described = "mixed " + " ".join(
            f"{name}:{quota}/{v}" for (name, quota), v in zip(quotas.items(), streams, strict=True)
        )
        self.micro_batch, self.per_step, self.number = micro_batch, per_step, 0
        samples = sum(order.samples for order in orders)
        self._batches = samples // micro_batch // per_step * per_step
        if not self._batches:
            raise ValueError(
                f"{samples} samples are fewer than the {per_step * micro_batch} of one "
                "optimizer step; set a smaller data.global_batch_size"
            )
        pattern = np.repeat(np.arange(len(orders)), self._quotas)
        self._pattern = np.random.RandomState([seed, len(orders)]).permutation(pattern)
        self._before = np.zeros_like(self._pattern)
        for part, quota in enumerate(self._quotas):
            self._before[self._pattern == part] = np.arange(quota)
        self._epochs: dict[int, ShuffledOrder] = {}  # the newest of each dataset

    def __len__(self) -> int:
        """Micro-batches of an epoch, all ranks together."""
        return self._batches

    def check_world(self, world: int) -> None:
        check_ranks(self.per_step, world)

    def epoch(self, number: int) -> "MixtureOrder":
        """The order of one epoch."""
        order = copy.copy(self)
        order.number, order._epochs = number, {}
        return order

    def rows(self, m: int) -> list[Row]:
        """The rows of micro-batch m."""
        first = (self.number * self._batches + m) * self.micro_batch
        return [self._row(row) for row in range(first, first + self.micro_batch)]

    def numbers(self) -> Int64[np.ndarray, " s"]:
        """As `ShuffledOrder.numbers`, the shards of each dataset counted on."""
        size = self._batches * self.micro_batch
        period, place = np.divmod(self.number * size + np.arange(size), len(self._pattern))
        parts, found, first = self._pattern[place], np.empty(size, dtype=np.int64), 0
        for part, order in enumerate(self._orders):
            mine = np.flatnonzero(parts == part)
            nth = period[mine] * self._quotas[part] + self._before[place[mine]]
            epochs, own = np.divmod(nth, len(order))
            for number in np.unique(epochs).tolist():
                then = epochs == number
                found[mine[then]] = first + order.epoch(number).numbers()[own[then]]
            first += order.samples
        return found

    def _row(self, row: int) -> Row:
        period, place = divmod(row, len(self._pattern))
        part = int(self._pattern[place])
        nth = period * self._quotas[part] + int(self._before[place])
        number, own = divmod(nth, len(self._orders[part]))
        order = self._epochs.get(part)
        if order is None or order.number != number:
            order = self._epochs[part] = self._orders[part].epoch(number)
        (found,) = order.rows(own)
        return found
