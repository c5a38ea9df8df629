"""The lab's own verifier: exact for every task of the lab, free text included.

Example::

    data:
      train: lab:text?layout=pair
      verifier: lab
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from luthier.core import registry
from luthier.core.errors import UserError


@registry.reward("lab")
def lab(rows: Sequence[Mapping[str, Any]], completions: Sequence[str], ctx: Any) -> list[float | None]:
    """Whether the lab's verifier of a row's task accepts the completion.

    Args:
        rows: canonical rows whose ``extra`` names the lab task they come from.
        completions: one text per row.
        ctx: not used.

    Returns:
        1.0 or 0.0 per row.

    Raises:
        UserError: a row that is not the lab's.
    """
    from luthier.lab import verify

    scores: list[float | None] = []
    for row, completion in zip(rows, completions, strict=True):
        about = json.loads(row.get("extra") or "{}")
        if "task" not in about:
            raise UserError(
                "the verifier 'lab' judges rows of lab:<task> only; this row has no 'task'. Choose another verifier, "
                "such as exact.",
                where=f"{row.get('source') or 'data'}, row {row.get('row')}",
            )
        scores.append(float(verify(about["task"], {**row, **about}, completion)))
    return scores
