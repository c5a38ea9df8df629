"""``luthier quickstart``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli import common


def quickstart(
    folder: Annotated[Path, typer.Argument(help="Where the runs go.")] = Path("runs/quickstart"),
    as_json: common.Json = False,
) -> None:
    """Fine-tune a small generated model with three methods and print them side by side, in minutes and offline."""
    from luthier.runs import api

    result = api.quickstart(folder)

    def human(out: Any) -> None:
        common.show_tree(out, result)

    common.emit(result, as_json, human)
