"""Ensembles of class probabilities over prompt variations, and how well the result is calibrated.

Everything is float64 numpy. E variations, N items, K classes. Averaging logits or log-probabilities would be another
rule (a geometric mean); here probabilities are aggregated.

Source: "On Task Performance and Model Calibration with Supervised and Self-Ensembled In-Context Learning", 2023, arXiv
2312.13772; batch calibration as in arXiv 2309.17249, contextual calibration as in arXiv 2102.09690.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from luthier.functional.calibration import expected_calibration_error, width_bin

Array = NDArray[np.float64]
Labels = NDArray[np.int64]
Rule = Literal["mean_prob", "max_prob", "majority_vote"]
BINS, LEAST = 10, 1e-12


def softmax(logits: ArrayLike) -> Array:
    """Probabilities over the last axis."""
    z = np.asarray(logits, np.float64)
    e = np.exp(z - z.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def aggregate(
    p: ArrayLike, rule: Rule = "max_prob", *, weighted: bool = True, min_votes: float = 0.0
) -> tuple[Array, Labels]:
    """Q [N, K] and the predicted class [N] of variations' probabilities [E, N, K].

    ``mean_prob``: the mean. ``max_prob``: each class's largest probability, renormalised. ``majority_vote``: each
    variation votes for its likeliest class with its confidence (``weighted``) or 1; q is the mean of the variations
    that voted for the winner, or of all where the winner's total is below ``min_votes``. Of tied classes the one that
    the earliest variation votes for wins.
    """
    p_ENK = np.asarray(p, np.float64)
    if rule == "majority_vote":
        vote_EN = p_ENK.argmax(-1)
        mine_ENK = np.eye(p_ENK.shape[-1])[vote_EN]
        total_NK = (mine_ENK * (p_ENK.max(-1)[..., None] if weighted else 1.0)).sum(0)
        best_N1 = total_NK.max(-1, keepdims=True)
        # Sums in another order may differ in the last bit and are ties all the same.
        tied_NK = total_NK >= best_N1 * (1 - 1e-12)
        first_N = np.take_along_axis(np.broadcast_to(tied_NK, p_ENK.shape), vote_EN[..., None], -1)[..., 0].argmax(0)
        winner_N = np.take_along_axis(vote_EN, first_N[None], 0)[0]
        kept_EN = (vote_EN == winner_N) | (best_N1[:, 0] < min_votes)
        q_NK = (p_ENK * kept_EN[..., None]).sum(0) / kept_EN.sum(0)[:, None]
        return q_NK, winner_N
    q_NK = p_ENK.mean(0) if rule == "mean_prob" else p_ENK.max(0)
    q_NK = q_NK / q_NK.sum(-1, keepdims=True)
    return q_NK, q_NK.argmax(-1)


@dataclass(frozen=True)
class Quality:
    """How good predicted probabilities are; shares in [0, 1], nats for ``nll`` and ``entropy``.

    Attributes:
        entropy_term: the mean of ``-q log q`` over all N K entries, as released code has it.
        overconfidence: mean confidence less accuracy.
    """

    accuracy: float
    macro_f1: float
    micro_f1: float
    ece: float
    nll: float
    brier: float
    confidence: float
    entropy: float
    entropy_term: float
    overconfidence: float


def quality(
    q: ArrayLike,
    gold: ArrayLike,
    predicted: ArrayLike | None = None,
    *,
    bins: int = BINS,
    binary_ece: Literal["top", "positive"] = "top",
) -> Quality:
    """The quality of q [N, K] for the true classes [N].

    Args:
        q: probabilities that sum to 1.
        gold: true class of each item.
        predicted: class predicted, by default the likeliest; a vote's winner may be another.
        bins: of equal width, right-closed; empty ones count nothing.
        binary_ece: with two classes, ``positive`` compares P(class 1) with how often class 1 is true, as released code
            does.

    Raises:
        ValueError: no items.
    """
    from sklearn.metrics import f1_score

    q_NK, gold_N = np.asarray(q, np.float64), np.asarray(gold, np.int64)
    if not len(q_NK):
        raise ValueError("there are no items")
    predicted_N = q_NK.argmax(-1) if predicted is None else np.asarray(predicted, np.int64)
    count, classes = q_NK.shape
    confidence_N, right_N = q_NK.max(-1), predicted_N == gold_N
    of, hit = confidence_N, right_N
    if binary_ece == "positive" and classes == 2:
        of, hit = q_NK[:, 1], gold_N == 1
    logq_NK = np.log(np.maximum(q_NK, LEAST))
    entropy = float(-(q_NK * logq_NK).sum() / count)
    f1 = {
        name: float(f1_score(gold_N, predicted_N, labels=range(classes), average=name, zero_division=0))
        for name in ("macro", "micro")
    }
    return Quality(
        accuracy=float(right_N.mean()),
        macro_f1=f1["macro"],
        micro_f1=f1["micro"],
        ece=expected_calibration_error(of, hit, bins=bins, scheme="equal-width"),
        nll=float(-logq_NK[np.arange(count), gold_N].mean()),
        brier=float(((q_NK - np.eye(classes)[gold_N]) ** 2).sum(-1).mean()),
        confidence=float(confidence_N.mean()),
        entropy=entropy,
        entropy_term=entropy / classes,
        overconfidence=float(confidence_N.mean() - right_N.mean()),
    )


def reliability(confidence: ArrayLike, correct: ArrayLike, bins: int = BINS) -> list[tuple[float, float, int]]:
    """(mean confidence, share right, count) of each equal-width bin that has items."""
    confidence_N, correct_N = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    index_N = width_bin(confidence_N, bins)
    inside = [index_N == b for b in range(bins)]
    return [(float(confidence_N[m].mean()), float(correct_N[m].mean()), int(m.sum())) for m in inside if m.any()]


def batch_calibrated(logits: ArrayLike, *, demean_only: bool = False) -> Array:
    """Probabilities [N, K] from logits [N, K] with each class standardised over the unlabelled batch.

    A class whose logits do not vary is only centred.
    """
    z_NK = np.asarray(logits, np.float64)
    centred_NK = z_NK - z_NK.mean(0)
    if demean_only or len(z_NK) < 2:
        return softmax(centred_NK)
    scale_K = np.sqrt(z_NK.var(0, ddof=1))
    return softmax(centred_NK / np.where(scale_K > 0, scale_K, 1.0))


class StreamingCalibration:
    """Batch calibration with running statistics: after each batch they move by ``momentum`` towards the batch's."""

    def __init__(self, classes: int, momentum: float = 0.1) -> None:
        self.mean_K, self.variance_K, self.momentum = np.zeros(classes), np.ones(classes), momentum

    def __call__(self, logits: ArrayLike) -> Array:
        """Probabilities [N, K] of a batch of at least two items, under the statistics that include it."""
        z_NK = np.asarray(logits, np.float64)
        self.mean_K = (1 - self.momentum) * self.mean_K + self.momentum * z_NK.mean(0)
        self.variance_K = (1 - self.momentum) * self.variance_K + self.momentum * z_NK.var(0, ddof=1)
        return softmax((z_NK - self.mean_K) / np.sqrt(self.variance_K))


def contextual_calibrated(p: ArrayLike, empty: ArrayLike) -> Array:
    """Probabilities [N, K] divided by those given to an input without content ([K] or [N, K]), renormalised."""
    w_NK = np.asarray(p, np.float64) / np.maximum(np.asarray(empty, np.float64), LEAST)
    return np.asarray(w_NK / w_NK.sum(-1, keepdims=True))
