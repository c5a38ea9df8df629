"""The rows of ``objectives.py``: those of ``material.py``, with what some methods read beside or in place of them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
NEGATIVES = 4
LABELS = ("count", "price", "time", "distance")


@dataclass(frozen=True)
class Rows:
    """One kind of rows.

    Attributes:
        task: what the model is used for on them.
        make: all rows of this kind from the prompts and completions of the others.
    """

    task: str
    make: Callable[[list[Row]], Iterator[Row]]

    def __call__(self, kind: str, folder: Path) -> None:
        """Write ``<kind>.jsonl`` beside ``rows.jsonl``."""
        pairs = [json.loads(line) for line in (folder / "rows.jsonl").open(encoding="utf-8")]
        with (folder / f"{kind}.jsonl").open("w", encoding="utf-8") as file:
            for row in self.make(pairs):
                file.write(json.dumps(row) + "\n")


def pairs(rows: list[Row]) -> Iterator[Row]:
    """With answers to other questions as negatives."""
    rng = random.Random(0)
    for row in rows:
        others = [other["completion"].strip() for other in rng.sample(rows, NEGATIVES + 1) if other is not row]
        yield {**row, "negatives": others[:NEGATIVES]}


def labels(rows: list[Row]) -> Iterator[Row]:
    """Questions and completions as one text with a label."""
    rng = random.Random(0)
    for row in rows:
        yield {"text": row["prompt"] + row["completion"], "label": rng.choice(LABELS)}


WRITERS = {
    "pairs": Rows("causal-lm", pairs),
    "labels": Rows("sequence-classification", labels),
}
