"""``luthier evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli import common
from luthier.core.errors import UserError


def evaluate(
    recipe: common.RecipeArgument,
    overrides: common.Overrides = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", "-m", help="The model to measure. Default: the run's, else the recipe's base."),
    ] = None,
    harness: Annotated[
        str | None, typer.Option("--harness", help="Tasks of lm-evaluation-harness, separated by commas.")
    ] = None,
    as_json: common.Json = False,
) -> None:
    """Measure a model on the recipe's data: target, forgetting and calibration, each with n and an interval."""
    plan = common.make_plan(recipe, overrides)
    trained = recipe / "model"
    if model is None and recipe.is_dir() and trained.is_dir():
        model = trained
    if model is not None and not model.is_dir():
        raise UserError(f"there is no model folder '{model}'.", where="--model")
    tasks = [t.strip() for t in harness.split(",") if t.strip()] if harness is not None else None
    if tasks == []:
        raise UserError("name at least one task, such as --harness arc_easy,hellaswag.", where="--harness")
    from luthier.runs import api

    result = api.evaluate(plan, model_folder=model, harness=tasks)
    if common.first_process():
        common.emit(result, as_json, lambda out: _human(out, result))


def _human(out: Any, result: dict[str, Any]) -> None:
    out.print(f"model {result.get('model', '')}", markup=False, soft_wrap=True)
    for note in result.get("notes", ()):
        out.print(note, markup=False, soft_wrap=True)
    common.show_metrics(out, {"value": {k: v for k, v in result.items() if isinstance(v, dict)}})
    if result.get("harness"):
        out.print("\nlm-evaluation-harness")
        common.show_tree(out, result["harness"])
