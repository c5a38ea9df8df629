"""Small perturbations of word embeddings, and how far a prediction moves under them.

    e_hat = (e - mean(e)) / s(e),   s(e) = sqrt(var(e) + 1e-7)      layer normalisation of one token, without affine
    e'    = mean(e) + s(e) (e_hat + delta) = e + s(e) delta         the perturbed embedding in the original scale
    delta <- project(delta + step * g / (|g| + 1e-12))              one step of ascent on the gradient g

``delta`` [B, T, D] has one vector per token; its length is the Euclidean norm (``l2``) or the largest absolute value
(``inf``) over D, and ``project`` brings it back to at most ``radius``.

Source: "SMART: Robust and Efficient Fine-Tuning for Pre-trained Natural Language Models through Principled Regularized
Optimization", 2019, arXiv 1911.03437; the normalisation is that of "DeBERTa", 2020, arXiv 2006.03654 (SiFT).
"""

from __future__ import annotations

from typing import Literal

import torch

Norm = Literal["l2", "inf"]

NORMALISATION = 1e-7
EPSILON = 1e-12


def symmetric_divergence(a_CV: torch.Tensor, b_CV: torch.Tensor) -> torch.Tensor:
    """``KL(p_a | p_b) + KL(p_b | p_a)`` [C] in nats, from logits [C, V]; both sides have gradients.

    Equal to ``sum_v (p_a - p_b) (log p_a - log p_b)``, which is never negative and exactly 0 for equal logits.
    """
    a_CV, b_CV = torch.log_softmax(a_CV, -1), torch.log_softmax(b_CV, -1)
    return ((a_CV.exp() - b_CV.exp()) * (a_CV - b_CV)).sum(-1)


def squared_difference(a_N: torch.Tensor, b_N: torch.Tensor) -> torch.Tensor:
    """``(f - f')^2`` [N], the divergence of two regressions."""
    return (a_N - b_N).square()


def embedding_scale(embedding_BTD: torch.Tensor) -> torch.Tensor:
    """s(e) [B, T, 1], without gradient, at least float32: what turns a normalised perturbation into one of e."""
    wide = embedding_BTD.detach().to(torch.promote_types(embedding_BTD.dtype, torch.float32))
    return (wide.var(-1, correction=0, keepdim=True) + NORMALISATION).sqrt()


def length(delta_BTD: torch.Tensor, norm: Norm) -> torch.Tensor:
    """The length of each token's perturbation, [B, T, 1]."""
    return torch.linalg.vector_norm(delta_BTD, ord=2 if norm == "l2" else float("inf"), dim=-1, keepdim=True)


def project(delta_BTD: torch.Tensor, radius: float, norm: Norm) -> torch.Tensor:
    """The nearest perturbation in the ball: shortened to the radius (``l2``), or each value cut to it (``inf``)."""
    if norm == "inf":
        return delta_BTD.clamp(-radius, radius)
    return delta_BTD * (radius / length(delta_BTD, norm).clamp(min=EPSILON)).clamp(max=1.0)


def ascend(
    delta_BTD: torch.Tensor, gradient_BTD: torch.Tensor, *, step_size: float, radius: float, norm: Norm
) -> torch.Tensor:
    """One projected step of ascent, each token's gradient brought to length 1; a gradient of zero is no step."""
    unit_BTD = gradient_BTD / (length(gradient_BTD, norm) + EPSILON)
    return project(delta_BTD + step_size * unit_BTD, radius, norm)
