"""Kullback-Leibler divergences between two predictions over one vocabulary, with the gradient by the first's logits.

With ``p = softmax(z)`` the trained model's prediction, ``q`` the reference's, and K one of::

    forward   K = sum_v q_v (log q_v - log p_v)     dK/dz = p - q                                (covers all of q)
    reverse   K = sum_v p_v (log p_v - log q_v)     dK/dz_v = p_v (log p_v - log q_v - K)        (keeps to modes of q)

Value and gradient are formed together, block by block, so that of a chunk of logits [C, V] only one further [C, V]
tensor is made. The coarse form sees k tokens and the remaining mass as one more outcome.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

Direction = Literal["forward", "reverse"]

# Rows are worked on in blocks of about this many bytes on a CPU, which then stay in its cache.
_BLOCK_BYTES = 1 << 20
# Of the mass outside the k tokens at least this much is assumed on both sides: 1 - sum(p) is rounded in float32.
LEAST_REST = 1e-6


def divergence(logits_CV: torch.Tensor, reference_CV: torch.Tensor, direction: Direction = "forward") -> torch.Tensor:
    """K [C] in nats per position, with its gradient by ``logits_CV``; the reference is taken as constant.

    Args:
        logits_CV: logits of the trained model, float32 or float64.
        reference_CV: logits (or log-probabilities) of the reference over the same vocabulary.
        direction: ``forward`` is KL(reference | model), ``reverse`` KL(model | reference).

    Raises:
        ValueError: the two have different shapes.
    """
    if logits_CV.shape != reference_CV.shape:
        raise ValueError(f"logits of shapes {tuple(logits_CV.shape)} and {tuple(reference_CV.shape)}")
    graph = torch.is_grad_enabled() and logits_CV.requires_grad
    with torch.autocast(logits_CV.device.type, enabled=False):
        value_C, slope_CV = _value_and_slope(logits_CV.detach(), reference_CV.detach(), direction, graph)
        if slope_CV is None:
            return value_C
        # A linear function with the gradient that is already there; the added difference is exactly zero.
        linear_C = torch.linalg.vecdot(logits_CV, slope_CV)
        return value_C + (linear_C - linear_C.detach())


def _value_and_slope(
    x_CV: torch.Tensor, y_CV: torch.Tensor, direction: Direction, graph: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows, width = x_CV.shape
    block = max(1, rows) if x_CV.is_cuda else max(1, _BLOCK_BYTES // (width * x_CV.element_size()))
    value_C, slope_CV = x_CV.new_empty(rows), torch.empty_like(x_CV) if graph else None
    p_spare, q_spare = (x_CV.new_empty((min(block, rows), width)) for _ in range(2))
    for start in range(0, rows, block):
        part = slice(start, min(start + block, rows))
        x, y = x_CV[part], y_CV[part].to(x_CV.dtype)
        p = torch.softmax(x, -1, out=p_spare[: len(x)] if slope_CV is None else slope_CV[part])
        q = torch.softmax(y, -1, out=q_spare[: len(x)])
        # The largest probability is at least 1/V, so its logarithm is exact. Equal logits give exactly 0.
        shift = (x.amax(-1) - p.amax(-1).log()) - (y.amax(-1) - q.amax(-1).log())
        # log q - log p = y - x + shift; differences of logits keep what differences of log-probabilities round away.
        ratio = y - x
        if direction == "forward":
            value = torch.linalg.vecdot(q, ratio).add_(shift)
            p.sub_(q)
        else:
            ratio.neg_().sub_(shift[:, None])
            value = torch.linalg.vecdot(p, ratio)
            p.mul_(ratio.sub_(value[:, None]))
        value_C[part] = value.clamp_(min=0.0)
    return value_C, slope_CV


def largest(logits_CV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k most likely tokens of a prediction, for :func:`coarse_divergence`.

    Returns:
        Their ids [C, k] (int64), their log-probabilities [C, k], and the logarithm of the remaining mass [C], exact to
        about 1e-7 of mass.
    """
    logp_CV = torch.log_softmax(logits_CV, -1)
    logp_Ck, ids_Ck = logp_CV.topk(min(k, logp_CV.shape[1]), -1)
    # Rounding of the difference is far below LEAST_REST, and a pass over the others would cost as much as the rest.
    return ids_Ck, logp_Ck, (1 - logp_Ck.exp().sum(-1)).clamp(min=0.0).log()


def coarse_divergence(
    logp_Nk: torch.Tensor, reference_Nk: torch.Tensor, rest_N: torch.Tensor, direction: Direction = "forward"
) -> torch.Tensor:
    """K [N] in nats over k tokens and one outcome for all others; it never exceeds the full K.

    Args:
        logp_Nk: log-probabilities of k tokens under the trained model, with a graph.
        reference_Nk: those of the same tokens under the reference.
        rest_N: logarithm of the mass the reference gives to all other tokens.
        direction: as in :func:`divergence`.
    """
    p_rest_N = (1 - logp_Nk.exp().sum(-1, keepdim=True)).clamp(min=LEAST_REST)
    logp = torch.cat([logp_Nk, p_rest_N.log()], -1)
    logq = torch.cat([reference_Nk, rest_N[:, None].clamp(min=math.log(LEAST_REST))], -1)
    if direction == "forward":
        return (logq.exp() * (logq - logp)).sum(-1)
    return (logp.exp() * (logp - logq)).sum(-1)
