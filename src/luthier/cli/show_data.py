"""``luthier show-data``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from luthier.cli import common
from luthier.core.errors import UserError


def show_data(
    recipe: common.RecipeArgument,
    overrides: common.Overrides = None,
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="How many rows.")] = 3,
    start: Annotated[int, typer.Option("--start", min=0, help="The first row, counted from 0.")] = 0,
    as_json: common.Json = False,
) -> None:
    """Show rows as the model sees them: which tokens are supervised, which are not, and where each comes from."""
    plan = common.make_plan(recipe, overrides)
    from luthier.data import inspect
    from luthier.runs import api

    data, renderer, prepared = api.prepare_data(plan)
    total = len(data.dataset)
    if start >= total:
        raise UserError(f"there are {total} rows; the last is {total - 1}.", where="--start")
    chosen = [data.dataset[i] for i in range(start, min(start + rows, total))]

    def human(out: Any) -> None:
        for row in chosen:
            out.rule(f"{row['source']}, row {row['row']}", align="left", style="dim")
            out.print(inspect.coloured(renderer, row), soft_wrap=True)
        out.rule(style="dim")
        common.show_tree(out, prepared.report.to_dict())

    value = {
        "rows": [inspect.spans_json(renderer, row) for row in chosen] if as_json else [],
        "report": prepared.report,
    }
    common.emit(value, as_json, human)
