"""Differences between fine-tuned models and their base, piece by piece: read, measured, trimmed and combined.

A source offers ``shapes()`` and ``piece(name, start, stop)``; nothing here holds more than a few pieces. Differences
are wide, because those of half-precision models are small differences of large numbers.

Sources: task vectors, "Editing Models with Task Arithmetic", ICLR 2023, arXiv 2212.04089; trimming and elected signs,
"TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023, arXiv 2306.01708.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from luthier.core.errors import UserError

# Entries of a piece: a few such vectors in float64 fit the caches of a core.
PIECE = 1 << 16
_HALF = 1 << 16


def pieces(sources: Mapping[str, Any], name: str, size: int = PIECE) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """(place of the first entry, label -> flat piece) over one tensor; the first source tells how long it is."""
    total = math.prod(next(iter(sources.values())).shapes()[name])
    for start in range(0, total, size):
        yield start, {label: source.piece(name, start, start + size) for label, source in sources.items()}


def difference(tuned: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Tuned - base in float64; entries that the base lacks at its end count as zero."""
    wide = tuned.to(torch.float64)
    if wide.shape == base.shape:
        # Copied first where it is float64 already: the model's own tensor is not to change.
        return wide.sub_(base) if wide is not tuned else wide - base
    changed = wide.clone()
    changed[: len(base)] -= base
    return changed


def floating(source: Any, base: Any) -> list[str]:
    """Names of the floating-point tensors of a model that its base has too."""
    known = set(base.names())
    return [n for n in source.names() if n in known and source.piece(n, 0, 0).is_floating_point()]


def rounded_difference(tuned: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Tuned - base as float32; of float32 and narrower types that is the difference itself, rounded once."""
    return tuned.to(torch.float32) - base.to(torch.float32)


def magnitude_thresholds(
    pieces_of: Callable[[], Iterable[Sequence[torch.Tensor]]], counts: Sequence[int]
) -> list[float]:
    """The ``counts[k]``-th largest absolute value of each of K long float32 vectors that come in pieces, exactly.

    Bits of a non-negative float32 read as an integer are in the order of the numbers, so two histograms find the value:
    one over the upper half of the bits, one over the lower half of those that share the upper half found.

    Args:
        pieces_of: gives the pieces anew each time, of all vectors at once.
        counts: each at least 1 and at most its vector's length.
    """
    upper_KB = torch.zeros(len(counts), _HALF, dtype=torch.int64)
    for vectors in pieces_of():
        for upper_B, piece in zip(upper_KB, vectors, strict=True):
            upper_B += torch.bincount(_bits(piece) >> 16, minlength=_HALF)
    tops = [_from_the_top(upper_B, count) for upper_B, count in zip(upper_KB, counts, strict=True)]
    # One more bin at each end takes what lies below and above.
    lower_KB = torch.zeros(len(counts), _HALF + 2, dtype=torch.int64)
    for vectors in pieces_of():
        for lower_B, piece, (top, _) in zip(lower_KB, vectors, tops, strict=True):
            inside = _bits(piece).sub_((top << 16) - 1).clamp_(0, _HALF + 1)
            lower_B += torch.bincount(inside, minlength=_HALF + 2)
    found = []
    for lower_B, count, (top, above) in zip(lower_KB, counts, tops, strict=True):
        low, _ = _from_the_top(lower_B[1:-1], count - above)
        found.append(float(torch.tensor([(top << 16) | low], dtype=torch.int32).view(torch.float32)))
    return found


def _bits(piece: torch.Tensor) -> torch.Tensor:
    return piece.abs().reshape(-1).view(torch.int32)


def _from_the_top(histogram: torch.Tensor, count: int) -> tuple[int, int]:
    """(the bin of the count-th largest value, how many values lie in the bins above it)."""
    reached = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(reached, count))
    return len(histogram) - 1 - place, int(reached[place] - histogram.flip(0)[place])


def trim(tau: torch.Tensor, threshold: float) -> torch.Tensor:
    """Tau (float32) with the entries whose absolute value is below the threshold set to zero."""
    limit = torch.tensor(threshold, dtype=torch.float32)
    below = float(torch.nextafter(limit, torch.tensor(-1.0)))
    return torch.nn.functional.hardshrink(tau, below) if below >= 0 else tau


def weighted_sum(taus: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """sum_t w_t tau_t in float64."""
    total = torch.zeros_like(taus[0], dtype=torch.float64)
    for tau, weight in zip(taus, weights, strict=True):
        total.add_(tau, alpha=weight)
    return total


def elected_mean(taus: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Per entry the mean of the values whose sign is that of the weighted sum of all; zero where that sum is zero.

    gamma = sgn(sum_t w_t tau_t);  result = sum_{t: sgn(tau_t) = gamma} w_t tau_t / sum_{t: sgn(tau_t) = gamma} w_t

    All weights are greater than 0.
    """
    gamma = weighted_sum(taus, weights).sign_()
    total, weight_sum = torch.zeros_like(gamma), torch.zeros_like(gamma)
    for tau, weight in zip(taus, weights, strict=True):
        agreeing = (gamma * tau).relu_()  # the size of a value of the elected sign, else 0
        total.add_(agreeing, alpha=weight)
        weight_sum.add_(agreeing.sign_(), alpha=weight)
    return gamma * total / weight_sum.clamp_(min=min(weights))


def factors(labels: Sequence[str], weights: Sequence[float] | None, op: str) -> list[float]:
    """One factor per model, 1 where none are given.

    Raises:
        UserError: another number of factors than models.
    """
    if weights is None:
        return [1.0] * len(labels)
    if len(weights) != len(labels):
        raise UserError(f"{op}: {len(weights)} weights for {len(labels)} models ({', '.join(labels)}).")
    return list(weights)
