"""Normalised match: as exact match, after case, punctuation, English articles and surplus space are taken away.

The normalisation is that of the SQuAD scorer (Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of
Text", 2016, arXiv 1606.05250) after Unicode NFKC, so that full-width and ligature forms match plain ones. A reference
that normalises to nothing gives None.

Example::

    data: {test: test.jsonl, verifier: normalised}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from luthier.core.protocols import Context
from luthier.core.registry import reward
from luthier.functional.answers import normalise, reference_texts


@reward("normalised")
def normalised(
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[str],
    ctx: Context | None,
    *,
    answer: Annotated[str, Field(description="column that holds the reference")] = "answer",
    contained: Annotated[bool, Field(description="the reference may stand anywhere in the completion")] = False,
) -> list[float | None]:
    """Whether the completion is the reference but for case, punctuation, articles and space."""
    scores: list[float | None] = []
    for row, completion in zip(rows, completions, strict=True):
        accepted = {normalise(text) for text in reference_texts(row, answer)} - {""}
        said = normalise(completion)
        if contained:
            # Between spaces, so that whole words are found.
            matches = any(f" {text} " in f" {said} " for text in accepted)
        else:
            matches = said in accepted
        scores.append(float(matches) if accepted else None)
    return scores
