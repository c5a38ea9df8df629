"""``luthier check``."""

from __future__ import annotations

from typing import Any

from luthier.cli import common


def check(recipe: common.RecipeArgument, overrides: common.Overrides = None, as_json: common.Json = False) -> None:
    """Check everything that can fail, without training: recipe, every row, lengths, conflicts, memory and time."""
    plan = common.make_plan(recipe, overrides)
    from luthier.runs import api

    result = api.check(plan)

    def human(out: Any) -> None:
        common.show_tree(out, result)
        out.print("\nThe recipe can be trained.")

    common.emit(result, as_json, human)
