"""Prompt tuning: trained embeddings of virtual tokens in front of every row, and nothing else.

    p(y | x) = model([P; E(x)])        P [tokens, H] trained, the model frozen

The adapter is peft's and is opened by peft; there is nothing to merge, for it is an input. ``init`` says what P starts
from: rows of the embedding table drawn at random (the paper's better choice), normal noise as wide as the table's
rows, or the embeddings of a text of your own, repeated to the length.

Paper: "The Power of Scale for Parameter-Efficient Prompt Tuning", 2021, arXiv 2104.08691.

Example::

    parameters:
      - prompt-tuning: {tokens: 20}
    training: {learning_rate: 3.0e-2}
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Context
from luthier.core.registry import parameters
from luthier.functional.adapters import TASK_TYPES
from luthier.methods.parameters._adapters import FREEZES, Adapter, alone, drawing, task_name


def starting_prompt(
    table_VH: torch.Tensor, tokens: int, generator: torch.Generator, text_ids: list[int] | None = None, *, noise: bool
) -> torch.Tensor:
    """[tokens, H]: the rows of ``text_ids`` over and over, or random rows, or noise of the table's deviation."""
    if text_ids:
        index = torch.tensor([text_ids[i % len(text_ids)] for i in range(tokens)])
        return table_VH[index].clone()
    if noise:
        drawn = torch.randn(tokens, table_VH.shape[1], generator=generator)
        return drawn.to(table_VH) * table_VH.std()
    return table_VH[torch.randint(len(table_VH), (tokens,), generator=generator)].clone()


@parameters(
    "prompt-tuning",
    example={"tokens": 3},
    tasks=tuple(TASK_TYPES),
    conflicts={**FREEZES, **alone("prompt-tuning")},
    paper="The Power of Scale for Parameter-Efficient Prompt Tuning, 2021, arXiv 2104.08691",
)
class PromptTuning(Adapter):
    """Prompt tuning: trained embeddings of virtual tokens in front of every row; the model is frozen."""

    slug, marks = "prompt-tuning", ("prompt_encoder",)
    unmergeable = "it trains an input and no weight, so it leaves an adapter"

    def __init__(
        self,
        *,
        tokens: Annotated[int, Field(ge=1, description="number of virtual tokens")] = 20,
        init: Annotated[
            str, Field(min_length=1, description="'vocabulary', 'noise', or a text to start from")
        ] = "vocabulary",
    ) -> None:
        self.tokens, self.init = tokens, init

    def apply(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """The model with virtual tokens, drawn from the ``init`` stream; only they (and a new head) are open.

        Raises:
            UserError: the text to start from has no token.
        """
        import peft

        ids = None
        if self.init not in ("vocabulary", "noise"):
            ids = list(ctx.processor.encode(self.init, add_special_tokens=False))
            if not ids:
                raise UserError(f"prompt-tuning: init: the text '{self.init}' has no token.")
        config = peft.PromptTuningConfig(task_type=TASK_TYPES[task_name(ctx)], num_virtual_tokens=self.tokens)
        with drawing(ctx, self.slug):
            made = peft.get_peft_model(model, config)
        table_VH = made.get_base_model().get_input_embeddings().weight.detach()
        start = starting_prompt(table_VH, self.tokens, ctx.rng("init", self.slug), ids, noise=self.init == "noise")
        made.prompt_encoder["default"].embedding.weight.data.copy_(start)
        return made
