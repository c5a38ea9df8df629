"""``luthier init``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli import common
from luthier.core.errors import UserError


def init(
    model: Annotated[str, typer.Argument(help="A model folder, a hub id or lab:nano.", show_default=False)],
    data: Annotated[str, typer.Argument(help="Rows: file, folder, hub data set or lab:<task>.", show_default=False)],
    output: Annotated[str, typer.Option("--output", "-o", help="The recipe to write; - prints it.")] = "recipe.yaml",
    test: Annotated[
        str | None, typer.Option("--test", help="Held-out rows; by default a file beside the data.")
    ] = None,
    objective: Annotated[str, typer.Option("--objective", help="An objective to start with.")] = "sft",
    parameters: Annotated[str, typer.Option("--parameters", help="What is trained.")] = "full",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the recipe.")] = False,
    as_json: common.Json = False,
) -> None:
    """Write a commented recipe for a model and a data file, guessing the layout of the rows."""
    from luthier.core.store import write_atomic
    from luthier.recipe.guess import guess

    path = Path(output)
    if output != "-" and path.exists() and not force:
        raise UserError(f"'{path}' is there already; choose another with -o, or overwrite it with --force.")
    named = output not in ("-", "recipe.yaml")
    guessed = guess(
        model, data, test=test, objective=objective, parameters=parameters, name=path.stem if named else None
    )
    if output != "-":
        write_atomic(path, guessed.text)
    for remark in guessed.remarks:
        common.note(remark)
    if as_json:
        written = None if output == "-" else str(path)
        common.emit({"path": written, "recipe": guessed.text, "remarks": guessed.remarks}, True, lambda _: None)
    elif output == "-":
        print(guessed.text, end="")
    else:
        common.note(f"wrote {path}; next: luthier check {path}")
