"""Low-rank adaptation: the base is frozen and each linear map of the blocks gets a trained low-rank addition.

    y = W x + s B A x,   A [r, in], B [out, r],   s = alpha / r   (alpha / sqrt(r) with rslora)

W frozen, A and B trained; B starts at zero (or B A = 0), so training starts at the base. ``dora`` also learns the norm
of each row of W + s B A. The adapter is peft's: the saved folder opens in plain peft and in vLLM, and ``merge`` adds it
into the base instead. A classification head is trained in full and saved with the adapter.

Papers: "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv 2106.09685; rank-stabilised scaling: "A Rank
Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023, arXiv 2312.03732; "DoRA: Weight-Decomposed Low-Rank
Adaptation", 2024, arXiv 2402.09353.

Example::

    parameters:
      - lora: {rank: 16, alpha: 32}
    training: {learning_rate: 2.0e-4}          # about ten times that of full fine-tuning
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Context
from luthier.core.registry import parameters
from luthier.functional.adapters import block_targets, named_targets
from luthier.methods.parameters._adapters import Adapter, alone, common, drawing


@parameters(
    "lora",
    example={"rank": 4, "alpha": 8.0},
    conflicts={
        "parameters:full": "full trains every tensor and lora freezes the base; name one of the two",
        **alone("lora"),
    },
    paper="LoRA: Low-Rank Adaptation of Large Language Models, 2021, arXiv 2106.09685",
)
class LowRankAdaptation(Adapter):
    """Low-rank adaptation: a frozen base with small trained matrices beside each linear map."""

    slug, marks = "lora", ("lora_",)

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
        rslora: Annotated[bool, Field(description="scale by alpha / sqrt(rank) instead of alpha / rank")] = False,
        dora: Annotated[bool, Field(description="learn the norm of each row beside its direction")] = False,
        init: Annotated[
            Literal["default", "gaussian", "orthogonal"],
            Field(description="how A and B start; all leave the base's weights and outputs as they are"),
        ] = "default",
        merge: Annotated[bool, Field(description="save the merged model instead of the adapter")] = False,
    ) -> None:
        if init == "orthogonal" and rank % 2:
            raise UserError(f"lora: init: orthogonal needs an even rank, got {rank}.")
        self.rank, self.alpha, self.dropout = rank, float(alpha if alpha is not None else 2 * rank), dropout
        self.target_modules, self.rslora, self.dora = target_modules, rslora, dora
        self.init, self.merge = init, merge

    def apply(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """The model with adapters, drawn from the ``init`` stream; only they (and a new head) are open."""
        import peft

        config = peft.LoraConfig(
            **common(model, ctx, merge=self.slug if self.merge else ""),
            r=self.rank,
            # peft annotates an integer but computes with any number.
            lora_alpha=int(self.alpha) if self.alpha.is_integer() else self.alpha,
            lora_dropout=self.dropout,
            target_modules=self._targets(model),
            use_rslora=self.rslora,
            use_dora=self.dora,
            init_lora_weights=True if self.init == "default" else self.init,
        )
        with drawing(ctx, "lora"):
            return peft.get_peft_model(model, config)

    def _targets(self, model: torch.nn.Module) -> list[str]:
        if self.target_modules is None:
            return block_targets(model, self.slug)
        return named_targets(model, self.target_modules, self.slug)
