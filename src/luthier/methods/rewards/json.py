"""JSON match: 1 where the completion holds JSON that agrees with the reference, and 0 elsewhere.

The value is the whole completion, its fenced block, or the first object or array in it; ``NaN`` and ``Infinity`` are
not JSON. ``match`` says what agreement is: ``equal`` (the same value; keys in any order, 1 and 1.0 the same number,
``true`` not 1), ``subset`` (every key of the reference is there with its value, further ones may be), or ``valid`` (any
JSON; no reference is read).

Example::

    data: {test: calls.jsonl, verifier: {json: {match: subset}}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.core.protocols import Context
from luthier.core.registry import reward
from luthier.functional.answers import parse_json, reference


def agrees(value: Any, wanted: Any, *, subset: bool) -> bool:
    """Whether a JSON value is the wanted one, or with ``subset`` holds at least its keys at every level."""
    if isinstance(wanted, dict):
        if not isinstance(value, dict) or not wanted.keys() <= value.keys():
            return False
        return (subset or len(value) == len(wanted)) and all(
            agrees(value[k], v, subset=subset) for k, v in wanted.items()
        )
    if isinstance(wanted, list):
        return (
            isinstance(value, list)
            and len(value) == len(wanted)
            and all(agrees(a, b, subset=subset) for a, b in zip(value, wanted, strict=True))
        )
    return isinstance(value, bool) == isinstance(wanted, bool) and bool(value == wanted)


@reward("json")
def json(
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[str],
    ctx: Context | None,
    *,
    answer: Annotated[str, Field(description="column that holds the reference, a value or its JSON text")] = "answer",
    match: Annotated[Literal["equal", "subset", "valid"], Field(description="what counts as agreement")] = "equal",
) -> list[float | None]:
    """Whether the completion holds JSON that agrees with the reference."""
    scores: list[float | None] = []
    for row, completion in zip(rows, completions, strict=True):
        wanted = reference(row, answer)
        try:
            wanted = parse_json(wanted) if isinstance(wanted, str) and match != "valid" else wanted
        except ValueError:
            wanted = None
        if wanted is None and match != "valid":
            scores.append(None)
            continue
        try:
            value = parse_json(completion)
        except ValueError:
            scores.append(0.0)
            continue
        scores.append(float(match == "valid" or agrees(value, wanted, subset=match == "subset")))
    return scores
