"""Prefix tuning: trained keys and values of virtual tokens in every attention layer, and nothing else.

    attention(q, [P_k; k], [P_v; v])       P_k, P_v [tokens, kv heads * head width] for each layer, the model frozen

``projection`` makes all of them from one small table by a two-layer network while training, which the paper found more
stable; only its result is saved. The adapter is peft's and is opened by peft; there is nothing to merge, for it is an
input. The model does not start at the base: a prefix takes part of the attention from the first step on.

Paper: "Prefix-Tuning: Optimizing Continuous Prompts for Generation", 2021, arXiv 2101.00190.

Example::

    parameters:
      - prefix-tuning: {tokens: 20}
    training: {learning_rate: 1.0e-2}
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.core.protocols import Context
from luthier.core.registry import parameters
from luthier.functional.adapters import TASK_TYPES
from luthier.methods.parameters._adapters import FREEZES, Adapter, alone, drawing, task_name


@parameters(
    "prefix-tuning",
    example={"tokens": 3},
    tasks=tuple(TASK_TYPES),
    conflicts={
        **FREEZES,
        **alone("prefix-tuning"),
        "gradient_checkpointing": "the prefix is a key-value cache, which checkpointing does not allow",
    },
    paper="Prefix-Tuning: Optimizing Continuous Prompts for Generation, 2021, arXiv 2101.00190",
)
class PrefixTuning(Adapter):
    """Prefix tuning: trained keys and values of virtual tokens in every layer; the model is frozen."""

    slug, marks = "prefix-tuning", ("prompt_encoder",)
    unmergeable = "it trains keys and values and no weight, so it leaves an adapter"

    def __init__(
        self,
        *,
        tokens: Annotated[int, Field(ge=1, description="number of virtual tokens")] = 20,
        projection: Annotated[bool, Field(description="make the prefixes by a small network while training")] = False,
        projection_width: Annotated[
            int | None, Field(ge=1, description="width of that network; the model's by default")
        ] = None,
    ) -> None:
        self.tokens, self.projection, self.projection_width = tokens, projection, projection_width

    def apply(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """The model with prefixes, drawn from the ``init`` stream; only they (and a new head) are open."""
        import peft

        base: Any = model
        config = peft.PrefixTuningConfig(
            task_type=TASK_TYPES[task_name(ctx)],
            num_virtual_tokens=self.tokens,
            prefix_projection=self.projection,
            encoder_hidden_size=self.projection_width or base.config.get_text_config().hidden_size,
        )
        with drawing(ctx, self.slug):
            return peft.get_peft_model(model, config)
