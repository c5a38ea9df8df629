"""Free text from a grammar with agreement: little stories whose subjects, verbs and pronouns agree in number."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import numpy as np

from luthier.lab import Row, Task
from luthier.lab.drawing import code, draw, in_split, pick_levels
from luthier.lab.words import ADJECTIVES, ANIMALS, MOVES, PLACES, PREPOSITIONS, VERBS

SKILLS = ("story",)


def _subjects(ids: np.ndarray) -> list[str]:
    """Noun phrases for [n, 5] draws: number, adjective, animal, whether a place follows, preposition and place."""
    found = []
    for plural, adjective, animal, placed, where in ids.tolist():
        place = f" {PREPOSITIONS[where % 4]} the {PLACES[where // 4]}" if placed == 0 else ""
        found.append(f"the {ADJECTIVES[adjective]} {ANIMALS[animal][plural]}{place}")
    return found


def _phrases(count: int, rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    bounds = (2, len(ADJECTIVES), len(ANIMALS), 3, len(PREPOSITIONS) * len(PLACES))
    ids = np.stack([rng.integers(0, bound, count) for bound in bounds], axis=1)
    return ids, _subjects(ids)


def stories(count: int, sentences: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """Stories of ``sentences`` [count] sentences, and a content code uint64 for each by its first sentence.

    The first sentence names two groups of animals; in each later one the first group is the subject again (it or
    they), so the number of the first noun decides a verb up to thirty words later.
    """
    subject, subject_text = _phrases(count, rng)
    _, other_text = _phrases(count, rng)
    verb = rng.integers(0, len(VERBS), count)
    move = rng.integers(0, len(MOVES), (count, 2))
    where = rng.integers(0, len(PREPOSITIONS) * len(PLACES), (count, 2))
    texts = []
    for i, (plural, length) in enumerate(zip(subject[:, 0].tolist(), sentences.tolist(), strict=True)):
        text = f"{subject_text[i]} {VERBS[verb[i]][plural]} {other_text[i]}."
        for k in range(length - 1):
            pronoun = "they" if plural else "it"
            place = where[i, k]
            text += f" {pronoun} {MOVES[move[i, k]][plural]} {PREPOSITIONS[place % 4]} the {PLACES[place // 4]}."
        texts.append(text)
    return np.array([code(text.partition(".")[0]) for text in texts], dtype=np.uint64), texts


def make(
    n: int,
    split: str,
    rng: np.random.Generator,
    *,
    difficulty: str | int = "all",
    layout: Literal["text", "pair"] = "text",
) -> list[Row]:
    """Stories.

    Args:
        n: how many rows.
        split: ``train`` or ``test``; no first sentence occurs in both.
        rng: where the words come from.
        difficulty: ``all``, or some of 1, 2, 3 (sentences), joined by commas.
        layout: ``text``, or ``pair``: the first three words are the prompt and the rest is the completion.
    """
    levels = pick_levels(difficulty)

    def propose(count: int) -> list[Row]:
        sentences = rng.choice(levels, count)
        content, texts = stories(count, sentences, rng)
        rows = []
        for i in np.flatnonzero(in_split(split, 11, content)).tolist():
            about = {"task": "text", "skill": "story", "difficulty": int(sentences[i])}
            if layout == "text":
                rows.append({"text": texts[i], **about})
            else:
                words = texts[i].split(" ")
                opening, rest = " ".join(words[:3]), " " + " ".join(words[3:])
                rows.append({"prompt": opening, "completion": rest, "verifier": "lab", "content": texts[i], **about})
        return rows

    rows = draw(n, rng, [propose], key="text" if layout == "text" else "content")
    for row in rows:
        row.pop("content", None)
    return rows


@cache
def _pattern() -> re.Pattern[str]:
    def any_of(words: Any) -> str:
        return f"(?:{'|'.join(words)})"

    place = f"{any_of(PREPOSITIONS)} the {any_of(PLACES)}"
    phrase = {k: f"the {any_of(ADJECTIVES)} {any_of(a[k] for a in ANIMALS)}(?: {place})?" for k in (0, 1)}
    either = f"(?:{phrase[0]}|{phrase[1]})"
    story = [
        f"{phrase[k]} {any_of(v[k] for v in VERBS)} {either}\\.(?: {pronoun} {any_of(m[k] for m in MOVES)} {place}\\.)*"
        for k, pronoun in ((0, "it"), (1, "they"))
    ]
    return re.compile(f"(?:{story[0]}|{story[1]})")


def verify(row: Mapping[str, Any], completion: str) -> bool:
    """Whether the opening and the completion make a story of the grammar, agreement of number included."""
    return bool(_pattern().fullmatch((row.get("prompt") or "") + completion.rstrip()))


task = Task("text", make, verify, SKILLS)
