"""Prepared rows with negatives, and their rendering: a text is token ids with spaces between them."""

from __future__ import annotations

from typing import Any

import numpy as np

from helpers import PROCESSOR, MemoryRows, OpenAll, tiny_llama
from luthier.engine.distributed import Processes
from luthier.engine.optimizer import open_parameters
from luthier.engine.session import Session
from luthier.engine.stack import Setup, Stack
from luthier.tasks.causal_lm import CausalLM

START, END = 1, 2


def ids_of(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def rendered(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    prompt = [START, *ids_of(row["prompt"])]
    ids = [*prompt, *ids_of(row["completion"]), END]
    return ids, [len(prompt), len(ids)]


def render(rows: list[dict[str, Any]]) -> Any:
    found = [rendered(row) for row in rows]
    columns = {
        "input_ids": [np.asarray(ids, dtype=np.int32) for ids, _ in found],
        "spans": [np.asarray(spans, dtype=np.int32) for _, spans in found],
    }
    return CausalLM(PROCESSOR).collate(columns, range(len(rows)))


class PairRows(MemoryRows):
    """Pairs with whatever further columns they have."""

    def __init__(self, pairs: list[dict[str, Any]]) -> None:
        super().__init__([rendered(pair) for pair in pairs])
        self.pairs = [
            {"kind": "pair", "separator": None, "system": None, "messages": None, "tools": None, "row": i + 1, **pair}
            for i, pair in enumerate(pairs)
        ]

    def fetch(self, index: Any) -> dict[str, list[Any]]:
        index = [int(i) for i in index]
        names = dict.fromkeys(name for pair in self.pairs for name in pair)
        return {**super().fetch(index), **{name: [self.pairs[i].get(name) for i in index] for name in names}}


def random_pairs(count: int = 24, *, negatives: int = 4, seed: int = 0) -> PairRows:
    rng = np.random.default_rng(seed)

    def text(low: int, high: int) -> str:
        return " ".join(map(str, rng.integers(3, 64, size=int(rng.integers(low, high))).tolist()))

    return PairRows(
        [
            {"prompt": text(1, 6), "completion": text(1, 6), "negatives": [text(0, 6) for _ in range(negatives)]}
            for _ in range(count)
        ]
    )


def pair_session(objective: Any, *, model: Any = None, fingerprint: str = "", processes: Any = None) -> Session:
    parameters = [OpenAll()]
    stack = Stack(
        objective=objective, parameters=parameters, named={"objective": objective, "parameters": parameters[0]}
    )
    model = open_parameters(model or tiny_llama(), stack, Setup(seed=0, task="causal-lm", processor=PROCESSOR))
    return Session(
        model=model,
        task=CausalLM(PROCESSOR),
        processor=PROCESSOR,
        stack=stack,
        processes=processes or Processes(device="cpu"),
        fingerprint=fingerprint,
        render=render,
    )
