"""DARE: drop most entries of each fine-tuned model's change at random and enlarge the rest, then merge.

    tau_t = theta_t - theta_0,   m ~ Bernoulli(1 - p) per entry
    tau_t' = m tau_t / (1 - p)
    theta = theta_0 + scale * sum_t w_t tau_t'          rule: sum
    theta = theta_0 + scale * elected mean of tau_t'    rule: ties (signs elected, see ``ties``)

The expectation of tau_t' is tau_t, so that one model survives a large drop rate p, and several models meet in fewer
entries. Each model has draws of its own, a function of the seed, its label, the tensor and the place in it.

Paper: "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch", ICML 2024, arXiv
2311.03099. Released code: yule-BUAA/MergeLM; its drop rates are 0.1 to 0.9, more where models are large.

Example::

    weights:
      - dare: {models: [runs/b/model], drop_rate: 0.9, weights: [0.5, 0.5]}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.registry import weight_op
from luthier.core.rng import stream
from luthier.functional.task_vectors import PIECE, difference, elected_mean, factors, weighted_sum


def kept(name: str, label: str, start: int, count: int, drop_rate: float, seed: int) -> torch.Tensor:
    """1 where one of ``count`` entries from ``start`` on stays, else 0, float32 [count]; however a tensor is cut."""
    drawn = []
    for block in range(start // PIECE, (start + count - 1) // PIECE + 1):
        first, last = max(start - block * PIECE, 0), min(start + count - block * PIECE, PIECE)
        values = torch.rand(last, generator=stream(seed, "noise", "dare", label, name, block))
        drawn.append(values[first:].ge_(drop_rate))
    return torch.cat(drawn) if drawn else torch.zeros(0)


def drop_and_rescale(tau: torch.Tensor, kept: torch.Tensor, drop_rate: float) -> torch.Tensor:
    """M tau / (1 - p), in tau's shape."""
    return tau * kept.view(tau.shape) / (1.0 - drop_rate)


@weight_op(
    "dare",
    identity={"drop_rate": 0.0},
    example={"drop_rate": 0.5},
    paper="Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch, ICML 2024, "
    "arXiv 2311.03099",
)
class Dare:
    """DARE: drop most of each model's change at random, enlarge the rest, and merge what is left."""

    needs_base, elementwise = True, True

    def __init__(
        self,
        *,
        models: Annotated[
            list[str] | None, Field(description="further model folders, fine-tuned from the same base")
        ] = None,
        drop_rate: Annotated[float, Field(ge=0, lt=1, description="share of the changes that is dropped")] = 0.9,
        rule: Annotated[
            Literal["sum", "ties"], Field(description="weighted sum of what is left, or a mean with elected signs")
        ] = "sum",
        weights: Annotated[
            list[float] | None, Field(description="factor of each model's change, this run's first; 1 each if left out")
        ] = None,
        scale: Annotated[float, Field(description="factor of the merged change")] = 1.0,
        seed: Annotated[int, Field(ge=0, description="seed of the draws")] = 0,
    ) -> None:
        if rule == "ties" and any(weight <= 0 for weight in weights or ()):
            raise UserError("dare: with rule: ties every weight must be greater than 0.")
        self.sources = {folder: folder for folder in models or ()}
        self.drop_rate, self.weights, self.scale, self.seed = drop_rate, weights, scale, seed
        self.combine = weighted_sum if rule == "sum" else elected_mean
        self.recipe: dict[str, Any] = {}

    def prepare(self, sources: Mapping[str, Any], ctx: Any) -> None:
        """Match the factors with the models."""
        self.labels = [label for label in sources if label != "base"]
        self.factors = factors(self.labels, self.weights, "dare")
        self.recipe = {"weights": dict(zip(self.labels, self.factors, strict=True)), "scale": self.scale}

    def tensor(self, name: str, tensors: Mapping[str, torch.Tensor], ctx: Any) -> torch.Tensor:
        """The base's entries with the merged changes."""
        base = tensors["base"]
        taus = []
        for label in self.labels:
            tau = difference(tensors[label], base)
            if self.drop_rate:
                mask = kept(name, label, ctx.start, tau.numel(), self.drop_rate, self.seed)
                tau = drop_and_rescale(tau, mask, self.drop_rate)
            taus.append(tau)
        return base.to(torch.float64).add(self.combine(taus, self.factors), alpha=self.scale)
