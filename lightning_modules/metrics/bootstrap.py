"""Bootstrap confidence intervals for the mean of right and wrong answers."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np


class MeanInterval(NamedTuple):
    """A mean and the two ends of its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: Sequence[float | int],
    clusters: Sequence[Hashable] | None = None,
    weights: Sequence[float] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> MeanInterval:
    """Returns the mean of `values`, such as 1 right and 0 wrong, and its bootstrap interval.

    The method is Efron's percentile bootstrap (1979). `weights` makes it a weighted mean. Answers
    about one needle are correlated, so the interval would be too narrow if they were treated as
    independent. `clusters` names the needle of each value; whole clusters are then drawn with
    replacement, each with all its values. If all values are equal, or there is a single cluster,
    the interval has zero width. It then shows that nothing varied, not that nothing could vary.

    Raises:
        ValueError: there are no values, or the number of cluster names differs.
    """
    if len(values) == 0:
        raise ValueError("a mean needs at least one value")
    names = range(len(values)) if clusters is None else clusters
    if len(names) != len(values):
        raise ValueError(
            f"{len(values)} values, but {len(names)} cluster names: give one name for each value"
        )
    index = {name: i for i, name in enumerate(dict.fromkeys(names))}
    members = np.array([index[name] for name in names])
    shares = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    sums = np.bincount(members, weights=shares * np.asarray(values, dtype=float))
    counts = np.bincount(members, weights=shares)
    draws = np.random.default_rng(seed).integers(len(index), size=(resamples, len(index)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return MeanInterval(float(sums.sum() / counts.sum()), float(low), float(high))
