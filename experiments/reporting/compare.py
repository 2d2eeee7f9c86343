"""Compares two settings on the same samples: the difference, how sure it is, and what would do.

Two things make a difference uncertain: other samples could have been asked, and other trainings
(seeds) could have been run. Settings are compared pair by pair: the same sample, the same seed. So
samples that are hard for all settings, and seeds that are lucky for all, do not blur it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import inf, isfinite, sqrt

import numpy as np
from scipy.special import stdtr, stdtrit

from experiments.reporting.measured import Answer, Measured
from lightning_modules.metrics.bootstrap import MeanInterval, bootstrap_interval

#: Chance that a true difference of the stated size is found, and level of the intervals.
POWER, LEVEL = 0.8, 0.95


@dataclass(frozen=True)
class Difference:
    """The mean difference of two settings, in the direction in which higher is better.

    Attributes:
        mean: first minus second.
        by_run: the difference of each pair of trainings.
        samples, clusters: how many were compared.
        sample_variance, run_variance: of `mean`, from drawing clusters and from trainings; the
            second is infinite for a single pair.
        draw: returns the interval of `over_samples`, which takes long.
    """

    mean: float
    by_run: list[float]
    samples: int
    clusters: int
    sample_variance: float
    run_variance: float
    draw: Callable[[], MeanInterval] = field(repr=False, compare=False)

    @cached_property
    def over_samples(self) -> MeanInterval:
        """The bootstrap interval over clusters of samples, for these trainings."""
        return self.draw()

    @property
    def one_run(self) -> bool:
        return len(self.by_run) == 1

    @property
    def error(self) -> float:
        """The standard error over samples and trainings; over samples alone for a single pair."""
        return sqrt(self.sample_variance + (0.0 if self.one_run else self.run_variance))

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the error (Welch 1947, Satterthwaite 1946)."""
        parts = [(self.sample_variance, self.clusters - 1)]
        parts += [] if self.one_run else [(self.run_variance, len(self.by_run) - 1)]
        below = sum(v**2 / f for v, f in parts if f > 0)
        return sum(v for v, _ in parts) ** 2 / below if below else 1.0

    @property
    def interval(self) -> MeanInterval:
        """The interval of Student's t over samples and trainings."""
        reach = float(stdtrit(self.freedom, (1 + LEVEL) / 2)) * self.error
        return MeanInterval(self.mean, self.mean - reach, self.mean + reach)

    @property
    def chance(self) -> float:
        """Two-sided p-value: how often equal settings would differ at least this much.

        It is never below the least p-value of a sign test over the clusters. Six videos that all
        favour one setting have no variance, but are still only six videos.
        """
        if self.mean == 0.0:
            return 1.0
        least = min(1.0, 2.0 ** (1 - self.clusters))
        if self.error == 0.0:
            return least
        return max(least, float(2 * stdtr(self.freedom, -abs(self.mean) / self.error)))

    @property
    def smallest(self) -> float:
        """The smallest true difference that is found with a chance of 80 %."""
        return self._reach(self.freedom) * self.error

    def needed(self) -> tuple[float, int]:
        """Returns how many samples, and how many trainings a setting, would show this difference.

        It assumes that the true difference is the measured one. Samples are infinite if the
        difference is 0. Trainings stay as they are if more samples are enough.
        """
        if self.mean == 0.0:
            return inf, len(self.by_run)
        allowed = (self.mean / self._reach(inf)) ** 2
        runs, of_runs = len(self.by_run), 0.0 if self.one_run else self.run_variance
        if of_runs > allowed / 2:
            runs = int(np.ceil(of_runs * runs / (allowed / 2)))
            of_runs = allowed / 2
        return self.samples * self.sample_variance / (allowed - of_runs), runs

    @staticmethod
    def _reach(freedom: float) -> float:
        freedom = freedom if isfinite(freedom) else 1e9
        return float(stdtrit(freedom, (1 + LEVEL) / 2) + stdtrit(freedom, POWER))


def compare(pairs: Sequence[tuple[Measured, Measured]]) -> Difference:
    """Compares trainings in pairs; all have the same samples.

    Each training counts alike, and each sample by its weight.

    Raises:
        ValueError: there is no pair, or a training has other samples.
    """
    if not pairs:
        raise ValueError("a comparison needs at least one pair of trainings")
    sign = -1.0 if pairs[0][0].higher_is_better is False else 1.0
    first = sorted(pairs[0][0].answers)
    keys = [answer.key for answer in first]
    weights = np.array([answer.weight for answer in first])
    by_run = np.array([sign * (_values(a, keys) - _values(b, keys)) for a, b in pairs])
    each = by_run.mean(axis=0)
    clusters = [answer.cluster for answer in first]
    means = (by_run @ weights / weights.sum()).tolist()
    return Difference(
        mean=float(each @ weights / weights.sum()),
        by_run=means,
        samples=len(keys),
        clusters=len(set(clusters)),
        sample_variance=_cluster_variance(each, weights, clusters),
        run_variance=float(np.var(means, ddof=1)) / len(means) if len(means) > 1 else inf,
        draw=partial(bootstrap_interval, each.tolist(), clusters, weights.tolist()),
    )


def _values(measured: Measured, keys: list[str]) -> np.ndarray:
    by_key = {answer.key: answer.value for answer in measured.answers}
    if by_key.keys() != set(keys):
        raise ValueError("the trainings were scored on different samples")
    return np.array([by_key[key] for key in keys])


def _cluster_variance(values: np.ndarray, weights: np.ndarray, clusters: list[str]) -> float:
    """Returns the variance of a weighted mean whose clusters are drawn (Liang and Zeger 1986)."""
    index = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    members = np.array([index[name] for name in clusters])
    mean = (weights * values).sum() / weights.sum()
    residuals = np.bincount(members, weights=weights * (values - mean))
    count = len(index)
    correction = count / (count - 1) if count > 1 else 1.0
    return float(correction * (residuals**2).sum() / weights.sum() ** 2)


def against(measured: Measured, null: Sequence[Answer]) -> tuple[Measured, Measured]:
    """Returns a training and itself under another condition, cut to the samples of both."""
    common = {answer.key for answer in null} & {answer.key for answer in measured.answers}
    parts = [[a for a in answers if a.key in common] for answers in (measured.answers, null)]
    one, other = (
        Measured(measured.metric, measured.higher_is_better, part, "", "") for part in parts
    )
    return one, other


def holm(chances: Sequence[float]) -> list[float]:
    """Returns p-values of several comparisons, corrected together (Holm 1979)."""
    order = sorted(range(len(chances)), key=lambda n: chances[n])
    corrected, largest = [0.0] * len(chances), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(chances) - rank) * chances[place]))
        corrected[place] = largest
    return corrected
