"""Truthfulness of a model: how often it is right, abstains and makes something up, before and after the run.

    Acc = correct / n,  Unc = abstentions / n,  Hall = 1 - Acc - Unc
    T   = w1 Acc + w2 Unc - w3 Hall,             w = (1, 0, 1) by default

Answers are those of the evaluation on ``data.test``, labelled by the options of the reward ``truth-rl``. T alone hides
a model that always abstains (T = 0), so the parts stand beside it. Rows that the data stage ``truth-rl`` has flagged as
out of knowledge are also shown by themselves.

Paper: "TruthRL: Incentivizing Truthful LLMs via Reinforcement Learning", 2025, arXiv 2509.25760.

Example::

    analysis: [truth-rl: {reward: {form: whole}}]
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Table
from luthier.core.registry import analysis
from luthier.functional.answers import column
from luthier.functional.judging import built
from luthier.functional.truthfulness import rates

SLUG, FLAG = "truth-rl", "out_of_knowledge"


@analysis(
    "truth-rl",
    paper="TruthRL: Incentivizing Truthful LLMs via Reinforcement Learning, 2025, arXiv 2509.25760",
)
class Truthfulness:
    """Truthfulness: accuracy, abstention and hallucination of a model, before and after the run."""

    def __init__(
        self,
        *,
        reward: Annotated[
            dict[str, Any] | None, Field(description="options of the reward truth-rl, by which answers are labelled")
        ] = None,
        weights: Annotated[
            tuple[float, float, float], Field(description="w of accuracy, abstention and hallucination in T")
        ] = (1.0, 0.0, 1.0),
    ) -> None:
        self.judge, self.weights = built({SLUG: reward or {}}, SLUG)[1], weights

    def run(self, runs: Iterable[Any], ctx: Any) -> Table:
        """One line for each model and group of questions.

        Raises:
            UserError: the run has no test rows, or its answers were not generated.
        """
        if ctx.data.test is None:
            raise UserError(f"{SLUG}: the analysis is of answers to data.test; name some.", where="analysis")
        rows = {row["row"]: row for row in ctx.data.test.rows.dataset}
        lines = []
        for run in runs:
            for when in ("before", "after"):
                items = ((run.metrics.get(when) or {}).get("items") or {}).get("target")
                if items:
                    lines += self._lines(when, items, rows, ctx)
        if not lines:
            raise UserError(f"{SLUG}: no answers were generated; set evaluation.generate: true.", where="analysis")
        names = ("accuracy", "abstention", "hallucination", "hallucination_given", "truthfulness")
        return Table(
            title="Truthfulness",
            columns=("model", "questions", "n", *names),
            rows=tuple(lines),
            units={**dict.fromkeys(names[:4], "share"), "n": "questions"},
            direction={"accuracy": "higher", "hallucination": "lower", "truthfulness": "higher"},
            notes=("T = {:g} accuracy + {:g} abstention - {:g} hallucination".format(*self.weights),),
        )

    def _lines(self, when: str, items: list[Any], rows: dict[Any, Any], ctx: Any) -> list[tuple[Any, ...]]:
        asked = [rows[item["row"]] for item in items]
        labels = self.judge.labels(asked, [item["completion"] for item in items], ctx)
        flags = [column(row, FLAG) for row in asked]
        groups: list[tuple[str, Any]] = [("all", None)]
        if any(isinstance(flag, bool) for flag in flags):
            groups += [("out of knowledge", True), ("within knowledge", False)]
        correct, abstain, wrong = self.weights
        lines = []
        for name, wanted in groups:
            some = [one for one, flag in zip(labels, flags, strict=True) if wanted is None or flag is wanted]
            found = rates(some, correct=correct, abstain=abstain, wrong=wrong)
            lines.append((when, name, len(some), *found.values()))
        return lines
