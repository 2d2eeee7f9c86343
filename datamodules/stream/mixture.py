"""Several datasets in one order, by weight. Nothing is drawn at random during the run.

row R of the whole training = epoch * rows per epoch + row in the epoch
   |  a fixed pattern of P rows, shuffled once, holds q rows of each dataset
   v
R = period * P + place     dataset d = pattern[place]
   |  rows of d before R: period * q[d] + rows of d before place in the pattern
   v
row n of dataset d         its own epoch n // len(d), shuffled independently
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
    """A dataset of a mixture. Without weights, the number of samples is the weight."""

    name: str
    shards: Any
    weight: float | int | None


def read_parts(train: Mapping[str, Any]) -> list[Part]:
    """Returns the datasets of `{name: {shards: ..., weight: 2.0}}`, in the given order.

    Raises:
        ValueError: a key is missing, unknown or has an invalid value.
    """
    parts = []
    for name, node in train.items():
        known = isinstance(node, Mapping) and {"shards"} <= set(node) <= {"shards", "weight"}
        if not known:
            raise ValueError(f"data.train.{name}: give it `shards` and an optional `weight`")
        weight = node.get("weight")
        if weight is not None and not 0 < weight < float("inf"):
            raise ValueError(f"data.train.{name}.weight is {weight}; set a number above 0, or null")
        parts.append(Part(name, node["shards"], weight))
    without = [part.name for part in parts if part.weight is None]
    if without and len(without) < len(parts):
        raise ValueError(
            f"data.train: {', '.join(without)} has no weight, but others have one; give a weight "
            "to all, or to none"
        )
    if not parts:
        raise ValueError("data.train is an empty mapping; name a dataset")
    return parts


def count_quotas(weights: Sequence[float | int]) -> list[int]:
    """Returns the rows of each dataset in a period of the pattern.

    Weights are exact if at most 10,000 rows can represent them. Otherwise they are rounded to
    1/10,000, but to at least one row.
    """
    exact = [Fraction(weight).limit_denominator(_PERIOD) for weight in weights]
    scale = lcm(*(share.denominator for share in exact))
    whole = [int(share * scale) for share in exact]
    whole = [n // (gcd(*whole) or 1) for n in whole]
    if all(whole) and sum(whole) <= _PERIOD:
        return [n * (_PERIOD // sum(whole)) for n in whole]
    shares = [_PERIOD * Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    quotas = [max(1, int(share)) for share in shares]
    # The rows left over by rounding down go to the largest remainders.
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
    """Returns one order over all manifests. Shards are numbered through all of them."""
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
    """Takes rows from several orders by quota. Each order has its own epochs.

    These continue from one epoch of the mixture to the next. So a dataset shows all its samples
    (except its remainder) before it repeats one. An epoch of the mixture has as many samples as all
    datasets together. Micro-batches that do not fill its last optimizer step move to the next
    epoch. Any rank may get any row, so every rank reads a pipe from start to end. Prefer files.

    Attributes:
        described: the facts that the order depends on, as text for a fingerprint.

    Args:
        orders: one order per dataset, with micro-batches of one sample.
        quotas: rows of each dataset in a period, by name.
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
        """Returns the number of micro-batches per epoch, over all ranks."""
        return self._batches

    def check_world(self, world: int) -> None:
        check_ranks(self.per_step, world)

    def epoch(self, number: int) -> "MixtureOrder":
        """Returns the order of one epoch."""
        order = copy.copy(self)
        order.number, order._epochs = number, {}
        return order

    def rows(self, m: int) -> list[Row]:
        """Returns the rows of micro-batch m."""
        first = (self.number * self._batches + m) * self.micro_batch
        return [self._row(row) for row in range(first, first + self.micro_batch)]

    def numbers(self) -> Int64[np.ndarray, " s"]:
        """Returns sample numbers as `ShuffledOrder.numbers`, counted through all datasets."""
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
