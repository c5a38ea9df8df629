"""How right and how well calibrated a few-shot classifier is: with and without examples, alone and as an ensemble.

Base and tuned model choose among the labels of the training answers, for test rows without examples (the base: ZSL, a
tuned model: FT) and behind m of them (ICL, SupICL). The E variations of a row are ``draws`` sets of training examples
times the ``templates``. Lines of the table: ``single`` (the mean over the variations of each one's numbers), the rules
``mean_prob``, ``max_prob`` and ``majority_vote``, and as baselines on the first variation ``batch calibration``,
``contextual calibration`` (divided by the probabilities for an input without content), and, with held-out rows in
``data.select``, ``temperature``. Plotting ``macro-F1`` against ``ECE`` shows which lines no other one beats in both.

    ECE = sum_b n_b / N |accuracy_b - confidence_b|             ``bins`` of equal width in the confidence max_c q_c

Paper: "On Task Performance and Model Calibration with Supervised and Self-Ensembled In-Context Learning", 2023, arXiv
2312.13772. Official repository: cambridgeltl/ensembled-sicl.

Example::

    data: {train: rows.jsonl, test: test.jsonl, stages: [calibration-self-ensemble: {m: 3}]}
    analysis: [calibration-self-ensemble: {m: 3, draws: 10}]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Table
from luthier.core.registry import analysis
from luthier.functional.class_ensembles import (
    Quality,
    aggregate,
    batch_calibrated,
    contextual_calibrated,
    quality,
    softmax,
)
from luthier.functional.in_context import (
    Example,
    Score,
    check_labels,
    class_scores,
    example_of,
    query_of,
    templates_of,
    variations,
)
from luthier.functional.target_rewriting import asked, gold_of
from luthier.functional.temperature import fit_temperature

SLUG = "calibration-self-ensemble"
EMPTY = "N/A"
NAMES = {
    "accuracy": "accuracy", "macro_f1": "macro-F1", "micro_f1": "micro-F1", "ece": "ECE", "nll": "NLL",
    "brier": "Brier", "confidence": "confidence", "entropy": "entropy", "entropy_term": "entropy term",
    "overconfidence": "overconfidence",
}  # fmt: skip


@analysis(
    "calibration-self-ensemble",
    example={"m": 1, "draws": 2},
    tasks=("causal-lm",),
    paper="On Task Performance and Model Calibration with Supervised and Self-Ensembled In-Context Learning, 2023, "
    "arXiv 2312.13772",
)
class FewShotCalibration:
    """Accuracy and calibration of a few-shot classifier: with and without examples, alone and as an ensemble."""

    def __init__(
        self,
        *,
        labels: Annotated[
            list[str] | None, Field(min_length=2, description="the classes; by default the training answers")
        ] = None,
        m: Annotated[int, Field(ge=1, description="examples in a prompt that has some")] = 3,
        draws: Annotated[int, Field(ge=1, description="sets of examples for each row (the paper's E)")] = 20,
        templates: Annotated[
            list[str] | None, Field(min_length=1, description="prompts with the slots {examples} and {input}")
        ] = None,
        example: Annotated[str, Field(description="an example, with the slots {input} and {label}")] = "{input}{label}",
        separator: Annotated[str, Field(description="behind each example")] = "\n\n",
        score: Annotated[Score, Field(description="what a label's score is")] = "mean_logprob",
        weighted: Annotated[bool, Field(description="majority_vote: votes count their confidence")] = True,
        min_votes: Annotated[
            float, Field(ge=0, description="majority_vote: with fewer votes for the winner, all variations count")
        ] = 0.0,
        bins: Annotated[int, Field(ge=1, description="of the calibration error")] = 10,
        binary_ece: Annotated[
            Literal["top", "positive"], Field(description="two classes: confidence of the answer, or of the second one")
        ] = "top",
        rows: Annotated[int, Field(ge=1, description="test rows that are classified")] = 200,
        seed: Annotated[int, Field(ge=0, description="another draw of the examples")] = 0,
    ) -> None:
        try:
            self.templates = templates_of(templates or ["{examples}{input}"], example, separator)
        except ValueError as error:
            raise UserError(f"{SLUG}: {error}.") from None
        self.labels, self.m, self.draws, self.score, self.rows, self.seed = labels, m, draws, score, rows, seed
        self.votes = {"weighted": weighted, "min_votes": min_votes}
        self.binned: dict[str, Any] = {"bins": bins, "binary_ece": binary_ece}

    def run(self, runs: Iterable[Any], ctx: Any) -> Table:
        """One table over all runs.

        Raises:
            UserError: no test rows, a row whose answer is none of the labels, too few training rows.
        """
        if ctx.data.test is None:
            raise UserError(f"{SLUG}: the analysis is of answers to data.test; name some.", where="analysis")
        train = _canonical(ctx.data.train)
        pool = [example_of(row) for row in train]
        labels = self.labels or sorted({e.label for e in pool})
        tokens = [ctx.base.processor.encode(name, add_special_tokens=False) for name in labels]
        try:
            check_labels(labels, tokens, self.score)
        except ValueError as error:
            raise UserError(f"{SLUG}: {error}; see the option labels.", where="analysis") from None
        test, select = _canonical(ctx.data.test, self.rows), _canonical(getattr(ctx.data, "select", None), self.rows)
        gold_N = _gold(test, labels)
        lines = []
        for run in runs:
            for name, session in {"base": ctx.base, "tuned": ctx.shop.session(run.model)}.items():
                for m in (0, self.m):

                    def scores(
                        rows: Sequence[Mapping[str, Any]], empty: bool = False, m: int = m, session: Any = session
                    ) -> np.ndarray:
                        return self._scores(session, rows, pool, tokens, m, ctx, empty)

                    logits_ENK = scores(test)
                    for rule, passes, found in self._lines(logits_ENK, gold_N, scores, test, select, labels):
                        values = [float(v) for v in asdict(found).values()]
                        lines.append((run.folder.name, name, m, rule, len(test), passes, *values))
        return Table(
            title="Few-shot classification: score and calibration",
            columns=("run", "model", "examples", "rule", "n", "passes per row", *NAMES.values()),
            rows=tuple(lines),
            units={"NLL": "nats", "entropy": "nats", "accuracy": "share", "ECE": "share"},
            direction={"accuracy": "higher", "macro-F1": "higher", "ECE": "lower", "NLL": "lower", "Brier": "lower"},
            notes=(f"labels: {', '.join(map(repr, labels))}; score {self.score}",),
        )

    def _lines(
        self, logits_ENK: np.ndarray, gold_N: np.ndarray, scores: Any, test: Any, select: Any, labels: Sequence[str]
    ) -> list[tuple[str, int, Quality]]:
        p_ENK = softmax(logits_ENK)
        each = [asdict(quality(p_NK, gold_N, **self.binned)) for p_NK in p_ENK]
        mean = Quality(**{name: float(np.mean([one[name] for one in each])) for name in each[0]})
        found = [("single", 1, mean)]
        for rule in ("mean_prob", "max_prob", "majority_vote"):
            q_NK, best_N = aggregate(p_ENK, rule, **(self.votes if rule == "majority_vote" else {}))  # type: ignore[arg-type]
            found.append((rule, len(p_ENK), quality(q_NK, gold_N, best_N, **self.binned)))
        first_NK = logits_ENK[0]
        found.append(("batch calibration", 1, quality(batch_calibrated(first_NK), gold_N, **self.binned)))
        # An input without content behind the same examples as the row's own.
        neutral_NK = softmax(scores(test, empty=True)[0])
        q_NK = contextual_calibrated(softmax(first_NK), neutral_NK)
        found.append(("contextual calibration", 2, quality(q_NK, gold_N, **self.binned)))
        if select:
            t = fit_temperature(scores(select)[0], _gold(select, labels))
            found.append(("temperature", 1, quality(softmax(first_NK / t), gold_N, **self.binned)))
        return found

    def _scores(
        self,
        session: Any,
        rows: Sequence[Mapping[str, Any]],
        pool: Sequence[Example],
        tokens: Sequence[Sequence[int]],
        m: int,
        ctx: Any,
        empty: bool,
    ) -> np.ndarray:
        """Scores [E, N, K] of the labels behind each variation of each row."""
        prompts = []
        for row in rows:
            query, own = query_of(row), example_of(row)
            try:
                chosen = variations(pool, own.input, self.templates, m, self.draws, self.seed)
            except ValueError as error:
                raise UserError(f"{SLUG}: {error}; give more training rows, or a smaller m.") from None
            for template, examples in chosen[: 1 if empty else None]:
                text = template.write(examples, EMPTY if empty else query)
                prompts.append(ctx.data.renderer.prompt_ids(asked(row, text)))
        logits = class_scores(
            session.model, prompts, tokens, score=self.score, pad_id=session.processor.pad_token_id or 0,
            device=session.device,
        )  # fmt: skip
        return logits.reshape(len(rows), -1, len(tokens)).swapaxes(0, 1)


def _canonical(source: Any, most: int | None = None) -> list[dict[str, Any]]:
    """Canonical rows of a source, evenly spaced where there are more than ``most``."""
    if source is None:
        return []
    count = len(source.prepared)
    index = np.unique(np.linspace(0, count - 1, min(most or count, count)).astype(np.int64))
    return [source.prepared.canonical(int(i)) for i in index]


def _gold(rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> np.ndarray:
    known = {name: index for index, name in enumerate(labels)}
    answers = [gold_of(row) for row in rows]
    if unknown := [a for a in answers if a not in known]:
        raise UserError(
            f"{SLUG}: the answer {unknown[0][:60]!r} is none of the {len(labels)} labels. The analysis is of "
            "classification; name all labels in the option labels.",
            where="analysis",
        )
    return np.array([known[a] for a in answers])
