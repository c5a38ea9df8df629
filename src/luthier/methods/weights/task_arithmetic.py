"""Task arithmetic: add the differences between fine-tuned models and their base, scaled, to the base.

    tau_t = theta_t - theta_0                          the task vector of model t, one entry per weight
    theta = theta_0 + scale * sum_t w_t tau_t

``weights`` are the w_t, 1 where left out; a negative one takes a task away. All of it is computed in float64, entry by
entry. 0.4 is what the paper's authors found to be good without a search; with held-out rows, try 0.1 to 1.

Paper: "Editing Models with Task Arithmetic", ICLR 2023, arXiv 2212.04089. Released code: mlfoundations/task_vectors.

Example::

    weights:
      - task-arithmetic: {models: [runs/b/model], scale: 0.4}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.core.registry import weight_op
from luthier.functional.task_vectors import difference, factors, weighted_sum


def task_arithmetic(
    base: torch.Tensor, models: Sequence[torch.Tensor], weights: Sequence[float], scale: float
) -> torch.Tensor:
    """theta_0 + scale * sum_t w_t (theta_t - theta_0), in float64 and the shape of ``base``."""
    merged = weighted_sum([difference(model, base) for model in models], weights)
    return base.to(torch.float64).add(merged, alpha=scale)


@weight_op(
    "task-arithmetic",
    identity={"scale": 1.0},
    example={"scale": 0.5},
    paper="Editing Models with Task Arithmetic, ICLR 2023, arXiv 2212.04089",
)
class TaskArithmetic:
    """Task arithmetic: add the scaled changes of several fine-tuned models to their base."""

    needs_base, elementwise = True, True

    def __init__(
        self,
        *,
        models: Annotated[
            list[str] | None, Field(description="further model folders, fine-tuned from the same base")
        ] = None,
        weights: Annotated[
            list[float] | None, Field(description="factor of each model's change, this run's first; 1 each if left out")
        ] = None,
        scale: Annotated[float, Field(description="factor of the summed change")] = 0.4,
    ) -> None:
        self.sources = {folder: folder for folder in models or ()}
        self.weights, self.scale = weights, scale
        self.recipe: dict[str, Any] = {}

    def prepare(self, sources: Mapping[str, Any], ctx: Any) -> None:
        """Match the factors with the models."""
        self.labels = [label for label in sources if label != "base"]
        self.factors = factors(self.labels, self.weights, "task-arithmetic")
        self.recipe = {"weights": dict(zip(self.labels, self.factors, strict=True)), "scale": self.scale}

    def tensor(self, name: str, tensors: Mapping[str, torch.Tensor], ctx: Any) -> torch.Tensor:
        """The base's entries with the models' changes."""
        return task_arithmetic(tensors["base"], [tensors[n] for n in self.labels], self.factors, self.scale)
