"""Multiple choice: 1 where the completion chooses the reference's label, and 0 elsewhere.

The chosen label is found in a box, after "the answer is", at the beginning, as a choice's full text, or as the only
label named; a completion that names several without saying which scores 0. The reference is a label, the number of a
choice counted from 0 (an integer), or a choice's full text. A column ``choices`` (a list, or label and text lists) is
used where the row has one; otherwise ``labels`` are the possible labels.

Example::

    data: {test: arc.jsonl, verifier: {choice: {answer: answerKey}}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from luthier.core.protocols import Context
from luthier.core.registry import reward
from luthier.functional.answers import choices, chosen_label, reference


@reward("choice")
def choice(
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[str],
    ctx: Context | None,
    *,
    answer: Annotated[str, Field(description="column that holds the reference")] = "answer",
    labels: Annotated[str, Field(min_length=1, description="possible labels, one character each")] = "ABCDE",
) -> list[float | None]:
    """Whether the completion chooses the reference's label."""
    scores: list[float | None] = []
    for row, completion in zip(rows, completions, strict=True):
        texts = choices(row)
        possible = list(texts) or list(labels)
        right = reference(row, answer)
        if isinstance(right, int) and str(right) not in possible and 0 <= right < len(possible):
            right = possible[right]
        label = None if right is None else chosen_label(str(right), possible, texts)
        scores.append(None if label is None else float(chosen_label(completion, possible, texts) == label))
    return scores
