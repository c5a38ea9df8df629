"""Differences between two ways of training, measured on the same items and over several seeds.

With items i = 1..n, seeds s = 1..K and a metric that is a ratio of sums over items, ``m_s = sum_i a_si / sum_i b_si``
(a mean where b counts), the difference of two methods is

    d = mean_s d_s,   d_s = m_s(method) - m_s(reference)

Two things make d uncertain. Which items were asked: ``v_items``, the variance of d when the items are resampled (the
same resample for both methods and all seeds, which keeps them paired). Which seeds were drawn: ``v_seeds = var_s(d_s) /
K``.
Resampling three seeds cannot show a variance that three values do not hold (it is too small by (K - 1) / K and its
quantiles are far too near), so the interval is Student's:

    d -+ t(df) sqrt(v_items + v_seeds),   df = (v_items + v_seeds)^2 / (v_items^2 / (n - 1) + v_seeds^2 / (K - 1))

with Satterthwaite's degrees of freedom (F. E. Satterthwaite, 1946). With one seed nothing is known of the seeds: the
interval is of the items alone. A statistic that is no ratio of sums (calibration error, macro F1) gets ``v_items`` from
the delete-a-group jackknife (P. S. Kott, 2001). Everything is float64 numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ratio = tuple[Array, Array]
_CHUNK = 1 << 22


@dataclass(frozen=True)
class PairedDifference:
    """A difference ``method - reference``.

    Attributes:
        value: d.
        low, high: its interval; NaN where the spread cannot be known.
        p_value: two-sided, of d = 0 (1 where the two are the same, NaN where the spread cannot be known).
        per_seed: d_s.
        items: n.
    """

    value: float
    low: float
    high: float
    p_value: float
    per_seed: tuple[float, ...]
    items: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def ratio(sums: Ratio) -> float:
    """``sum a / sum b``; NaN without a denominator."""
    total = float(sums[1].sum())
    return float(sums[0].sum()) / total if total else math.nan


def item_variance(method: Sequence[Ratio], reference: Sequence[Ratio], *, samples: int = 2000, seed: int = 0) -> float:
    """Variance of d over resampled items (bootstrap).

    Args:
        method: per seed, sums of every item: ``(a_n, b_n)``.
        reference: the same for the other; equally many items, in the same order.
        samples: resamples.
        seed: of the resampling.
    """
    arms = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in (*method, *reference)]
    items = arms[0][0].size
    if items < 2:
        return math.nan
    columns_nC = np.stack([column for arm in arms for column in arm], axis=1)
    generator = np.random.default_rng(seed)
    half, found = len(method), []
    step = max(1, _CHUNK // items)
    for start in range(0, samples, step):
        count = min(step, samples - start)
        times_Rn = generator.multinomial(items, np.full(items, 1 / items), size=count).astype(np.float64)
        sums_RC = times_Rn @ columns_nC
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios_RA = sums_RC[:, 0::2] / sums_RC[:, 1::2]
        found.append(ratios_RA[:, :half].mean(1) - ratios_RA[:, half:].mean(1))
    values = np.concatenate(found)
    values = values[np.isfinite(values)]
    # The variance of a resample is too small by (n - 1) / n.
    return float(values.var(ddof=1)) * items / (items - 1) if values.size > 1 else math.nan


def group_variance(statistic: Callable[[int, int], float], arms: int, groups: int) -> float:
    """Delete-a-group jackknife variance of ``mean over methods - mean over references``.

    Args:
        statistic: ``statistic(arm, g)``, the value of an arm without group g; the first half of the arms are the
            method's, the second half the reference's.
        arms: how many arms.
        groups: how many groups hold anything.
    """
    if groups < 2:
        return math.nan
    half = arms // 2
    values_GA = np.array([[statistic(arm, g) for arm in range(arms)] for g in range(groups)])
    left_out = values_GA[:, :half].mean(1) - values_GA[:, half:].mean(1)
    return float((groups - 1) / groups * ((left_out - left_out.mean()) ** 2).sum())


def difference(
    per_seed: Sequence[float], v_items: float, items: int, *, degrees: int | None = None, confidence: float = 0.95
) -> PairedDifference:
    """The difference with its interval, from the differences of each seed and the variance over items.

    Args:
        per_seed: d_s.
        v_items: variance of their mean over items.
        items: n.
        degrees: degrees of freedom of ``v_items``; n - 1 by default (groups - 1 for a jackknife).
        confidence: of the interval.
    """
    from scipy.special import stdtr, stdtrit

    d_K = np.asarray(per_seed, np.float64)
    value, seeds = float(d_K.mean()), d_K.size
    v_seeds = float(d_K.var(ddof=1)) / seeds if seeds > 1 else 0.0
    variance = v_items + v_seeds
    made = tuple(float(x) for x in d_K)
    if math.isnan(variance) or math.isnan(value):
        return PairedDifference(value, math.nan, math.nan, math.nan, made, items)
    if variance == 0.0:
        return PairedDifference(value, value, value, 1.0 if value == 0.0 else 0.0, made, items)
    own = max((items - 1) if degrees is None else degrees, 1)
    df = variance**2 / (v_items**2 / own + (v_seeds**2 / (seeds - 1) if seeds > 1 else 0.0))
    error = math.sqrt(variance)
    half = float(stdtrit(df, 0.5 + confidence / 2)) * error
    p_value = 2 * float(stdtr(df, -abs(value) / error))
    return PairedDifference(value, value - half, value + half, min(1.0, p_value), made, items)


def compare_ratios(
    method: Sequence[Ratio],
    reference: Sequence[Ratio],
    *,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> PairedDifference:
    """:func:`difference` of two methods on a metric that is a ratio of sums over items.

    Raises:
        ValueError: the two have different numbers of seeds or items.
    """
    sizes = {np.asarray(part).size for arm in (*method, *reference) for part in arm}
    if len(method) != len(reference) or len(sizes) != 1:
        raise ValueError("a paired comparison needs the same seeds and the same items on both sides")
    per_seed = [ratio(a) - ratio(b) for a, b in zip(method, reference, strict=True)]
    same = all(np.array_equal(x, y) for a, b in zip(method, reference, strict=True) for x, y in zip(a, b, strict=True))
    v_items = 0.0 if same else item_variance(method, reference, samples=samples, seed=seed)
    return difference(per_seed, v_items, sizes.pop(), confidence=confidence)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of p-values (S. Holm, 1979); NaN stays NaN and is not counted."""
    p = np.asarray(p_values, np.float64)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    adjusted, running = p.copy(), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (order.size - rank) * p[index]))
        adjusted[index] = running
    return [float(x) for x in adjusted]
