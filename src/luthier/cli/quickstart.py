"""``luthier quickstart``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli import common


def quickstart(
    folder: Annotated[Path, typer.Argument(help="Where the runs go; a former quickstart there is replaced.")] = Path(
        "runs/quickstart"
    ),
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    as_json: common.Json = False,
) -> None:
    """Fine-tune a small generated model with three methods and print them side by side, in minutes and offline."""
    from luthier.runs import api

    result = api.quickstart(folder, quiet=quiet or as_json)
    runs = result["runs"]
    # Results row by row stay in each run's evaluation.json.
    brief = {method: {stage: _brief(part) for stage, part in run.items()} for method, run in runs.items()}

    def human(out: Any) -> None:
        base = next((run["before"] for run in runs.values() if run.get("before")), None)
        columns = ({"base": base} if base else {}) | {m: run["after"] | _cost(run) for m, run in runs.items()}
        common.show_side_by_side(out, {name: _brief(part) for name, part in columns.items()})
        out.print(f"\nreport  {result['report']}", markup=False, soft_wrap=True)
        out.print("next    luthier init MODEL DATA, or luthier methods", markup=False)

    common.emit({**result, "runs": brief}, as_json, human)


def _brief(part: Any) -> Any:
    return {k: v for k, v in part.items() if k != "items"} if isinstance(part, dict) else part


def _cost(run: Any) -> dict[str, Any]:
    spent = run.get("training") or {}
    if not spent.get("parameters"):
        return {}
    share = spent["trainable_parameters"] / spent["parameters"]
    return {
        "cost": {
            "trained share": {"value": share, "direction": "lower"},
            "training seconds": {"value": spent["seconds"], "direction": "lower"},
        }
    }
