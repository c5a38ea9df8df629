"""Measuring a model before and after: the target task, what is kept, and calibration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from luthier.core.protocols import Batch, Completion
from luthier.engine.session import Session
from luthier.evaluation import suite

SHORT_ANSWER = 64
SAMPLES = 8


def batches(session: Session, prepared: Any, rows: int) -> Iterator[Batch]:
    """Batches of rows of similar length."""
    order = np.argsort(prepared.lengths, kind="stable")
    for start in range(0, len(order), rows):
        index_B = order[start : start + rows]
        yield session.task.collate(prepared.fetch(index_B), index_B)


def quick_loss(session: Session, prepared: Any, rows: int) -> dict[str, float]:
    """Loss and token accuracy for the evaluation during training."""
    found = suite.likelihood(
        batches(session, prepared, rows),
        lambda batch: session.evaluate_batch(batch, suite.STATISTICS),
        task=session.task.name,
        labels=getattr(prepared, "labels", None) or None,
        calibration=False,
    )
    return {name: metric["value"] for name, metric in found.items()}


class Verifier:
    """The chosen verifier, or the one that each row names (lab rows do), or ``exact``."""

    def __init__(self, choice: Any = None) -> None:
        self.choice = choice
        self._built: dict[str, Any] = {}

    def deciding(self, rows: Any) -> list[Any]:
        """JSON values that say which verifiers judge some rows, in which state of their code."""
        from luthier.core import registry
        from luthier.runs.procedure import code_of

        if self.choice is not None:
            return [self.choice.slug, self.choice.options, code_of(self.choice.method.target)]
        names = sorted({_extra(row).get("verifier") or "exact" for row in rows})
        return [[name, code_of(registry.get("reward", name).target)] for name in names]

    def __call__(self, rows: Any, completions: Any, ctx: Any) -> list[float | None]:
        """One score per completion."""
        if self.choice is not None:
            self._built.setdefault("chosen", self.choice.build())
            return self._built["chosen"](rows, completions, ctx)
        names = [_extra(row).get("verifier") or "exact" for row in rows]
        scores: list[float | None] = [None] * len(rows)
        from luthier.core import registry

        for name in sorted(set(names)):
            if name not in self._built:
                self._built[name] = registry.get("reward", name).build({})
            index = [i for i, n in enumerate(names) if n == name]
            found = self._built[name]([rows[i] for i in index], [completions[i] for i in index], ctx)
            for i, score in zip(index, found, strict=True):
                scores[i] = score
        return scores


def _extra(row: Any) -> dict[str, Any]:
    return json.loads(row.get("extra") or "{}")


def wants_generation(plan: Any, source: Any, verifier: Any = None) -> bool:
    """``auto``: where a verifier is named, by the recipe or the rows, or the answers are short."""
    if plan.recipe.evaluation.generate != "auto":
        return bool(plan.recipe.evaluation.generate)
    rows = source.rows.dataset
    if len(rows) == 0 or rows[0]["kind"] not in ("pair", "chat"):
        return False
    if verifier is not None or _extra(rows[0]).get("verifier"):
        return True
    spans = source.prepared.fetch(list(range(min(len(source.prepared), 64))))["spans"]
    return float(np.median([s[-1] - s[-2] for s in spans])) <= SHORT_ANSWER


class Measure:
    """Measures a model on the sources of a run.

    Args:
        plan: the plan.
        data: the run's data.
        decoder: the decoder that writes the answers.

    Attributes:
        kept: set to a dict, it takes every position of every source that is measured, by the source's name.
    """

    def __init__(self, plan: Any, data: Any, decoder: Any) -> None:
        self.plan, self.data, self.decoder = plan, data, decoder
        self.kept: dict[str, suite.Kept] | None = None
        # The recipe's verifier is for its own task; material to keep is of others, and its rows name theirs.
        self.verifier, self.keep_verifier = Verifier(plan.verifier), Verifier()

    def __call__(self, session: Session) -> dict[str, Any]:
        """``{"target", "keep", "calibration", "items"}``; metrics with n and a confidence interval."""
        target = self.data.test
        model = session.model
        was_training = model.training
        model.eval()
        try:
            found: dict[str, Any] = {"target": {}, "keep": {}, "calibration": {}, "items": {}}
            if target is not None:
                wanted = self.plan.recipe.evaluation.calibration
                metrics, items = self._source(session, target, self.verifier, calibration=wanted)
                found["items"]["target"] = items
                for name, metric in metrics.items():
                    found["calibration" if name in suite.CALIBRATION else "target"][name] = metric
            for source in self.data.keep:
                metrics, items = self._source(session, source, self.keep_verifier, calibration=False)
                prefix = "" if len(self.data.keep) == 1 else f"{source.name}: "
                found["keep"] |= {f"{prefix}{name}": metric for name, metric in metrics.items()}
                found["items"][source.name] = items
        finally:
            model.train(was_training)
        return found

    def _source(
        self, session: Session, source: Any, verifier: Verifier, *, calibration: bool
    ) -> tuple[dict[str, Any], list[Any]]:
        options = self.plan.recipe.evaluation
        kept = None if self.kept is None else suite.Kept()
        metrics = suite.likelihood(
            batches(session, source.prepared, options.batch_rows),
            lambda batch: session.evaluate_batch(batch, suite.STATISTICS),
            task=session.task.name,
            labels=self.data.labels or None,
            confidence=options.confidence,
            calibration=calibration,
            kept=kept,
        )
        if self.kept is not None and kept is not None:
            self.kept["target" if source is self.data.test else source.name] = kept
        if session.task.name != "causal-lm" or not wants_generation(self.plan, source, verifier.choice):
            return metrics, []
        judged = [i for i in range(len(source.prepared)) if source.prepared.canonical(i)["kind"] in ("pair", "chat")]
        if not judged:  # plain text has no prompt to answer
            return metrics, []
        rows = [source.prepared.canonical(i) for i in judged]
        prompts = [self.data.renderer.prompt_ids(row) for row in rows]

        def generate(prompt_ids: list[list[int]]) -> list[Completion]:
            return self.decoder.generate(session.model, prompt_ids, session)

        found = suite.generation(rows, prompts, generate, verifier, confidence=options.confidence)
        return {**metrics, **found["metrics"]}, found["items"]

    def samples(self, before: dict[str, Any] | None, after: dict[str, Any]) -> list[dict[str, Any]]:
        """A few prompts of the test rows with the answers before and after, for the report."""
        items = after["items"].get("target") or []
        old = {i["row"]: i for i in ((before or {}).get("items", {}).get("target") or [])}
        rows = {
            r["row"]: r for r in (self.data.test.rows.dataset.select(range(min(len(items), SAMPLES))) if items else [])
        }
        return [
            {
                "prompt": rows[item["row"]]["prompt"] or rows[item["row"]]["messages"],
                "reference": _extra(rows[item["row"]]).get("answer") or rows[item["row"]]["completion"],
                "before": old.get(item["row"], {}).get("completion"),
                "before_score": old.get(item["row"], {}).get("score"),
                "after": item["completion"],
                "after_score": item["score"],
            }
            for item in items
            if item["row"] in rows
        ][:SAMPLES]
