"""Linear probe: the classification head (or the output embedding) alone is trained, on features that do not move.

    logits = W h(x) + b        W, b trained, h frozen

What it reaches says how much of a task the base's features hold already; what trains the features must beat it. For a
language model W is the output embedding; where that is the input embedding too, it gets its own copy first, since
otherwise the features would move with it. Of a classifier everything outside the backbone is trained.

Source: "Understanding intermediate layers using linear classifier probes", 2016, arXiv 1610.01644.

Example::

    parameters: [linear-probe]
    training: {learning_rate: 1.0e-2}
"""

from __future__ import annotations

from typing import Any

import torch

from luthier.core.errors import UserError
from luthier.core.protocols import Context
from luthier.core.registry import parameters
from luthier.functional.adapters import heads
from luthier.methods.parameters._adapters import Adapter, task_name


@parameters(
    "linear-probe",
    conflicts={
        "parameters:full": "full trains the head too; name one of the two",
        "parameters:sorted-ft": "sorted-ft trains the output embedding too; name one of the two",
    },
    tasks=("causal-lm", "sequence-classification", "token-classification", "image-classification"),
    paper="Understanding intermediate layers using linear classifier probes, 2016, arXiv 1610.01644",
)
class LinearProbe(Adapter):
    """Linear probe: only the classification head, or the output embedding, is trained."""

    slug = "linear-probe"

    def apply(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Open the head.

        Raises:
            UserError: a classifier has nothing outside its backbone.
        """
        base: Any = model
        if task_name(ctx) == "causal-lm":
            head = base.get_output_embeddings()
            if head.weight is base.get_input_embeddings().weight:
                head.weight = torch.nn.Parameter(head.weight.detach().clone())
                base.config.tie_word_embeddings = False
            head.requires_grad_(True)
            return model
        names = heads(model)
        if not names:
            raise UserError(f"linear-probe: {type(model).__name__} has no head outside its backbone. Use 'full'.")
        for name in names:
            model.get_submodule(name).requires_grad_(True)
        return model

    def groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """The head."""
        return [{"params": [p for p in model.parameters() if p.requires_grad]}]
