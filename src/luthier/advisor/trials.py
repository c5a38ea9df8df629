"""The race's runner over the trials of ``luthier compare``, which are stored, so that the final comparison has them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.advisor.race import SFT, Progress
from luthier.comparison.entries import parse
from luthier.comparison.pools import LocalPool
from luthier.comparison.run import Comparison
from luthier.comparison.trial import clean, prepare, reason, trial
from luthier.core.registry import TOKEN_TASKS

POLL_SECONDS = 0.1


class TrialRunner:
    """Runs entries of a recipe as trials with the recipe's own seed.

    Args:
        recipe: the recipe that all entries start from, with ``data.select``, by which they are ranked.
        root: the comparison's folder, where trials are stored.
    """

    def __init__(self, recipe: Mapping[str, Any], root: Path) -> None:
        self.recipe, self.root, self.pool = recipe, root, LocalPool()
        self._comparisons: dict[tuple[str, float], Comparison] = {}
        self._steps: dict[tuple[str, float], int] = {}

    def comparison(self, entry: str, length: float = 1.0) -> Comparison:
        """The comparison of one entry with plain SFT, which plans it.

        Raises:
            UserError: the entry cannot be planned.
        """
        key = (entry, length)
        if key not in self._comparisons:
            methods = [] if entry == SFT else [entry]
            self._comparisons[key] = Comparison(
                shortened(self.recipe, length), methods=methods, seeds=1, output=self.root
            )
        return self._comparisons[key]

    def plan(self, entry: str, length: float) -> Any:
        """The plan of an entry with the first seed."""
        comparison = self.comparison(entry, length)
        name = SFT if entry == SFT else comparison.entries[0].name
        return comparison.plans[name, comparison.seeds[0]]

    def steps(self, entry: str, length: float) -> int:
        """Optimiser steps of an entry over a share of the recipe's epochs."""
        from luthier.runs.api import check

        key = (entry, length)
        if key not in self._steps:
            self._steps[key] = int(check(self.plan(entry, length))["steps"])
        return self._steps[key]

    def group(self, entry: str) -> str:
        """The entry's methods where it changes only ``training``; else the entry itself."""
        if entry == SFT:
            return SFT
        (parsed,) = parse([entry])
        only_training = all(change.startswith("training.") for change in parsed.overrides)
        return parsed.name.partition("[")[0] if only_training else parsed.name

    def run_to(self, entry: str, step: int, length: float) -> Progress:
        """Go on with an entry's trial, in a process of its own."""
        started = time.perf_counter()
        plan = self.plan(entry, length)
        wanted = trial(entry, plan)
        folder = wanted.folder(self.root)
        before = _records(folder)
        prepare(wanted, self.root, threads=self.comparison(entry, length).threads, alone=True, until=step)
        handle = self.pool.start(folder, threads=self.comparison(entry, length).threads, alone=True)
        try:
            while (status := self.pool.poll(handle)) is None:
                time.sleep(POLL_SECONDS)
        finally:
            self.pool.stop([handle])
        seconds = time.perf_counter() - started
        done = status == 0
        records = _records(folder)
        train = [r for r in records if r["split"] == "train"]
        fresh = [r for r in train if r["step"] > max((b["step"] for b in before), default=0)]
        return Progress(
            step=int(train[-1]["step"]) if train else 0,
            score=_score(records, plan.task) if done else None,
            seconds=seconds,
            training_seconds=sum(r["tokens"] / r["tokens_per_second"] for r in fresh if r["tokens_per_second"]),
            records=train,
            failed="" if done else reason(folder),
        )

    def finish(self) -> None:
        """Delete what only going on would need."""
        for folder in (self.root / "trials").glob("*"):
            clean(folder, keep_model=False)


def shortened(recipe: Mapping[str, Any], length: float) -> dict[str, Any]:
    """The recipe over a share of its epochs."""
    training = dict(recipe["training"])
    return {**recipe, "training": {**training, "epochs": training["epochs"] * length}}


def _records(folder: Path) -> list[dict[str, Any]]:
    """What the trial logged so far; a last line cut short by a kill is left out."""
    from luthier.runs.report import read_metrics

    finished, unfinished = folder / "metrics.jsonl", folder / "run" / "metrics.jsonl"
    return read_metrics(finished if finished.is_file() else unfinished)


def _score(records: list[dict[str, Any]], task: str) -> float | None:
    """The accuracy of the last evaluation on the held-out rows: of tokens, or of labels."""
    name = "token_accuracy" if task in TOKEN_TASKS else "accuracy"
    found = [r for r in records if r["split"] == "eval" and r.get(name) is not None]
    return float(found[-1][name]) if found else None
