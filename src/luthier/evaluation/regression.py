"""How predicted numbers agree with true ones: squared error and correlations, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from scipy.stats import rankdata

from luthier.core.errors import LuthierError, UserError
from luthier.core.protocols import Batch, Outputs
from luthier.evaluation.accumulators import Array, Metric, as_metric
from luthier.functional.statistics import Estimate, mean, normal_quantile


def correlation(a: Array, b: Array, confidence: float, *, ranks: bool = False) -> Estimate:
    """Pearson's correlation of two lists of numbers, or Spearman's, with the interval of Fisher's z.

    The variance of z is 1/(n - 3) for Pearson's and (1 + r^2/2)/(n - 3) for Spearman's (Bonett and Wright, 2000). NaN
    where one of the lists is constant or there are fewer than two numbers; without an interval below four.
    """
    if ranks:
        a, b = rankdata(a), rankdata(b)
    n = len(a)
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    if n < 2 or scale == 0:
        return Estimate(math.nan, n, math.nan, math.nan)
    r = min(max(float(a @ b) / scale, -1.0), 1.0)
    if n < 4 or abs(r) == 1:
        return Estimate(r, n, math.nan, math.nan)
    half = normal_quantile(confidence) * math.sqrt((1 + r * r / 2 if ranks else 1.0) / (n - 3))
    return Estimate(r, n, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half))


def agreement(
    batches: Iterable[Batch], forward: Callable[[Batch], Outputs], *, confidence: float = 0.95
) -> dict[str, Metric]:
    """Mean squared error, Pearson's and Spearman's correlation of a model over batches.

    Args:
        batches: collated batches.
        forward: the model up to its outputs, whose ``numbers`` are read.
        confidence: of the intervals.

    Raises:
        UserError: there is nothing to evaluate.
        LuthierError: a prediction is not finite.
    """
    numbers, targets = [np.empty(0)], [np.empty(0)]
    with torch.no_grad():
        for batch in batches:
            kept = batch.weight_N > 0
            numbers.append(forward(batch).numbers()[kept.to(batch.weight_N.device)].double().cpu().numpy())
            targets.append(batch.target_N[kept].double().cpu().numpy())
    f, y = np.concatenate(numbers), np.concatenate(targets)
    if not len(y):
        raise UserError("there is no row to evaluate: the data is empty.")
    if not np.isfinite(f).all():
        raise LuthierError(
            "the model predicts a number that is not finite: evaluate in float32, or go back a checkpoint."
        )
    return {
        "loss": as_metric(mean((f - y) ** 2, confidence), "squared error", "lower"),
        "pearson": as_metric(correlation(f, y, confidence), "correlation", "higher"),
        "spearman": as_metric(correlation(f, y, confidence, ranks=True), "correlation", "higher"),
    }
