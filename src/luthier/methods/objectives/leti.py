"""The loss of learning from textual interactions: language modelling on every token, held to the start where it counts.

    L = sum_t -log p(s_t | s_<t) / N  +  kl_weight * sum_t m_t KL(p_0(. | t) || p(. | t)) / M

s is a whole sequence (reward token, feedback, instruction, program: rows of plain text are learnt whole), N the
predicted tokens of the optimiser step, p_0 the base; m_t is 1 on tokens of instruction and program, M their number.
With ``count_first_token`` N also counts each row's first token, which nothing predicts, as the released code does. With
``kl_weight: 0`` it is the plain loss.

Where the sequences come from is the procedure of the same name. Paper: "LETI: Learning to Generate from Textual
Interactions", Findings of NAACL 2024, arXiv 2305.10314. Official repository: xingyaoww/LeTI.

Example::

    objective: {leti: {kl_weight: 0.1}}
    procedure: leti
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.core.protocols import Batch, Context, Loss, Needs, Outputs
from luthier.core.registry import objective
from luthier.functional.divergences import divergence

SPAN = "leti_span"


def inside(batch: Batch) -> torch.Tensor:
    """M [N]: whether each target is a token of instruction or program, by the row's ``leti_span``; without one, no."""
    spans = [span or (0, 0) for span in batch.columns[SPAN]]
    edge_B2 = torch.tensor(spans, device=batch.sequence_N.device)[batch.sequence_N]
    token_N = batch.position_N - batch.sequence_N * batch.inputs["input_ids"].shape[1] + 1
    return (token_N >= edge_B2[:, 0]) & (token_N < edge_B2[:, 1])


@objective(
    "leti",
    identity={},
    example={"kl_weight": 0.5, "count_first_token": True},
    paper="LETI: Learning to Generate from Textual Interactions, Findings of NAACL 2024, arXiv 2305.10314",
)
class LETI:
    """Language modelling on every token of a sequence, with a divergence to the base on instruction and program."""

    def __init__(
        self,
        *,
        kl_weight: Annotated[float, Field(ge=0, description="weight of the divergence from the base; 0 is none")] = 0.0,
        count_first_token: Annotated[
            bool, Field(description="the first token of a row counts in the mean, as in the released code")
        ] = False,
    ) -> None:
        self.kl_weight, self.count_first_token = kl_weight, count_first_token

    @property
    def needs(self) -> Needs:
        """The base and the whole vocabulary where there is a divergence."""
        if not self.kl_weight:
            return Needs(positionwise=True, tasks=("causal-lm",))
        return Needs(positionwise=True, vocabulary=True, models=("reference",), columns=(SPAN,), tasks=("causal-lm",))

    def counts(self, batch: Batch, ctx: Context) -> dict[str, float]:
        """M, the tokens of instruction and program."""
        if not self.kl_weight or SPAN not in batch.columns:
            return {SPAN: 0.0}
        return {SPAN: float((inside(batch) * batch.weight_N).sum())}

    def loss(self, out: Outputs, batch: Batch, ctx: Context) -> Loss:
        """Sum over the positions; the divergence, whose mean has another divisor, is scaled to that of the loss."""
        weight_N = batch.weight_N
        metrics: dict[str, tuple[Any, Any]] = {}
        extra: torch.Tensor | float = 0.0
        if self.kl_weight and ctx.totals.get(SPAN):

            def against_base(logits_CV: torch.Tensor, index_C: torch.Tensor) -> torch.Tensor:
                base = ctx.forward(batch.positions(index_C), "reference")
                return divergence(logits_CV, base.over_vocabulary(_rows))

            counted_N = inside(batch) * weight_N
            kl = (out.over_vocabulary(against_base) * counted_N).sum()
            metrics["kl"] = (kl.detach(), counted_N.sum())
            extra = self.kl_weight * kl * (self._divisor(ctx) / ctx.totals[SPAN])
        total = -(out.logp_N * weight_N).sum()
        return Loss(sum=total + extra, weight=weight_N.sum() + self._first(batch), metrics=metrics)

    def _divisor(self, ctx: Context) -> float:
        return ctx.totals["token"] + (ctx.totals["sequence"] if self.count_first_token else 0.0)

    def _first(self, batch: Batch) -> torch.Tensor | float:
        """How many rows have their first target here; a batch may be a part of one."""
        if not self.count_first_token:
            return 0.0
        whole, index_C = batch.part_of if batch.part_of is not None else (batch, None)
        first_N = torch.ones_like(whole.sequence_N, dtype=torch.bool)
        first_N[1:] = whole.sequence_N[1:] != whole.sequence_N[:-1]
        mine_N = first_N if index_C is None else first_N[index_C]
        return (mine_N & (batch.weight_N != 0)).sum()


def _rows(logits_CV: torch.Tensor, index_C: torch.Tensor) -> torch.Tensor:
    return logits_CV
