"""Sampled completions as batches: what the transform ``rollouts`` leaves in the columns, and how objectives read it.

Columns of a batch of B completions with N tokens:

    advantage_N       float, before any division by the whole step's spread
    old_logp_N        log-probabilities under the policy that wrote them; absent where that is the policy itself
    value_N, return_N of a critic, where there is one
    reward            [B], NaN where none applies
    spread            [B] what the spread over the step is that of, with ``batch`` and ``normalise_then_sum``
    sequence_weight   [B] weight of each completion, 0 for one that only fills a place
    finished          [B] 1 where it stopped by itself
    no_signal         [B] 1 where all rewards of its group are equal
    room              [B] most tokens it could have had
    temperature       [B] that it was drawn at

``weight_N`` is the completion's weight, and 0 on tokens that were masked out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch

from luthier.core.errors import UserError
from luthier.core.protocols import Batch, Outputs
from luthier.functional.advantages import moments, standardised
from luthier.functional.policy_gradient import sums

Aggregation = Literal["grpo", "bnpo", "dapo", "dr_grpo", "luspo"]

# How advantages are divided by the spread of a whole step: (subtract the mean, whiten).
SPREADS = {"scale": (False, False), "standardise": (True, False), "whiten": (True, True)}


def spread_counts(how: str, value: torch.Tensor, weight: torch.Tensor) -> dict[str, float]:
    """What :func:`advantages` must know of the whole step, for the engine to add up."""
    names = (f"rollouts/{how}/{part}" for part in ("count", "sum", "square"))
    return dict(zip(names, moments(value, weight), strict=True))


def advantages(batch: Batch, totals: dict[str, float], who: str) -> torch.Tensor:
    """[N], divided by the spread of the whole step where the rollouts ask for it.

    Raises:
        UserError: the batch holds no rollouts.
    """
    if "advantage_N" not in batch.columns:
        raise UserError(
            f"{who}: the batch has no advantages: it learns from completions that the model writes. Add transforms: "
            "[rollouts: {reward: ...}]."
        )
    advantage_N: torch.Tensor = batch.columns["advantage_N"]
    for how, (centre, whiten) in SPREADS.items():
        if (count := totals.get(f"rollouts/{how}/count")) is not None:
            total, square = totals[f"rollouts/{how}/sum"], totals[f"rollouts/{how}/square"]
            spread_N = standardised(advantage_N, count, total, square, centre=centre, whiten=whiten)
            # What no reward could judge stays at 0 when the mean is taken away.
            return spread_N.masked_fill(batch.columns["reward"].isnan()[batch.sequence_N], 0.0)
    return advantage_N


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    if device.type == "cpu":
        return batch
    tensors: dict[str, Any] = {n: v.to(device) for n, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    return replace(batch, inputs={n: v.to(device) for n, v in batch.inputs.items()}, **tensors)


def whole_of(batch: Batch) -> Batch:
    """The micro-batch that a batch is, or was cut from."""
    return batch if batch.part_of is None else batch.part_of[0]


def shares(batch: Batch) -> torch.Tensor:
    """[N], of each token its completion's weight over its number of tokens, so that they add up to the weight."""
    whole = whole_of(batch)
    count_B = torch.bincount(whole.sequence_N, minlength=whole.examples).clamp(min=1)
    return (batch.columns["sequence_weight"] / count_B)[batch.sequence_N]


def aggregation(batch: Batch, how: Aggregation) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token its factor in the sum of the loss, and its part in what the sum is divided by: [N] and [N].

        grpo      mean over completions of (sum_t m l / sum_t m)
        bnpo      sum m l / sum m of the micro-batch                    depends on how the step is cut
        dapo      sum m l / tokens of the whole step
        dr_grpo   sum m l / (completions * most tokens of a completion)
        luspo     mean over completions of sum_t m l

    Both are sums over tokens, so that a loss of tokens may be computed chunk by chunk.
    """
    weight_N = batch.weight_N
    if how == "dapo":
        return weight_N, weight_N
    whole = whole_of(batch)
    if how == "bnpo":
        total = whole.weight_N.sum()
        factor_N = weight_N / total if bool(total > 0) else weight_N
        return factor_N, factor_N
    share_N = shares(batch)
    if how == "luspo":
        return weight_N, share_N
    if how == "dr_grpo":
        return weight_N / batch.columns["room"][batch.sequence_N], share_N
    count_B = sums((whole.weight_N > 0).to(weight_N.dtype), whole.sequence_N, whole.examples)
    return weight_N / count_B.clamp(min=1.0)[batch.sequence_N], share_N


def drawn_logp(out: Outputs, batch: Batch) -> torch.Tensor:
    """Log-probability of the targets [N] at the temperature that they were drawn at."""
    temperature = float(batch.columns["temperature"][0])
    if temperature == 1.0:
        return out.logp_N

    def at(logits_CV: torch.Tensor, index_C: torch.Tensor) -> torch.Tensor:
        scaled_CV = logits_CV / temperature
        return scaled_CV.gather(1, batch.target_N[index_C, None]).squeeze(1) - scaled_CV.logsumexp(-1)

    return out.over_vocabulary(at)


def report(batch: Batch) -> dict[str, tuple[Any, Any]]:
    """What is logged of rollouts by every objective that reads them: sums over completions, and their number."""
    share_N = shares(batch)
    total = share_N.sum()

    def mean(name: str) -> tuple[Any, Any]:
        return (share_N * batch.columns[name][batch.sequence_N]).nansum(), total

    return {
        "reward": mean("reward"),
        "finished": mean("finished"),
        "no_signal": mean("no_signal"),
        "completion_tokens": ((batch.columns["sequence_weight"][batch.sequence_N] > 0).sum(), total),
    }
