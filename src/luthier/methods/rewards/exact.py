"""Exact match: 1 where the completion is the reference, character for character, and 0 elsewhere.

Space before and after is not compared unless ``strip`` is off. The reference of a row is its column ``answer`` (a list
holds several accepted answers), else its completion or last assistant message; a row with none gives None.

Example::

    data: {test: test.jsonl, verifier: exact}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from luthier.core.protocols import Context
from luthier.core.registry import reward
from luthier.functional.answers import reference_texts


@reward("exact")
def exact(
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[str],
    ctx: Context | None,
    *,
    answer: Annotated[str, Field(description="column that holds the reference")] = "answer",
    strip: Annotated[bool, Field(description="pass over space before and after")] = True,
) -> list[float | None]:
    """Whether the completion is the reference, character for character."""

    def trimmed(text: str) -> str:
        return text.strip() if strip else text

    scores: list[float | None] = []
    for row, completion in zip(rows, completions, strict=True):
        accepted = {trimmed(text) for text in reference_texts(row, answer)}
        scores.append(float(trimmed(completion) in accepted) if accepted else None)
    return scores
