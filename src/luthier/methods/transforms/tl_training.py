"""Key-token weights of TL-Training before any objective: they multiply the position weights.

    weight_n <- weight_n * k_n        k_n = omega at key positions, 1 elsewhere

with omega as in the objective of the same name. With ``average: sample`` k_n is divided by its sum over the turn, so
that every turn counts the same; the step's mean is then the objective's. ``nll_key``, the plain loss of the key tokens,
is logged.

Paper: "TL-Training: A Task-Feature-Based Framework for Training Large Language Models in Tool Use", EMNLP 2025, arXiv
2412.15495.

Example::

    data: {train: dialogues.jsonl, stages: [tl-training]}
    objective: dynamic-ft
    transforms: [tl-training]
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.core.protocols import Batch, Context, Needs
from luthier.core.registry import transform
from luthier.functional.key_tokens import COLUMNS, coefficients, require_key_tokens


@transform(
    "tl-training",
    identity={"max_weight": 1.0},
    example={"max_weight": 1.0, "average": "sample"},
    conflicts={
        "packing": "the places of the key tokens are those of one row",
        "objective:discriminative-ft": "it changes the score of the answer but not those of its negatives",
        "objective:preference-oriented-sft": "that compares whole answers, whose scores token weights would change",
    },
    tasks=("causal-lm",),
    paper="TL-Training: A Task-Feature-Based Framework for Training Large Language Models in Tool Use, EMNLP 2025, "
    "arXiv 2412.15495",
)
class KeyTokenWeighting:
    """Key-token weights before any objective: the tokens that decide which tool is called count more."""

    def __init__(
        self,
        *,
        max_weight: Annotated[float, Field(ge=1, description="largest weight of a key token; 1 weights none")] = 9.0,
        average: Annotated[
            Literal["sample", "token"], Field(description="every turn counts the same, or every token as weighted")
        ] = "token",
    ) -> None:
        self.max_weight, self.average = max_weight, average
        self.needs = Needs(statistics=("logp",), columns=COLUMNS if max_weight > 1 else ())

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

    def __call__(self, batch: Batch, ctx: Context) -> Batch:
        """The batch with its position weights multiplied."""
        if self.max_weight == 1 and self.average == "token":
            return batch
        weight_N, key_N = coefficients(batch, self.max_weight, per_sample=self.average == "sample")
        columns = {**batch.columns, "key_N": key_N} if self.max_weight > 1 else batch.columns
        return replace(batch.with_weights(batch.weight_N * weight_N), columns=columns)
