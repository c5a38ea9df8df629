"""The rows of ``objectives.py``: those of ``material.py``, with what some methods read beside or in place of them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]
NEGATIVES = 4
TOOLS = ("get_answer", "get_answers", "get_time", "search")
LABELS = ("count", "price", "time", "distance")


@dataclass(frozen=True)
class Rows:
    """One kind of rows.

    Attributes:
        task: what the model is used for on them.
        make: all rows of this kind from the prompts and completions of the others.
        data: keys of the recipe's data section, for plain SFT too.
    """

    task: str
    make: Callable[[list[Row]], Iterator[Row]]
    data: dict[str, Any] = field(default_factory=dict)

    def __call__(self, kind: str, folder: Path) -> None:
        """Write ``<kind>.jsonl`` beside ``rows.jsonl``."""
        pairs = [json.loads(line) for line in (folder / "rows.jsonl").open(encoding="utf-8")]
        with (folder / f"{kind}.jsonl").open("w", encoding="utf-8") as file:
            for row in self.make(pairs):
                file.write(json.dumps(row) + "\n")


def pairs(rows: list[Row]) -> Iterator[Row]:
    """With answers to other questions as negatives, a score, and both texts once more with every word turned round."""
    rng = random.Random(0)
    for row in rows:
        others = [other["completion"].strip() for other in rng.sample(rows, NEGATIVES + 1) if other is not row]
        foreign = {name: re.sub(r"\w+", lambda word: word[0][::-1], row[name]) for name in ("prompt", "completion")}
        scored = {"negatives": others[:NEGATIVES], "ref_score": rng.gauss(-2.0, 0.5)}
        yield {**row, **scored, "other_answer": foreign["completion"], "english_prompt": foreign["prompt"]}


def variants(rows: list[Row]) -> Iterator[Row]:
    """With the same answer, wrong in one number."""
    for row in rows:
        wrong = re.sub(r"\d+", lambda found: str(int(found[0]) + 1), row["completion"], count=1)
        yield {**row, "variants": [wrong]}


def tools(rows: list[Row]) -> Iterator[Row]:
    """Calls of one of four tools whose names begin alike, with the completion as an argument."""
    rng = random.Random(0)
    parameters = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}
    offered = [
        {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}} for name in TOOLS
    ]
    for row in rows:
        call = {"name": rng.choice(TOOLS), "arguments": {"answer": row["completion"]}}
        said = {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}
        yield {"messages": [{"role": "user", "content": row["prompt"]}, said], "tools": offered}


def labels(rows: list[Row]) -> Iterator[Row]:
    """Questions and completions as one text with a label."""
    rng = random.Random(0)
    for row in rows:
        yield {"text": row["prompt"] + row["completion"], "label": rng.choice(LABELS)}


WRITERS = {
    "pairs": Rows("causal-lm", pairs),
    "variants": Rows(
        "causal-lm",
        variants,
        {"stages": [{"fault-aware-ft": {"source": "variants", "verify": False, "language": "text"}}]},
    ),
    "tools": Rows("causal-lm", tools, {"stages": ["tl-training"], "template": "plain", "max_length": 2048}),
    "labels": Rows("sequence-classification", labels),
}
