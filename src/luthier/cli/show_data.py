"""``luthier show-data``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from luthier.cli import common
from luthier.cli.check import findings
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
        plain = out.no_color or not out.is_terminal
        for row in chosen:
            if plain:
                out.print(_marked(inspect.spans_json(renderer, row)), markup=False, soft_wrap=True)
            else:
                out.print(inspect.coloured(renderer, row), soft_wrap=True)
        bright = "between ⟦ and ⟧" if plain else "bright"
        out.print(f"supervised: {bright}; not supervised: the rest; in brackets: where a part comes from", style="dim")
        sentences = findings({"name": "train", "read": data.report.to_dict(), "prepared": prepared.report.to_dict()})
        for sentence in sentences:
            out.print(f"note: {sentence}", markup=False, soft_wrap=True)

    shown = [inspect.spans_json(renderer, row) for row in chosen] if as_json else []
    common.emit({"rows": shown, "read": data.report, "prepared": prepared.report}, as_json, human)


def _marked(about: dict[str, Any]) -> str:
    """A row without colours: supervised stretches between ⟦ and ⟧."""
    text = f"{about['source']}, row {about['row']} ({about['kind']}): {about['length']} tokens"
    text += f", {about['supervised']} supervised\n" + _side(about)
    if "rejected" in about:
        text += f"rejected: {about['rejected']['supervised']} supervised\n" + _side(about["rejected"])
    if about.get("tags"):
        text += " ".join(f"{tag['word']}/{tag['tag']}" for tag in about["tags"]) + "\n"
    if "label" in about:
        text += f"label: {about['label']}\n"
    return text


def _side(about: dict[str, Any]) -> str:
    text, origin, inside = "", None, False
    for token in about["tokens"]:
        if inside and not token["supervised"]:
            text += "⟧"
        if token["origin"] != origin:
            origin = token["origin"]
            text += f"[{origin}] "
        if token["supervised"] and not inside:
            text += "⟦"
        inside = token["supervised"]
        text += token["text"]
    return text + ("⟧" if inside else "") + "\n"
