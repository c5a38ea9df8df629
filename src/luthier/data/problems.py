"""What is wrong with a row, and how it is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.core.errors import UserError

ACCEPTED_LAYOUTS = (
    "prompt/completion (or question/answer, input/output, ...), messages or conversations, instruction/input/output, "
    "chosen/rejected, text/label, tokens/tags, image/label, text"
)
EXCERPT = 90


@dataclass(frozen=True)
class Reject:
    """One row that cannot be used.

    Attributes:
        source: the file's name.
        row: its 1-based number there (the line for line formats).
        field: the field that is wrong; empty when the whole row is.
        reason: a short phrase under which such rows are counted.
        fix: what is accepted or what to do; may be empty.
        excerpt: the beginning of the row or field, on one line.
    """

    source: str
    row: int
    field: str
    reason: str
    fix: str = ""
    excerpt: str = ""

    def error(self, more: int = 0) -> UserError:
        """The one-line error for this row; ``more`` is how many further rows are bad too."""
        place = f"{self.source}, row {self.row}" + (f", field '{self.field}'" if self.field else "")
        parts = [f"{self.reason}."]
        if self.fix:
            parts.append(self.fix)
        if self.excerpt:
            parts.append(f"Found: {self.excerpt}.")
        parts.append(f"Accepted layouts: {ACCEPTED_LAYOUTS}.")
        if more:
            parts.append(f"{more} more row{'s are' if more > 1 else ' is'} bad too.")
        parts.append("Correct the file, or set `data.bad_rows: skip` to leave such rows out and list them.")
        return UserError(" ".join(parts), where=place)


def excerpt(value: Any, limit: int = EXCERPT) -> str:
    """The beginning of a value as one printable line."""
    text = value if isinstance(value, str) else repr(value)
    # A row may hold 50 MB, so cut before any work over the whole of it.
    short = repr(text[: limit + 1])[1:-1] if isinstance(value, str) else text[: limit + 1]
    return f"{short[:limit]}..." if len(short) > limit or len(text) > limit else short


class Problems:
    """The bad rows of one block; the first problem of a row is the one that is told.

    Args:
        source: the file's name.
        numbers: row number of each row of the block.
    """

    def __init__(self, source: str, numbers: np.ndarray) -> None:
        self.source, self.numbers = source, numbers
        self.bad = np.zeros(len(numbers), dtype=bool)
        self.rejects: list[Reject] = []

    def add(self, index: int, field: str, reason: str, fix: str = "", found: Any = "") -> None:
        """Row ``index`` of the block is bad, unless it already is."""
        if not self.bad[index]:
            self.bad[index] = True
            number = int(self.numbers[index])
            self.rejects.append(Reject(self.source, number, field, reason, fix, excerpt(found) if found != "" else ""))

    def mark(self, mask: Any, word: Callable[[int], tuple[str, str, str, Any]]) -> None:
        """Every row of a boolean mask is bad; ``word(index)`` gives field, reason, fix and what was found."""
        mask = np.asarray(mask, dtype=bool) if isinstance(mask, np.ndarray) else mask.to_numpy(zero_copy_only=False)
        if mask.any():
            for index in np.flatnonzero(mask & ~self.bad):
                self.add(int(index), *word(int(index)))
