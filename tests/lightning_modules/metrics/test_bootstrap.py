"""Bootstrap intervals have the stated coverage, and a cluster's values count once."""

import numpy as np
import pytest

from lightning_modules.metrics.bootstrap import bootstrap_interval


class TestBootstrap:
    def test_independent_values_give_the_normal_interval(self):
        values = [1.0] * 300 + [0.0] * 700
        mean, low, high = bootstrap_interval(values)
        half = 1.96 * np.sqrt(0.3 * 0.7 / 1000)
        assert mean == pytest.approx(0.3)
        assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.004)

    def test_values_that_agree_within_a_cluster_count_once(self):
        once = bootstrap_interval([1.0, 0.0, 1.0, 0.0, 0.0])
        often = bootstrap_interval([1.0, 0.0, 1.0, 0.0, 0.0] * 20, [*range(5)] * 20)
        assert often == pytest.approx(once)
        assert often.high - often.low > 2 * np.ptp(bootstrap_interval([1.0, 0.0] * 50)[1:])

    def test_the_same_seed_gives_the_same_interval(self):
        values = [1.0, 0.0, 0.0] * 9
        assert bootstrap_interval(values) == bootstrap_interval(values)
        assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)

    def test_it_covers_the_truth_about_as_often_as_it_says(self):
        rng = np.random.default_rng(0)
        hits = 0
        for _ in range(200):
            rates = rng.beta(3, 2, size=30)  # needles differ in difficulty; the mean is 0.6
            answers = rng.random((8, 30)) < rates
            _, low, high = bootstrap_interval(
                answers.ravel().tolist(), [*range(30)] * 8, resamples=500
            )
            hits += low <= 0.6 <= high
        assert 0.89 <= hits / 200 <= 0.99

    def test_misuse_is_refused(self):
        with pytest.raises(ValueError, match="at least one"):
            bootstrap_interval([])
        with pytest.raises(ValueError, match="2 values, but 1"):
            bootstrap_interval([0, 1], ["a"])
