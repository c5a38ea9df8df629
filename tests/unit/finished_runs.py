"""A stand-in for the context of analyses: real sessions over small models, and rows that stand in memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from helpers import make_session, random_rows


class Source:
    """A data source of canonical pairs whose texts are token ids."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.memory = random_rows(count, seed=seed)
        self.prepared = self

    def __len__(self) -> int:
        return len(self.memory)

    def canonical(self, index: int) -> dict[str, Any]:
        row = {name: values[index] for name, values in self.memory.columns.items() if name != "negatives"}
        return {**row, "row": index, "source": "rows", "extra": None}


class Context:
    """``base``, ``shop.session(model)``, ``both(run)`` and ``data`` as a finished run has them."""

    def __init__(self, base: Any, rows: int = 6, batch_rows: int = 4) -> None:
        self.base = make_session(base) if isinstance(base, torch.nn.Module) else base
        self.data = SimpleNamespace(train=Source(12, seed=1), test=Source(rows))
        self.verifier = lambda rows, texts, ctx: [None] * len(rows)
        self.shop = SimpleNamespace(
            session=lambda model: make_session(model) if isinstance(model, torch.nn.Module) else model,
            measure=SimpleNamespace(verifier=lambda *given: self.verifier(*given)),
        )
        self.plan = SimpleNamespace(recipe=SimpleNamespace(evaluation=SimpleNamespace(batch_rows=batch_rows)))

    def batches(self) -> list[Any]:
        memory, size = self.data.test.memory, self.plan.recipe.evaluation.batch_rows
        cuts = [np.arange(i, min(i + size, len(memory))) for i in range(0, len(memory), size)]
        return [self.base.task.collate(memory.fetch(index), index) for index in cuts]

    def both(self, run: Any) -> Any:
        tuned = self.shop.session(run.model)
        for batch in self.batches():
            yield batch, *(s.evaluate_batch(batch, ("logp",)) for s in (self.base, tuned))


def finished(model: Any) -> Any:
    """A run that left this model."""
    return SimpleNamespace(folder=Path("runs/one"), model=model)
