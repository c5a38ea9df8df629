"""PPO with a critic: clipped policy steps on advantages of single tokens, and a value head that predicts returns.

    w_t = p(o_t) / p_old(o_t)
    policy_t = max( -A_t w_t, -A_t clip(w_t, 1 - clip, 1 + clip) )
    value_t  = 1/2 max( (V_t - R_t)^2, (clip(V_t, V_old - value_clip, V_old + value_clip) - R_t)^2 )
    loss = mean over tokens of  policy_t + value_weight value_t

The critic V is one linear map on the last hidden state at the position that predicts token t; it starts at zero, is
trained beside whatever else is, and is taken away before the model is saved. Advantages A (generalised, whitened) and
returns R come from the transform ``rollouts`` with ``advantages: gae``; the divergence from the starting model is in
the reward of each token (``kl_in_reward``). With ``shared_trunk: false`` the critic reads hidden states but does not
move them.

Paper: "Proximal Policy Optimization Algorithms", 2017, arXiv 1707.06347; advantages: "High-Dimensional Continuous
Control Using Generalized Advantage Estimation", 2015, arXiv 1506.02438. For language models the common practice is
followed: the score at the last token, whitened advantages, a clipped value loss.

Example::

    objective: {ppo: {value_weight: 0.1}}
    transforms: [rollouts: {reward: numeric, samples: 1, advantages: gae, kl_in_reward: 0.05, updates: 4}]
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Batch, Context, Loss, Needs, Outputs
from luthier.core.registry import objective
from luthier.functional import policy_gradient as pg
from luthier.functional import value_head
from luthier.functional.rollouts import advantages, drawn_logp, report


@objective(
    "ppo",
    conflicts={
        "packing": "a packed row holds several answers",
        "weighted_sum": "its critic and its policy are trained on the same tokens; give it alone",
    },
    beside={
        "transform:rollouts": {
            "reward": {"regex": {"pattern": "[0-4]$"}},
            "samples": 2,
            "max_new_tokens": 6,
            "advantages": "gae",
            "kl_in_reward": 0.05,
        }
    },
    requires={"transform:rollouts": "it learns from completions that the model writes and a reward judges"},
    tasks=("causal-lm",),
    paper="Proximal Policy Optimization Algorithms, 2017, arXiv 1707.06347",
)
class ProximalPolicyOptimization:
    """PPO with a critic: clipped steps on advantages of single tokens, and a value head that predicts returns."""

    needs = Needs(statistics=("logp",), hidden=True)

    def __init__(
        self,
        *,
        clip: Annotated[float, Field(gt=0, lt=1, description="how far the ratio may move from 1")] = 0.2,
        value_clip: Annotated[
            float | None, Field(gt=0, description="how far a value may move from that of the rollout; null for any")
        ] = 0.2,
        value_weight: Annotated[float, Field(gt=0, description="weight of the critic's loss")] = 0.1,
        shared_trunk: Annotated[
            bool, Field(description="the critic's loss also moves the model's hidden states")
        ] = True,
    ) -> None:
        self.clip, self.value_clip, self.value_weight, self.shared = clip, value_clip, value_weight, shared_trunk
        self._own: list[torch.nn.Parameter] = []

    # -- hooks of the engine

    def prepare_model(self, model: Any, processor: Any) -> None:
        """Put the critic on the model."""
        value_head.add(model)

    def prepare(self, ctx: Context, dataset: Any) -> None:
        """Open the critic where the parameter methods left it frozen.

        Raises:
            UserError: several processes, which would not share its gradients then.
        """
        self._own = [p for p in value_head.of(ctx.model).parameters() if not p.requires_grad]
        if self._own and torch.distributed.is_available() and torch.distributed.is_initialized():
            raise UserError(
                "ppo: beside adapters the critic is trained in one process only; use parameters: full, or one process."
            )
        for parameter in self._own:
            parameter.requires_grad_(True)

    def groups(self, model: Any) -> list[dict[str, Any]]:
        """The critic, where it is not part of what the parameter methods train."""
        return [{"params": self._own}] if self._own else []

    def finish_model(self, model: Any, processor: Any) -> None:
        """Take the critic away."""
        value_head.remove(model)

    # -- the loss

    def loss(self, out: Outputs, batch: Batch, ctx: Context) -> Loss:
        """Sum over tokens; the weight is that of the tokens.

        Raises:
            UserError: the batch holds no rollouts, or none with returns.
        """
        advantage_N = advantages(batch, ctx.totals, "ppo")
        if "return_N" not in batch.columns:
            raise UserError("ppo: the rollouts have no returns; set advantages: gae in the transform rollouts.")
        weight_N, tokens = batch.weight_N, batch.weight_N.sum()
        logp_N = drawn_logp(out, batch)
        gap_N = logp_N - batch.columns["old_logp_N"]
        ratio_N = gap_N.clamp(-pg.LARGEST_LOG_RATIO, pg.LARGEST_LOG_RATIO).exp()
        policy_N = pg.clipped(ratio_N, advantage_N, self.clip, self.clip)
        value_N = value_head.values(ctx.model, out, frozen=not self.shared)
        return_N = batch.columns["return_N"]
        error_N = pg.clipped_value_loss(value_N, batch.columns["value_N"], return_N, self.value_clip)
        loss_N = policy_N + self.value_weight * error_N
        with torch.no_grad():
            outside_N = ((ratio_N > 1 + self.clip) & (advantage_N > 0)) | (
                (ratio_N < 1 - self.clip) & (advantage_N < 0)
            )
            watched = {"value_loss": error_N, "value": value_N, "returns": return_N, "clipped": outside_N,
                       "moved": -gap_N}  # fmt: skip
            metrics = {name: ((each_N * weight_N).sum(), tokens) for name, each_N in watched.items()}
        return Loss(sum=(loss_N * weight_N).sum(), weight=tokens, metrics={**report(batch), **metrics})
