"""Whether the disk holds what a run will write, told before training rather than at the end of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from luthier.core.errors import UserError
from luthier.models.estimate import count_trained
from luthier.models.info import ModelInfo

MOMENTS = {"adamw": 8, "sgd": 4}
REPORT = 1 << 20  # report, metrics, tokenizer and the like


def needed(plan: Any, info: ModelInfo) -> int:
    """Bytes that a run writes at least: the trained weights and, with ``save_steps``, its checkpoints."""
    training = plan.recipe.training
    trained, _, _ = count_trained(info, plan)
    size = 2 if plan.recipe.model.dtype == "bfloat16" else 4
    # A new checkpoint is whole before an old one goes.
    checkpoints = training.keep_checkpoints + 1 if training.save_steps else 0
    return trained * size + checkpoints * trained * (size + MOMENTS[training.optimizer]) + REPORT


def check(plan: Any, info: ModelInfo) -> None:
    """Refuse a run that the disk of its output cannot hold.

    Raises:
        UserError: less is free than the run will write.
    """
    folder = Path(plan.recipe.output).absolute()
    there = next(p for p in (folder, *folder.parents) if p.exists())
    free, wanted = shutil.disk_usage(there).free, needed(plan, info)
    if free < wanted:
        raise UserError(
            f"output: at least {_size(wanted)} will be written to {plan.recipe.output}, where {_size(free)} are free. "
            "Free some space, choose another place with output=..., or keep fewer checkpoints.",
            where=plan.recipe.where(("output",)),
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
