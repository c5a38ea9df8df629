"""Train the final norm and the output embedding alone, or beside adapters: what every exit reads through.

    f_n(x) = H(N(h_n))     N and H trained, the blocks frozen

Beside ``lora`` it lets the shared head follow the shallow exits of sorted fine-tuning, which a frozen head serves
badly.
Alone, on the first n blocks of a fine-tuned model (procedure ``sorted-ft``), it is the paper's comparison of an
intermediate exit with a head of its own. Where input and output embedding are one tensor both are trained; ``untie``
gives the output its own copy first. An adapter cannot hold a trained head, so with one the merged model is saved.

Paper: "Sorted LLaMA: Unlocking the Potential of Intermediate Layers of Large Language Models for Dynamic Inference
(Using Sorted Fine-Tuning)", 2023, arXiv 2309.08968.

Example::

    objective: sorted-ft
    parameters: [lora, sorted-ft]
"""

from __future__ import annotations

import copy
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.core.protocols import Context
from luthier.core.registry import parameters
from luthier.functional.exits import final_norm, transformers_model


def shared(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The tensors of the final norm and of the output embedding."""
    head = transformers_model(model).get_output_embeddings()
    return [p for part in (final_norm(model), head) for p in part.parameters()]


@parameters(
    "sorted-ft",
    example={"untie": True},
    conflicts={"parameters:full": "full already trains the final norm and the head"},
    tasks=("causal-lm",),
    paper="Sorted LLaMA: Unlocking the Potential of Intermediate Layers of Large Language Models for Dynamic Inference "
    "(Using Sorted Fine-Tuning), 2023, arXiv 2309.08968",
)
class SharedHead:
    """Train the final norm and the output embedding: the part that all exits of a sorted model share."""

    def __init__(
        self,
        *,
        untie: Annotated[
            bool, Field(description="give the output embedding its own copy where it is also the input embedding")
        ] = False,
    ) -> None:
        self.untie = untie

    def apply(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Open the final norm and the output embedding."""
        base = transformers_model(model)
        head = base.get_output_embeddings()
        if self.untie and head.weight is base.get_input_embeddings().weight:
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
            base.config.tie_word_embeddings = False
        for parameter in shared(model):
            parameter.requires_grad_(True)
        return model

    def groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """One group of both."""
        return [{"params": shared(model)}]

    def on_grad(self, model: torch.nn.Module, ctx: Context) -> None:
        """Nothing to do."""

    def on_step(self, model: torch.nn.Module, ctx: Context) -> None:
        """Nothing to do."""

    def state(self) -> dict[str, Any]:
        """No state beside the weights."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def export(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model; one with an adapter is merged, for the adapter's file could not hold the head."""
        if not hasattr(model, "peft_config"):
            return model
        merged: Any = copy.deepcopy(model)
        return merged.merge_and_unload(safe_merge=True)
