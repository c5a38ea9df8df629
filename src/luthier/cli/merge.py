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
    adapter: Annotated[Path, typer.Argument(help="The folder of a run that left an adapter, or of the adapter.")],
    folder: Annotated[Path, typer.Argument(help="Where the merged model goes.")],
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Type of the merged weights.")] = Dtype.float32,
    as_json: common.Json = False,
) -> None:
    """Merge an adapter into its base, compare the two on probe prompts, and save a plain model."""
    if folder.exists():
        raise UserError(f"'{folder}' is there already; name a new folder.")
    if not adapter.is_dir():
        raise UserError(f"there is no folder '{adapter}'.")
    from luthier.runs import api

    report = api.merge(adapter, folder, dtype=dtype.value)

    def human(out: Any) -> None:
        out.print(f"merged into {folder}", markup=False, soft_wrap=True)
        found, limit = common.number(report.max_difference, 3), common.number(report.tolerance, 3)
        out.print(
            f"largest difference of a logit on {report.probes} probes: {found} (accepted: {limit}); "
            f"the adapter itself moves logits by up to {common.number(report.adapter_effect, 3)}",
            markup=False,
            soft_wrap=True,
        )

    common.emit(report, as_json, human)
