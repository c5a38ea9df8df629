"""Which of a model's own answers are unlike the given one, by the similarity of embeddings.

Source: "Extensive Self-Contrast Enables Feedback-Free Language Model Alignment", 2024, arXiv 2404.00604.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

Mode = Literal["lastdedup", "last", "alldedup", "all"]


def ranks(similarity_n: np.ndarray) -> np.ndarray:
    """Place of each similarity [n] in ascending order, 0 the least; equal ones have the first place of theirs."""
    return np.searchsorted(np.sort(similarity_n), similarity_n, side="left")


def pool(texts: Sequence[str], similarity_n: np.ndarray, share: float, mode: Mode, target: str) -> list[int]:
    """Indices of the answers that may be negatives, in order.

    ``lastdedup``: of the first copies of the distinct answers, those whose rank is below the K-th smallest (from 0) of
    their ranks, ``K = min(floor(n share), distinct - 1)``; ``last``: the same with copies; ``alldedup``, ``all``:
    without the filter. Blank answers and copies of the target are never among them.

    Args:
        texts: n answers.
        similarity_n: of each to the target.
        share: p, about how much of the least similar ones stays.
        mode: which filter.
        target: the given answer.
    """
    candidates = list(range(len(texts)))
    if mode.endswith("dedup"):
        candidates = [i for i in candidates if texts[i] not in texts[:i]]
    if mode.startswith("last") and candidates:
        rank_n = ranks(similarity_n)
        kept = min(int(len(texts) * share), len(candidates) - 1)
        threshold = sorted(rank_n[candidates])[kept]
        candidates = [i for i in candidates if rank_n[i] < threshold]
    return [i for i in candidates if texts[i].strip() and texts[i].strip() != target.strip()]


def cosine(a_nH: np.ndarray, b_H: np.ndarray) -> np.ndarray:
    """Cosine [n] of each row with a vector; 0 where one of them is zero."""
    norm = np.linalg.norm(a_nH, axis=1) * np.linalg.norm(b_H)
    return np.divide(a_nH @ b_H, norm, out=np.zeros(len(a_nH)), where=norm > 0)
