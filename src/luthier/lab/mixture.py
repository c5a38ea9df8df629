"""The mixture the bases are pretrained on: stories, strings, easy arithmetic, facts of half the people, feelings.

Its test split is the held-out general material on which the forgetting of a lab base is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from luthier import lab
from luthier.lab import Row, Task

# (task, options, share): what the bases see. Everything else of the lab is new to them.
PARTS: tuple[tuple[str, dict[str, Any], float], ...] = (
    ("arithmetic", {"difficulty": "1", "skill": "add,subtract,chain"}, 0.40),
    ("strings", {"difficulty": "1", "skill": "uppercase,count,first,last,reverse"}, 0.22),
    ("facts", {"people": "known"}, 0.24),
    ("text", {"layout": "pair"}, 0.08),
    ("sentences", {"layout": "pair", "difficulty": "1,2"}, 0.06),
)


def make(n: int, split: lab.Split, rng: np.random.Generator, *, part: str = "all") -> list[Row]:
    """Rows of the mixture as pairs, shuffled.

    Args:
        n: how many rows.
        split: ``train`` or ``test``.
        rng: where everything comes from.
        part: ``all``, or some of the tasks joined by commas, in their proportions.
    """
    from luthier.lab.drawing import pick

    chosen = [p for p in PARTS if p[0] in pick(part, [name for name, _, _ in PARTS], "part")]
    ends = np.round(np.cumsum([share for _, _, share in chosen]) / sum(p[2] for p in chosen) * n).astype(int)
    seed = int(rng.integers(0, 2**31))
    rows: list[Row] = []
    for (name, options, _), end in zip(chosen, ends.tolist(), strict=True):
        if end > len(rows):
            rows += lab.dataset(name, split=split, n=end - len(rows), seed=seed, **options)
    return [rows[i] for i in rng.permutation(len(rows)).tolist()]


def verify(row: Mapping[str, Any], completion: str) -> bool:
    """As the row's own task verifies it."""
    return lab.verify(row["task"], row, completion)


task = Task("mixture", make, verify, skills=tuple(name for name, _, _ in PARTS), rows={"train": 25000, "test": 600})
