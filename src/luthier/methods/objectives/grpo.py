"""GRPO: raise the probability of completions that earn more than the others of their group.

    w_t = p(o_t) / p_old(o_t)                                                     importance ratio of a sampled token
    l_t = -min( w_t A, clip(w_t, 1 - clip_low, 1 + clip_high) A ) + beta kl_t     A advantage of its completion
    kl_t = exp(u) - u - 1,  u = log p_ref(o_t) - log p(o_t)                       k3, never negative
    loss = 1/G sum_i 1/|o_i| sum_t l_t                                            mean over completions

The transform ``rollouts`` writes the completions o and their advantages; ``p_ref`` is the model as it was before
training. Log-probabilities are taken at the temperature of sampling. With one update per rollout w is 1 in value and
the gradient is that of -A log p.

``loss`` chooses l and how it is averaged::

    grpo      as above                              dr_grpo   sum over tokens / (completions * most tokens)
    dapo      sum over tokens / tokens of the step  bnpo      the same of each micro-batch
    luspo     mean over completions of the sum      reinforce l = -A log p, averaged as grpo
    cispo     l = -sg(min(w, cap)) A log p, averaged as dapo; cap is the bound itself, not an offset
    sapo      l = -A sigmoid(tau (w - 1)) 4 / tau, averaged as grpo

``ratio: sequence`` is GSPO: w = exp(mean_t log w_t) for all tokens of a completion. ``delta`` bounds w also where A is
negative. ``kl_correction`` multiplies k3 by w, so that its gradient is that of KL(p || p_ref). ``off_policy_threshold``
drops completions with A < 0 whose mean of log p_old - log p exceeds it. ``uncertain_share`` keeps, of each completion,
only the tokens with the most uncertain prediction.

Papers: "DeepSeekMath", 2024, arXiv 2402.03300; DAPO, 2025, arXiv 2503.14476; Dr. GRPO, 2025, arXiv 2503.20783; GSPO,
2025, arXiv 2507.18071; CISPO (MiniMax-M1), 2025, arXiv 2506.13585; SAPO, 2025, arXiv 2511.20347; delta (INTELLECT-2),
2025, arXiv 2505.07291. trl's defaults are another loss (dapo), no divergence and a corrected one; here they are the
first paper's. Its mask of uncertain tokens ranks those of the whole batch; here each completion is ranked by itself, so
that the result does not depend on how a step is cut.

Example::

    objective: {grpo: {beta: 0.04}}
    transforms: [rollouts: {reward: numeric, samples: 8}]
    training: {learning_rate: 1.0e-6, batch_rows: 16}
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Batch, Context, Loss, Needs, Outputs
from luthier.core.registry import objective
from luthier.functional import policy_gradient as pg
from luthier.functional.rollouts import Aggregation, advantages, aggregation, drawn_logp, report

AVERAGED: dict[str, Aggregation] = {"cispo": "dapo", "sapo": "grpo", "reinforce": "grpo"}
CISPO_CAP = 5.0


@objective(
    "grpo",
    example={"beta": 0.04, "clip_high": 0.28},
    conflicts={"packing": "a packed row holds several answers, and an advantage is that of one"},
    requires={"transform:rollouts": "it learns from completions that the model writes and a reward judges"},
    tasks=("causal-lm",),
    paper="DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models, 2024, arXiv 2402.03300",
)
class GroupRelativePolicyOptimization:
    """GRPO: raise the probability of completions that earn more than the others of their group."""

    def __init__(
        self,
        *,
        loss: Annotated[
            Literal["grpo", "bnpo", "dapo", "dr_grpo", "luspo", "cispo", "sapo", "reinforce"],
            Field(description="the loss of a token and how it is averaged"),
        ] = "grpo",
        ratio: Annotated[
            Literal["token", "sequence"], Field(description="importance ratio of each token, or of the completion")
        ] = "token",
        clip_low: Annotated[float, Field(ge=0, lt=1, description="how far the ratio may fall below 1")] = 0.2,
        clip_high: Annotated[
            float | None,
            Field(gt=0, description="how far it may rise above 1; clip_low by default. cispo: the cap itself, 5"),
        ] = None,
        delta: Annotated[
            float | None, Field(gt=1, description="bound on the ratio where the advantage is negative")
        ] = (None),
        beta: Annotated[float, Field(ge=0, description="weight of the divergence from the starting model")] = 0.04,
        kl: Annotated[Literal["k2", "k3"], Field(description="its estimator")] = "k3",
        kl_correction: Annotated[bool, Field(description="multiply the divergence by the ratio")] = False,
        tau_positive: Annotated[float, Field(gt=0, description="sapo: tau where the advantage is positive")] = 1.0,
        tau_negative: Annotated[float, Field(gt=0, description="sapo: tau elsewhere")] = 1.05,
        off_policy_threshold: Annotated[
            float | None,
            Field(ge=0, description="drop bad completions that have become this unlikely, in nats a token"),
        ] = None,
        uncertain_share: Annotated[
            float, Field(gt=0, le=1, description="share of each completion's tokens kept, most uncertain first")
        ] = 1.0,
    ) -> None:
        if delta is not None and loss in ("cispo", "sapo", "reinforce"):
            raise UserError(f"grpo: delta bounds a clipped loss, and loss: {loss} is not clipped; remove it.")
        self.kind, self.ratio, self.ratio_bound, self.beta = loss, ratio, delta, beta
        self.clip_low, self.clip_high = clip_low, clip_low if clip_high is None else clip_high
        self.cap = CISPO_CAP if clip_high is None else clip_high
        self.kl, self.kl_correction = kl, kl_correction
        self.tau = (tau_positive, tau_negative)
        self.off_policy_threshold, self.uncertain_share = off_policy_threshold, uncertain_share

    @property
    def needs(self) -> Needs:
        """Log-probabilities, token by token where nothing of a whole completion enters; the starting model."""
        whole = self.ratio == "sequence" or self.off_policy_threshold is not None or self.uncertain_share < 1
        return Needs(
            statistics=("logp", "entropy") if self.uncertain_share < 1 else ("logp",),
            positionwise=not whole,
            models=("reference",) if self.beta else (),
        )

    def loss(self, out: Outputs, batch: Batch, ctx: Context) -> Loss:
        """The loss of the tokens weighted by :func:`aggregation`; the weight is what that divides by.

        Raises:
            UserError: the batch holds no rollouts.
        """
        advantage_N = advantages(batch, ctx.totals, "grpo")
        logp_N = drawn_logp(out, batch)
        old_N = batch.columns.get("old_logp_N")
        old_N = logp_N.detach() if old_N is None else old_N
        mask_N = (batch.weight_N > 0).to(logp_N.dtype)
        log_ratio_N = pg.log_ratio(logp_N, old_N, batch.sequence_N, mask_N, batch.examples, self.ratio)
        ratio_N = log_ratio_N.exp()
        loss_N = self._surrogate(logp_N, ratio_N, advantage_N)
        if self.off_policy_threshold is not None:
            gap_N = old_N - logp_N.detach()
            loss_N = loss_N * pg.off_policy(
                advantage_N, gap_N, batch.sequence_N, mask_N, batch.examples, self.off_policy_threshold
            )
        if self.uncertain_share < 1:
            loss_N = loss_N * pg.most_uncertain(out.entropy_N, batch.sequence_N, self.uncertain_share)
        factor_N, count_N = aggregation(batch, AVERAGED.get(self.kind, self.kind))  # type: ignore[arg-type]
        tokens = batch.weight_N.sum()
        metrics: dict[str, tuple[Any, Any]] = report(batch)
        if self.beta:
            kl_N = pg.divergence(logp_N, drawn_logp(ctx.forward(batch, "reference"), batch).detach(), self.kl)
            metrics["kl"] = ((kl_N.detach() * batch.weight_N).sum(), tokens)
            loss_N = loss_N + self.beta * (kl_N * ratio_N if self.kl_correction else kl_N)
        with torch.no_grad():
            high = self.cap if self.kind == "cispo" else 1 + self.clip_high
            outside_N = ((ratio_N > high) & (advantage_N > 0)).to(logp_N.dtype)
            if self.kind not in ("cispo", "sapo", "reinforce"):
                outside_N += ((ratio_N < 1 - self.clip_low) & (advantage_N < 0)).to(logp_N.dtype)
            metrics["clipped"] = ((outside_N * batch.weight_N).sum(), tokens)
        unit: Literal["token", "sequence", "batch"] = "sequence"
        if AVERAGED.get(self.kind, self.kind) == "dapo":
            unit = "token"
        elif self.kind == "bnpo":
            unit = "batch"
        return Loss(sum=(loss_N * factor_N).sum(), weight=count_N.sum(), unit=unit, metrics=metrics)

    def _surrogate(self, logp_N: torch.Tensor, ratio_N: torch.Tensor, advantage_N: torch.Tensor) -> torch.Tensor:
        if self.kind == "cispo":
            return pg.cispo(ratio_N, advantage_N, logp_N, self.cap)
        if self.kind == "sapo":
            return pg.sapo(ratio_N, advantage_N, *self.tau)
        if self.kind == "reinforce":
            return pg.reinforce(advantage_N, logp_N)
        return pg.clipped(ratio_N, advantage_N, self.clip_low, self.clip_high, self.ratio_bound)
