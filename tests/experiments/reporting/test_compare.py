"""Comparisons of settings: by hand, against SciPy, and on trainings whose truth is known."""

import numpy as np
import pytest
from scipy import stats

from experiments.reporting.compare import Difference, compare, holm
from experiments.reporting.measured import Answer, Measured


def measured(values, clusters=None, higher_is_better=True, weights=None):
    clusters = range(len(values)) if clusters is None else clusters
    weights = np.ones(len(values)) if weights is None else weights
    rows = zip(values, clusters, weights, strict=True)
    answers = [
        Answer(f"{n:04d}", float(v), str(c), weight=float(w)) for n, (v, c, w) in enumerate(rows)
    ]
    return Measured("m", higher_is_better, answers, "question", "video")


def test_the_difference_is_that_of_pairs_counted_by_hand():
    one, other = measured([1, 1, 0, 1]), measured([1, 0, 0, 0])
    found = compare([(one, other)])
    assert found.mean == 0.5
    assert found.by_run == [0.5]
    assert found.samples == found.clusters == 4
    # d = 1, 0, 0, 1 from its mean: a variance of 1/3, over 4 samples
    d = np.array([0, 1, 0, 1])
    assert found.sample_variance == pytest.approx(d.var(ddof=1) / 4)
    assert compare([(other, one)]).mean == -0.5


def test_lower_values_win_where_lower_is_better():
    loss, lower = measured([2, 2], None, False), measured([1, 2], None, False)
    assert compare([(lower, loss)]).mean == 0.5


def test_weights_make_a_weighted_mean():
    one, other = measured([1, 0], weights=[3, 1]), measured([0, 0], weights=[3, 1])
    assert compare([(one, other)]).mean == 0.75


def test_one_training_and_own_clusters_are_students_paired_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 1, 40), rng.normal(0, 1, 40)
    found, reference = compare([(measured(a), measured(b))]), stats.ttest_rel(a, b)
    assert found.chance == pytest.approx(reference.pvalue, rel=1e-9)
    low, high = reference.confidence_interval()
    assert found.interval == pytest.approx((found.mean, low, high))


def test_trainings_alone_are_students_test_over_seeds():
    """Each training answers all samples alike, so samples add nothing."""
    by_seed = np.array([0.1, 0.4, 0.3])
    pairs = [(measured([d] * 8), measured([0] * 8)) for d in by_seed]
    found = compare(pairs)
    reference = stats.ttest_1samp(by_seed, 0)
    assert found.sample_variance == pytest.approx(0)
    assert found.chance == pytest.approx(reference.pvalue, rel=1e-6)


def test_answers_about_one_video_count_as_one():
    """Twenty questions about one video say no more than that video."""
    few = compare([(measured([1, 0, 1, 1]), measured([0, 0, 1, 0]))])
    values = np.repeat([[1, 0, 1, 1], [0, 0, 1, 0]], 20, axis=1)
    clusters = np.repeat(range(4), 20)
    many = compare([(measured(values[0], clusters), measured(values[1], clusters))])
    assert many.error == pytest.approx(few.error)
    assert many.over_samples == pytest.approx(few.over_samples)
    one_video = compare([(measured([1] * 20, [0] * 20), measured([0] * 20, [0] * 20))])
    assert one_video.chance == 1.0, "a single video proves nothing"


def test_six_videos_that_agree_are_still_six_videos():
    found = compare([(measured([1] * 6), measured([0] * 6))] * 3)
    assert found.error == 0
    assert found.chance == stats.binomtest(6, 6).pvalue == 2**-5


def test_other_samples_are_refused():
    with pytest.raises(ValueError, match="different samples"):
        compare([(measured([1, 0]), measured([1, 0])), (measured([1]), measured([0]))])
    with pytest.raises(ValueError, match="at least one pair"):
        compare([])


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def trainings(rng, effect, seeds=3, videos=30, of_seeds=0.05, of_videos=0.3) -> Difference:
    """Compares two settings whose true difference is `effect`, on new videos and new trainings."""
    hard = rng.normal(0, of_videos, videos)  # the difference of the settings on each video
    pairs = []
    for _ in range(seeds):
        luck = rng.normal(0, of_seeds * 2**0.5)
        noise = rng.normal(0, 0.2, videos)
        pairs.append((measured(effect + luck + hard + noise), measured(np.zeros(videos))))
    return compare(pairs)


def test_equal_settings_are_called_different_as_rarely_as_promised():
    """Of 600 tests of equal settings, about 5 % may fail; the error of 600 is 0.9 %."""
    rng = np.random.default_rng(0)
    found = [trainings(rng, 0.0) for _ in range(600)]
    assert np.mean([d.chance < 0.05 for d in found]) < 0.07
    outside = [not d.interval.low <= 0 <= d.interval.high for d in found]
    assert 0.01 < np.mean(outside) < 0.07


def test_the_smallest_difference_is_found_as_often_as_promised():
    rng = np.random.default_rng(1)
    smallest = np.mean([trainings(rng, 0.0).smallest for _ in range(200)])
    found = [trainings(rng, smallest).chance < 0.05 for _ in range(400)]
    assert 0.72 < np.mean(found) < 0.92


def test_as_many_samples_as_needed_do():
    """Trainings that hardly differ, and a difference that 30 videos do not show."""
    rng = np.random.default_rng(2)
    options = {"of_seeds": 0.001}
    needed = [trainings(rng, 0.06, **options).needed() for _ in range(200)]
    typical = int(np.median([samples for samples, _ in needed]))
    assert typical > 60
    rng = np.random.default_rng(3)
    true = int((2.8 * (0.3**2 + 0.2**2 / 3) ** 0.5 / 0.06) ** 2)  # normal approximation by hand
    found = [trainings(rng, 0.06, videos=true, **options).chance < 0.05 for _ in range(200)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.09)
    large = trainings(np.random.default_rng(4), 0.06, videos=2000, **options)
    assert large.needed()[0] == pytest.approx(true, rel=0.4)


def test_where_seeds_differ_more_than_settings_more_seeds_are_asked_for():
    pairs = [(measured([d] * 8), measured([0, 0.01] * 4)) for d in (0.3, -0.2, 0.05)]
    samples, seeds = compare(pairs).needed()
    assert seeds > 3
    assert np.isfinite(samples)
    equal = compare([(measured([1, 0]), measured([0, 1]))])
    assert equal.needed()[0] == np.inf
