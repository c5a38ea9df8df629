"""Whether a run can have its folder, and whether the disk holds what it will write: told before training."""

from __future__ import annotations

import os
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


def check_folder(plan: Any, folder: Path, *, resume: bool) -> None:
    """Whether the run's folder can be had: new or, with ``resume``, the one of the same recipe.

    Raises:
        UserError: it cannot be written, it already holds a run, or the run in it has another recipe.
    """
    from luthier.recipe.load import dump

    place = plan.recipe.where(("output",))
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise UserError(f"output: '{there}' is a file, not a folder. Choose another place with output=...", where=place)
    if not os.access(there, os.W_OK):
        raise UserError(f"output: '{there}' cannot be written. Choose another place with output=...", where=place)
    held = folder / "recipe.yaml"
    if held.exists():
        text = dump(plan.recipe)
        if not resume:
            raise UserError(
                f"{folder} already holds a run. Continue it with --resume, choose another place with "
                "output=..., or delete the folder."
            )
        if held.read_text(encoding="utf-8") != text:
            raise UserError(
                f"the run in {folder} was made by another recipe, so it cannot be continued with this one. Resume "
                f"with {held}, or choose another place with output=..."
            )
