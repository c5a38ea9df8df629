"""Where two similar programs (or other texts) differ: by lines, by characters, and in the tokens over them.

Only characters that carry meaning are compared: for Python everything but comments and the white space outside of
strings, for other text everything but white space. So a difference in comments, blank lines or spacing is none.
"""

from __future__ import annotations

import difflib
import io
import re
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Language = Literal["python", "text"]
NEWLINE = re.compile(r"\r\n|\r|\n")
_SILENT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


@dataclass(frozen=True)
class Line:
    """A line with something to compare: what it says, and the places of those characters in the whole text."""

    says: tuple[str, ...]
    places: tuple[int, ...]


@dataclass(frozen=True)
class Side:
    """The error-sensitive characters of one of two texts, as places in it, in order and without white space.

    Attributes:
        lines: those of the lines that the other text does not have, or has otherwise.
        characters: the finer choice: those that a shortest edit script substitutes or deletes, and those on both
            sides of where it inserts.
    """

    lines: list[int]
    characters: list[int]


def line_starts(text: str) -> list[int]:
    """The place of the first character of each line."""
    return [0, *(m.end() for m in NEWLINE.finditer(text))]


def meaningful_lines(text: str, language: Language) -> list[Line]:
    """The lines of a text that say something. Python that cannot be split into tokens is read as other text."""
    starts = line_starts(text)
    found: list[tuple[list[str], list[int]]] = [([], []) for _ in starts]
    try:
        pieces = _python_pieces(text, starts) if language == "python" else _words(text)
    except (tokenize.TokenError, SyntaxError):
        pieces = _words(text)
    for start, end in pieces:
        # A string may run over several lines; each takes its share.
        while start < end:
            line = int(np.searchsorted(starts, start, side="right")) - 1
            until = min(end, starts[line + 1]) if line + 1 < len(starts) else end
            if said := text[start:until].rstrip("\r\n"):
                found[line][0].append(said)
                found[line][1].extend(range(start, start + len(said)))
            start = until
    return [Line(tuple(says), tuple(places)) for says, places in found if places]


def _python_pieces(text: str, starts: list[int]) -> list[tuple[int, int]]:
    """Intervals of the Python tokens that have a meaning, as places in the text."""
    tokens = tokenize.generate_tokens(io.StringIO(text, newline=None).readline)
    return [
        (starts[t.start[0] - 1] + t.start[1], starts[t.end[0] - 1] + t.end[1])
        for t in tokens
        if t.type not in _SILENT and t.start != t.end
    ]


def _words(text: str) -> list[tuple[int, int]]:
    return [m.span() for m in re.finditer(r"\S+", text)]


def _spoken(line: Line, language: Language) -> tuple[str, ...]:
    # Between Python's tokens a space can matter ("not b"); elsewhere it is spacing.
    return line.says if language == "python" else ("".join(line.says),)


def similarity(a: str, b: str, unit: Literal["characters", "lines"] = "characters") -> float:
    """The ratio 2 M / (|a| + |b|) of difflib; units that both begin or end with count as matched."""
    one: Sequence[str] = a if unit == "characters" else NEWLINE.split(a)
    other: Sequence[str] = b if unit == "characters" else NEWLINE.split(b)
    if not len(one) + len(other):
        return 1.0
    head, tail = _shared(one, other)
    middle = difflib.SequenceMatcher(
        None, one[head : len(one) - tail], other[head : len(other) - tail], autojunk=False
    ).get_matching_blocks()
    return 2 * (head + tail + sum(block.size for block in middle)) / (len(one) + len(other))


def _shared(a: Sequence[Any], b: Sequence[Any]) -> tuple[int, int]:
    """How many units both begin with, and how many they end with behind those."""
    shorter = min(len(a), len(b))
    head = next((i for i in range(shorter) if a[i] != b[i]), shorter)
    tail = next((i for i in range(shorter - head) if a[-1 - i] != b[-1 - i]), shorter - head)
    return head, tail


def edits(a: str, b: str) -> tuple[set[int], set[int]]:
    """Places in ``a`` and in ``b`` that a shortest script of Levenshtein edits from one to the other touches.

    Substituted and deleted characters of each side, and the characters beside each insertion on the other side. Of
    several shortest scripts, read from the end, the one that matches first, then substitutes, then deletes.
    """
    head, tail = _shared(a, b)
    rows, columns = len(a) - head - tail, len(b) - head - tail
    distance = _distances(a[head : head + rows], b[head : head + columns])
    in_a: set[int] = set()
    in_b: set[int] = set()
    i, j = rows, columns
    while i or j:
        same = i and j and a[head + i - 1] == b[head + j - 1]
        if i and j and distance[i, j] == distance[i - 1, j - 1] + (not same):
            i, j = i - 1, j - 1
            if not same:
                in_a.add(head + i)
                in_b.add(head + j)
        elif i and distance[i, j] == distance[i - 1, j] + 1:
            i -= 1
            in_a.add(head + i)
            in_b |= {head + j - 1, head + j}
        else:
            j -= 1
            in_b.add(head + j)
            in_a |= {head + i - 1, head + i}
    return {p for p in in_a if 0 <= p < len(a)}, {p for p in in_b if 0 <= p < len(b)}


def _distances(a: str, b: str) -> np.ndarray:
    """Levenshtein distances between all beginnings, [len(a) + 1, len(b) + 1]."""
    other, step = np.array([ord(c) for c in b], dtype=np.int32), np.arange(len(b) + 1, dtype=np.int32)
    table = np.empty((len(a) + 1, len(b) + 1), dtype=np.int32)
    table[0] = step
    for i, character in enumerate(a, start=1):
        row = table[i - 1] + 1
        row[1:] = np.minimum(row[1:], table[i - 1, :-1] + (other != ord(character)))
        # An insertion continues the row: the least of (value before + how many characters ago).
        table[i] = np.minimum.accumulate(row - step) + step
    return table


def differences(good: str, wrong: str, language: Language = "python") -> tuple[Side, Side]:
    """The error-sensitive characters of a correct and a wrong text, each as places in it.

    Lines are compared by difflib. Within a block of lines that replaces another, characters are aligned line by line
    where both have as many, else over the whole block; a block that only one side has is sensitive as a whole there,
    and on the other side the characters next to the gap are.
    """
    texts = (good, wrong)
    lines = tuple(meaningful_lines(text, language) for text in texts)
    said = [[_spoken(line, language) for line in side] for side in lines]
    whole: tuple[set[int], set[int]] = (set(), set())
    fine: tuple[set[int], set[int]] = (set(), set())
    head, tail = _shared(said[0], said[1])
    middle = [side[head : len(side) - tail] for side in said]
    for kind, *edges in difflib.SequenceMatcher(None, middle[0], middle[1], autojunk=False).get_opcodes():
        if kind == "equal":
            continue
        a, a_end, b, b_end = (edge + head for edge in edges)
        blocks = (lines[0][a:a_end], lines[1][b:b_end])
        for side in (0, 1):
            whole[side].update(p for line in blocks[side] for p in line.places)
        if kind == "replace":
            pairs = list(zip(*([x] for x in blocks), strict=True))
            if len(blocks[0]) == len(blocks[1]):
                pairs = [([x], [y]) for x, y in zip(*blocks, strict=True)]
            for pair in pairs:
                places = [[p for line in part for p in line.places] for part in pair]
                words = ["".join(text[p] for p in found) for text, found in zip(texts, places, strict=True)]
                for side, touched in enumerate(edits(*words)):
                    fine[side].update(places[side][k] for k in touched)
            continue
        own, at = (0, b) if kind == "delete" else (1, a)
        fine[own].update(p for line in blocks[own] for p in line.places)
        other = lines[1 - own]
        fine[1 - own].update([other[at - 1].places[-1]] if at else [])
        fine[1 - own].update([other[at].places[0]] if at < len(other) else [])

    def visible(side: int, places: set[int]) -> list[int]:
        return sorted(p for p in places if not texts[side][p].isspace())

    return Side(visible(0, whole[0]), visible(0, fine[0])), Side(visible(1, whole[1]), visible(1, fine[1]))


def overlapping(spans: Sequence[tuple[int, int]], places: Sequence[int]) -> list[int]:
    """Which of the half-open character spans hold at least one of the places: their numbers, in order."""
    if not places or not spans:
        return []
    size = max(max(end for _, end in spans), max(places) + 1)
    marked = np.zeros(size + 1, dtype=np.int64)
    marked[np.asarray(places) + 1] = 1
    before = marked.cumsum()
    edges = np.asarray(spans)
    return np.flatnonzero(before[edges[:, 1]] > before[edges[:, 0]]).tolist()
