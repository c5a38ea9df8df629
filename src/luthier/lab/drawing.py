"""Drawing rows: splits by content, distinct rows, choices among skills and difficulties."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from luthier.core.errors import UserError, did_you_mean

Row = dict[str, Any]

TEST_SHARE = 5  # one content in five belongs to the test split


def mix(*parts: np.ndarray | int) -> np.ndarray:
    """A 64-bit hash of integer columns, element by element (splitmix64 chained over the columns).

    Args:
        parts: int arrays of one shape [n], or plain integers.

    Returns:
        uint64 [n].
    """
    with np.errstate(over="ignore"):
        state = np.zeros((), dtype=np.uint64)
        for part in parts:
            state = (state ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def in_split(split: str, *content: np.ndarray | int) -> np.ndarray:
    """Which contents belong to the split: a function of the content alone, so no seed moves a row across.

    Args:
        split: ``train`` or ``test``.
        content: integer columns [n] that say what is asked.

    Returns:
        bool [n].
    """
    return (mix(*content) % np.uint64(TEST_SHARE) == 0) == (split == "test")


def code(text: str) -> int:
    """An integer for a text of at most a few dozen characters, for :func:`mix`."""
    value = 0
    for character in text:
        value = (value * 1000003 + ord(character)) & 0x7FFFFFFFFFFFFFFF
    return value


def draw(
    n: int, rng: np.random.Generator, proposers: Sequence[Callable[[int], list[Row]]], key: str = "prompt"
) -> list[Row]:
    """Exactly ``n`` rows, the same share from each proposer, shuffled.

    A proposer's rows are distinct in ``key`` as long as it brings new ones, then repeat in order; a proposer with few
    distinct rows therefore keeps its share.

    Args:
        n: how many.
        rng: decides the order; the proposers draw from it too, so the result is a function of the stream.
        proposers: each gives about as many candidate rows as it is asked for (fewer where a split filters them).
        key: the column by which rows are distinct.

    Raises:
        UserError: a proposer brings nothing.
    """
    ends = [round((i + 1) * n / len(proposers)) for i in range(len(proposers))]
    rows: list[Row] = []
    for propose, end in zip(proposers, ends, strict=True):
        rows += _distinct(end - len(rows), propose, key)
    return [rows[i] for i in rng.permutation(n).tolist()]


def _distinct(n: int, propose: Callable[[int], list[Row]], key: str) -> list[Row]:
    found: dict[Any, Row] = {}
    stale = 0
    while len(found) < n and stale < 3:
        before = len(found)
        for row in propose(max(64, (n - before) * 3 // 2)):
            found.setdefault(row[key], row)
        # Three rounds that bring almost nothing: there are no more distinct rows than these.
        stale = stale + 1 if len(found) - before <= before // 200 else 0
    distinct = list(found.values())
    if not distinct and n:
        raise UserError("this combination of options leaves no row in the split.")
    return [dict(distinct[i % len(distinct)]) for i in range(n)]


def pick(value: str, accepted: Sequence[str], what: str) -> list[str]:
    """The names in ``value``: ``all``, one name, or several joined by commas.

    Raises:
        UserError: a name that is not accepted.
    """
    if value == "all":
        return list(accepted)
    chosen = [part.strip() for part in value.split(",")]
    for name in chosen:
        if name not in accepted:
            raise UserError(
                f"unknown {what} '{name}'.{did_you_mean(name, accepted)} Accepted: all, {', '.join(accepted)}."
            )
    return chosen


def pick_levels(value: str | int, accepted: Sequence[int] = (1, 2, 3)) -> list[int]:
    """As :func:`pick`, for difficulties."""
    return [int(level) for level in pick(str(value), [str(level) for level in accepted], "difficulty")]
