"""Sparse deltas with a support that moves: budgets, schedules, the two choices of positions and the two optimisers.

One layer has K trained entries of a weight [O, I]: flat row-major positions ``index_K`` and values ``value_K``.

Source: "Scaling Sparse Fine-Tuning to Large Language Models", 2024, arXiv 2401.16405.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


def layer_counts(numels: Sequence[int], budget: int) -> list[int]:
    """Entries of each layer, in proportion to its size; 0 for a layer too small for its share."""
    total = sum(numels)
    return [budget * n // total for n in numels]


def opens(t: int, every: int) -> bool:
    """Whether a selection phase opens after ``t`` completed steps; the first one is open from the start."""
    return (t + 1) % every == 0


def closes(t: int, every: int, accumulate: int) -> bool:
    """Whether a selection phase closes after ``t`` completed steps."""
    return t > 0 and t % every == accumulate


def replaced_share(policy: str, rate: float, t: int, total: int, accumulate: int) -> float:
    """The share of a layer's entries that a closing phase replaces.

    ``linear``: all at the first closing (the start is random), then ``rate * (1 - t / total)``. ``cosine``:
    ``rate * (1 + cos(pi t / total)) / 2`` always.
    """
    if policy == "cosine":
        return rate * (1 + math.cos(math.pi * t / total)) / 2
    return 1.0 if t == accumulate else rate * (1 - t / total)


@dataclass
class Candidates:
    """What a selection phase of accumulated gradients knows of one layer.

    Attributes:
        index_C: flat positions, ascending.
        sum_C: sum of the gradients seen.
        square_C: sum of their squares.
        samples: how many were seen.
    """

    index_C: torch.Tensor
    sum_C: torch.Tensor
    square_C: torch.Tensor
    samples: int = 0


def largest(score: torch.Tensor, count: int) -> torch.Tensor:
    """Flat positions of the ``count`` largest scores, ascending; ties go to the lower position."""
    flat = score.reshape(-1)
    least = torch.topk(flat, count, sorted=True).values[-1]
    chosen = flat > least
    equal = torch.nonzero(flat == least).squeeze(1)
    chosen[equal[: count - int(chosen.sum())]] = True
    return torch.nonzero(chosen).squeeze(1)


def candidates(grad_OI: torch.Tensor, count: int) -> torch.Tensor:
    """Flat positions of the ``count`` largest gradients of a layer, ascending."""
    return largest(grad_OI.abs(), count)


def smallest(value_K: torch.Tensor, count: int) -> torch.Tensor:
    """Slots of the ``count`` values smallest in size, smallest first; ties to the lower slot."""
    return torch.argsort(value_K.abs().float(), stable=True)[:count]


def choose_accumulated(
    index_K: torch.Tensor, value_K: torch.Tensor, seen: Candidates, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """SpIEL-AG: drop the ``count`` values smallest in size, grow the candidates with the largest summed gradient.

    A position both dropped and grown is left alone. Where fewer come in than go out, only as many go.

    Returns:
        (slots [R] whose entry is replaced, which candidates [R] take them).
    """
    slot_R = smallest(value_K, count)
    remains_K = torch.ones_like(index_K, dtype=torch.bool)
    remains_K[slot_R] = False
    free_C = torch.nonzero(~torch.isin(seen.index_C, index_K[remains_K])).squeeze(1)
    order = torch.argsort(seen.sum_C[free_C].abs(), descending=True, stable=True)
    grown_R = free_C[order[:count]]
    stays_R = torch.isin(index_K[slot_R], seen.index_C[grown_R])
    comes_R = ~torch.isin(seen.index_C[grown_R], index_K[slot_R])
    slot_R, grown_R = slot_R[~stays_R], grown_R[comes_R]
    moved = min(slot_R.numel(), grown_R.numel())
    return slot_R[:moved], grown_R[:moved]


def seeded_moments(
    seen: Candidates, place_R: torch.Tensor, age: float, beta1: float, beta2: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adam's moments of positions that come in, as if ``age`` steps had seen their mean gradient and square."""
    m_R = seen.sum_C[place_R] / seen.samples * (1 - beta1**age)
    v_R = seen.square_C[place_R] / seen.samples * (1 - beta2**age)
    return m_R, v_R


def adamw_with_ages(
    value_K: torch.Tensor,
    grad_K: torch.Tensor,
    m_K: torch.Tensor,
    v_K: torch.Tensor,
    age_K: torch.Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
) -> torch.Tensor:
    """One AdamW step in which every entry has an age of its own (1 at its first step).

    ``epsilon`` is added before the bias correction, and the decay pulls deltas to zero, that is weights to the base.
    Moments and ages (float32) are updated in place.

    Returns:
        The new values.
    """
    m_K.lerp_(grad_K, 1 - beta1)
    v_K.mul_(beta2).addcmul_(grad_K, grad_K, value=1 - beta2)
    scale_K = (v_K.sqrt() + epsilon) * (1 - beta1**age_K) / (1 - beta2**age_K).sqrt()
    moved_K = value_K - lr * m_K / scale_K
    age_K += 1
    return moved_K - lr * weight_decay * moved_K


def sm3(
    value_K: torch.Tensor,
    grad_K: torch.Tensor,
    index_K: torch.Tensor,
    row_O: torch.Tensor,
    column_I: torch.Tensor,
    *,
    lr: float,
    epsilon: float,
    weight_decay: float,
) -> torch.Tensor:
    """One SM3 step with an accumulator per row and column, fed by the entries alone; both are updated in place.

    Returns:
        The new values.
    """
    i_K, j_K = index_K // column_I.numel(), index_K % column_I.numel()
    u_K = torch.minimum(row_O[i_K], column_I[j_K]) + grad_K.square()
    row_O.scatter_reduce_(0, i_K, u_K, "amax")
    column_I.scatter_reduce_(0, j_K, u_K, "amax")
    moved_K = value_K - lr * grad_K / (u_K + epsilon).sqrt()
    return moved_K - lr * weight_decay * moved_K


def choose_by_accumulators(
    index_K: torch.Tensor, value_K: torch.Tensor, row_O: torch.Tensor, column_I: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """SpIEL-MA: drop the ``count`` values smallest in size, grow where row times column accumulator is largest.

    Positions that are active now, dropped ones among them, do not come in.

    Returns:
        (slots [R] whose entry is replaced, their new positions [R]).
    """
    slot_R = smallest(value_K, count)
    score = torch.outer(row_O, column_I).reshape(-1)
    score[index_K] = -1.0
    moved = min(count, score.numel() - index_K.numel())
    grown_R = largest(score, moved) if moved else index_K[:0]
    return slot_R[:moved], grown_R
