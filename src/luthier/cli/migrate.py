"""``luthier migrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli import common


def migrate(
    recipe: Annotated[Path, typer.Argument(help="A recipe of an older version, or a flat file of another trainer.")],
    write: Annotated[bool, typer.Option("--write", "-w", help="Change the file; otherwise print the result.")] = False,
    as_json: common.Json = False,
) -> None:
    """Bring a recipe to the present version, keeping its comments."""
    from luthier.core.store import write_atomic
    from luthier.recipe.migrate import migrate as run

    text, changes = run(recipe)
    for change in changes or ["nothing to change"]:
        common.note(f"{recipe}: {change}")
    if write and changes:
        write_atomic(recipe, text)
    if as_json:
        common.emit({"recipe": text, "changes": changes, "written": write and bool(changes)}, True, lambda _: None)
    elif not write:
        print(text, end="")
