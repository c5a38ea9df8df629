"""Train on all data at once (stacked), or set by set in rising difficulty (phased), as a study of small models has it.

    stacked   one shuffled union, one optimiser, one schedule
    phased    for p = 1..P: train on  D_p u R_p  from the chosen checkpoint of phase p - 1, optimiser and schedule anew

D_p is the rows of phase p, and R_p a random part of the rows of earlier phases such that |R_p| / |D_p u R_p| = replay
(to within one row; all earlier rows where there are not enough). After every phase but the last, the checkpoint with
the lowest loss on ``data.select`` is the one to go on from where ``training.eval_steps`` is set, else the last one.
Every phase trains ``training.epochs`` over its own rows. With one phase both are plain fine-tuning.

The study finds no clear difference in the end score; stacked needs fewer samples and no choice of checkpoints. Its
other findings (larger batches at a lower rate, no warm-up, stopping runs early) are in :mod:`luthier.advisor`.

Paper: "Unveiling the Secret Recipe: A Guide For Supervised Fine-Tuning Small LLMs", 2024, arXiv 2412.13337; the code it
names is instructlab/training.

Example::

    data: {train: [knowledge.jsonl, skills.jsonl]}
    procedure: {small-llm-recipe: {strategy: phased, replay: 0.1}}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Artefact
from luthier.core.registry import procedure
from luthier.core.rng import numpy_stream

SOURCE = "source"


def phases(values_R: Sequence[Any], *, sort: bool) -> dict[Any, np.ndarray]:
    """Row numbers by phase; phases in order of their first row, or of their value where ``sort`` is set."""
    found: dict[Any, list[int]] = {}
    for row, value in enumerate(values_R):
        found.setdefault(value, []).append(row)
    order = sorted(found) if sort else list(found)
    return {value: np.asarray(found[value], dtype=np.int64) for value in order}


def with_replay(parts: Sequence[np.ndarray], replay: float, seed: int) -> list[np.ndarray]:
    """The rows of every phase with those it repeats from earlier ones, in order.

    Args:
        parts: row numbers of each phase.
        replay: share of a phase's rows that are of earlier phases, 0 to below 1.
        seed: of the choice.
    """
    made = []
    for p, own in enumerate(parts):
        earlier = np.concatenate([*parts[:p], np.zeros(0, dtype=np.int64)])
        wanted = min(round(replay / (1 - replay) * len(own)), len(earlier))
        drawn = numpy_stream(seed, "data", "small-llm-recipe", p).choice(earlier, size=wanted, replace=False)
        made.append(np.sort(np.concatenate([own, drawn.astype(np.int64)])))
    return made


@procedure(
    "small-llm-recipe",
    identity={"strategy": "stacked"},
    example={"strategy": "phased", "phase_by": "difficulty", "replay": 0.1},
    paper="Unveiling the Secret Recipe: A Guide For Supervised Fine-Tuning Small LLMs, 2024, arXiv 2412.13337",
)
def small_llm_recipe(
    ctx: Any,
    *,
    strategy: Annotated[Literal["stacked", "phased"], Field(description="all data at once, or set by set")] = "stacked",
    phase_by: Annotated[
        str, Field(min_length=1, description="source (the files of data.train, in order), or a column of the rows")
    ] = SOURCE,
    replay: Annotated[float, Field(ge=0, lt=1, description="share of a phase's rows that are of earlier phases")] = 0.0,
) -> Artefact:
    """Train on all data at once, or set by set in rising difficulty with a share of earlier rows repeated."""
    if strategy == "stacked":
        return ctx.train(ctx.data.train)
    rows = ctx.data.train.rows.dataset
    found = phases(_values(rows, phase_by), sort=phase_by != SOURCE)
    if len(found) == 1:
        return ctx.train(ctx.data.train)
    made, names = with_replay(list(found.values()), replay, ctx.seed), [str(value) for value in found]
    before: Artefact | None = None
    for number, index_R in enumerate(made[:-1], 1):
        source = ctx.source(rows.select(index_R), f"phase {number}")
        before = ctx.train(source, stage=f"phase-{number}", start=before, best=True)
    artefact = ctx.train(ctx.source(rows.select(made[-1]), f"phase {len(made)}"), start=before)
    sizes = ", ".join(f"{name} ({len(index_R):,} rows)" for name, index_R in zip(names, made, strict=True))
    note = f"trained in {len(made)} phases: {sizes}; {len(made) - 1} checkpoints were chosen on the way"
    return Artefact(artefact.model, artefact.metrics, artefact.folder, (*artefact.notes, note))


def _values(rows: Any, phase_by: str) -> list[Any]:
    if phase_by == SOURCE:
        return list(rows[SOURCE])
    values = [json.loads(text or "{}").get(phase_by) for text in rows["extra"]]
    missing = next((i for i, value in enumerate(values) if value is None), None)
    if missing is not None:
        raise UserError(
            f"small-llm-recipe: row {rows[missing]['row']} of {rows[missing]['source']} has no column '{phase_by}' to "
            "tell its phase. Name one that every row has, or give a file per phase and leave phase_by at source."
        )
    return values
