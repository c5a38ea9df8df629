"""Losses of pairs of answers, one preferred, against a reference model: the DPO family.

Shapes: B pairs. A log-ratio is ``rho = S - S_ref``, with S the sum of token log-probabilities of an answer; the margin
is ``h = beta (rho_chosen - rho_rejected)``; the implicit reward of an answer is ``beta rho``.

Sources: DPO (2023, arXiv 2305.18290), hinge (SLiC, 2023, arXiv 2305.10425), IPO (2023, arXiv 2310.12036), conservative
DPO (E. Mitchell, 2023), robust DPO (2024, arXiv 2403.00409), length-desensitised DPO (2024, arXiv 2409.06411).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn.functional import logsigmoid

Preference = Literal["sigmoid", "hinge", "ipo", "robust"]


def preference_loss(
    chosen_B: torch.Tensor, rejected_B: torch.Tensor, beta: float, kind: Preference = "sigmoid", flipped: float = 0.0
) -> torch.Tensor:
    """The loss of each pair [B].

        sigmoid   -(1 - e) log sigma(h) - e log sigma(-h)                     e > 0: conservative DPO
        hinge     max(0, 1 - h)
        ipo       (rho_chosen - rho_rejected - 1 / (2 beta))^2                log-ratios per token, see below
        robust    (-(1 - e) log sigma(h) + e log sigma(-h)) / (1 - 2 e)       unbiased under flips

    Args:
        chosen_B: log-ratios rho of the preferred answers; for ``ipo`` each divided by the tokens of its own answer.
        rejected_B: those of the others.
        beta: how near the policy stays to the reference.
        kind: which loss.
        flipped: e, share of pairs whose preference is the wrong way round, below 1/2.
    """
    margin_B = beta * (chosen_B - rejected_B)
    if kind == "hinge":
        return torch.relu(1 - margin_B)
    if kind == "ipo":
        return (chosen_B - rejected_B - 1 / (2 * beta)).square()
    right_B, wrong_B = -logsigmoid(margin_B), -logsigmoid(-margin_B)
    if kind == "robust":
        return ((1 - flipped) * right_B - flipped * wrong_B) / (1 - 2 * flipped)
    return (1 - flipped) * right_B + flipped * wrong_B if flipped else right_B


def tail_weights(
    sequence_N: torch.Tensor, length_B: torch.Tensor, shared_B: torch.Tensor, alpha: float
) -> torch.Tensor:
    """1 [N] on the first ``shared_B`` tokens of an answer and ``alpha`` on those behind.

    Args:
        sequence_N: which answer; the tokens of one stand together, answers in order.
        length_B: tokens of each.
        shared_B: the length of the shorter answer of its pair.
        alpha: 1 is plain DPO, 0 compares the common length alone.
    """
    place_N = torch.arange(len(sequence_N), device=sequence_N.device) - (length_B.cumsum(0) - length_B)[sequence_N]
    return torch.where(place_N < shared_B[sequence_N], 1.0, alpha)
