"""How sure a mean of right and wrong answers is."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np


class MeanInterval(NamedTuple):
    """A mean and the two ends of its interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: Sequence[float | int],
    clusters: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> MeanInterval:
    """Mean of `values` (1 right, 0 wrong) with its percentile bootstrap interval, Efron 1979.

    Answers about one needle rise and fall together, so treating them as independent makes the
    interval too narrow. `clusters` names the needle of each value; whole clusters are then drawn
    with replacement, each with all its values. Values that are all equal, or a single cluster,
    give an interval of no width: it shows that nothing varied, not that nothing could.

    Raises:
        ValueError: no values, or not one cluster name for every value.
    """
    if len(values) == 0:
        raise ValueError("a mean needs at least one value")
    names = range(len(values)) if clusters is None else clusters
    if len(names) != len(values):
        raise ValueError(f"{len(values)} values, but {len(names)} cluster names: give one for each")
    index = {name: i for i, name in enumerate(dict.fromkeys(names))}
    members = np.array([index[name] for name in names])
    sums = np.bincount(members, weights=np.asarray(values, dtype=float))
    counts = np.bincount(members)
    draws = np.random.default_rng(seed).integers(len(index), size=(resamples, len(index)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return MeanInterval(float(sums.sum() / counts.sum()), float(low), float(high))
