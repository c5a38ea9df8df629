"""TIES: trim small changes of each fine-tuned model, elect a sign per weight, average the changes that have it.

    tau_t = theta_t - theta_0
    trim    the share ``density`` of the entries of tau_t that are largest in absolute value stays, the rest becomes 0
    elect   gamma = sgn(sum_t w_t tau_t)
    merge   tau = sum_{t: sgn(tau_t) = gamma} w_t tau_t / sum_{t: sgn(tau_t) = gamma} w_t
    theta = theta_0 + scale * tau

The paper weighs all models alike (w_t = 1). Entries of equal size at the limit of the trim all stay. The paper and its
released code trim each model as one long vector (``trim: global``, the default; the code keeps one entry more);
mergekit trims each tensor by itself (``trim: tensor``). Changes are rounded to float32 before they are compared. Where
the weighted sum of an entry is exactly zero although some model changed it, the change is 0; the released code takes
the commonest sign of the whole model there.

Paper: "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023, arXiv 2306.01708. Released code:
prateeky2806/ties-merging.

Example::

    weights:
      - ties: {models: [runs/b/model, runs/c/model], density: 0.2}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core.registry import weight_op
from luthier.functional.task_vectors import (
    elected_mean,
    factors,
    floating,
    magnitude_thresholds,
    pieces,
    rounded_difference,
    trim,
)


def ties(
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    thresholds: Sequence[float],
    weights: Sequence[float],
    scale: float,
) -> torch.Tensor:
    """The merged entries in float64, without each model's changes below its threshold; shapes are those of ``base``."""
    taus = [trim(rounded_difference(model, base), limit) for model, limit in zip(models, thresholds, strict=True)]
    return base.to(torch.float64).add(elected_mean(taus, weights), alpha=scale)


@weight_op(
    "ties",
    identity={"density": 1.0},
    example={"density": 0.5},
    paper="TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023, arXiv 2306.01708",
)
class Ties:
    """TIES: keep each model's largest changes, settle conflicts of sign, and average what agrees."""

    needs_base, elementwise = True, True

    def __init__(
        self,
        *,
        models: Annotated[
            list[str] | None, Field(description="further model folders, fine-tuned from the same base")
        ] = None,
        density: Annotated[float, Field(gt=0, le=1, description="share of each model's changes that is kept")] = 0.2,
        trim: Annotated[
            Literal["global", "tensor"], Field(description="the share of each model as a whole, or of each tensor")
        ] = "global",
        weights: Annotated[
            list[Annotated[float, Field(gt=0)]] | None,
            Field(description="factor of each model's change, this run's first; 1 each if left out"),
        ] = None,
        scale: Annotated[float, Field(description="factor of the merged change")] = 1.0,
    ) -> None:
        self.sources = {folder: folder for folder in models or ()}
        self.density, self.trim, self.weights, self.scale = density, trim, weights, scale
        self.recipe: dict[str, Any] = {}

    def prepare(self, sources: Mapping[str, Any], ctx: Any) -> None:
        """Find what size of change each model keeps."""
        base = sources["base"]
        self.labels = [label for label in sources if label != "base"]
        self.factors = factors(self.labels, self.weights, "ties")
        self.limits: dict[str, list[float]] = {}
        self.recipe = {"weights": dict(zip(self.labels, self.factors, strict=True)), "scale": self.scale}
        if self.density == 1.0:
            return
        models = {label: sources[label] for label in self.labels}
        names = floating(models[self.labels[0]], base)
        groups = {"": names} if self.trim == "global" else {name: [name] for name in names}
        self.limits = {key: _limits(models, base, group, self.density) for key, group in groups.items()}
        if self.trim == "global":
            self.recipe["thresholds"] = dict(zip(self.labels, self.limits[""], strict=True))

    def tensor(self, name: str, tensors: Mapping[str, torch.Tensor], ctx: Any) -> torch.Tensor:
        """The base's entries with the merged changes."""
        limits = self.limits.get("" if self.trim == "global" else name, [0.0] * len(self.labels))
        return ties(tensors["base"], [tensors[n] for n in self.labels], limits, self.factors, self.scale)


def _limits(models: Mapping[str, Any], base: Any, names: Sequence[str], density: float) -> list[float]:
    """The smallest size of change that each model keeps, over some tensors together."""

    def changes() -> Iterator[list[torch.Tensor]]:
        for name in names:
            for _, piece in pieces({"base": base, **models}, name):
                yield [rounded_difference(piece[label], piece["base"]) for label in models]

    shapes = base.shapes()
    count = sum(torch.Size(shapes[name]).numel() for name in names)
    return magnitude_thresholds(changes, [max(int(density * count), 1)] * len(models)) if count else [0.0] * len(models)
