"""Key-token weights of TL-Training: the few tokens that decide which tool is called count more.

    omega = min(n_O / n_P, max_weight) if 0 < n_P < n_O else 1
    loss  = mean_s [ (omega sum_P f_n + sum_Q f_n + sum_O f_n) / (omega n_P + n_Q + n_O) ]

A sample s is one supervised turn. ``P`` its key positions: the first token of the tool's name, and every token where
the name departs from another offered tool's; ``Q`` tokens that close an argument; ``O`` all others; n their numbers. A
position in both P and Q is in P. ``f_n`` is -log p_n, or with ``q`` > 0 the generalised cross-entropy (1 - p_n^q) / q.
A turn that calls no tool has no key position and so its plain mean. The places of P and Q come with the rows, from the
data stage of the same name. Position weights of a transform or selector multiply f_n; positions of weight 0 do not
count. ``average: token`` divides by the sum of all weights of the step instead, as plain fine-tuning does.

As a transform of the same name the weights go before any other objective.

Paper: "TL-Training: A Task-Feature-Based Framework for Training Large Language Models in Tool Use", EMNLP 2025, arXiv
2412.15495. Official repository: Junjie-Ye/TL-Training, which finds positions by the token strings of one tokenizer,
takes one row at a time, and counts a position of P and Q in both sums.

Example::

    data: {train: dialogues.jsonl, stages: [tl-training]}
    objective: {tl-training: {max_weight: 9}}
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core.protocols import Batch, Context, Loss, Needs, Outputs
from luthier.core.registry import objective
from luthier.functional.key_tokens import COLUMNS, coefficients, require_key_tokens
from luthier.functional.probability_losses import Member, token_loss


@objective(
    "tl-training",
    identity={"max_weight": 1.0, "average": "token"},
    example={"max_weight": 1.0, "q": 0.3},
    conflicts={
        "packing": "the places of the key tokens are those of one row",
        "transform:tl-training": "both weight the key tokens, which would then count twice",
    },
    tasks=("causal-lm",),
    paper="TL-Training: A Task-Feature-Based Framework for Training Large Language Models in Tool Use, EMNLP 2025, "
    "arXiv 2412.15495",
)
class KeyTokenWeights:
    """Key-token weights: the few tokens that decide which tool is called count more."""

    def __init__(
        self,
        *,
        max_weight: Annotated[float, Field(ge=1, description="largest weight of a key token; 1 weights none")] = 9.0,
        q: Annotated[float, Field(ge=0, le=1, description="generalised cross-entropy (1 - p^q) / q; 0 is -log p")] = 0,
        average: Annotated[
            Literal["sample", "token"], Field(description="mean of the turns' means, or one mean over all tokens")
        ] = "sample",
    ) -> None:
        self.max_weight, self.average = max_weight, average
        self.member = Member("general", alpha=q)
        self._batch: Batch | None = None
        self._found: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def needs(self) -> Needs:
        """Log-probabilities, and the rows' key tokens unless they weigh no more than others."""
        columns = COLUMNS if self.max_weight > 1 else ()
        return Needs(statistics=("logp",), positionwise=True, columns=columns)

    def check_data(self, dataset: Any) -> None:
        """See that the rows have key tokens.

        Raises:
            UserError: none of them has.
        """
        if self.max_weight > 1:
            require_key_tokens(dataset)

    def prepare(self, ctx: Context, dataset: Any) -> None:
        """Look again: a procedure may have made these rows."""
        self.check_data(dataset)

    def loss(self, out: Outputs, batch: Batch, ctx: Context) -> Loss:
        """Weighted sum of f; the weight is the number of turns, or the sum of token weights."""
        coefficient_N, key_N = self._coefficients(batch)
        weight_N = coefficient_N * batch.weight_N
        metrics = {}
        if self.max_weight > 1:
            inside_N = batch.weight_N * key_N
            metrics["nll_key"] = (-(out.logp_N.detach() * inside_N).sum(), inside_N.sum())
        return Loss(
            sum=(token_loss(self.member, out.logp_N) * weight_N).sum(),
            weight=weight_N.sum(),
            unit="sequence" if self.average == "sample" else "token",
            metrics=metrics,
        )

    def _coefficients(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the whole batch, found once and cut to the positions asked for."""
        whole, index_C = batch.part_of if batch.part_of is not None else (batch, None)
        if self._batch is not whole or self._found is None:
            self._batch = whole
            self._found = coefficients(whole, self.max_weight, per_sample=self.average == "sample")
        coefficient_N, key_N = self._found
        return (coefficient_N, key_N) if index_C is None else (coefficient_N[index_C], key_N[index_C])
