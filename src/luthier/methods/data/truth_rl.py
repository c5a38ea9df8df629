"""TruthRL's probe of the knowledge boundary: many samples per question tell what the base model can answer at all.

    c(x) = correct answers among ``samples`` draws from the base
    out_of_knowledge(x) = (c(x) = 0),   empirical_accuracy(x) = c(x) / samples

Both go to the rows, for the reward ``truth-rl`` with ``variant: knowledge``. ``targets`` makes the paper's baselines of
them::

    gold        the rows as they are
    r-tuning    out of knowledge, the answer becomes the abstention (R-Tuning)
    rft         the answer becomes one of the model's own correct ones; rows without any go (rejection sampling)
    pairs       preference rows: a correct answer before an abstention before a wrong one, where both kinds were drawn

Answers are labelled by the options of the reward. Paper: "TruthRL: Incentivizing Truthful LLMs via Reinforcement
Learning", 2025, arXiv 2509.25760.

Example::

    data: {train: questions.jsonl, stages: [truth-rl: {samples: 256}]}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.registry import data_stage
from luthier.functional.discriminative import as_answer, given_answer, with_answer
from luthier.functional.judging import built
from luthier.functional.rows import with_columns
from luthier.functional.truthfulness import PHRASES, Label

if TYPE_CHECKING:
    from datasets import Dataset

SLUG, FLAG, ACCURACY = "truth-rl", "out_of_knowledge", "empirical_accuracy"


@data_stage(
    "truth-rl",
    example={"samples": 2, "max_new_tokens": 8},
    tasks=("causal-lm",),
    paper="TruthRL: Incentivizing Truthful LLMs via Reinforcement Learning, 2025, arXiv 2509.25760",
)
class KnowledgeProbe:
    """Sample the base many times on each question: those it never answers correctly are out of its knowledge."""

    def __init__(
        self,
        *,
        samples: Annotated[int, Field(ge=1, description="draws per question")] = 256,
        temperature: Annotated[float, Field(gt=0, description="of sampling")] = 1.0,
        max_new_tokens: Annotated[int, Field(ge=1, description="longest answer, in tokens")] = 256,
        targets: Annotated[
            Literal["gold", "r-tuning", "rft", "pairs"], Field(description="what the rows teach, see above")
        ] = "gold",
        abstention: Annotated[
            str | None, Field(min_length=1, description="targets: r-tuning, the whole answer; boxed where answers are")
        ] = None,
        reward: Annotated[
            dict[str, Any] | None, Field(description="options of the reward truth-rl, by which answers are labelled")
        ] = None,
    ) -> None:
        self.samples, self.targets = samples, targets
        self.sampling = {"temperature": temperature, "max_new_tokens": max_new_tokens}
        self.judge = built({SLUG: reward or {}}, SLUG)[1]
        phrase = self.judge.phrases[0] if self.judge.phrases else PHRASES[0]
        forms = {"boxed": f"\\boxed{{{phrase}}}", "tag": f"<answer>{phrase}</answer>", "whole": phrase}
        self.abstention = abstention or forms[self.judge.form]

    def run(self, dataset: Dataset, ctx: Any) -> Dataset:
        """The rows with both columns.

        Raises:
            UserError: a row has no gold answer, or no row is left.
        """
        rows = [dataset[i] for i in range(len(dataset))]
        drawn = ctx.generate(rows, samples=self.samples, decoding="sample", **self.sampling)
        labels: list[list[Label]] = [
            self.judge.labels([row] * len(some), [c.text for c in some], ctx)
            for row, some in zip(rows, drawn, strict=True)
        ]
        right = [some.count("correct") for some in labels]
        ctx.report(
            {
                "questions": len(rows),
                "samples": self.samples,
                FLAG: sum(c == 0 for c in right),
                "accuracy": sum(right) / max(len(rows) * self.samples, 1),
                "abstention": sum(some.count("abstain") for some in labels) / max(len(rows) * self.samples, 1),
            }
        )
        found = with_columns(dataset, [{FLAG: c == 0, ACCURACY: c / self.samples} for c in right])
        if self.targets == "gold":
            return found
        made = []
        for row, some, kinds in zip((found[i] for i in range(len(found))), drawn, labels, strict=True):
            texts = {
                kind: as_answer(c.text, given_answer(row)) for c, kind in zip(some[::-1], kinds[::-1], strict=True)
            }
            if (new := self._taught(row, texts)) is not None:
                made.append(new)
        if not made:
            raise UserError(f"{SLUG}: targets: {self.targets} leaves no row; the base has no answers to make it of.")
        return _dataset(found, made)

    def _taught(self, row: dict[str, Any], texts: Mapping[Label, str]) -> dict[str, Any] | None:
        """The row with another answer, or a pair of two of the model's own; None where it cannot be made."""
        if self.targets == "r-tuning":
            unknown = json.loads(row["extra"])[FLAG]
            return with_answer(row, as_answer(self.abstention, given_answer(row))) if unknown else row
        if self.targets == "rft":
            return with_answer(row, texts["correct"]) if "correct" in texts else None
        ranked: tuple[Label, ...] = ("correct", "abstain", "wrong")
        order = [texts[k] for k in ranked if k in texts]
        if len(order) < 2 or row["kind"] != "pair":
            return None
        return {**row, "kind": "preference", "completion": order[0], "rejected": order[1]}


def _dataset(like: Dataset, rows: list[dict[str, Any]]) -> Dataset:
    """Rows with the columns and types of a dataset."""
    from datasets import Dataset

    return Dataset.from_list(rows, features=like.features)
