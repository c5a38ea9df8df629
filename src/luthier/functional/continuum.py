"""Where a model and a dataset lie on the model-capability continuum, from the model's target log-probabilities.

A strong model already gives the targets high probability and gains from losses that trust it (prior-leaning); a weak
one has to learn what it does not know and needs plain likelihood. The two limits on the mean target probability are
this library's own choice, not the paper's; they are arguments everywhere.

Source of the notion: "Beyond Log Likelihood: Probability-Based Objectives for Supervised Fine-Tuning across the Model
Capability Continuum", 2025, arXiv 2510.00526.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from luthier.functional.probability_losses import Member, token_weight

STRONG_FROM = 0.75
WEAK_UP_TO = 0.35
BINS = 20

RECOMMENDATION = {
    "strong": "prior-leaning: p, general with alpha 1 to 10, or a top threshold; use a learning rate 3 to 10 times "
    "smaller than for nll",
    "weak": "prior-averse: nll",
    "intermediate": "no winner is predicted: run nll and p and compare",
}


@dataclass(frozen=True)
class Continuum:
    """The diagnosis.

    Attributes:
        n: supervised positions seen.
        mean_p: mean target probability.
        standard_error: of ``mean_p``; rows, not positions, count as independent where the rows are known.
        mean_logp: mean target log-probability, nats.
        histogram: share of positions in each of 20 equal bins of p.
        share_below_01: share with p < 0.1.
        share_above_09: share with p > 0.9.
        position: ``strong``, ``intermediate`` or ``weak``.
        strong_from: limit used, mean p from which it is strong.
        weak_up_to: limit used, mean p up to which it is weak.
    """

    n: int
    mean_p: float
    standard_error: float
    mean_logp: float
    histogram: tuple[float, ...]
    share_below_01: float
    share_above_09: float
    position: str
    strong_from: float
    weak_up_to: float

    @property
    def recommendation(self) -> str:
        """What to try, in words."""
        return RECOMMENDATION[self.position]

    @property
    def member(self) -> Member:
        """What ``auto`` uses: ``p`` on the strong side, else ``nll``."""
        return Member("p" if self.position == "strong" else "nll")


def _bin_of(p_N: np.ndarray) -> np.ndarray:
    return np.minimum((p_N * BINS).astype(np.int64), BINS - 1)


def diagnose(
    logp_N: np.ndarray,
    row_N: np.ndarray | None = None,
    *,
    strong_from: float = STRONG_FROM,
    weak_up_to: float = WEAK_UP_TO,
) -> Continuum:
    """The position of target log-probabilities [N] (nats) on the continuum; ``row_N`` tells whose row each is.

    Raises:
        ValueError: no positions, or limits in the wrong order.
    """
    if not 0 <= weak_up_to < strong_from <= 1:
        raise ValueError(f"need 0 <= weak_up_to < strong_from <= 1, got {weak_up_to} and {strong_from}")
    logp_N = np.asarray(logp_N, dtype=np.float64)
    if logp_N.size == 0:
        raise ValueError("no supervised positions to diagnose")
    p_N = np.exp(np.minimum(logp_N, 0.0))
    mean = float(p_N.mean())
    counts = np.bincount(_bin_of(p_N), minlength=BINS)
    deviation = p_N - mean if row_N is None else np.bincount(row_N, weights=p_N - mean)
    return Continuum(
        n=int(p_N.size),
        mean_p=mean,
        standard_error=float(np.sqrt((deviation**2).sum()) / p_N.size),
        mean_logp=float(logp_N.mean()),
        histogram=tuple((counts / p_N.size).tolist()),
        share_below_01=float((p_N < 0.1).mean()),
        share_above_09=float((p_N > 0.9).mean()),
        position="strong" if mean >= strong_from else "weak" if mean <= weak_up_to else "intermediate",
        strong_from=strong_from,
        weak_up_to=weak_up_to,
    )


def gradient_mass(logp_N: np.ndarray, members: Sequence[Member]) -> dict[str, tuple[float, ...]]:
    """For each member, the share of the total weight w(p) that falls into each of 20 equal bins of p."""
    logp_N = np.asarray(logp_N, dtype=np.float64)
    bin_N = _bin_of(np.exp(np.minimum(logp_N, 0.0)))
    shares = {}
    for member in members:
        weight_N = token_weight(member, torch.from_numpy(logp_N)).numpy()
        mass = np.bincount(bin_N, weights=weight_N, minlength=BINS)
        shares[str(member)] = tuple((mass / max(mass.sum(), 1e-300)).tolist())
    return shares
