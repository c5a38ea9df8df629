"""Policy losses of sampled completions: importance ratios, clipping, divergence from a reference, aggregation.

Shapes: N sampled tokens of a batch, flat; B completions; ``sequence_N`` tells which completion a token belongs to. Only
``logp_N`` carries a gradient. ``mask_N`` is 1 on tokens that count, 0 on those of a completion that was masked out.

Sources: PPO (2017, arXiv 1707.06347), GRPO (2024, arXiv 2402.03300), DAPO (2025, arXiv 2503.14476), GSPO (2025, arXiv
2507.18071), CISPO (MiniMax-M1, 2025, arXiv 2506.13585), SAPO (2025, arXiv 2511.20347), two-sided clipping (INTELLECT-2,
2025, arXiv 2505.07291), estimators of the divergence (J. Schulman, "Approximating KL Divergence", 2020).
"""

from __future__ import annotations

from typing import Literal

import torch

Level = Literal["token", "sequence", "sequence_sum"]
Surrogate = Literal["clipped", "cispo", "sapo", "reinforce"]
Estimator = Literal["k1", "k2", "k3"]

LARGEST_LOG_RATIO = 20.0


def sums(value_N: torch.Tensor, sequence_N: torch.Tensor, examples: int) -> torch.Tensor:
    """Sum over the tokens of each completion [B]."""
    return value_N.new_zeros(examples).index_add(0, sequence_N, value_N)


def as_rows(value_N: torch.Tensor, sequence_N: torch.Tensor, examples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] with the tokens of a completion from the left, and the mask; ``rows[mask]`` gives ``value_N`` back.

    Args:
        value_N: by token; those of a completion stand together, completions in order.
        sequence_N: which completion.
        examples: B.
    """
    count_B = torch.bincount(sequence_N, minlength=examples)
    width = max(int(count_B.max()) if examples else 0, 1)
    mask_BT = torch.arange(width, device=value_N.device) < count_B[:, None]
    rows_BT = value_N.new_zeros(mask_BT.shape)
    rows_BT[mask_BT] = value_N
    return rows_BT, mask_BT


def log_ratio(
    logp_N: torch.Tensor, old_logp_N: torch.Tensor, sequence_N: torch.Tensor, mask_N: torch.Tensor, examples: int,
    level: Level = "token",
) -> torch.Tensor:  # fmt: skip
    """``log w`` [N], clamped to +-20 before anyone exponentiates it.

    ``token``: each token's own; ``sequence``: the mean over its completion (GSPO); ``sequence_sum``: the sum (RLOO).
    """
    gap_N = logp_N - old_logp_N
    if level != "token":
        gap_B = sums(gap_N * mask_N, sequence_N, examples)
        if level == "sequence":
            gap_B = gap_B / sums(mask_N, sequence_N, examples).clamp(min=1.0)
        gap_N = gap_B[sequence_N]
    return gap_N.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


def clipped(
    ratio_N: torch.Tensor, advantage_N: torch.Tensor, low: float, high: float, delta: float | None = None
) -> torch.Tensor:
    """``-min(w' A, clip(w, 1 - low, 1 + high) A)`` [N], ``w' = min(w, delta)`` where delta is given."""
    inside_N = ratio_N.clamp(1 - low, 1 + high)
    whole_N = ratio_N if delta is None else ratio_N.clamp(max=delta)
    return -torch.minimum(whole_N * advantage_N, inside_N * advantage_N)


def cispo(ratio_N: torch.Tensor, advantage_N: torch.Tensor, logp_N: torch.Tensor, cap: float) -> torch.Tensor:
    """``-sg(min(w, cap)) A log p`` [N]: the ratio is a weight without gradient, capped above only."""
    return -ratio_N.detach().clamp(max=cap) * advantage_N * logp_N


def sapo(ratio_N: torch.Tensor, advantage_N: torch.Tensor, positive: float, negative: float) -> torch.Tensor:
    """``-A sigmoid(tau (w - 1)) 4 / tau`` [N], tau by the sign of the advantage: a soft gate in place of clipping."""
    tau_N = torch.where(advantage_N > 0, advantage_N.new_tensor(positive), advantage_N.new_tensor(negative))
    return -advantage_N * torch.sigmoid(tau_N * (ratio_N - 1)) * 4 / tau_N


def reinforce(advantage_N: torch.Tensor, logp_N: torch.Tensor) -> torch.Tensor:
    """``-A log p`` [N]."""
    return -advantage_N * logp_N


def divergence(logp_N: torch.Tensor, reference_N: torch.Tensor, estimator: Estimator = "k3") -> torch.Tensor:
    """Estimate [N] of KL(policy || reference) at tokens that the policy drew, ``u = log p_ref - log p``.

    ``k1 = -u`` is unbiased and may be negative; as a loss its gradient has mean zero. ``k2 = u^2 / 2`` has a biased
    value and the right gradient. ``k3 = exp(u) - u - 1`` is unbiased and never negative; its gradient is that of the
    other direction, unless it is multiplied by the (differentiable) ratio.
    """
    u_N = reference_N - logp_N
    if estimator == "k1":
        return -u_N
    if estimator == "k2":
        return u_N.square() / 2
    return u_N.clamp(max=LARGEST_LOG_RATIO).exp() - u_N - 1


def off_policy(
    advantage_N: torch.Tensor, gap_N: torch.Tensor, sequence_N: torch.Tensor, mask_N: torch.Tensor, examples: int,
    threshold: float,
) -> torch.Tensor:  # fmt: skip
    """1 [N] but 0 where ``A < 0`` and the completion's mean of ``log p_sampled - log p`` exceeds the threshold.

    ``gap_N`` is ``log p_sampled - log p``, without gradient.
    """
    mean_B = sums(gap_N * mask_N, sequence_N, examples) / sums(mask_N, sequence_N, examples).clamp(min=1.0)
    return (~((advantage_N < 0) & (mean_B[sequence_N] > threshold))).to(gap_N.dtype)


def most_uncertain(entropy_N: torch.Tensor, sequence_N: torch.Tensor, share: float) -> torch.Tensor:
    """1 [N] on the share of each completion's tokens whose prediction has the largest entropy, at least one."""
    order_N = torch.argsort(entropy_N, descending=True, stable=True)
    order_N = order_N[torch.argsort(sequence_N[order_N], stable=True)]
    count_B = torch.bincount(sequence_N)
    start_B = count_B.cumsum(0) - count_B
    rank_N = torch.empty_like(order_N)
    rank_N[order_N] = torch.arange(len(order_N), device=order_N.device) - start_B[sequence_N[order_N]]
    return (rank_N < (share * count_B).ceil().clamp(min=1)[sequence_N]).to(entropy_N.dtype)


def clipped_value_loss(
    value_N: torch.Tensor, old_value_N: torch.Tensor, return_N: torch.Tensor, clip: float | None
) -> torch.Tensor:
    """``max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2`` [N]; without a clip the square alone."""
    square_N = (value_N - return_N).square()
    if clip is not None:
        near_N = old_value_N + (value_N - old_value_N).clamp(-clip, clip)
        square_N = torch.maximum(square_N, (near_N - return_N).square())
    return square_N / 2
