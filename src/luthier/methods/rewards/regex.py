r"""Regular expression: 1 where the completion matches a pattern, and 0 elsewhere.

The pattern is the option ``pattern``, or else the row's column ``pattern``; a row with neither gives None. ``^`` and
``$`` are the ends of the completion, ``.`` matches a line break, and space around the completion is passed over. A
pattern that takes more than ``seconds`` on a completion (nested repetitions can take for ever) gives None.

Example::

    data: {test: dates.jsonl, verifier: {regex: {pattern: '\d{4}-\d{2}-\d{2}', whole: true}}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import regex as expressions
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Context
from luthier.core.registry import reward
from luthier.functional.answers import column


def compiled(pattern: str, where: str) -> Any:
    """The compiled pattern.

    Raises:
        UserError: it is not a regular expression.
    """
    try:
        return expressions.compile(pattern, expressions.DOTALL)
    except expressions.error as error:
        raise UserError(f"'{pattern}' is not a regular expression: {error}.", where=where) from error


@reward("regex")
def regex(
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[str],
    ctx: Context | None,
    *,
    pattern: Annotated[str | None, Field(description="the expression; by default each row's own")] = None,
    answer: Annotated[str, Field(description="column that holds each row's expression")] = "pattern",
    whole: Annotated[bool, Field(description="match the whole completion, not a part")] = False,
    seconds: Annotated[float, Field(gt=0, description="time for one completion")] = 1.0,
) -> list[float | None]:
    """Whether the completion matches a regular expression."""
    common = None if pattern is None else compiled(pattern, "verifier regex, option pattern")
    scores: list[float | None] = []
    for index, (row, completion) in enumerate(zip(rows, completions, strict=True)):
        own = column(row, answer) if common is None else None
        if common is None and own is None:
            scores.append(None)
            continue
        expression = common or compiled(str(own), f"row {row.get('row', index)}, column {answer}")
        try:
            found = (expression.fullmatch if whole else expression.search)(completion.strip(), timeout=seconds)
        except TimeoutError:
            scores.append(None)
            continue
        scores.append(float(found is not None))
    return scores
