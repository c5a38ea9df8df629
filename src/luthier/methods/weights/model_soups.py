"""Model soups: average the weights of models fine-tuned from the same start.

    uniform           theta = (1/k) sum_i theta_i                       (or given coefficients)
    greedy            go from the best model to the worst; keep each one that makes the held-out metric better
    learned           theta = sum_i softmax(a)_i theta_i, a by gradient on held-out data
    learned-by-tensor the same with one weight vector per tensor

theta_i are state dicts of runs that share the base and the initial head. One model comes out, at the inference cost of
one. ``include_base`` adds the base itself as an ingredient: with one run this is the interpolation between the base and
the tuned model (WiSE-FT). Integer buffers come from the first ingredient. Do not choose on the test set.

Paper: "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference
time", ICML 2022, arXiv 2203.05482. Official repository: mlfoundations/model-soups. Its greedy pass accepts strictly
better soups (``accept: gt``); the paper's text writes >= (``accept: ge``).

Example::

    weights:
      - model-soups: {method: greedy, ingredients: [runs/a/model, runs/b/model]}
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core.errors import LuthierError, UserError, did_you_mean
from luthier.core.protocols import Batch
from luthier.core.registry import weight_op
from luthier.core.rng import numpy_stream
from luthier.functional.averaging import Average, greedy, learn_mixture, mean, ranked


class _Lazy(Mapping[str, "torch.Tensor"]):
    """A source as a mapping whose tensors are read when asked for."""

    def __init__(self, source: Any) -> None:
        self._source, self._names = source, list(source.names())

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._source.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@weight_op(
    "model-soups",
    identity={},
    example={"include_base": True},
    paper="Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference "
    "time, ICML 2022, arXiv 2203.05482",
)
class ModelSoups:
    """Model soups: average the weights of several models fine-tuned from the same start."""

    elementwise = True

    def __init__(
        self,
        *,
        method: Annotated[
            Literal["uniform", "greedy", "learned", "learned-by-tensor"], Field(description="how the weights are found")
        ] = "uniform",
        ingredients: Annotated[
            list[str] | None,
            Field(description="further model folders, fine-tuned from the same base; this run is one already"),
        ] = None,
        include_base: Annotated[bool, Field(description="the base is an ingredient too")] = False,
        coefficients: Annotated[
            dict[str, float] | None,
            Field(
                description="uniform: weight of each ingredient by label (tuned, base, or the folder); made to sum to 1"
            ),
        ] = None,
        accept: Annotated[Literal["gt", "ge"], Field(description="greedy: strictly better, or not worse")] = "gt",
        order: Annotated[Literal["best", "random", "given"], Field(description="greedy: order of the pass")] = "best",
        direction: Annotated[
            Literal["higher", "lower"], Field(description="greedy: whether a larger metric is better")
        ] = "higher",
        learning_rate: Annotated[float, Field(gt=0, description="learned: of AdamW")] = 0.05,
        epochs: Annotated[int, Field(ge=1, description="learned: passes over the held-out rows")] = 5,
        seed: Annotated[int, Field(ge=0, description="greedy: seed of a random order")] = 0,
    ) -> None:
        if coefficients is not None and method != "uniform":
            raise UserError(f"model-soups: coefficients belong to method: uniform, not to {method}.")
        self.ingredients = list(ingredients or [])
        if len(set(self.ingredients)) != len(self.ingredients):
            raise UserError("model-soups: an ingredient is named twice.")
        self.method, self.include_base, self.needs_base = method, include_base, include_base
        self.coefficients, self.accept, self.order, self.direction = coefficients, accept, order, direction
        self.learning_rate, self.epochs, self.seed = learning_rate, epochs, seed
        # What was done, for the run's JSON: ingredients, scores, log and final coefficients.
        self.recipe: dict[str, Any] = {}
        self._labels: list[str] = []
        self._weights: dict[str, list[float]] | list[float] | None = None

    @property
    def sources(self) -> dict[str, str]:
        """Label -> folder of the further models to open."""
        return {folder: folder for folder in self.ingredients}

    @property
    def needs_rows(self) -> bool:
        """Whether the ingredients are chosen or weighed by a score."""
        return self.method != "uniform"

    def prepare(self, sources: Mapping[str, Any], ctx: Any) -> None:
        """Find the weights.

        Raises:
            UserError: an ingredient is missing, or the coefficients name none or sum to nothing.
        """
        labels = [label for label in sources if label != "base" or self.include_base]
        if missing := [folder for folder in self.ingredients if folder not in sources]:
            raise UserError(f"model-soups: the ingredient {missing[0]} was not opened.")
        models = {label: _Lazy(sources[label]) for label in labels}
        self._warn_of_running_statistics(models)
        self.recipe = {"method": self.method, "ingredients": labels}
        self._labels, self._weights = labels, None
        if self.method == "uniform":
            self._uniform(labels)
        elif len(labels) > 1 and self.method == "greedy":
            self._greedy(models, ctx)
        elif len(labels) > 1:
            self._learned(models, ctx)
        self.recipe["coefficients"] = self._coefficients()

    def tensor(self, name: str, tensors: Mapping[str, torch.Tensor], ctx: Any) -> torch.Tensor:
        """The weighted mean of the chosen ingredients, summed in float64, in the first one's type."""
        if not self._labels:
            raise LuthierError("model-soups: prepare must run before tensor.")
        weights = self._weights.get(name) if isinstance(self._weights, dict) else self._weights
        return mean([tensors[label] for label in self._labels], weights)

    # -- parts

    def _warn_of_running_statistics(self, models: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        running = sorted({n for m in models.values() for n in m if "running_mean" in n or "running_var" in n})
        if running:
            warnings.warn(
                f"model-soups averages batch-norm statistics ({running[0]}, ...); recompute them on training rows.",
                stacklevel=3,
            )

    def _uniform(self, labels: list[str]) -> None:
        if self.coefficients is None:
            return
        for label in self.coefficients:
            if label not in labels:
                raise UserError(
                    f"model-soups: coefficients name '{label}', which is no ingredient.{did_you_mean(label, labels)} "
                    f"Ingredients: {', '.join(labels)}."
                )
        self._labels = [label for label in labels if self.coefficients.get(label)]
        total = sum(self.coefficients[label] for label in self._labels)
        if not total > 0:
            raise UserError("model-soups: the coefficients must sum to more than 0.")
        self._weights = [self.coefficients[label] / total for label in self._labels]

    def _greedy(self, models: Mapping[str, Mapping[str, torch.Tensor]], ctx: Any) -> None:
        scores = {label: float(ctx.evaluate(model)) for label, model in models.items()}
        higher = self.direction == "higher"
        order = ranked(scores, higher=higher)
        if self.order == "given":
            order = list(models)
        elif self.order == "random":
            order = [list(models)[i] for i in numpy_stream(self.seed, "init", "model-soups").permutation(len(models))]

        def score_of(chosen: list[str]) -> float:
            return float(ctx.evaluate(Average([models[label] for label in chosen])))

        found = greedy(order, scores, score_of, accept=self.accept, higher=higher)
        self._labels = found.kept
        self.recipe |= {"scores": scores, "log": found.log, "score": found.score, "order": order}

    def _learned(self, models: Mapping[str, Mapping[str, torch.Tensor]], ctx: Any) -> None:
        by_tensor = self.method == "learned-by-tensor"
        loaded = [{name: model[name].to(ctx.device) for name in model} for model in models.values()]
        found = learn_mixture(
            loaded,
            ctx.batches,
            lambda parameters, beta, batch: tempered_loss(parameters, beta, batch, ctx),
            by_tensor=by_tensor,
            learning_rate=self.learning_rate,
            epochs=self.epochs,
        )
        rows = found.weight_TK.double().cpu().tolist()
        if by_tensor:
            floating = [name for name, tensor in loaded[0].items() if tensor.is_floating_point()]
            self._weights = dict(zip(floating, rows, strict=True))
        else:
            self._weights = rows[0]
        self.recipe |= {"beta": found.beta, "held_out_losses": list(found.losses)}

    def _coefficients(self) -> dict[str, Any]:
        if isinstance(self._weights, dict):
            return {name: dict(zip(self._labels, row, strict=True)) for name, row in self._weights.items()}
        weights = self._weights or [1 / len(self._labels)] * len(self._labels)
        return dict(zip(self._labels, weights, strict=True))


def tempered_loss(
    parameters: dict[str, torch.Tensor], beta: torch.Tensor, batch: Batch, ctx: Any
) -> tuple[torch.Tensor, float]:
    """(sum, weight) of the cross-entropy of beta times the logits under other weights, with a graph to both."""
    out = ctx.forward(batch, parameters=parameters, grad=True)

    def logp(logits_CV: torch.Tensor, index_C: torch.Tensor) -> torch.Tensor:
        target_C1 = batch.target_N[index_C].unsqueeze(1)
        return torch.log_softmax(beta * logits_CV.float(), dim=-1).gather(1, target_C1).squeeze(1)

    logp_N = out.over_vocabulary(logp)
    return -(logp_N * batch.weight_N).sum(), float(batch.weight_N.sum())
