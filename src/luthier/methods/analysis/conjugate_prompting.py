"""Was a capability lost in fine-tuning, or does the model only no longer choose it? Ask again in another surface.

    forgetting(c, t) = acc_base(c, t) - acc_tuned(c, t)
    recovery(c) = 1 - forgetting(c, t*) / forgetting(c, identity)

Each capability c is asked with its prompts as they are and under each transform t; answers are transformed back and
judged. t* is chosen on dev items (``dev_share``), the index and its bootstrap interval are of the others. Verdict:
``suppressed`` when the interval lies above 0.25, ``lost`` when it lies below, else ``unclear``. Both accuracies stand
beside it, for a transform lowers the base's too, and log p of the prompt per character under both models, which says
how far T(x) lies from the fine-tuning data.

``tasks: test`` asks the test rows, grouped by their column ``group``; ``ambiguity`` asks the paper's four cells of
solved examples against instructions in ``languages`` (a language is a transform of the English prompts there). Judge
several lengths of fine-tuning before a conclusion: long ones really forget. ``refusals`` are patterns of refusing
answers, whose share under both models is shown for the user's own prompts.

Paper: "Understanding Catastrophic Forgetting in Language Models via Implicit Inference", ICLR 2024, arXiv 2309.10105.
Official repository: kothasuhas/understanding-forgetting.

Example::

    analysis: [conjugate-prompting: {transforms: [rot13, swap-case], group: skill}]
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Table
from luthier.core.registry import analysis
from luthier.core.rng import numpy_stream
from luthier.functional.ambiguity import LANGUAGES, starts_with, suite
from luthier.functional.answers import column, reference_texts
from luthier.functional.conjugation import (
    IDENTITY,
    Conjugation,
    conjugation,
    recovery,
    round_trip_failures,
    with_answers,
)
from luthier.functional.statistics import bootstrap
from luthier.functional.target_rewriting import asked, question_of

SLUG = "conjugate-prompting"
Spec = str | dict[str, Any] | list[str | dict[str, Any]]
COLUMNS = (
    "run", "task", "transform", "n", "base", "tuned", "forgetting", "low", "high", "log p base", "log p tuned",
    "log ratio", "refusals base", "refusals tuned", "recovery", "verdict",
)  # fmt: skip
Row = dict[str, Any]
Judge = Callable[[Sequence[Row], Sequence[str]], np.ndarray]


@analysis(
    "conjugate-prompting",
    example={"transforms": ["swap-case"], "n_boot": 20},
    tasks=("causal-lm",),
    paper="Understanding Catastrophic Forgetting in Language Models via Implicit Inference, ICLR 2024, arXiv "
    "2309.10105",
)
class ForgettingDiagnosis:
    """Was a capability lost in fine-tuning or only suppressed: how much comes back under transformed prompts."""

    def __init__(
        self,
        *,
        transforms: Annotated[
            list[Spec] | None, Field(min_length=1, description="as the decoder's transform; identity is always there")
        ] = None,
        tasks: Annotated[
            Literal["test", "ambiguity"], Field(description="the test rows, or examples against instructions")
        ] = "test",
        group: Annotated[str | None, Field(description="test: the column that names a row's capability")] = None,
        languages: Annotated[
            list[str] | None, Field(description="ambiguity: further languages that the prompts are asked in")
        ] = None,
        rows: Annotated[int, Field(ge=4, description="prompts of each capability, the dev items among them")] = 100,
        dev_share: Annotated[float, Field(gt=0, lt=1, description="share of the items that choose t*")] = 0.3,
        keeps: Annotated[
            float, Field(ge=0, le=1, description="t* leaves the base at least this share of its accuracy")
        ] = 0.5,
        n_boot: Annotated[int, Field(ge=1, description="resamples of the intervals")] = 2000,
        confidence: Annotated[float, Field(gt=0, lt=1, description="of the intervals")] = 0.95,
        refusals: Annotated[
            list[str] | None, Field(min_length=1, description="patterns that a refusing answer matches")
        ] = None,
        max_new_tokens: Annotated[
            int | None, Field(ge=1, description="longest answer; by default the recipe's, ambiguity: 10")
        ] = None,
        seed: Annotated[int, Field(ge=0, description="another draw of prompts and dev items")] = 0,
    ) -> None:
        made = [conjugation(t) for t in transforms or ["leetspeak", "pig-latin", "rot13", "swap-case"]]
        self.transforms = [IDENTITY, *(t for t in made if t.name != "identity")]
        if unknown := [name for name in languages or [] if name not in LANGUAGES]:
            raise UserError(f"{SLUG}: there is no language '{unknown[0]}'. Accepted: {', '.join(LANGUAGES)}.")
        try:
            self.refusals = [re.compile(p, re.IGNORECASE) for p in refusals or []]
        except re.error as error:
            raise UserError(f"{SLUG}: refusals: {error}.") from None
        self.tasks, self.group, self.rows, self.dev_share, self.keeps = tasks, group, rows, dev_share, keeps
        self.languages = [name for name in languages or [] if name != "english"]
        self.n_boot, self.confidence, self.seed = n_boot, confidence, seed
        self.options: dict[str, Any] = {"decoding": "greedy", "max_new_tokens": max_new_tokens or 10}
        if tasks == "test" and max_new_tokens is None:
            self.options = {}

    def run(self, runs: Iterable[Any], ctx: Any) -> Table:
        """One table over all runs.

        Raises:
            UserError: no test rows, or answers that cannot be judged.
        """
        lines, notes = [], []
        for run in runs:
            models = {"base": ctx.base, "tuned": ctx.shop.session(run.model)}
            for task, surfaces, judge in self._tasks(ctx):
                found, failed = self._task(surfaces, judge, models)
                lines += [(run.folder.name, task, *line) for line in found]
                if failed:
                    notes.append(f"{task}: not given back by the transform: {', '.join(failed[:5])} ({len(failed)})")
        return Table(
            title="Lost or suppressed: capabilities under transformed prompts",
            columns=COLUMNS,
            rows=tuple(lines),
            units={"log p base": "nats per character", "log p tuned": "nats per character", "forgetting": "share"},
            direction={"tuned": "higher", "forgetting": "lower"},
            notes=tuple(dict.fromkeys(notes)),
        )

    def _tasks(self, ctx: Any) -> Iterable[tuple[str, list[tuple[str, Conjugation, list[Row]]], Judge]]:
        """(capability, its surfaces: (name, way back, rows to ask), what judges answers)."""
        if self.tasks == "ambiguity":
            for function in ("repeat", "capitalise"):
                for query in ("arithmetic", "blank"):
                    surfaces = []
                    for language in ("english", *self.languages):
                        for t in self.transforms if language == "english" else [IDENTITY]:
                            cell = suite(function, query, language=language, count=self.rows, seed=self.seed)
                            # The answers' own transforms are accepted, so that nothing has to be transformed back.
                            rows = [_pair(t.apply(a.prompt), [t.apply(a.in_context)]) for a in cell]
                            surfaces.append((t.name if language == "english" else language, IDENTITY, rows))
                    yield f"{function}, {query}", surfaces, _begins
            return
        if ctx.data.test is None:
            raise UserError(f"{SLUG}: the analysis is of answers to data.test; name some.", where="analysis")
        prepared = ctx.data.test.prepared
        groups: dict[Any, list[Any]] = {}
        for i in range(len(prepared)):
            row = prepared.canonical(i)
            name = "test" if self.group is None else str(column(row, self.group))
            groups.setdefault(name, []).append(row)
        for name, rows in groups.items():
            spaced = np.unique(np.linspace(0, len(rows) - 1, min(self.rows, len(rows))).astype(np.int64))
            some = [rows[int(i)] for i in spaced]
            accepted = sorted({text for row in some for text in reference_texts(row)})
            surfaces = []
            for t in self.transforms:
                try:
                    back = with_answers(t, accepted)
                except ValueError as error:
                    raise UserError(f"{SLUG}: {error}; leave {t.name} out.", where="analysis") from None
                surfaces.append((t.name, back, [asked(row, t.apply(question_of(row))) for row in some]))

            def judge(given: Sequence[Row], texts: Sequence[str], rows: list[Row] = some) -> np.ndarray:
                scores = ctx.shop.measure.verifier(rows, list(texts), None)
                if any(s is None for s in scores):
                    raise UserError(f"{SLUG}: the answers cannot be judged; set evaluation.verifier.", where="analysis")
                return np.array(scores, np.float64)

            yield name, surfaces, judge

    def _task(
        self, surfaces: Sequence[tuple[str, Conjugation, list[Row]]], judge: Judge, models: Mapping[str, Any]
    ) -> tuple[list[tuple[Any, ...]], list[str]]:
        count = len(surfaces[0][2])
        if count < 4:
            raise UserError(f"{SLUG}: a capability with {count} rows cannot be diagnosed; give 4 or more.")
        dev_N = numpy_stream(self.seed, "data", SLUG, "dev").permutation(count) < max(1, round(self.dev_share * count))
        scores: dict[str, dict[str, np.ndarray]] = {name: {} for name in models}
        lines: list[tuple[Any, ...]] = []
        failed: list[str] = []
        for name, back, rows in surfaces:
            likely, refused = {}, {}
            for model, session in models.items():
                session.model.eval()
                texts = [back.invert(one[0].text) for one in session.generate(rows, **self.options)]
                scores[model][name] = judge(rows, texts)
                likely[model] = _log_likelihood(session, rows)
                refused[model] = self._refused(texts)
            failed += round_trip_failures(back, [back.invert(question_of(row)) for row in rows])
            base_N, tuned_N = scores["base"][name], scores["tuned"][name]
            gap = bootstrap(base_N - tuned_N, confidence=self.confidence, samples=self.n_boot, seed=self.seed)
            lines.append((
                name, count, float(base_N.mean()), float(tuned_N.mean()), gap.value, gap.low, gap.high,
                likely["base"], likely["tuned"], likely["tuned"] - likely["base"], refused["base"], refused["tuned"],
                None, None,
            ))  # fmt: skip
        if len(surfaces) > 1:
            found = recovery(
                scores["base"], scores["tuned"], dev_N, keeps=self.keeps, n_boot=self.n_boot,
                confidence=self.confidence, seed=self.seed,
            )  # fmt: skip
            ends = [end if math.isfinite(end) else None for end in (found.low, found.high)]
            lines.append((f"chosen: {found.chosen}", int((~dev_N).sum()), *[None] * 3, *ends, *[None] * 5, found.index,
                          found.verdict))  # fmt: skip
        return lines, failed

    def _refused(self, texts: Sequence[str]) -> float | None:
        if not self.refusals:
            return None
        return float(np.mean([any(p.search(t) for p in self.refusals) for t in texts]))


def _row(kind: str, **values: Any) -> Row:
    """A canonical row."""
    empty = ("text", "prompt", "separator", "completion", "system", "messages", "tools", "extra")
    return {**dict.fromkeys(empty), "kind": kind, "source": SLUG, "row": 0, **values}


def _pair(prompt: str, answers: list[str]) -> Row:
    return _row("pair", prompt=prompt, completion=answers[0], accepted=answers)


def _begins(rows: Sequence[Row], texts: Sequence[str]) -> np.ndarray:
    return np.array([starts_with(t, row["accepted"]) for row, t in zip(rows, texts, strict=True)], np.float64)


def _log_likelihood(session: Any, rows: Sequence[Row]) -> float:
    """Log p of the questions without their answers, per character."""
    total, characters = 0.0, 0
    for start in range(0, len(rows), 16):
        texts = [question_of(row) for row in rows[start : start + 16]]
        batch = session.render([_row("text", text=text) for text in texts])
        logp_N = session.evaluate_batch(batch, ("logp",)).logp_N.double().cpu()
        # That the text ends is no part of it.
        inside_N = batch.target_N.cpu() != session.processor.eos_token_id
        total += float(logp_N[inside_N].sum())
        characters += sum(map(len, texts))
    return total / max(characters, 1)
