"""Sentence contrast: two passes over a sentence must agree more than passes over different sentences.

    L_CL = sum_i -log( exp(cos(v_i, v'_i) / tau) / sum_j exp(cos(v_i, v'_j) / tau) )

``v_i`` and ``v'_i`` [D] come from the same sentence under two dropout masks; j runs over the batch, i included.

Paper: "SimCSE: Simple Contrastive Learning of Sentence Embeddings", 2021, arXiv 2104.08821.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

Pooling = Literal["mean", "first"]

# Dropout inside attention is a number in the configuration, not a module.
_ATTENTION = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")


def contrast_logits(first_BD: torch.Tensor, second_BD: torch.Tensor, temperature: float) -> torch.Tensor:
    """[B, B] cosine of every first with every second vector over the temperature, in float32 at least."""
    one_BD, other_BD = (
        torch.nn.functional.normalize(v if v.dtype == torch.float64 else v.float(), dim=-1)
        for v in (first_BD, second_BD)
    )
    return one_BD @ other_BD.T / temperature


def contrast_loss(logits_BB: torch.Tensor, weight_B: torch.Tensor) -> torch.Tensor:
    """L_CL with a weight on each sentence (as the one to be found again; it stays a negative of others).

    Args:
        logits_BB: of :func:`contrast_logits`.
        weight_B: weight of each sentence.

    Raises:
        ValueError: fewer than two sentences, so that there is no negative.
    """
    if len(logits_BB) < 2:
        raise ValueError("a contrast needs at least two sentences")
    own_B = torch.log_softmax(logits_BB, dim=-1).diagonal()
    return -(own_B * weight_B.to(own_B)).sum()


def pooled(hidden_BTH: torch.Tensor, mask_BT: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """[B, H] one vector for each row: the mean over its real tokens, or its first token."""
    if pooling == "first":
        return hidden_BTH[:, 0]
    weight_BT1 = mask_BT.to(hidden_BTH)[..., None]
    return (hidden_BTH * weight_BT1).sum(1) / weight_BT1.sum(1)


def has_dropout(model: Any) -> bool:
    """Whether two passes of a transformers model in training mode differ: some dropout has a rate above 0."""
    for module in model.modules():
        rate = getattr(module, "p", None) if "dropout" in type(module).__name__.lower() else None
        if isinstance(rate, float | int) and rate > 0:
            return True
    return any((getattr(model.config, name, None) or 0) > 0 for name in _ATTENTION)
