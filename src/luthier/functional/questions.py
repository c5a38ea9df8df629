"""Other questions for canonical rows, and their estimates as JSON values: what analyses of held-out rows share."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from luthier.functional.statistics import Estimate


def with_question(row: Mapping[str, Any], change: Callable[[str], str | None]) -> dict[str, Any] | None:
    """A canonical row with another question: the prompt, or the last message of the user before the last answer.

    Args:
        row: a row of any kind.
        change: gives the new question for the old one; None where it has none to give.

    Returns:
        A copy; None where the row has no question or ``change`` gives none.
    """
    if row["kind"] == "chat":
        messages = json.loads(row["messages"])
        last = max((i for i, m in enumerate(messages[:-1]) if m["role"] == "user"), default=None)
        if last is None or (text := change(messages[last]["content"])) is None:
            return None
        messages[last] = {**messages[last], "content": text}
        return {**row, "messages": json.dumps(messages, ensure_ascii=False)}
    if row["kind"] != "pair" or (text := change(row["prompt"])) is None:
        return None
    return {**row, "prompt": text}


def with_sentence(text: str, sentence: str) -> str:
    """A text with one more sentence before its last one, where a question usually stands.

    Sentences end with ``.``, ``!``, ``?`` or ``;`` and white space, or at a line break.
    """
    body = text.rstrip()
    ends = [m.end() for m in re.finditer(r"(?<=[.!?;])\s+|\s*\n\s*", body)]
    at = ends[-1] if ends else 0
    return f"{text[:at]}{sentence} {text[at:]}"


def numbers(found: Estimate) -> tuple[float, int, float | None, float | None]:
    """Value, n, low and high of an estimate as JSON has them: an end that is not known, or has no bound, is None."""
    low, high = (float(end) if math.isfinite(end) else None for end in (found.low, found.high))
    return float(found.value), found.n, low, high
