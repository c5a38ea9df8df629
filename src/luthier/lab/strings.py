"""Operations on short made-up words: reverse, uppercase, count, first and last letter, sort, double."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from luthier.lab import Row, Task
from luthier.lab.drawing import draw, in_split, pick, pick_levels
from luthier.lab.words import all_words

_OPERATIONS: dict[str, Callable[[str], str]] = {
    "reverse": lambda s: s[::-1],
    "uppercase": str.upper,
    "count": lambda s: str(len(s)),
    "first": lambda s: s[0],
    "last": lambda s: s[-1],
    "sort": lambda s: "".join(sorted(s)),
    "double": lambda s: "".join(c + c for c in s),
}
SKILLS = tuple(_OPERATIONS)
_WORDINGS = {
    "reverse": ("reverse {s}\n", "write {s} backwards\n", "spell {s} from last to first\n"),
    "uppercase": ("uppercase {s}\n", "write {s} in capitals\n", "capitals of {s}\n"),
    "count": ("count the letters of {s}\n", "how many letters has {s}?\n", "letters in {s}\n"),
    "first": ("first letter of {s}\n", "which letter is first in {s}?\n", "the first of {s}\n"),
    "last": ("last letter of {s}\n", "which letter is last in {s}?\n", "the last of {s}\n"),
    "sort": ("sort {s}\n", "write the letters of {s} in order\n", "letters of {s} from a to z\n"),
    "double": ("double {s}\n", "write each letter of {s} twice\n", "{s} with letters twice\n"),
}
# Shortest and longest string, and how many letters of the alphabet are used, by difficulty.
_SIZES = {1: (2, 4, 10), 2: (4, 6, 26), 3: (7, 9, 26)}
_WORDS = frozenset(all_words())


def make(
    n: int, split: str, rng: np.random.Generator, *, skill: str = "all", difficulty: str | int = "all"
) -> list[Row]:
    """Rows that ask for an operation on a string.

    Args:
        n: how many rows.
        split: ``train`` or ``test``; no pair of operation and string occurs in both.
        rng: where the letters come from.
        skill: ``all``, or some of reverse, uppercase, count, first, last, sort, double, joined by commas.
        difficulty: ``all``, or some of 1 (2 to 4 of the letters a to j), 2 (4 to 6 letters), 3 (7 to 9
            letters), joined by commas.
    """
    skills, levels = pick(skill, SKILLS, "skill"), pick_levels(difficulty)

    return draw(
        n, rng, [partial(_propose, skill=name, level=at, split=split, rng=rng) for name in skills for at in levels]
    )


def _propose(count: int, skill: str, level: int, split: str, rng: np.random.Generator) -> list[Row]:
    shortest, longest, alphabet = _SIZES[level]
    length = rng.integers(shortest, longest + 1, count)
    letters = rng.integers(0, alphabet, (count, longest))
    letters[np.arange(longest) >= length[:, None]] = 26  # 26 marks the end
    text = (letters + ord("a")).astype(np.uint8)
    wording = rng.integers(0, 3, count)
    rows = []
    for i in np.flatnonzero(in_split(split, SKILLS.index(skill), *letters.T)).tolist():
        string = text[i, : length[i]].tobytes().decode()
        # A word of the world would be one token, not its letters.
        if string in _WORDS:
            continue
        answer = _OPERATIONS[skill](string)
        rows.append(
            {
                "prompt": _WORDINGS[skill][wording[i]].format(s=string), "completion": answer, "answer": answer,
                "task": "strings", "skill": skill, "difficulty": level, "verifier": "exact",
            }
        )  # fmt: skip
    return rows


def verify(row: Mapping[str, Any], completion: str) -> bool:
    """Whether the completion is the answer, up to white space around it."""
    return completion.strip() == row["answer"]


task = Task("strings", make, verify, SKILLS)
