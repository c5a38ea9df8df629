"""Compose deltas of one base: add some to the run's model, take others out.

    theta = tuned + factor * (sum of deltas in ``add`` - sum of deltas in ``remove``)

Zero-shot transfer trains a task on top of one language's delta and exchanges the language afterwards: ``remove`` the
delta it was trained on, ``add`` the other one. Heads that a delta keeps with their full values are left out, since the
model has its own. Sums are formed in float32. A delta of another base is refused.

Paper: "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", ACL 2022, arXiv 2110.07560.

Example::

    procedure: {composable-sparse-ft: {start: [runs/english/delta]}}
    weights:
      - composable-sparse-ft: {remove: [runs/english/delta], add: [runs/swahili/delta]}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.registry import weight_op
from luthier.functional.differences import Difference, add_to


@weight_op(
    "composable-sparse-ft",
    identity={},
    paper="Composable Sparse Fine-Tuning for Cross-Lingual Transfer, ACL 2022, arXiv 2110.07560",
)
class ComposeDeltas:
    """Composition of sparse deltas: what one run learned is exchanged for what another one did."""

    def __init__(
        self,
        *,
        add: Annotated[list[str] | None, Field(description="folders of deltas to add")] = None,
        remove: Annotated[list[str] | None, Field(description="folders of deltas to take out")] = None,
        factor: Annotated[float, Field(description="multiplies all of them")] = 1.0,
    ) -> None:
        self.add, self.remove, self.factor = add or [], remove or [], factor
        self._parts: list[tuple[float, Mapping[str, Difference]]] = []

    def prepare(self, sources: Mapping[str, Any], ctx: Any) -> None:
        """Open the deltas.

        Raises:
            UserError: one is of another base (both fingerprints are named), or changes a tensor that is not there.
        """
        from luthier.models.delta import Delta
        from luthier.models.info import fingerprint, read_json

        tied = read_json(sources["tuned"].folder / "config.json").get("tie_word_embeddings")
        base, there = fingerprint(sources["base"].folder), set(sources["tuned"].names())
        for sign, places in ((1.0, self.add), (-1.0, self.remove)):
            for place in places:
                delta = Delta.load(place)
                if delta.base != base:
                    raise UserError(f"the delta belongs to the base {delta.base}, this is {base}.", where=place)
                if lost := sorted(set(delta.parts) - there):
                    raise UserError(f"the delta changes '{lost[0]}', which this model has not.", where=place)
                if delta.about.get("untied") and tied:
                    raise UserError(
                        "the delta moves the input embedding alone, but this model's output matrix is tied to it. "
                        "Train the model with untie: true as well, or the delta with untie: false.",
                        where=place,
                    )
                self._parts.append((sign * self.factor, delta.parts))

    def tensor(self, name: str, tensors: Mapping[str, torch.Tensor], ctx: Any) -> torch.Tensor:
        """The tuned tensor with the deltas."""
        tensor = tensors["tuned"]
        changes = [(factor, parts[name]) for factor, parts in self._parts if name in parts]
        if not changes:
            return tensor
        whole = tensor.float().clone()
        for factor, part in changes:
            if tuple(part.shape) != tuple(tensor.shape):
                raise UserError(f"a delta's '{name}' has shape {tuple(part.shape)}, the model's {tuple(tensor.shape)}.")
            add_to(whole, part, factor)
        return whole.to(tensor.dtype)
