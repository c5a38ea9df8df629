"""From flat positions to examples: mean losses, and the logits of one example at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def mean_loss(logp_N: torch.Tensor, weight_N: torch.Tensor, sequence_N: torch.Tensor, examples: int) -> torch.Tensor:
    """Weighted mean of -logp per example [B], in nats; -inf for an example without supervised weight."""
    weight_N = weight_N.to(logp_N.dtype)
    total_B = torch.zeros(examples, dtype=logp_N.dtype, device=logp_N.device)
    count_B = torch.zeros_like(total_B)
    total_B.index_add_(0, sequence_N, -logp_N * weight_N)
    count_B.index_add_(0, sequence_N, weight_N)
    nothing_B = torch.full_like(total_B, -torch.inf)
    return torch.where(count_B > 0, total_B / count_B.clamp(min=1e-30), nothing_B)


def by_example(sequence_N: torch.Tensor, examples: int) -> list[torch.Tensor]:
    """The positions of each example, in order."""
    counts = torch.bincount(sequence_N, minlength=examples).tolist()
    return list(torch.argsort(sequence_N, stable=True).split(counts))


def each_example(
    out: Any, sequence_N: torch.Tensor, examples: int, use: Callable[[int, torch.Tensor, torch.Tensor], None]
) -> None:
    """Call ``use(b, logits_LV, index_L)`` for every example with positions; the logits of few are held at a time.

    Args:
        out: outputs without a graph (``over_vocabulary`` then walks once over the positions).
        sequence_N: int64, which example each position belongs to.
        examples: B.
        use: receives the example, its logits and its positions.
    """
    expected = torch.bincount(sequence_N, minlength=examples).tolist()
    waiting: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def collect(logits_CV: torch.Tensor, index_C: torch.Tensor) -> torch.Tensor:
        owner_C = sequence_N[index_C]
        for b in owner_C.unique().tolist():
            pieces = waiting.setdefault(b, [])
            pieces.append((logits_CV[owner_C == b], index_C[owner_C == b]))
            if sum(len(index) for _, index in pieces) == expected[b]:
                del waiting[b]
                use(b, torch.cat([logits for logits, _ in pieces]), torch.cat([index for _, index in pieces]))
        return index_C

    out.over_vocabulary(collect)
