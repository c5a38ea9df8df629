"""``luthier train``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from luthier.cli import common


def train(
    recipe: common.RecipeArgument,
    overrides: common.Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of this run.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    as_json: common.Json = False,
) -> None:
    """Train a recipe and measure the model before and after."""
    plan = common.make_plan(recipe, overrides)
    from luthier.runs import api

    run = api.train(plan, resume=resume, quiet=quiet or as_json)
    report = run.report()
    result: dict[str, Any] = {"folder": plan.recipe.output, "report": report, "metrics": run.metrics}

    def human(out: Any) -> None:
        common.show_metrics(out, run.metrics)
        out.print(f"\nmodel   {plan.recipe.output}/model\nreport  {report}", soft_wrap=True)

    common.emit(result, as_json, human)
