"""Self-contrast from the base model: fine-tune, let the result answer its own prompts, learn against what is unlike.

::

    1  M0 = the base fine-tuned on the rows (plain loss, ``sft``)
    2  n answers of M0 to every prompt; those unlike the given answer are rejected answers (data stage of this name)
    3  train M0 by the recipe's objective, ``dpo`` with ``rejected_from: negatives``; the reference is M0

Each stage is kept, so a run that was killed goes on where it was.

Paper: "Extensive Self-Contrast Enables Feedback-Free Language Model Alignment", 2024, arXiv 2404.00604.

Example::

    procedure: {self-contrast: {contrast: {samples: 16, negatives: 4}, sft: {epochs: 2, learning_rate: 1.0e-5}}}
    objective: {dpo: {beta: 0.1, rejected_from: negatives}}
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from luthier.core.protocols import Artefact
from luthier.core.registry import get, procedure
from luthier.core.store import write_json
from luthier.functional.rows import prepared_rows

SLUG = "self-contrast"


@procedure(
    "self-contrast",
    requires={"objective:dpo": "it prefers the given answers to the model's own (rejected_from: negatives)"},
    conflicts={"transform:rollouts": "its answers are drawn once, before the training"},
    tasks=("causal-lm",),
    paper="Extensive Self-Contrast Enables Feedback-Free Language Model Alignment, 2024, arXiv 2404.00604",
)
def self_contrast(
    ctx: Any,
    *,
    contrast: Annotated[dict[str, Any] | None, Field(description="options of the data stage self-contrast")] = None,
    sft: Annotated[
        dict[str, Any] | None, Field(description="keys of the training section for the fine-tuning before")
    ] = None,
) -> Artefact:
    """Fine-tune, then prefer the given answers to the model's own that are unlike them."""
    stage = get("data", SLUG).build(contrast or {})
    first = ctx.train(ctx.data.train, stage="sft", plain=True, training=sft)
    rows = prepared_rows(ctx.data.train)
    drawn = ctx.generate(list(rows), model=first.model, samples=stage.samples, decoding="sample", **stage.sampling)
    made, report = stage.contrasted(rows, drawn, ctx.seed, first.model, ctx.loaded.processor)
    if ctx.processes.main:
        write_json(ctx.folder / f"{SLUG}.json", report)
    done = ctx.train(ctx.source(made, SLUG), start=first)
    share = report["dropped"] / max(report["prompts"], 1)
    note = (
        f"{SLUG}: {100 * share:.0f}% of the prompts had too few unlike answers and were left out of the second stage."
    )
    return replace(done, metrics={**done.metrics, SLUG: report}, notes=(*done.notes, note) if share else done.notes)
