"""Targets between a given label and what models say that have not seen it.

    y~_i = (1 - a_i) onehot(y_i) + a_i q_i,     a_i = a_max * max(0, q_i[argmax] - q_i[y_i])

``q_i`` [C] is an out-of-fold prediction: of a model trained without row i and without any row of the same text. Where
it agrees with the label nothing changes; the more confidently it disagrees, the less the label counts. For numbers,
``y~ = (1 - a) y + a f`` with ``a = a_max * min(1, |f - y| / (3 sd))``.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def one_text(text: str) -> str:
    """A text as duplicates are known by: NFKC, lower case, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def folds(texts: Sequence[str], k: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """[N] the fold of each row, from 0 to k - 1: equal texts share one, and the folds are as equal as that allows.

    Args:
        texts: of the rows; compared by :func:`one_text`.
        k: number of folds.
        rng: decides which texts go together.

    Raises:
        ValueError: fewer different texts than folds.
    """
    _, group_N, size_G = np.unique([one_text(t) for t in texts], return_inverse=True, return_counts=True)
    if len(size_G) < k:
        raise ValueError(f"{k} folds need at least {k} different texts, and there are {len(size_G)}")
    shuffled = rng.permutation(len(size_G))
    fold_G, filled = np.zeros(len(size_G), np.int64), np.zeros(k, np.int64)
    # Large groups first, each into the emptiest fold.
    for group in shuffled[np.argsort(-size_G[shuffled], kind="stable")]:
        fold_G[group] = int(filled.argmin())
        filled[fold_G[group]] += size_G[group]
    return fold_G[group_N]


def disagreement(q: ArrayLike, label: ArrayLike, a_max: float) -> Array:
    """The prediction's share a [N] of the target, from out-of-fold probabilities [N, C] and given labels [N]."""
    q_NC = np.asarray(q, np.float64)
    own_N = q_NC[np.arange(len(q_NC)), np.asarray(label, np.int64)]
    return a_max * np.maximum(0.0, q_NC.max(-1) - own_N)


def calibrated_targets(q: ArrayLike, label: ArrayLike, a_max: float) -> Array:
    """y~ [N, C], from out-of-fold probabilities [N, C] and given labels [N]."""
    q_NC, a_N1 = np.asarray(q, np.float64), disagreement(q, label, a_max)[:, None]
    return (1 - a_N1) * np.eye(q_NC.shape[1])[np.asarray(label, np.int64)] + a_N1 * q_NC


def calibrated_numbers(prediction: ArrayLike, label: ArrayLike, a_max: float) -> Array:
    """y~ [N] for regression; ``sd`` is the standard deviation of the errors of the out-of-fold predictions."""
    f_N, y_N = np.asarray(prediction, np.float64), np.asarray(label, np.float64)
    sd = (f_N - y_N).std()
    if sd == 0:
        return y_N.copy()
    a_N = a_max * np.minimum(1.0, np.abs(f_N - y_N) / (3 * sd))
    return (1 - a_N) * y_N + a_N * f_N
