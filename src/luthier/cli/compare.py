"""``luthier compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli import common


def compare(
    recipe: common.RecipeArgument,
    overrides: common.Overrides = None,
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            "-m",
            help="Entries separated by commas: 'half-ft, anchored-sft(anchor_weight=0.1)+lora, "
            "sft[training.learning_rate=1e-4]'. The base and plain SFT are always in.",
        ),
    ] = "",
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="Seeds of every entry, counted up from the recipe's.")
    ] = 3,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget", help="For every trial: tokens=N (supervised), flops=N or seconds=N.", show_default=False
        ),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Trials side by side, once costs are known.")] = 1,
    ray: Annotated[
        str | None, typer.Option("--ray", help="Run the trials on the Ray cluster at this address.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The comparison's folder.", show_default="<output>-compare")
    ] = None,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Leave the trained models on disk.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: common.Json = False,
) -> None:
    """Train methods side by side and say what each gains, forgets, calibrates and costs.

    What was run is kept: the same command goes on where it was stopped, and a method or seed that is added runs alone.
    """
    from luthier.comparison.run import compare as run

    made = run(
        common.recipe_file(recipe),
        overrides=overrides or (),
        methods=methods,
        seeds=seeds,
        budget=budget,
        jobs=jobs,
        ray=ray,
        output=output,
        keep_models=keep_models,
        quiet=quiet or as_json,
    )
    folder = Path(made["folder"])

    def human(out: Any) -> None:
        from luthier.comparison.table import legend, table

        out.print(table(made))
        for line in (*legend(made), *made["notes"]):
            out.print(line, style="dim", markup=False, soft_wrap=True)
        out.print()
        for sentence in made["findings"]:
            out.print(f"- {sentence}", markup=False, soft_wrap=True)
        out.print(f"\npage  {folder / 'comparison.html'}", markup=False, soft_wrap=True)

    common.emit(made, as_json, human)
