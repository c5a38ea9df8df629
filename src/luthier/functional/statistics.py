"""Means with confidence intervals: normal and t, Wilson, bootstrap, clustered by sequence, jackknife over groups.

Tokens of one sequence are not independent; an interval that treats them so is too narrow. :class:`ClusteredMean` keeps
five sums per metric, whatever the amount of data, and gives the linearised (ratio estimator) variance over sequences
(Cochran, "Sampling Techniques", 1977, section 6.3). Everything is float64 numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval.

    Attributes:
        value: the point estimate.
        n: how many observations it is made of.
        low: lower end; NaN where the spread cannot be known (a single observation).
        high: upper end.
    """

    value: float
    n: int
    low: float
    high: float

    def mapped(self, fn: Callable[[float], float]) -> Estimate:
        """The estimate of an increasing function of the value."""
        return Estimate(fn(self.value), self.n, fn(self.low), fn(self.high))

    def clipped(self, low: float, high: float) -> Estimate:
        """The same with the interval kept inside the range the value can take."""
        return Estimate(self.value, self.n, min(max(self.low, low), high), max(min(self.high, high), low))


def normal_quantile(confidence: float) -> float:
    """The two-sided standard normal quantile: 1.96 for 0.95."""
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def t_quantile(confidence: float, degrees: int) -> float:
    """The two-sided quantile of Student's t; NaN without a degree of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.5 + confidence / 2)) if degrees > 0 else math.nan


def mean(values: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Mean of independent values with a t interval."""
    x = np.asarray(values, np.float64)
    if x.size == 0:
        return Estimate(math.nan, 0, math.nan, math.nan)
    value = float(x.mean())
    spread = float(x.std(ddof=1)) / math.sqrt(x.size) if x.size > 1 else math.nan
    half = t_quantile(confidence, x.size - 1) * spread
    return Estimate(value, x.size, value - half, value + half)


def proportion(successes: float, n: int, confidence: float = 0.95) -> Estimate:
    """Share of successes with Wilson's interval (E. B. Wilson, 1927), which holds near 0 and 1 and for few items."""
    if n == 0:
        return Estimate(math.nan, 0, math.nan, math.nan)
    z2 = normal_quantile(confidence) ** 2
    p = successes / n
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * p * (1 - p) / n + z2 * z2 / (4 * n * n)) / (1 + z2 / n)
    return Estimate(p, n, max(0.0, centre - half), min(1.0, centre + half))


def score_mean(scores: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Mean of item scores: Wilson's interval when every score is 0 or 1, a t interval otherwise."""
    x = np.asarray(scores, np.float64)
    if np.isin(x, (0.0, 1.0)).all():
        return proportion(float(x.sum()), x.size, confidence)
    return mean(x, confidence)


def bootstrap_means(values: ArrayLike, samples: int, seed: int) -> Array:
    """[samples] means of the values resampled with replacement; bounded memory."""
    x = np.asarray(values, np.float64)
    generator = np.random.default_rng(seed)
    step = max(1, _CHUNK // max(1, x.size))
    parts = [
        x[generator.integers(0, x.size, size=(min(step, samples - start), x.size))].mean(axis=1)
        for start in range(0, samples, step)
    ]
    return np.concatenate(parts)


def bootstrap(values: ArrayLike, *, confidence: float = 0.95, samples: int = 1000, seed: int = 0) -> Estimate:
    """Mean with a percentile bootstrap interval over independent items."""
    x = np.asarray(values, np.float64)
    if x.size == 0:
        return Estimate(math.nan, 0, math.nan, math.nan)
    low, high = np.quantile(bootstrap_means(x, samples, seed), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Estimate(float(x.mean()), x.size, float(low), float(high))


@dataclass(frozen=True)
class Difference:
    """A paired difference ``after - before``.

    Attributes:
        estimate: the mean difference with its bootstrap interval.
        p_value: two-sided, the share of resampled differences on the other side of zero (at least 1 / samples).
    """

    estimate: Estimate
    p_value: float


def paired_bootstrap(
    before: ArrayLike, after: ArrayLike, *, confidence: float = 0.95, samples: int = 1000, seed: int = 0
) -> Difference:
    """Compare two systems on the same items.

    Args:
        before: [N] item scores of the first.
        after: [N] item scores of the second, in the same order.
        confidence: of the interval.
        samples: bootstrap resamples.
        seed: of the resampling.

    Raises:
        ValueError: the lengths differ.
    """
    x, y = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if x.shape != y.shape:
        raise ValueError(f"paired comparison needs the same items on both sides, got {x.size} and {y.size}")
    difference = y - x
    estimate = bootstrap(difference, confidence=confidence, samples=samples, seed=seed)
    if not difference.size:
        return Difference(estimate, math.nan)
    means = bootstrap_means(difference, samples, seed)
    one_sided = min((means <= 0).mean(), (means >= 0).mean())
    return Difference(estimate, float(min(1.0, max(2 * one_sided, 1 / samples))))


class ClusteredMean:
    """Streaming mean over observations that come in clusters (the tokens of a sequence).

    value = S / N with S the sum over observations and N their number; its variance is taken over the clusters,
    ``G / (G - 1) * sum_g (s_g - value * n_g)^2 / N^2`` with ``s_g``, ``n_g`` the sum and size of cluster g, which needs
    only sums of ``s``, ``n``, ``s^2``, ``s n`` and ``n^2``.
    """

    def __init__(self) -> None:
        self.clusters = 0
        self._sums = np.zeros(5)

    def add(self, sum_G: ArrayLike, count_G: ArrayLike) -> None:
        """Add whole clusters by the sum of their values and their sizes; empty ones are passed over."""
        n = np.asarray(count_G, np.float64)
        s = np.asarray(sum_G, np.float64)[n > 0]
        n = n[n > 0]
        self.clusters += n.size
        self._sums += [s.sum(), n.sum(), (s * s).sum(), (s * n).sum(), (n * n).sum()]

    def estimate(self, confidence: float = 0.95) -> Estimate:
        """The mean with a t interval of G - 1 degrees of freedom; ``n`` counts observations."""
        total, count, ss, sn, nn = self._sums
        if not count:
            return Estimate(math.nan, 0, math.nan, math.nan)
        value = total / count
        if self.clusters < 2:
            return Estimate(value, int(count), math.nan, math.nan)
        squares = max(0.0, ss - 2 * value * sn + value * value * nn)
        error = math.sqrt(self.clusters / (self.clusters - 1) * squares) / count
        half = t_quantile(confidence, self.clusters - 1) * error
        return Estimate(value, int(count), value - half, value + half)


def group_jackknife(statistic: Callable[[Array], float], sums_GX: Array, n: int, confidence: float = 0.95) -> Estimate:
    """Interval of a statistic that is not a mean (ECE, F1), from additive sums kept per group of sequences.

    The delete-one-group jackknife: ``se^2 = (G - 1) / G * sum_g (theta_-g - mean)^2`` with a t interval of G - 1
    degrees of freedom (Kott, "The Delete-a-Group Jackknife", 2001).

    Args:
        statistic: maps summed counts [...] to the value.
        sums_GX: [G, ...] counts of each group; groups without data must be left out.
        n: observations, reported in the estimate.
        confidence: of the interval.
    """
    total = sums_GX.sum(axis=0)
    value = statistic(total)
    groups = sums_GX.shape[0]
    if groups < 2:
        return Estimate(value, n, math.nan, math.nan)
    left_out = np.array([statistic(total - part) for part in sums_GX])
    error = math.sqrt((groups - 1) / groups * float(((left_out - left_out.mean()) ** 2).sum()))
    half = t_quantile(confidence, groups - 1) * error
    return Estimate(value, n, value - half, value + half)
