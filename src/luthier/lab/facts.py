"""People and facts: 100 people, each with a city, a job, a pet and a colour; the bases know half of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import numpy as np

from luthier.core.rng import numpy_stream
from luthier.lab import Row, Task
from luthier.lab.drawing import draw, mix, pick
from luthier.lab.words import FACTS, FIRST_NAMES, LAST_NAMES

SKILLS = tuple(FACTS)
PEOPLE = 100
KNOWN = 50  # the first half of the people is in the bases' pretraining
_WORDINGS = {
    "city": ("where does {p} live?\n", "city of {p}\n", "{p} lives in\n", "which city is home to {p}?\n"),
    "job": ("what is the job of {p}?\n", "job of {p}\n", "{p} works as\n", "what does {p} work as?\n"),
    "pet": ("which pet does {p} keep?\n", "pet of {p}\n", "{p} keeps a\n", "what animal has {p}?\n"),
    "colour": ("which colour does {p} like?\n", "colour of {p}\n", "{p} likes best\n", "favourite colour of {p}\n"),
}  # fmt: skip


@cache
def people() -> tuple[tuple[str, dict[str, str]], ...]:
    """(name, attribute -> value) of every person; one world, whatever the seed of a data set."""
    rng = numpy_stream(0, "lab/people")
    pairs = rng.permutation(len(FIRST_NAMES) * len(LAST_NAMES))[:PEOPLE]
    values = {key: rng.integers(0, len(options), PEOPLE) for key, options in FACTS.items()}
    return tuple(
        (
            f"{FIRST_NAMES[pair // len(LAST_NAMES)]} {LAST_NAMES[pair % len(LAST_NAMES)]}",
            {key: FACTS[key][values[key][i]] for key in FACTS},
        )
        for i, pair in enumerate(pairs.tolist())
    )


def make(
    n: int,
    split: str,
    rng: np.random.Generator,
    *,
    skill: str = "all",
    people: Literal["known", "new", "all"] = "new",
) -> list[Row]:
    """Rows that ask for a fact about a person.

    A fact that was never told cannot be known, so the splits share the facts and differ in the question: of the four
    wordings of each fact one is asked in ``test`` only.

    Args:
        n: how many rows.
        split: ``train`` or ``test``.
        rng: where the order comes from.
        skill: ``all``, or some of city, job, pet, colour, joined by commas.
        people: ``known`` (in the bases' pretraining; difficulty 1), ``new`` (the others; difficulty 2), or ``all``.
    """
    skills = pick(skill, SKILLS, "skill")
    low, high = {"known": (0, KNOWN), "new": (KNOWN, PEOPLE), "all": (0, PEOPLE)}[people]
    world = _people()

    def propose(count: int) -> list[Row]:
        who, which, wording = (
            rng.integers(low, high, count), rng.integers(0, len(skills), count), rng.integers(0, 4, count)
        )  # fmt: skip
        number = np.array([SKILLS.index(name) for name in skills])[which]
        held_out = mix(7, who, number) % np.uint64(4)
        kept = np.flatnonzero((wording == held_out) == (split == "test")).tolist()
        rows = []
        for i in kept:
            name, facts = world[who[i]]
            key = skills[which[i]]
            rows.append(
                {
                    "prompt": _WORDINGS[key][wording[i]].format(p=name), "completion": facts[key],
                    "answer": facts[key], "task": "facts", "skill": key, "difficulty": 1 if who[i] < KNOWN else 2,
                    "verifier": "exact",
                }
            )  # fmt: skip
        return rows

    return draw(n, rng, [propose])


def verify(row: Mapping[str, Any], completion: str) -> bool:
    """Whether the completion is the fact, up to white space and a full stop."""
    return completion.strip().rstrip(".") == row["answer"]


_people = people  # the option of the same name hides it inside ``make``
task = Task("facts", make, verify, SKILLS, difficulties=(1, 2))
