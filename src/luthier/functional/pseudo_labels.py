"""Which predictions on unlabelled inputs are certain enough to be learnt from.

Classes: the largest probability is at least a threshold, and, where a share is given, the prediction is among that
share of the most confident ones of its class ("class-balanced self-training", 2018, arXiv 1810.07911). Numbers: the
predictions of several models differ little.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Columns of a row by which a procedure tells the objective how to learn from it: class probabilities in place of the
# label, a factor on its loss, and whether that factor is one of the rising ones.
TARGET, WEIGHT, PSEUDO = "glue_target", "glue_weight", "glue_pseudo"


def confident(p: ArrayLike, threshold: float, class_share: float = 1.0) -> NDArray[np.int64]:
    """Indices of the kept predictions, ascending.

    Args:
        p: [N, C] probabilities, the mean over the models of an ensemble.
        threshold: smallest probability of the predicted class, itself included.
        class_share: of the predictions of each class (all, not only those above the threshold) at most this share is
            kept, rounded up; of equal ones the first.
    """
    p_NC = np.asarray(p, np.float64)
    predicted_N, confidence_N = p_NC.argmax(-1), p_NC.max(-1)
    kept_N = confidence_N >= threshold
    if class_share < 1.0:
        for c in range(p_NC.shape[1]):
            members = np.flatnonzero(predicted_N == c)
            order = members[np.argsort(-confidence_N[members], kind="stable")]
            kept_N[order[math.ceil(class_share * len(members)) :]] = False
    return np.flatnonzero(kept_N)


def certain(prediction_KN: ArrayLike, largest_deviation: float) -> NDArray[np.int64]:
    """Indices of numeric predictions whose standard deviation over K models is at most ``largest_deviation``.

    Args:
        prediction_KN: [K, N] predictions scaled to [0, 1].
        largest_deviation: of the population of the K models.

    Raises:
        ValueError: fewer than two models, of which no deviation can be told.
    """
    found = np.asarray(prediction_KN, np.float64)
    if len(found) < 2:
        raise ValueError("the deviation of predictions needs at least two models")
    return np.flatnonzero(found.std(axis=0) <= largest_deviation)


def ramp(step: int, total_steps: int, share: float) -> float:
    """A factor that rises linearly from 0 at the first step to 1 after ``share`` of the steps."""
    rising = share * total_steps
    return 1.0 if rising <= 0 else min(1.0, step / rising)
