"""Token overlap: how many words of completion and reference are the same, as a multiset.

    recall    = shared words / words of the reference
    precision = shared words / words of the completion
    f1        = 2 precision recall / (precision + recall)

Words are those left after the normalisation of ``normalised``. With several references the best counts; a row without
one that has words gives None. ``recall`` does not punish an answer for being longer than the reference.

Example::

    data: {train: rows.jsonl, verifier: {token-overlap: {measure: recall}}}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.core.protocols import Context
from luthier.core.registry import reward
from luthier.functional.answers import normalise, reference_texts

Measure = Literal["f1", "recall", "precision"]


def overlap(said: Sequence[str], wanted: Sequence[str], measure: Measure) -> float:
    """The share of words that are the same, in [0, 1]; 0 where either side has none."""
    shared = sum((Counter(said) & Counter(wanted)).values())
    if not shared:
        return 0.0
    if measure == "f1":
        return 2 * shared / (len(said) + len(wanted))
    return shared / len(wanted if measure == "recall" else said)


@reward("token-overlap")
def token_overlap(
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[str],
    ctx: Context | None,
    *,
    answer: Annotated[str, Field(description="column that holds the reference")] = "answer",
    measure: Annotated[Measure, Field(description="f1, recall or precision")] = "f1",
) -> list[float | None]:
    """The share of words that completion and reference have in common."""
    scores: list[float | None] = []
    for row, completion in zip(rows, completions, strict=True):
        accepted = [words for text in reference_texts(row, answer) if (words := normalise(text).split())]
        said = normalise(completion).split()
        scores.append(max(overlap(said, words, measure) for words in accepted) if accepted else None)
    return scores
