"""Statistics of comparisons against values worked out another way, and their rates of error."""

import math

import numpy as np
import pytest
from scipy import stats

from luthier.functional.paired_trials import compare_ratios, difference, group_variance, holm, item_variance, ratio


def ones(values):
    values = np.asarray(values, float)
    return values, np.ones_like(values)


def test_holm_by_hand():
    # Sorted: 0.01 x 4, 0.02 x 3, 0.03 x 2, 0.04 x 1, each at least the one before.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    adjusted = holm([0.5, math.nan, 0.9])
    assert adjusted[0] == 1.0
    assert math.isnan(adjusted[1])
    assert adjusted[2] == 1.0


def test_interval_by_hand():
    # d = 2; v_seeds = var([1, 2, 3]) / 3 = 1/3; v_items = 1/6; df = (1/2)^2 / ((1/6)^2 / 9 + (1/3)^2 / 2)
    found = difference([1.0, 2.0, 3.0], 1 / 6, 10)
    df = 0.25 / ((1 / 36) / 9 + (1 / 9) / 2)
    half = stats.t.ppf(0.975, df) * math.sqrt(0.5)
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2 - half, 2 + half))
    assert found.p_value == pytest.approx(2 * stats.t.sf(2 / math.sqrt(0.5), df))


def test_without_items_variance_it_is_the_paired_t_test_over_seeds():
    d = [0.1, 0.4, 0.2, 0.3]
    assert difference(d, 0.0, 50).p_value == pytest.approx(stats.ttest_1samp(d, 0).pvalue)


def test_item_variance_is_that_of_a_paired_mean():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=400), rng.normal(size=400)
    # For means over n items the bootstrap's variance tends to var(a - b) / n.
    assert item_variance([ones(a)], [ones(b)], samples=20_000) == pytest.approx((a - b).var(ddof=1) / 400, rel=0.03)


def test_one_seed_speaks_of_items_alone():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=500) + 0.3, rng.normal(size=500)
    found = compare_ratios([ones(a)], [ones(b)], samples=20_000)
    assert found.p_value == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=0.3)
    assert found.per_seed == (pytest.approx(a.mean() - b.mean()),)


def test_a_ratio_weighs_items_by_their_size():
    assert ratio((np.array([2.0, 9.0]), np.array([1.0, 3.0]))) == pytest.approx(11 / 4)
    assert math.isnan(ratio((np.zeros(2), np.zeros(2))))


def test_the_same_numbers_are_no_difference():
    a = [ones(np.random.default_rng(s).normal(size=30)) for s in range(3)]
    found = compare_ratios(a, a)
    assert (found.value, found.low, found.high, found.p_value) == (0, 0, 0, 1)
    assert not found.excludes_zero


def test_unlike_sides_are_refused():
    a = [ones([1.0, 2.0])]
    with pytest.raises(ValueError, match="same seeds"):
        compare_ratios(a, [*a, *a])
    with pytest.raises(ValueError, match="same items"):
        compare_ratios(a, [ones([1.0])])


def test_jackknife_of_a_mean_is_its_variance():
    # For means over groups of one item each the jackknife gives exactly var / n.
    a, b = np.array([1.0, 2.0, 4.0, 8.0]), np.array([0.0, 3.0, 3.0, 1.0])
    arms = [a, b]
    found = group_variance(lambda arm, g: np.delete(arms[arm], g).mean(), 2, 4)
    assert found == pytest.approx((a - b).var(ddof=1) / 4)


@pytest.mark.parametrize("spread", [(0.0, 1.0), (0.3, 1.0), (1.0, 0.3)])
def test_false_alarms_stay_near_the_nominal_rate(spread):
    """Two arms of one population: seeds shift all items by N(0, spread[0]), items differ by N(0, spread[1])."""
    rng, trials, alarms = np.random.default_rng(7), 400, 0
    for _ in range(trials):
        difficulty = rng.normal(size=60)
        arms = [
            [ones(difficulty + spread[0] * rng.normal() + spread[1] * rng.normal(size=60)) for _ in range(3)]
            for _ in range(2)
        ]
        alarms += compare_ratios(*arms, samples=300).excludes_zero
    # 5% of 400 is 20, and a binomial of that size stays below 34 with probability 0.999.
    assert alarms < 34


def test_a_real_difference_is_found():
    rng, found = np.random.default_rng(3), 0
    for _ in range(50):
        difficulty = rng.normal(size=100)
        method = [ones(difficulty + 0.6 + 0.1 * rng.normal() + 0.5 * rng.normal(size=100)) for _ in range(3)]
        plain = [ones(difficulty + 0.1 * rng.normal() + 0.5 * rng.normal(size=100)) for _ in range(3)]
        found += compare_ratios(method, plain, samples=300).low > 0
    assert found >= 45
