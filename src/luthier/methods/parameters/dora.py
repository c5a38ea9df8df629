"""DoRA: low-rank adaptation that also learns the norm of each row of the adapted weight.

    W' = m (W + s B A) / ||W + s B A||_row        m [out] starts at the norms of W's rows

The same as ``lora`` with ``dora: true``, under the name it is known by; the adapter is peft's.

Paper: "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, arXiv 2402.09353.

Example::

    parameters:
      - dora: {rank: 16, alpha: 32}
    training: {learning_rate: 2.0e-4}
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.core.protocols import Context
from luthier.core.registry import parameters
from luthier.methods.parameters._adapters import FREEZES, Adapter, alone
from luthier.methods.parameters.lora import LowRankAdaptation


@parameters(
    "dora",
    example={"rank": 4, "alpha": 8.0},
    conflicts={**FREEZES, **alone("dora")},
    paper="DoRA: Weight-Decomposed Low-Rank Adaptation, 2024, arXiv 2402.09353",
)
class WeightDecomposed(Adapter):
    """DoRA: low-rank adaptation of the direction of each weight row, and its norm learnt beside it."""

    slug, marks = "dora", ("lora_",)

    def __init__(
        self,
        *,
        rank: Annotated[int, Field(ge=1, description="rank r of the addition")] = 16,
        alpha: Annotated[float | None, Field(gt=0, description="scale numerator; twice the rank by default")] = None,
        dropout: Annotated[float, Field(ge=0, lt=1, description="dropout on the adapter's input")] = 0.0,
        target_modules: Annotated[
            list[str] | None,
            Field(min_length=1, description="names of linear modules; by default all linear maps of the blocks"),
        ] = None,
        merge: Annotated[bool, Field(description="save the merged model instead of the adapter")] = False,
    ) -> None:
        self.merge = merge
        self.adaptation = LowRankAdaptation(
            rank=rank, alpha=alpha, dropout=dropout, target_modules=target_modules, dora=True, merge=merge
        )

    def apply(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """The model with adapters, drawn from the ``init`` stream; only they (and a new head) are open."""
        return self.adaptation.apply(model, ctx)
