"""Calibration of predicted probabilities: expected calibration error, Brier score, negative log-likelihood.

The statistics taken are those a log-prob head gives per prediction without keeping the distribution:
``logp`` of the target, the confidence (probability of the most likely class), whether that class is right, and the
collision probability ``sum_v p_v^2``. Everything is float64 numpy.

Expected calibration error (Naeini et al., "Obtaining Well Calibrated Probabilities Using Bayesian Binning", AAAI 2015):

    ECE = sum_b n_b / n * |accuracy_b - confidence_b|

over bins of equal width in confidence, or of equal mass (the same number of predictions in each). Equal-mass bins are
cut through predictions of the same confidence in proportion, so the result does not depend on the order of the data.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Scheme = Literal["equal-width", "equal-mass"]
Array = NDArray[np.float64]
BINS = 15


def brier(p_target: ArrayLike, collision: ArrayLike) -> Array:
    """Multi-class Brier score of each prediction, in [0, 2]: ``sum_v (p_v - [v = y])^2 = 1 - 2 p_y + sum_v p_v^2``.

    Args:
        p_target: [N] probability given to the true class.
        collision: [N] sum of squared probabilities.
    """
    return 1.0 - 2.0 * np.asarray(p_target, np.float64) + np.asarray(collision, np.float64)


def negative_log_likelihood(logp: ArrayLike) -> Array:
    """[N] nats, from the log-probability of the true class."""
    return -np.asarray(logp, np.float64)


def width_bin(confidence: ArrayLike, bins: int = BINS) -> NDArray[np.int64]:
    """[N] index of the equal-width bin of each confidence; bin b covers (b / bins, (b + 1) / bins]."""
    index = np.ceil(np.asarray(confidence, np.float64) * bins).astype(np.int64) - 1
    return np.clip(index, 0, bins - 1)


def binned_error(count_B: Array, confidence_B: Array, correct_B: Array) -> float:
    """ECE from the sums of each bin.

    Args:
        count_B: predictions in each bin.
        confidence_B: sum of their confidences.
        correct_B: how many of them are right.
    """
    total = count_B.sum()
    return float(np.abs(correct_B - confidence_B).sum() / total) if total else float("nan")


def equal_mass_bins(
    count_C: Array, confidence_C: Array, correct_C: Array, bins: int = BINS
) -> tuple[Array, Array, Array]:
    """Regroup cells, sorted by confidence, into bins of equal mass; a cell on a border is divided in proportion.

    Args:
        count_C: predictions in each cell (cells are sorted by confidence; empty ones are allowed).
        confidence_C: sum of the confidences of each cell.
        correct_C: right predictions of each cell.
        bins: number of bins.

    Returns:
        The same three sums for each bin.
    """
    borders = np.linspace(0.0, count_C.sum(), bins + 1)
    filled = count_C > 0
    mass = np.concatenate([[0.0], np.cumsum(count_C[filled])])
    sums = []
    for value_C in (count_C, confidence_C, correct_C):
        running = np.concatenate([[0.0], np.cumsum(value_C[filled])])
        sums.append(np.diff(np.interp(borders, mass, running)))
    return sums[0], sums[1], sums[2]


def expected_calibration_error(
    confidence: ArrayLike, correct: ArrayLike, *, bins: int = BINS, scheme: Scheme = "equal-mass"
) -> float:
    """ECE of predictions held in memory.

    Args:
        confidence: [N] probability of the predicted class.
        correct: [N] whether the prediction is right.
        bins: number of bins.
        scheme: ``equal-mass`` or ``equal-width``.

    Returns:
        The error in [0, 1]; NaN without predictions.
    """
    confidence_N = np.asarray(confidence, np.float64)
    correct_N = np.asarray(correct, np.float64)
    if confidence_N.size == 0:
        return float("nan")
    if scheme == "equal-width":
        index_N, size = width_bin(confidence_N, bins), bins
    else:
        values, index_N = np.unique(confidence_N, return_inverse=True)
        size = values.size
    count = np.bincount(index_N, minlength=size).astype(np.float64)
    confidence_sum = np.bincount(index_N, confidence_N, minlength=size).astype(np.float64)
    correct_sum = np.bincount(index_N, correct_N, minlength=size).astype(np.float64)
    if scheme == "equal-width":
        return binned_error(count, confidence_sum, correct_sum)
    return binned_error(*equal_mass_bins(count, confidence_sum, correct_sum, bins))


# Cells of the streaming histogram: equal widths in log-odds, which are fine where confidences crowd near 0 and 1.
CELLS = 4096
_LOG_ODDS = 12.0


def confidence_cell(log_confidence: ArrayLike) -> NDArray[np.int64]:
    """[N] cell of the streaming histogram, from log-confidences (nats).

    Two confidences of one cell differ by at most 24 / 4096 / 4 < 0.0015, and those above 1 - 6.2e-6 share the last
    cell. An equal-mass ECE from cells equals the exact one up to the order of predictions inside a border's cell.
    """
    log_p = np.minimum(np.asarray(log_confidence, np.float64), 0.0)
    with np.errstate(divide="ignore"):
        log_odds = log_p - np.log(-np.expm1(log_p))
    scaled = (np.clip(log_odds, -_LOG_ODDS, _LOG_ODDS) + _LOG_ODDS) / (2 * _LOG_ODDS) * CELLS
    return np.minimum(scaled.astype(np.int64), CELLS - 1)
