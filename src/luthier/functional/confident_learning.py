"""Confident learning: which labels does a model contradict with confidence?

    t_j    = mean of p_j over the rows labelled j            what "confident" means for class j
    j*(x)  = argmax of p_j(x) over the classes with p_j(x) >= t_j
    row x with label i is contradicted when j*(x) exists and j* != i

The probabilities must come from a model that has not seen the row's label, hence :func:`cross_validated`: a softmax
regression on fixed features, each fold predicted by the others. In a text whose answer is tokens there are no classes
to average over; :func:`contradicted` looks at the first token where the model would go another way.

Source: "Confident Learning: Estimating Uncertainty in Dataset Labels", Northcutt, Jiang and Chuang, 2021,
arXiv 1911.00068.
"""

from __future__ import annotations

import numpy as np
import torch

_ITERATIONS = 100


def confident_disagreement(p_NC: np.ndarray, label_N: np.ndarray) -> np.ndarray:
    """Whether each row's label is contradicted with confidence, bool [N].

    Args:
        p_NC: out-of-sample class probabilities.
        label_N: given labels, int64 below C.
    """
    p_NC, label_N = np.asarray(p_NC, np.float64), np.asarray(label_N, np.int64)
    classes = p_NC.shape[1]
    own_N = p_NC[np.arange(len(label_N)), label_N]
    count_C = np.bincount(label_N, minlength=classes)
    total_C = np.bincount(label_N, weights=own_N, minlength=classes)
    # No row says what confident means for a class without rows.
    threshold_C = np.divide(total_C, count_C, out=np.full(classes, np.inf), where=count_C > 0)
    confident_NC = np.where(p_NC >= threshold_C, p_NC, -1.0)
    best_N = confident_NC.argmax(axis=1)
    return (confident_NC.max(axis=1) >= 0) & (best_N != label_N)


def cross_validated(
    feature_NH: np.ndarray, label_N: np.ndarray, classes: int, *, folds: int = 5, decay: float = 1e-2, seed: int = 0
) -> np.ndarray:
    """Class probabilities [N, C] of a softmax regression on fixed features, each row predicted without its own label.

    Args:
        feature_NH: features, standardised here.
        label_N: given labels.
        classes: C.
        folds: parts; each is predicted by a regression on the others.
        decay: weight of the squared norm of the coefficients in the mean loss.
        seed: of the folds.

    Raises:
        ValueError: fewer rows than folds.
    """
    rows = len(label_N)
    if rows < folds:
        raise ValueError(f"{rows} rows cannot be cut into {folds} folds")
    feature_NH = np.asarray(feature_NH, np.float64)
    spread_H = feature_NH.std(axis=0)
    scaled = (feature_NH - feature_NH.mean(axis=0)) / np.where(spread_H > 0, spread_H, 1.0)
    x_NH, y_N = torch.from_numpy(scaled), torch.from_numpy(np.asarray(label_N, np.int64))
    fold_N = torch.from_numpy(np.random.default_rng(seed).permutation(rows) % folds)
    p_NC = torch.zeros(rows, classes, dtype=torch.float64)
    for fold in range(folds):
        weight_HC, bias_C = _regression(x_NH[fold_N != fold], y_N[fold_N != fold], classes, decay)
        p_NC[fold_N == fold] = torch.softmax(x_NH[fold_N == fold] @ weight_HC + bias_C, dim=1)
    return p_NC.numpy()


def _regression(x_NH: torch.Tensor, y_N: torch.Tensor, classes: int, decay: float) -> tuple[torch.Tensor, torch.Tensor]:
    weight_HC = torch.zeros(x_NH.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias_C = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_HC, bias_C], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(x_NH @ weight_HC + bias_C, y_N) + decay * weight_HC.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return weight_HC.detach(), bias_C.detach()


def contradicted(
    top1_N: np.ndarray, top1_logp_N: np.ndarray, target_N: np.ndarray, row_N: np.ndarray, *, confidence: float = 0.8
) -> tuple[np.ndarray, np.ndarray]:
    """(agreed_R, contradicted_R), bool per row, of a model's most likely token at every supervised position.

    Agreed: the model would write the whole answer itself. Contradicted: where it would first go another way, its own
    token has at least the probability ``confidence``. What follows that place was conditioned on a token it did not
    expect, so it is not asked.

    Args:
        top1_N: most likely token at each position.
        top1_logp_N: its log-probability.
        target_N: given token.
        row_N: whose row each position is, not decreasing, every row from 0 present.
        confidence: probability from which the model is sure.
    """
    rows = int(row_N[-1]) + 1 if len(row_N) else 0
    other_N = np.flatnonzero(top1_N != target_N)
    first_R = np.full(rows, -1, dtype=np.int64)
    # Written from the last to the first, so that each row keeps its earliest place.
    first_R[row_N[other_N][::-1]] = other_N[::-1]
    agreed_R = first_R < 0
    sure_R = np.zeros(rows, dtype=bool)
    sure_R[~agreed_R] = np.exp(np.asarray(top1_logp_N, np.float64)[first_R[~agreed_R]]) >= confidence
    return agreed_R, sure_R
