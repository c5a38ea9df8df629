"""Intervals against scipy, against formulas written out, and by their coverage in simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from luthier.functional import statistics as s


@pytest.mark.parametrize(("successes", "n"), [(0, 5), (3, 10), (10, 10), (137, 256), (1, 2000)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_proportion_is_wilsons_interval(successes: int, n: int, confidence: float) -> None:
    expected = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    found = s.proportion(successes, n, confidence)
    assert (found.value, found.n) == (successes / n, n)
    assert found.low == pytest.approx(expected.low, abs=1e-12)
    assert found.high == pytest.approx(expected.high, abs=1e-12)


def test_mean_is_the_t_interval() -> None:
    x = np.random.default_rng(0).normal(3.0, 2.0, 17)
    low, high = stats.t.interval(0.9, 16, loc=x.mean(), scale=stats.sem(x))
    found = s.mean(x, 0.9)
    assert (found.value, found.n) == (pytest.approx(x.mean()), 17)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_scores_choose_their_interval() -> None:
    assert s.score_mean([1, 0, 1, 1]) == s.proportion(3, 4)
    assert s.score_mean([0.5, 0, 1, 1]) == s.mean([0.5, 0, 1, 1])


def test_nothing_and_one_observation() -> None:
    for found in (s.mean([]), s.proportion(0, 0), s.bootstrap([]), s.ClusteredMean().estimate()):
        assert found.n == 0
        assert math.isnan(found.value)
    one = s.mean([2.0])
    assert one.value == 2.0
    assert math.isnan(one.low)
    assert math.isnan(one.clipped(0.0, 1.0).low)


def test_bootstrap_mean_agrees_with_the_normal_interval() -> None:
    x = np.random.default_rng(1).normal(size=2000)
    found = s.bootstrap(x, samples=4000)
    half = 1.96 * x.std() / math.sqrt(x.size)
    assert found.low == pytest.approx(x.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(x.mean() + half, abs=0.1 * half)
    assert found == s.bootstrap(x, samples=4000)


def test_bootstrap_in_bounded_memory_is_the_same_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(2).normal(size=50)
    at_once = s.bootstrap_means(x, 40, 7)
    monkeypatch.setattr(s, "_CHUNK", 500)
    np.testing.assert_array_equal(np.sort(s.bootstrap_means(x, 40, 7)), np.sort(at_once))


def test_paired_bootstrap() -> None:
    generator = np.random.default_rng(3)
    before = (generator.random(400) < 0.5).astype(float)
    after = np.where(generator.random(400) < 0.2, 1.0, before)
    gain = s.paired_bootstrap(before, after)
    assert gain.estimate.value == pytest.approx((after - before).mean())
    assert 0 < gain.estimate.low < gain.estimate.value < gain.estimate.high
    assert gain.p_value == 1 / 1000  # no resample falls on the other side of zero
    nothing = s.paired_bootstrap(before, before)
    assert (nothing.estimate.value, nothing.p_value) == (0.0, 1.0)
    # Pairing matters: the same two means unpaired are far less certain.
    unpaired = 1.96 * math.sqrt(before.var() / 400 + after.var() / 400)
    assert gain.estimate.high - gain.estimate.low < 2 * unpaired * 0.9
    with pytest.raises(ValueError, match="same items"):
        s.paired_bootstrap([1, 0], [1])


def test_clustered_mean_by_the_formula_written_out() -> None:
    sums, sizes = np.array([4.0, 1.0, 9.0, 2.5]), np.array([3, 1, 5, 2])
    mean = s.ClusteredMean()
    mean.add(sums[:2], sizes[:2])
    mean.add(np.array([0.0, 9.0, 2.5]), np.array([0, 5, 2]))  # an empty cluster is passed over
    value = sums.sum() / sizes.sum()
    variance = sum((a - value * n) ** 2 for a, n in zip(sums, sizes, strict=True)) * 4 / 3 / sizes.sum() ** 2
    half = stats.t.ppf(0.975, 3) * math.sqrt(variance)
    found = mean.estimate()
    assert (found.value, found.n) == (pytest.approx(value), 11)
    assert (found.low, found.high) == (pytest.approx(value - half), pytest.approx(value + half))


def test_clusters_of_one_give_the_plain_t_interval() -> None:
    x = np.random.default_rng(4).normal(size=30)
    mean = s.ClusteredMean()
    mean.add(x, np.ones(30))
    plain = s.mean(x)
    found = mean.estimate()
    assert (found.low, found.high) == (pytest.approx(plain.low), pytest.approx(plain.high))


def test_clustered_interval_covers_where_the_naive_one_does_not() -> None:
    generator = np.random.default_rng(5)
    covered = naive = 0
    for _ in range(400):
        sizes = generator.integers(5, 60, 40)
        values = np.concatenate([generator.normal(generator.normal(), 0.3, n) for n in sizes])
        group = np.repeat(np.arange(40), sizes)
        mean = s.ClusteredMean()
        mean.add(np.bincount(group, values), sizes)
        found = mean.estimate()
        covered += found.low <= 0 <= found.high
        flat = s.mean(values)
        naive += flat.low <= 0 <= flat.high
    assert 0.90 <= covered / 400 <= 0.98
    assert naive / 400 < 0.6


def test_group_jackknife_of_a_mean_is_the_clustered_interval_of_equal_groups() -> None:
    values = np.random.default_rng(6).normal(size=(12, 5))
    sums = np.stack([values.sum(1), np.full(12, 5.0)], axis=1)
    found = s.group_jackknife(lambda total: total[0] / total[1], sums, 60)
    mean = s.ClusteredMean()
    mean.add(values.sum(1), np.full(12, 5))
    assert found.low == pytest.approx(mean.estimate().low, rel=1e-9)
    assert math.isnan(s.group_jackknife(lambda total: total[0], sums[:1], 5).low)
