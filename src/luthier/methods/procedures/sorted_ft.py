"""Train once, then also write chosen depths of the trained model as checkpoints of their own.

    model/           the whole model
    model-exit-n/    its first n blocks with the same final norm and head, num_hidden_layers = n

Each sub-model opens in plain transformers without the deeper blocks.

Example::

    objective: {sorted-ft: {exits: [2, 4, 6]}}
    procedure: {sorted-ft: {export: [2, 4]}}
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from luthier.core.protocols import Artefact
from luthier.core.registry import procedure
from luthier.core.store import atomic_folder
from luthier.functional.exits import check_exits, first_blocks


def write_exit(model: Any, processor: Any, exit: int, folder: str | Path) -> Path:
    """Write the first ``exit`` blocks as a checkpoint of their own, which plain transformers opens.

    Raises:
        UserError: there is no such exit, or the model has an adapter.
    """
    part = first_blocks(model, exit)
    with atomic_folder(Path(folder)) as aside:
        part.save_pretrained(aside)
        if processor is not None:
            processor.save_pretrained(aside)
    return Path(folder)


@procedure(
    "sorted-ft",
    example={"export": [1]},
    tasks=("causal-lm",),
    paper="Sorted LLaMA: Unlocking the Potential of Intermediate Layers of Large Language Models for Dynamic Inference "
    "(Using Sorted Fine-Tuning), 2023, arXiv 2309.08968",
)
def sorted_ft(
    ctx: Any,
    *,
    export: Annotated[list[int], Field(min_length=1, description="depths to write as models of their own, in blocks")],
) -> Artefact:
    """Train once, and write chosen depths of the trained model as standalone checkpoints beside it."""
    depths = check_exits(export)
    # Refused before the training, not after it.
    first_blocks(ctx.loaded.model, depths[-1])
    made = ctx.train(ctx.data.train)
    if ctx.processes.main:
        for depth in depths:
            write_exit(made.model, ctx.loaded.processor, depth, ctx.folder / f"model-exit-{depth}")
    return made
