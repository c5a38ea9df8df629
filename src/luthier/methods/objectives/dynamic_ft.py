"""Dynamic fine-tuning: each token's loss is weighted by the model's own probability of that token.

    loss = sum_n m_n sg(p_n^a) (-log p_n) / sum_n m_n

``p_n`` [N] probability of each target, ``sg`` no gradient, ``a`` the exponent (``p_power``, 1 in the paper), ``m_n``
[N] position weights. Seen as reinforcement learning, plain fine-tuning gives a target the reward 1/p, which is
unbounded for unlikely tokens; the factor p makes that reward 1. The gradient is that of 1 - p, so this learns as
``beyond-log-likelihood: p`` does; the value of the loss differs. Without the stop-gradient it would be
(-log p - 1) grad p, which changes its sign at p = 1/e.

Paper: "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification", 2025, arXiv
2508.05629. Official repository: yongliang-wu/DFT. Clipping of the weight and the weight of a whole response are options
of the successor's code (zhuchichi56/ASFT), off by default.

Example::

    objective: dynamic-ft
    training: {learning_rate: 5.0e-5, schedule: cosine}
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Batch, Context, Loss, Needs, Outputs
from luthier.core.registry import objective
from luthier.functional.probability_losses import Member, detached_weight, weight_histogram, weight_report


@objective(
    "dynamic-ft",
    identity={"p_power": 0.0},
    example={"weight_cap": 0.9},
    conflicts={"objective:label-smoothing": "the weight is the probability of one target, which smoothing spreads out"},
    paper="On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification, 2025, "
    "arXiv 2508.05629",
)
class DynamicFineTuning:
    """Dynamic fine-tuning: each token's loss weighted by the model's own probability of it, held constant."""

    def __init__(
        self,
        *,
        p_power: Annotated[float, Field(ge=0, description="exponent of the probability in the weight; 0 is sft")] = 1.0,
        weight_floor: Annotated[float | None, Field(ge=0, description="smallest weight; none by default")] = None,
        weight_cap: Annotated[float | None, Field(gt=0, description="largest weight; none by default")] = None,
        weight_level: Annotated[
            Literal["token", "sequence"],
            Field(description="p of each token, or the geometric mean of p over its response"),
        ] = "token",
        histogram_steps: Annotated[int, Field(ge=1, description="log a histogram of the weights every so often")] = 100,
    ) -> None:
        if weight_floor is not None and weight_cap is not None and weight_floor > weight_cap:
            raise UserError(
                f"dynamic-ft: weight_floor {weight_floor:g} is above weight_cap {weight_cap:g}; exchange them."
            )
        self.member = Member("general", alpha=p_power)
        self.floor, self.cap, self.level, self.histogram_steps = weight_floor, weight_cap, weight_level, histogram_steps

    @property
    def needs(self) -> Needs:
        """Log-probabilities; the weight of a response joins its positions."""
        return Needs(statistics=("logp",), positionwise=self.level == "token")

    def loss(self, out: Outputs, batch: Batch, ctx: Context) -> Loss:
        """Sum of sg(p^a) (-log p) over the positions; the weight is the sum of the position weights."""
        logp_N, counted_N = out.logp_N, batch.weight_N
        weight_N = detached_weight(
            self.member,
            logp_N,
            floor=self.floor,
            cap=self.cap,
            sequence_N=batch.sequence_N if self.level == "sequence" else None,
            counted_N=counted_N != 0,
        )
        metrics = weight_report(logp_N, weight_N, counted_N)
        if ctx.step % self.histogram_steps == 0:
            metrics |= weight_histogram(weight_N, counted_N)
        return Loss(sum=-(weight_N * logp_N * counted_N).sum(), weight=counted_N.sum(), metrics=metrics)
