"""``luthier merge``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli import common
from luthier.core.errors import UserError


class Dtype(StrEnum):
    """Types that merged weights can be stored in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def merge(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL... FOLDER",
            help="What to merge (an adapter, the models of an operation, or a YAML file), and where the result goes.",
            show_default=False,
        ),
    ],
    op: Annotated[
        list[str] | None,
        typer.Option("--op", help="A weight operation, such as ties; several are done in the order given."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", "-o", help="An option of it: density=0.5, or ties.density=0.5 where there are several."
        ),
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="What the models were fine-tuned from.")] = None,
    rows: Annotated[
        Path | None, typer.Option("--rows", help="A recipe on whose data an operation chooses, such as a greedy soup.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Type of the merged weights. Default: as stored; adapters: float32.")
    ] = None,
    as_json: common.Json = False,
) -> None:
    """Merge an adapter into its base and compare the two on probe prompts, or several models into one."""
    *models, last = paths
    folder = Path(last)
    if not models:
        raise UserError("name what is to be merged and a folder for the result: luthier merge MODEL... FOLDER.")
    if folder.exists():
        raise UserError(f"'{folder}' is there already; name a new folder.")
    weights = _weights(op or [], option or [])
    written = len(models) == 1 and models[0].endswith((".yaml", ".yml"))
    if not weights and not written and len(models) == 1 and not Path(models[0]).is_dir():
        raise UserError(f"there is no folder '{models[0]}'.")
    from luthier.runs import api

    report = api.merge(
        models,
        folder,
        op=weights or None,
        base=base,
        dtype=dtype.value if dtype else None,
        rows=rows,
        quiet=as_json or not common.first_process(),
    )
    common.emit(report, as_json, lambda out: _human(out, report, folder))


def _weights(ops: list[str], options: list[str]) -> list[dict[str, Any]]:
    """The operations with their options, as a recipe has them."""
    from luthier.recipe.source import parse

    if options and not ops:
        raise UserError("an option belongs to an operation: name one with --op.", where="--option")
    found: dict[str, dict[str, Any]] = {name: {} for name in ops}
    if len(found) < len(ops):
        raise UserError("the same operation twice; write a YAML file for that.", where="--op")
    for text in options:
        name, equals, raw = text.partition("=")
        if not equals or not name.strip():
            raise UserError(f"'{text}' is not written name=value, such as density=0.5.", where="--option")
        slug, dot, key = name.strip().rpartition(".")
        if not dot:
            if len(ops) > 1:
                raise UserError(f"of which operation? Write it as {ops[0]}.{key}=...", where=f"--option {text}")
            slug = ops[0]
        if slug not in found:
            raise UserError(f"'{slug}' is none of the operations {', '.join(ops)}.", where=f"--option {text}")
        found[slug][key] = parse(raw, f"--option {text}")[0]
    return [{slug: chosen} for slug, chosen in found.items()]


def _human(out: Any, report: Any, folder: Path) -> None:
    out.print(f"merged into {folder}", markup=False, soft_wrap=True)
    if hasattr(report, "probes"):
        found, limit = common.number(report.max_difference, 3), common.number(report.tolerance, 3)
        line = (
            f"largest difference of a logit on {report.probes} probes: {found} (accepted: {limit}); "
            f"the adapter itself moves logits by up to {common.number(report.adapter_effect, 3)}"
        )
        out.print(line, markup=False, soft_wrap=True)
        return
    from rich.markup import escape

    size = f"{report.bytes / 1e6:,.1f} MB"
    out.print(
        f"{report.tensors} tensors, {size}, from {len(report.models)} models in {common.number(report.seconds, 3)} s"
    )
    for operation in report.operations:
        out.print(f"[bold]{escape(operation['op'])}[/bold]")
        brief = {k: v for k, v in operation["found"].items() if not isinstance(v, dict) or len(v) <= 40}
        common.show_tree(out, brief, 1)
