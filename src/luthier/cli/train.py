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
    if not common.first_process():
        return
    stages = {name: run.metrics[name] for name in ("before", "after") if run.metrics.get(name)}
    # Results row by row stay in the run's evaluation.json.
    brief = {name: {k: v for k, v in metrics.items() if k != "items"} for name, metrics in stages.items()}
    training = run.metrics.get("training", {})
    report = run.folder / "report.html"
    result = {"folder": run.folder, "model": run.folder / "model", "report": report, **brief, "training": training}

    def human(out: Any) -> None:
        common.show_metrics(out, stages)
        out.print()
        common.show_tree(out, {"training": training, "model": str(run.folder / "model"), "report": str(report)})

    common.emit(result, as_json, human)
