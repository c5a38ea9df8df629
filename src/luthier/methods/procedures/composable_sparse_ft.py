"""Lottery-ticket sparse fine-tuning: train in full, keep the entries that changed most, wind back, train these alone.

    theta0 = base + deltas of ``start``;   b = 0 everywhere
    repeat ``iterations`` times:
      1  full phase    train everything from where the last iteration ended
      2  selection     of the entries with b = 0, the K / iterations with the largest |theta - theta0| get b = 1
      3  rewind        all weights go back to where this iteration began
      4  sparse phase  train again under the mask b, with a new optimiser and schedule

K, what can be masked and the L1 pull are options of the parameters of the same name. A run for a task on top of a
language's delta (``start``) learns a delta that does not contain the language, so that the language can be exchanged
later. The phases' lengths are the recipe's unless stated: steps alone mean that many; with epochs,
``n = floor(epochs * rows / batch_rows)`` is raised to the least and cut to the most steps.

Paper: "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", ACL 2022, arXiv 2110.07560; released code
cambridgeltl/composable-sft.

Example::

    parameters: [{composable-sparse-ft: {proportion: 0.08}}]
    procedure: {composable-sparse-ft: {full_epochs: 3, sparse_epochs: 10}}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Artefact
from luthier.core.registry import procedure
from luthier.methods.parameters.composable_sparse_ft import select

SLUG = "composable-sparse-ft"


@dataclass(frozen=True)
class Phase:
    """How long a phase is; empty means as the recipe's training section has it."""

    epochs: float | None = None
    min_steps: int | None = None
    max_steps: int | None = None


def phase_steps(phase: Phase, rows: int, batch_rows: int | None) -> int | None:
    """Optimiser steps of a phase; None where only epochs are stated and the rows of a step vary.

    Raises:
        UserError: neither epochs nor steps, a least above the most, or a least where the rows of a step vary.
    """
    if phase.min_steps is not None and phase.max_steps is not None and phase.min_steps > phase.max_steps:
        raise UserError(f"{SLUG}: a phase's min_steps ({phase.min_steps}) is more than max_steps ({phase.max_steps}).")
    if phase.epochs is None:
        if phase.max_steps is None:
            raise UserError(f"{SLUG}: a phase with min_steps needs epochs or max_steps as well.")
        return phase.max_steps
    if batch_rows is None:
        if phase.min_steps is not None:
            raise UserError(f"{SLUG}: min_steps beside epochs needs training.batch_rows, not batch_tokens.")
        return None
    steps = max(int(phase.epochs * rows / batch_rows), phase.min_steps or 1)
    return steps if phase.max_steps is None else min(steps, phase.max_steps)


@procedure(
    "composable-sparse-ft",
    requires={"parameters:composable-sparse-ft": "it masks the weights and keeps the delta"},
    paper="Composable Sparse Fine-Tuning for Cross-Lingual Transfer, ACL 2022, arXiv 2110.07560",
)
def composable_sparse_ft(
    ctx: Any,
    *,
    selection: Annotated[
        Literal["change", "change-per-tensor", "random", "all", "prune"],
        Field(
            description="largest change over all tensors, or in each; for comparison a random mask without full phase, "
            "no mask, or the full phase's values of the chosen entries without a sparse phase"
        ),
    ] = "change",
    iterations: Annotated[int, Field(ge=1, description="T, times the mask grows")] = 1,
    full_epochs: Annotated[float | None, Field(gt=0, description="passes of a full phase")] = None,
    full_min_steps: Annotated[int | None, Field(ge=1, description="least steps of a full phase")] = None,
    full_max_steps: Annotated[int | None, Field(ge=1, description="most steps of a full phase")] = None,
    sparse_epochs: Annotated[float | None, Field(gt=0, description="passes of a sparse phase")] = None,
    sparse_min_steps: Annotated[int | None, Field(ge=1, description="least steps of a sparse phase")] = None,
    sparse_max_steps: Annotated[int | None, Field(ge=1, description="most steps of a sparse phase")] = None,
    start: Annotated[list[str] | None, Field(description="deltas added to the base before training")] = None,
) -> Artefact:
    """Lottery-ticket sparse fine-tuning: a full phase finds the entries, a second one trains them from the start."""
    choice = next(c for c in ctx.plan.parameters if c.slug == SLUG)
    full = training_of(ctx, Phase(full_epochs, full_min_steps, full_max_steps))
    sparse = training_of(ctx, Phase(sparse_epochs, sparse_min_steps, sparse_max_steps))
    add_deltas(ctx, start or [])
    if selection == "random":
        return ctx.train(ctx.data.train, training=sparse)
    if selection in ("all", "prune"):
        told = {"phase": "full", "prune": selection == "prune"}
        return ctx.train(ctx.data.train, given={SLUG: told}, training=full)
    method = choice.build()
    base = ctx.loaded.model
    maskable, _ = method.divide(base, ctx.plan.task)
    k = method.budget(base, maskable)
    if k < iterations:
        raise UserError(f"{SLUG}: {k:,} entries cannot be chosen in {iterations} iterations.")
    theta0 = {name: base.get_parameter(name) for name in maskable}
    mask: dict[str, torch.Tensor] | None = None
    at: dict[str, torch.Tensor] = {}
    for number in range(1, iterations + 1):
        told = {"phase": "full", "start": at}
        found = ctx.train(ctx.data.train, stage=f"full-{number}", given={SLUG: told}, training=full)
        tuned = {name: found.model.get_parameter(name) for name in maskable}
        mask = select(tuned, theta0, k // iterations, mask, per_tensor=selection == "change-per-tensor")
        told = {"phase": "sparse", "start": at, "mask": mask}
        last = number == iterations
        made = ctx.train(
            ctx.data.train, stage=None if last else f"sparse-{number}", given={SLUG: told}, training=sparse
        )
        at = {name: p.detach() for name, p in made.model.named_parameters() if p.requires_grad}
    return made


def add_deltas(ctx: Any, places: list[str]) -> None:
    """Add deltas to the base in place, without the full values of their heads.

    Raises:
        UserError: one is of another base.
    """
    from luthier.models.delta import Delta

    for place in places:
        Delta.load(place).apply(ctx.loaded.model, ctx.loaded.fingerprint, absolute=False)


def training_of(ctx: Any, phase: Phase) -> dict[str, Any]:
    """The keys of the training section that a phase changes."""
    if phase == Phase():
        return {}
    steps = phase_steps(phase, len(ctx.data.train.prepared), ctx.plan.recipe.training.batch_rows)
    if steps is None:
        return {"epochs": phase.epochs, "max_steps": phase.max_steps}
    # With rows per step so many epochs are never fewer steps than that.
    epochs = {"epochs": float(steps)} if ctx.plan.recipe.training.batch_rows else {}
    return {**epochs, "max_steps": steps}
