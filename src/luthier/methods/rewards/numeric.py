r"""Numeric match: 1 where the completion's final number is the reference's, and 0 elsewhere.

The final number is the one after ``####`` (GSM8K), in the last ``\boxed{}``, after "the answer is", or the last of the
text, read exactly (thousands separators, currency and units, fractions, powers of ten). With the reference y and the
completion's number x,

    score = 1 if |x - y| <= tolerance * |y| else 0

A reference without a number gives None, a completion without one 0.

Example::

    data: {test: gsm8k/test.jsonl, verifier: numeric}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any

from pydantic import Field

from luthier.core.protocols import Context
from luthier.core.registry import reward
from luthier.functional.answers import final_number, reference_texts


@reward("numeric")
def numeric(
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[str],
    ctx: Context | None,
    *,
    answer: Annotated[str, Field(description="column that holds the reference")] = "answer",
    tolerance: Annotated[float, Field(ge=0, lt=1, description="relative difference that still counts")] = 1e-6,
) -> list[float | None]:
    """Whether the completion's final number is the reference's."""
    scores: list[float | None] = []
    for row, completion in zip(rows, completions, strict=True):
        accepted = [n for text in reference_texts(row, answer) if (n := final_number(text)) is not None]
        if not accepted:
            scores.append(None)
            continue
        said = final_number(completion)
        near = said is not None and any(abs(said - y) <= Fraction(tolerance) * abs(y) for y in accepted)
        scores.append(float(near))
    return scores
