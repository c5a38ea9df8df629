"""The methods of a run as one object: what they need together, their state, and the weighted sum of objectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch

from luthier.core.errors import LuthierError, UserError
from luthier.core.protocols import Batch, Context, Loss, Needs, Objective, Outputs, Selector, Transform
from luthier.core.rng import stream


def merge_needs(all_needs: list[Needs]) -> Needs:
    """The union of what several methods need."""
    return Needs(
        statistics=tuple(dict.fromkeys(s for n in all_needs for s in n.statistics)),
        positionwise=all(n.positionwise for n in all_needs),
        vocabulary=any(n.vocabulary for n in all_needs),
        hidden=any(n.hidden for n in all_needs),
        models=tuple(dict.fromkeys(m for n in all_needs for m in n.models)),
        columns=tuple(dict.fromkeys(c for n in all_needs for c in n.columns)),
        generation=any(n.generation for n in all_needs),
        fixed_weight=all(n.fixed_weight for n in all_needs),
    )


class FunctionObjective:
    """An objective registered as ``f(logp_N, weight_N, *, options) -> loss_N``: a weighted mean over positions."""

    needs = Needs(statistics=("logp",), positionwise=True)

    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self.function = function

    def loss(self, out: Outputs, batch: Batch, ctx: Context) -> Loss:
        """The function's values summed; the weight is the sum of the position weights."""
        loss_N = self.function(out.logp_N, batch.weight_N)
        if loss_N.shape != batch.weight_N.shape:
            raise UserError(
                f"the objective function returned shape {tuple(loss_N.shape)}; it must return one value per supervised "
                f"position, shape {tuple(batch.weight_N.shape)}."
            )
        return Loss(sum=loss_N.sum(), weight=batch.weight_N.sum())


class WeightedSum:
    """``sum_k c_k * loss_k``, each term a mean over its own unit (tokens or sequences of the whole step)."""

    def __init__(self, parts: list[tuple[str, Objective, float]]) -> None:
        for label, part, _ in parts:
            if not part.needs.fixed_weight:
                raise UserError(
                    f"objective '{label}' divides by a count that depends on the model, so it cannot be one term of a "
                    "weighted sum. Use it alone, or choose a fixed denominator in its options."
                )
        self.parts = parts
        self.needs = merge_needs([part.needs for _, part, _ in parts])

    def loss(self, out: Outputs, batch: Batch, ctx: Context) -> Loss:
        """Each part's sum over the step's count of its unit, brought to the scale of the token count."""
        total = Loss(sum=batch.weight_N.new_zeros(()), weight=batch.weight_N.sum())
        for label, part, factor in self.parts:
            total = total.plus(part.loss(out, batch, ctx), ctx.totals, label, factor)
        return total


def as_objective(built: Any) -> Objective:
    """A built method as an objective: function forms are wrapped."""
    return FunctionObjective(built) if isinstance(built, partial) else built


@dataclass
class Stack:
    """The methods of one training run.

    Attributes:
        objective: the loss.
        transforms: applied in order after selection.
        selector: online batch selection, or None.
        parameters: parameter spaces whose claims do not overlap.
        named: every method by ``<axis>:<slug>`` (``#2`` and so on behind repeats), under which its state is kept.
    """

    objective: Objective
    transforms: list[Transform] = field(default_factory=list)
    selector: Selector | None = None
    parameters: list[Any] = field(default_factory=list)
    named: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def needs(self) -> Needs:
        """What all of them need together (``positionwise`` is the objective's)."""
        others = [m.needs for m in self.named.values() if isinstance(getattr(m, "needs", None), Needs)]
        both = merge_needs([self.objective.needs, *others])
        return Needs(**{**vars(both), "positionwise": self.objective.needs.positionwise})

    @property
    def oversample(self) -> int:
        """How many times the rows of a step are offered."""
        return int(self.selector.oversample) if self.selector else 1

    @property
    def repeats(self) -> int:
        """How many optimiser steps in a row have the same rows: the most that a method asks for."""
        return max((int(getattr(m, "repeats", 1)) for m in self.named.values()), default=1)

    def call(self, hook: str, *arguments: Any) -> None:
        """Call an optional hook (see :class:`luthier.core.protocols.Hooks`) of every method that has it."""
        for method in self.named.values():
            if hasattr(method, hook):
                getattr(method, hook)(*arguments)

    def counts(self, batches: Sequence[Batch], ctx: Any) -> dict[str, float]:
        """What losses are divided by, summed over micro-batches: tokens, examples, and what methods count."""
        counters = [m.counts for m in self.named.values() if hasattr(m, "counts")]
        found = {"token": 0.0, "sequence": 0.0, "batch": 0.0}
        for batch in batches:
            used = bool(batch.weight_N.any())
            own = [{"token": batch.weight_N.sum(), "sequence": batch.examples * used, "batch": used}]
            for name, value in (pair for more in (*own, *(c(batch, ctx) for c in counters)) for pair in more.items()):
                found[name] = found.get(name, 0.0) + float(value)
        return found

    def complete(self, loss: Loss, batch: Batch, ctx: Any) -> Loss:
        """The objective's loss of a micro-batch with the terms of the hook ``auxiliary``."""
        for name, method in self.named.items():
            if hasattr(method, "auxiliary"):
                loss = loss.plus(method.auxiliary(ctx.model, batch, ctx), ctx.totals, name)
        return loss

    def state(self) -> dict[str, Any]:
        """The state of every method that has one."""
        return {name: m.state() for name, m in self.named.items() if hasattr(m, "state")}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        for name, method in self.named.items():
            if hasattr(method, "load"):
                if name not in state:
                    raise LuthierError(f"the checkpoint holds no state of '{name}': it was made by another recipe.")
                method.load(state[name])


@dataclass(frozen=True)
class Setup:
    """The context of methods before training starts: what is known when parameters are opened.

    Attributes:
        stage: how many trainings of the run came before this one.
        given: what the procedure tells the methods of this training, by slug.
    """

    seed: int
    task: Any
    processor: Any
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    stage: int = 0
    given: Mapping[str, Any] = field(default_factory=dict)

    def rng(self, name: str, *keys: object) -> torch.Generator:
        """A generator of the named stream."""
        return stream(self.seed, name, *keys)
