"""Shrink the intruder dimensions of a tuned model, to get back what they cost.

    W(lambda) = W1 + sum_j (lambda - 1) s_j u_j v_j^T          over the intruders j of the tuned W1

``factor`` is lambda: 1 changes nothing, 0 takes the directions out, above 1 enlarges them. Intruders are those of
the analysis of the same name. ``direction: control`` scales as many directions that the base has most of instead, which
should give back less. Other tensors stay as they are.

Paper: "LoRA vs Full Fine-tuning: An Illusion of Equivalence", NeurIPS 2025, arXiv 2410.21228; as in peft's
``reduce_intruder_dimension`` but on merged weights, without its truncation to the adapter's rank.

Example::

    parameters: [{lora: {merge: true}}]
    weights: [{lora-illusion: {factor: 0.3}}]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core.errors import LuthierError
from luthier.core.registry import weight_op
from luthier.functional import intruders as spectra
from luthier.functional import tensor_selection as selection
from luthier.functional.intruders import Side


@weight_op(
    "lora-illusion",
    identity={"factor": 1.0},
    example={"k": 2, "factor": 0.5},
    paper="LoRA vs Full Fine-tuning: An Illusion of Equivalence, NeurIPS 2025, arXiv 2410.21228",
)
class ShrinkIntruders:
    """Shrink directions of high rank that the tuned weights have and the base has not."""

    needs_base, elementwise, count = True, False, (1, 1)

    def __init__(
        self,
        *,
        factor: Annotated[float, Field(ge=0, description="lambda, what the directions are multiplied with")] = 0.75,
        k: Annotated[int, Field(ge=1, description="largest tuned directions that are looked at")] = 10,
        eps: Annotated[
            float, Field(gt=0, le=1, description="least cosine with a base direction that is no intruder")
        ] = (0.5),
        side: Annotated[
            Side, Field(description="singular vectors: left, right, or the mean of both products")
        ] = "left",
        direction: Annotated[
            Literal["intruder", "control"], Field(description="or as many directions that the base has most of")
        ] = "intruder",
    ) -> None:
        self.factor, self.k, self.eps, self.side, self.direction = factor, k, eps, side, direction
        self.names: set[str] | None = None

    def prepare(self, sources: Mapping[str, Any], ctx: Any) -> None:
        """Which tensors are matrices of transformer blocks."""
        shapes = sources["base"].shapes()
        self.names = {n for unit in selection.block_units(shapes) for n in unit.tensors if len(shapes[n]) == 2}

    def tensor(self, name: str, tensors: Mapping[str, torch.Tensor], ctx: Any) -> torch.Tensor:
        """The tuned tensor with its intruders rescaled.

        Raises:
            UserError: base and tuned tensor differ in shape, or hold a number that is not finite.
        """
        if self.names is None:
            raise LuthierError("lora-illusion: prepare must run before tensor.")
        tuned = tensors["tuned"]
        if name not in self.names or "base" not in tensors or self.factor == 1:
            return tuned
        w0, w1 = spectra.oriented(tensors["base"], name), spectra.oriented(tuned, name)
        found = spectra.spectrum(w0, w1, self.side, name)
        choose = spectra.intruders if self.direction == "intruder" else spectra.controls
        made = spectra.rescaled(w1, found, choose(found, self.k, self.eps), self.factor)
        return spectra.oriented(made, name).contiguous()
