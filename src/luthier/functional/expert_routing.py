"""Soft routing over experts, and losses that balance it.

Shapes: M modules with a router of their own, B examples, T tokens, N experts.

Source: "LoRAMoE: Alleviate World Knowledge Forgetting in Large Language Models via MoE-Style Plugin", ACL 2024, arXiv
2312.09979.
"""

from __future__ import annotations

import torch

EPSILON = 1e-10


def soft_routing(scores: torch.Tensor, top_k: int | None = None) -> torch.Tensor:
    """Weights over the last dimension, float32: the softmax of all scores, or of the ``top_k`` largest alone."""
    scores = scores.float()
    if top_k is not None and top_k < scores.shape[-1]:
        kept = scores.topk(top_k, dim=-1).indices
        scores = torch.full_like(scores, -torch.inf).scatter(-1, kept, scores.gather(-1, kept))
    return scores.softmax(-1)


def mass(weight_MBTN: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
    """What each expert gets of each example [M, B, N], over its real tokens; over all of them where mask is None."""
    if mask_BT is None:
        return weight_MBTN.sum(2)
    return torch.einsum("mbtn,bt->mbn", weight_MBTN, mask_BT.to(weight_MBTN.dtype))


def importance(example_B: torch.Tensor, expert_N: torch.Tensor, contrast: float) -> torch.Tensor:
    """1 + contrast where the types of an example and an expert agree, 1 - contrast where they do not, [B, N]."""
    agree_BN = example_B[:, None] == expert_N[None]
    return torch.where(agree_BN, 1.0 + contrast, 1.0 - contrast)


def dispersion(value: torch.Tensor, kind: str = "cv2") -> torch.Tensor:
    """How unequal the values of the last dimension are: unbiased variance over squared mean, or over the mean.

    Args:
        value: [..., K], not negative.
        kind: ``cv2`` (squared coefficient of variation) or ``index`` (index of dispersion).

    Returns:
        [...]; 0 where K is 1.
    """
    if value.shape[-1] == 1:
        return value.new_zeros(value.shape[:-1])
    variance, mean = value.float().var(-1), value.float().mean(-1)
    return variance / ((mean.square() if kind == "cv2" else mean) + EPSILON)


def balance(
    mass_MBN: torch.Tensor, importance_BN: torch.Tensor, *, kind: str = "cv2", over: str = "batch"
) -> torch.Tensor:
    """The localized balancing loss of each module: the dispersion of mass times importance.

    Args:
        mass_MBN: from :func:`mass`.
        importance_BN: from :func:`importance`.
        kind: see :func:`dispersion`.
        over: ``batch``: over all B * N values; ``example``: over the N of each example, summed over examples.

    Returns:
        [M].
    """
    weighted_MBN = mass_MBN * importance_BN
    return dispersion(weighted_MBN.flatten(1), kind) if over == "batch" else dispersion(weighted_MBN, kind).sum(1)
