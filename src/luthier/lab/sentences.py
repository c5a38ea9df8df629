"""Labelled sentences with controllable label noise: hotel reviews with a feeling, a topic, a person and a place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from luthier.lab import Row, Task
from luthier.lab.drawing import draw, in_split, pick_levels
from luthier.lab.words import BAD, FIRST_NAMES, GOOD, INNS, LAST_NAMES, TOPICS

SKILLS = ("plain", "negation", "contrast")
LABELS = {"feeling": ("negative", "positive"), "topic": tuple(TOPICS)}
_WORDINGS = {
    "feeling": ("{s}\nfeeling?\n", "sentiment of this review: {s}\n", "is this positive or negative? {s}\n"),
    "topic": ("{s}\ntopic?\n", "topic of this review: {s}\n", "what is this about? {s}\n"),
}
_THINGS = tuple((topic, thing) for topic, things in TOPICS.items() for thing in things)


def make(
    n: int,
    split: str,
    rng: np.random.Generator,
    *,
    difficulty: str | int = "all",
    label: Literal["feeling", "topic"] = "feeling",
    noise: Annotated[float, Field(ge=0, le=1)] = 0.0,
    layout: Literal["classification", "pair", "tags"] = "classification",
) -> list[Row]:
    """Labelled sentences.

    Args:
        n: how many rows.
        split: ``train`` or ``test``; no opinion (person, inn, thing, words) occurs in both. Test labels are clean.
        rng: where the words come from.
        difficulty: ``all``, or some of 1 (one opinion), 2 (possibly turned by "not"), 3 (two opinions joined by
            "but", of which the second counts), joined by commas.
        label: ``feeling`` (negative, positive) or ``topic`` (food, room, staff).
        noise: the share of training rows that carry a wrong label, drawn evenly from the others; such rows have
            ``noisy`` true, and ``answer`` keeps the right label.
        layout: ``classification`` (columns text and label), ``pair`` (an instruction and the label as completion), or
            ``tags`` (tokens and their tags: persons and inns in BIO form; noise does not apply).
    """
    levels = pick_levels(difficulty)
    accepted = LABELS[label]

    def propose(count: int) -> list[Row]:
        level = rng.choice(levels, count)
        first, last = rng.integers(0, len(FIRST_NAMES), count), rng.integers(0, len(LAST_NAMES), count)
        inn = rng.integers(0, len(INNS), count)
        thing = rng.integers(0, len(_THINGS), (count, 2))
        good = rng.integers(0, 2, (count, 2)).astype(bool)
        word = rng.integers(0, len(GOOD), (count, 2))
        turned = (rng.integers(0, 2, (count, 2)) == 1) & (level[:, None] == 2)
        form = rng.integers(0, 3, count)
        shift = rng.integers(1, len(accepted), count)
        wrong = rng.random(count) < (noise if split == "train" else 0.0)
        # What the sentence does not show must not decide its split.
        thing[level != 3, 1] = word[level != 3, 1] = 0
        kept = in_split(split, 13, first, last, inn, *thing.T, *word.T)
        rows = []
        for i in np.flatnonzero(kept).tolist():
            opinion = [f"{'not ' if turned[i, k] else ''}{(GOOD if good[i, k] else BAD)[word[i, k]]}" for k in (0, 1)]
            (topic, noun), (_, other) = _THINGS[thing[i, 0]], _THINGS[thing[i, 1]]
            decided = 0
            tokens = [FIRST_NAMES[first[i]], LAST_NAMES[last[i]], "said", "the"]
            if level[i] == 3:
                # The first opinion goes the other way; the second decides.
                opposite = (BAD if good[i, 1] else GOOD)[word[i, 0]]
                tokens += [other, "was", opposite, "but", "the", noun, "was", opinion[1]]
                decided = 1
            else:
                tokens += [noun, "was", *opinion[0].split(" ")]
            tokens += ["at", INNS[inn[i]], "Inn"]
            feeling = bool(good[i, decided]) != bool(turned[i, decided])
            right = int(feeling) if label == "feeling" else accepted.index(topic)
            answer = accepted[right]
            given = accepted[(right + shift[i]) % len(accepted)] if wrong[i] else answer
            about: Row = {
                "task": "sentences", "skill": SKILLS[level[i] - 1], "difficulty": int(level[i]), "answer": answer,
                "noisy": bool(wrong[i]),
            }  # fmt: skip
            text = " ".join(tokens)
            if layout == "classification":
                rows.append({"text": text, "label": given, **about})
            elif layout == "pair":
                prompt = _WORDINGS[label][form[i]].format(s=text)
                rows.append({"prompt": prompt, "completion": given, **about, "verifier": "exact"})
            else:
                tags = ["B-person", "I-person", *["O"] * (len(tokens) - 4), "B-inn", "I-inn"]
                rows.append({"tokens": tokens, "tags": tags, "content": text, **about})
        return rows

    rows = draw(n, rng, [propose], key={"classification": "text", "pair": "prompt", "tags": "content"}[layout])
    for row in rows:
        row.pop("content", None)
    return rows


def verify(row: Mapping[str, Any], completion: str) -> bool:
    """Whether the completion is the right label (also where the row's own label is noise)."""
    return completion.strip().rstrip(".") == row["answer"]


task = Task("sentences", make, verify, SKILLS)
