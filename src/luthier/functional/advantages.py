"""Rewards of groups of completions as advantages; none of it carries a gradient.

Shapes: R reward functions, P prompts, K completions of each, B = P K completions, T tokens. NaN is "does not apply".

Sources: group normalisation and its two forms (DeepSeekMath, 2024, arXiv 2402.03300; Dr. GRPO, 2025, arXiv 2503.20783),
leave-one-out (RLOO, 2024, arXiv 2402.14740), generalised advantage estimation (2015, arXiv 1506.02438), soft overlong
penalty (DAPO, 2025, arXiv 2503.14476).
"""

from __future__ import annotations

import torch

EPSILON = 1e-4
"""Added to the standard deviation of a group or a batch."""
WHITEN_EPSILON = 1e-8
"""Added to the variance where per-token advantages are whitened."""


def combined(rewards_RB: torch.Tensor, weight_R: torch.Tensor) -> torch.Tensor:
    """``sum_k w_k r_k`` [B] over the functions that apply; NaN where none does."""
    reward_B = (rewards_RB * weight_R[:, None]).nansum(0)
    return reward_B.masked_fill(rewards_RB.isnan().all(0), torch.nan)


def _others(valid_PK: torch.Tensor) -> torch.Tensor:
    """How many other completions of the group [P, K] have a reward."""
    return valid_PK.sum(1, keepdim=True) - valid_PK.int()


def group_std(reward_PK: torch.Tensor) -> torch.Tensor:
    """Standard deviation [P, 1] with Bessel's correction over the rewards that are there; 0 for fewer than two."""
    valid_PK = ~reward_PK.isnan()
    count_P1 = valid_PK.sum(1, keepdim=True)
    gap_PK = (reward_PK - reward_PK.nanmean(1, keepdim=True)).nan_to_num(0.0)
    return (gap_PK.square().sum(1, keepdim=True) / (count_P1 - 1).clamp(min=1)).sqrt()


def centred(reward_PK: torch.Tensor) -> torch.Tensor:
    """``r - mean of the group`` [P, K]; 0 where there is no reward."""
    return (reward_PK - reward_PK.nanmean(1, keepdim=True)).nan_to_num(0.0)


def normalised(reward_PK: torch.Tensor) -> torch.Tensor:
    """``(r - mean) / (std + 1e-4)`` of the group [P, K]; 0 where there is no reward."""
    return centred(reward_PK) / (group_std(reward_PK) + EPSILON)


def leave_one_out(reward_PK: torch.Tensor) -> torch.Tensor:
    """``r - mean of the others of the group`` [P, K]; 0 where there is no reward or no other."""
    valid_PK = ~reward_PK.isnan()
    known_PK = reward_PK.nan_to_num(0.0)
    others_PK = _others(valid_PK)
    mean_PK = (known_PK.sum(1, keepdim=True) - known_PK) / others_PK.clamp(min=1)
    return torch.where(valid_PK & (others_PK > 0), known_PK - mean_PK, 0.0)


def normalised_then_summed(rewards_RPK: torch.Tensor, weight_R: torch.Tensor) -> torch.Tensor:
    """``sum_k w_k z_k`` [P, K] of each function's rewards z-scored inside the group.

    It is then z-scored over the whole batch, by :func:`standardised`.
    """
    each = torch.stack([normalised(reward_PK) for reward_PK in rewards_RPK])
    return (each * weight_R[:, None, None]).sum(0)


def moments(value: torch.Tensor, weight: torch.Tensor) -> tuple[float, float, float]:
    """Count, sum and sum of squares (float64) of the values whose weight is above 0 and that are numbers."""
    kept = value.double()[(weight > 0) & ~value.isnan()]
    return float(kept.numel()), float(kept.sum()), float(kept.square().sum())


def standardised(
    value: torch.Tensor, count: float, total: float, square: float, *, centre: bool, whiten: bool = False
) -> torch.Tensor:
    """The values over the standard deviation of a whole batch, of which count, sum and sum of squares are known.

    Args:
        value: any shape.
        count: values of the batch; fewer than two have a standard deviation of 0.
        total: their sum.
        square: the sum of their squares.
        centre: subtract the mean first.
        whiten: divide by ``sqrt(variance + 1e-8)`` instead of ``standard deviation + 1e-4``.
    """
    mean = total / max(count, 1.0)
    variance = max(square - count * mean * mean, 0.0) / max(count - 1.0, 1.0)
    scale = (variance + WHITEN_EPSILON) ** 0.5 if whiten else variance**0.5 + EPSILON
    return (value - mean if centre else value) / scale


def token_rewards(
    reward_BT: torch.Tensor, old_logp_BT: torch.Tensor, reference_BT: torch.Tensor, mask_BT: torch.Tensor, kl: float
) -> torch.Tensor:
    """``rho_t = reward_t - kl (log p_old - log p_ref)`` [B, T] on the real tokens, 0 elsewhere."""
    return (reward_BT - kl * (old_logp_BT - reference_BT)) * mask_BT


def at_last_token(score_B: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """[B, T], the score at the last real token of each row; a row without tokens gets none."""
    count_B = mask_BT.sum(1).long()
    place_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    return torch.where(place_T == (count_B - 1)[:, None], score_B[:, None], 0.0)


def generalised(
    reward_BT: torch.Tensor, value_BT: torch.Tensor, mask_BT: torch.Tensor, *, gamma: float, lambda_: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation: advantages and returns [B, T], 0 on padding.

        delta_t = rho_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lambda A_{t+1},   return_t = A_t + V_t

    with V and A behind the last real token 0.

    Args:
        reward_BT: rho, per-token rewards.
        value_BT: V, at the position that predicts token t.
        mask_BT: 1 on real tokens, which stand at the start of their row.
        gamma: discount.
        lambda_: 1 is the return minus the value, 0 the one-step error.
    """
    mask_BT = mask_BT.to(value_BT.dtype)
    value_BT, reward_BT = value_BT * mask_BT, reward_BT * mask_BT
    advantage_BT = torch.zeros_like(value_BT)
    next_value, running = torch.zeros_like(value_BT[:, 0]), torch.zeros_like(value_BT[:, 0])
    for t in range(value_BT.shape[1] - 1, -1, -1):
        delta = reward_BT[:, t] + gamma * next_value - value_BT[:, t]
        running = (delta + gamma * lambda_ * running) * mask_BT[:, t]
        advantage_BT[:, t] = running
        next_value = value_BT[:, t]
    return advantage_BT, advantage_BT + value_BT


def overlong_penalty(length_B: torch.Tensor, longest: int, cache: int) -> torch.Tensor:
    """0 up to ``longest - cache`` tokens, linear down to -1 at ``longest``, -1 beyond [B]."""
    return -((length_B - (longest - cache)) / max(cache, 1)).clamp(0.0, 1.0)
