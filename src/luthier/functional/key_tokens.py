"""Larger weights for the few tokens of a target that decide what it does.

A sample is one supervised run of tokens (a turn). With its key positions P, positions Q that close an argument and all
others O, their numbers n_P, n_Q and n_O::

    omega  = min(n_O / n_P, max_weight) if 0 < n_P < n_O else 1
    k_n    = omega in P, 1 in Q and O
    loss   = mean over samples of sum_n k_n nll_n / sum_n k_n

A position in both P and Q belongs to P. Rows carry P and Q as token places in two columns, which a data stage writes.

Source: "TL-Training: A Task-Feature-Based Framework for Training Large Language Models in Tool Use", EMNLP 2025, arXiv
2412.15495.
"""

from __future__ import annotations

from typing import Any

import torch

from luthier.core.errors import UserError
from luthier.core.protocols import Batch

KEY_TOKENS, CLOSING_TOKENS = "key_tokens", "closing_tokens"
COLUMNS = (KEY_TOKENS, CLOSING_TOKENS)
SCANNED_ROWS = 1000


def samples(position_N: torch.Tensor) -> torch.Tensor:
    """int64 [N], the number of the unbroken run of supervised tokens that each position belongs to."""
    begins_N = torch.ones_like(position_N)
    begins_N[1:] = (position_N[1:] != position_N[:-1] + 1).long()
    return begins_N.cumsum(0) - 1


def marked(batch: Batch, column: str) -> torch.Tensor:
    """Whether each position's target is among the token places that its row lists in a column, bool [N]."""
    width = batch.inputs["input_ids"].shape[1]
    rows = batch.columns.get(column) or []
    # A row that was cut no longer has all of its tokens.
    place = [b * width + token for b, tokens in enumerate(rows) for token in tokens or () if token < width]
    flag_T = torch.zeros(batch.examples * width, dtype=torch.bool)
    flag_T[place] = True
    return flag_T.to(batch.position_N.device)[batch.position_N + 1]


def key_weights(
    key_N: torch.Tensor, closing_N: torch.Tensor, sample_N: torch.Tensor, max_weight: float
) -> torch.Tensor:
    """k_n, float32 [N].

    Args:
        key_N: bool, the positions P.
        closing_N: bool, the positions Q (those in P do not count).
        sample_N: int64, which sample a position belongs to.
        max_weight: the largest omega.
    """
    count = int(sample_N[-1]) + 1 if sample_N.numel() else 0

    def number(flag_N: torch.Tensor) -> torch.Tensor:
        return torch.zeros(count, device=flag_N.device).index_add(0, sample_N, flag_N.float())

    keys_S, others_S = number(key_N), number(~(key_N | closing_N))
    weight_S = (others_S / keys_S.clamp(min=1)).clamp(max=max_weight)
    weight_S = torch.where((keys_S > 0) & (keys_S < others_S), weight_S, torch.ones_like(weight_S))
    return torch.where(key_N, weight_S[sample_N], torch.ones_like(weight_S[sample_N]))


def coefficients(batch: Batch, max_weight: float, *, per_sample: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What each position's loss is multiplied by, without its own weight, and the positions P.

    Args:
        batch: a whole batch (not one cut by ``positions``) with the columns :data:`COLUMNS`.
        max_weight: the largest weight of a key position.
        per_sample: divide k_n by its sum over the sample's positions of non-zero weight, so that a sample counts 1.

    Returns:
        float32 [N] and bool [N].
    """
    key_N, sample_N = marked(batch, KEY_TOKENS), samples(batch.position_N)
    weight_N = key_weights(key_N, marked(batch, CLOSING_TOKENS), sample_N, max_weight)
    if per_sample and weight_N.numel():
        there_N = weight_N * (batch.weight_N != 0)
        total_S = torch.zeros(int(sample_N[-1]) + 1, device=weight_N.device).index_add(0, sample_N, there_N)
        weight_N = weight_N / total_S.clamp(min=1e-12)[sample_N]
    return weight_N, key_N


def require_key_tokens(dataset: Any) -> None:
    """Look for a prepared row with key tokens.

    Raises:
        UserError: there is none.
    """
    for start in range(0, len(dataset), SCANNED_ROWS):
        rows = dataset.fetch(range(start, min(start + SCANNED_ROWS, len(dataset))))
        if any(rows.get(KEY_TOKENS) or ()):
            return
    raise UserError(
        "tl-training: no training row has key tokens. Put the data stage 'tl-training' into data.stages, or set "
        "max_weight: 1, which weights none."
    )
