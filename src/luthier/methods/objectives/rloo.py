"""RLOO: REINFORCE on whole completions, each compared with the mean of the others of its group.

    A_i = r_i - 1/(K-1) sum_(j != i) r_j,     r_i = reward - beta sum_t (log p_old - log p_ref)
    w_i = exp( sum_t log p(o_t) - log p_old(o_t) )                       ratio of the completion, not of a token
    loss = 1/B sum_i -min( w_i A_i, clip(w_i, 1 - clip_low, 1 + clip_high) A_i )

Advantages and the divergence in the reward are made by the transform ``rollouts`` (``advantages: rloo``,
``kl_in_reward``: beta). With one update per rollout the gradient is that of -A_i log p(o_i).

Paper: "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs", 2024, arXiv
2402.14740.

Example::

    objective: rloo
    transforms: [rollouts: {reward: numeric, samples: 4, advantages: rloo, kl_in_reward: 0.05}]
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.core.protocols import Batch, Context, Loss, Needs, Outputs
from luthier.core.registry import objective
from luthier.functional import policy_gradient as pg
from luthier.functional.rollouts import advantages, drawn_logp, report, shares


@objective(
    "rloo",
    conflicts={"packing": "a packed row holds several answers, and an advantage is that of one"},
    requires={"transform:rollouts": "it learns from completions that the model writes and a reward judges"},
    tasks=("causal-lm",),
    paper="Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs, 2024, "
    "arXiv 2402.14740",
)
class ReinforceLeaveOneOut:
    """RLOO: REINFORCE on whole completions, each compared with the mean of the others of its group."""

    needs = Needs(statistics=("logp",))

    def __init__(
        self,
        *,
        clip_low: Annotated[float, Field(ge=0, lt=1, description="how far the ratio may fall below 1")] = 0.2,
        clip_high: Annotated[
            float | None, Field(gt=0, description="how far it may rise above 1; clip_low by default")
        ] = None,
    ) -> None:
        self.clip_low, self.clip_high = clip_low, clip_low if clip_high is None else clip_high

    def loss(self, out: Outputs, batch: Batch, ctx: Context) -> Loss:
        """Sum over completions; the weight is their number.

        Raises:
            UserError: the batch holds no rollouts.
        """
        advantage_N = advantages(batch, ctx.totals, "rloo")
        logp_N = drawn_logp(out, batch)
        old_N = batch.columns.get("old_logp_N")
        old_N = logp_N.detach() if old_N is None else old_N
        mask_N = (batch.weight_N > 0).to(logp_N.dtype)
        ratio_N = pg.log_ratio(logp_N, old_N, batch.sequence_N, mask_N, batch.examples, "sequence_sum").exp()
        loss_N = pg.clipped(ratio_N, advantage_N, self.clip_low, self.clip_high)
        share_N = shares(batch)
        with torch.no_grad():
            high_N = (ratio_N > 1 + self.clip_high) & (advantage_N > 0)
            low_N = (ratio_N < 1 - self.clip_low) & (advantage_N < 0)
            clipped: tuple[Any, Any] = (((high_N | low_N) * share_N).sum(), share_N.sum())
        # Every token carries its completion's loss, so the shares make one of it.
        return Loss(
            sum=(loss_N * mask_N * share_N).sum(),
            weight=share_N.sum(),
            unit="sequence",
            metrics={**report(batch), "clipped": clipped},
        )
