"""Filter answers that the model doubts, then let what was learnt from the rest correct them (CLEAR, both stages).

    1  c_i for every given answer under the untouched base B; keep c_i >= gamma           auto-filter
    2  train on what was kept                                                              -> M1
    3  M1 writes a candidate for every row; B prefers it or the given answer, with confidence c_J
    4  candidate preferred and c_J > eta: it replaces the given answer                     auto-correct
       otherwise: kept rows stay as they are, the others are dropped
    5  train from B on the result                                                          -> M2

The judge is B, never M1. ``judge: consistency`` needs no judging prompt: the same samples of B that gave c_i say how
consistent the candidate is with them; c_J = 0.5 + (O(candidate) - O(given)) / 2. ``judge: ask`` shows B both answers in
both orders (verdicts that disagree are a tie); c_J is the confidence of that verdict, from k sampled verdicts and from
asking B about it. Further ``rounds`` repeat 3 to 5 with M2, until fewer than 1% of the rows change. Every row stands in
``clear-curation.jsonl`` of the run, least confident first.

Paper: "Automated Data Curation for Robust Language Model Fine-Tuning", ACL 2024, arXiv 2403.12776. It has no code; both
orders, the tie and ``consistency`` are this library's.

Example::

    procedure: {clear-curation: {samples: 5, beta: 1.0}}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Artefact
from luthier.core.registry import procedure
from luthier.functional import confidence as sure
from luthier.functional import score_table as tables
from luthier.functional import target_rewriting as targets_of
from luthier.functional.answers import chosen_label
from luthier.functional.confidence import Confidence, Reflection, Similarity
from luthier.functional.discriminative import with_answer
from luthier.functional.target_rewriting import Answer, Row

SLUG = "clear-curation"
SETTLED = 0.01
JUDGE = (
    "Question: {question}\nAnswer 1: {first}\nAnswer 2: {second}\nWhich answer is better: (A) Answer 1 (B) Answer 2 "
    "(C) Both are equally good. The answer is: "
)
Verdict = tuple[str, float]


@procedure(
    "clear-curation",
    example={"samples": 2, "beta": 1.0, "max_new_tokens": 8},
    tasks=("causal-lm",),
    paper="Automated Data Curation for Robust Language Model Fine-Tuning, ACL 2024, arXiv 2403.12776",
)
def clear_curation(
    ctx: Any,
    *,
    samples: Annotated[int, Field(ge=1, description="k, answers of the base to each prompt")] = 5,
    temperature: Annotated[float, Field(gt=0, description="of sampling them")] = 1.0,
    similarity: Annotated[
        Similarity, Field(description="of two answers: jaccard (words), json, numeric, positions or exact")
    ] = "jaccard",
    alpha: Annotated[float, Field(ge=0, le=1, description="share of similarity against equality in O")] = 0.8,
    beta: Annotated[
        float, Field(ge=0, le=1, description="share of O against what the base says; 1 does not ask")
    ] = 0.7,
    reflection: Annotated[
        Reflection, Field(description="ask the base and read what it writes, twice, or compare the options' likelihood")
    ] = "ask",
    least: Annotated[float | None, Field(ge=0, le=1, description="gamma; null is the median")] = None,
    keep_fraction: Annotated[
        float | None, Field(gt=0, le=1, description="share of rows the filter keeps, instead of gamma")
    ] = None,
    judge: Annotated[
        Literal["consistency", "ask"], Field(description="how the base prefers one of two answers")
    ] = "consistency",
    certainty: Annotated[
        float,
        Field(ge=0, le=1, description="eta, confidence above which a preferred candidate replaces the given answer"),
    ] = 0.8,
    correct: Annotated[Literal["all", "dropped"], Field(description="rows that may be corrected")] = "all",
    filter_first: Annotated[bool, Field(description="false: correct only, nothing is dropped")] = True,
    rounds: Annotated[int, Field(ge=1, description="times that answers are corrected anew")] = 1,
    max_new_tokens: Annotated[
        int | None, Field(ge=1, description="longest answer; null: 1.5 times the 95th percentile of the given ones")
    ] = None,
    batch_rows: Annotated[int, Field(ge=1, description="prompts completed together")] = 32,
) -> Artefact:
    """Drop answers the base doubts, and replace them where what was learnt from the rest writes better ones."""
    if least is not None and keep_fraction is not None:
        raise UserError(f"{SLUG}: least and keep_fraction both say how much stays; set one of them to null.")
    dataset, rows = targets_of.training_rows(ctx)
    longest = max_new_tokens or targets_of.longest_answer(ctx.data.train.prepared)
    sampling = {"temperature": temperature, "max_new_tokens": longest}
    how = Confidence(samples, similarity, alpha, beta, reflection, sampling, batch_rows)
    measured = how.measure(ctx, dataset)
    gamma = sure.threshold_of(measured["confidence"], least, keep_fraction) if filter_first else 0.0
    kept_N = measured["confidence"] >= gamma
    none: list[Answer | None] = [None] * len(rows)
    source, _ = targets_of.rewritten(ctx, dataset, none, kept_N.astype(float).tolist())
    model = ctx.train(source, stage="filtered").model
    before: list[str] = []
    for number in range(1, rounds + 1):
        candidates = written(ctx, rows, kept_N, correct, model, longest, batch_rows)
        verdicts = preferred(ctx, rows, candidates, how, judge)
        decisions = [sure.decided(bool(k), v, c, certainty) for k, (v, c) in zip(kept_N, verdicts, strict=True)]
        chosen = [a if d == "corrected" else None for a, d in zip(candidates, decisions, strict=True)]
        learnt = [answer.text if answer else decision for answer, decision in zip(chosen, decisions, strict=True)]
        changed = sum(a != b for a, b in zip(learnt, before or [""] * len(rows), strict=True))
        last = number == rounds or changed < SETTLED * len(rows)
        weights = [float(d != "dropped") for d in decisions]
        source, _ = targets_of.rewritten(ctx, dataset, chosen, weights)
        if last and ctx.processes.main:
            lines = table(rows, measured, gamma, kept_N, decisions, candidates, verdicts)
            order = np.argsort(measured["confidence"], kind="stable")
            tables.write(ctx.folder / f"{SLUG}.jsonl", lines, order)
        made = ctx.train(source, stage=None if last else f"corrected-{number}")
        if last:
            break
        model, before = made.model, learnt
    counts = {name: decisions.count(name) for name in ("kept", "corrected", "dropped")}
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    note = f"{SLUG}: of {len(rows)} rows {told}."
    record = {**counts, "gamma": gamma, "histogram": sure.histogram(measured["confidence"]), "rounds": number}
    warned = tuple(f"{SLUG}: {warning}." for warning in sure.warnings(measured))
    return replace(made, metrics={**made.metrics, SLUG: record}, notes=(*made.notes, note, *warned))


def written(
    ctx: Any, rows: Sequence[Row], kept_N: np.ndarray, correct: str, model: Any, longest: int, batch_rows: int
) -> list[Answer | None]:
    """What the trained model writes for each row that may be corrected; None where it writes no answer."""
    index = [i for i in range(len(rows)) if correct == "all" or not kept_N[i]]
    found: list[Answer | None] = [None] * len(rows)
    options = {"decoding": "greedy", "max_new_tokens": longest, "batch_rows": batch_rows}
    completions = ctx.generate([rows[i] for i in index], model=model, **options) if index else []
    for i, (completion,) in zip(index, completions, strict=True):
        if not targets_of.refused(rows[i], completion):
            found[i] = Answer(completion.text, tuple(completion.token_ids), True, None, "candidate")
    return found


def preferred(
    ctx: Any, rows: Sequence[Row], candidates: Sequence[Answer | None], how: Confidence, judge: str
) -> list[Verdict]:
    """The base's verdict on every candidate beside the given answer, with its confidence."""
    there = [i for i, answer in enumerate(candidates) if answer is not None]
    some, texts = [rows[i] for i in there], [a.text for a in candidates if a is not None]
    found: list[Verdict] = [("given", 0.0)] * len(rows)
    if not there:
        return found
    given = [targets_of.gold_of(row) for row in some]
    if judge == "consistency":
        own = [
            w for start in range(0, len(rows), sure.BLOCK) for w in how.samples(ctx, rows[start : start + sure.BLOCK])
        ]
        own = [own[i] for i in there]
        pairs = zip(how.observed(given, own), how.observed(texts, own), strict=True)
        said = [sure.by_consistency(float(g), float(c)) for g, c in pairs]
    else:
        said = asked_twice(ctx, some, given, texts, how)
    for i, verdict in zip(there, said, strict=True):
        found[i] = verdict
    return found


def asked_twice(
    ctx: Any, rows: Sequence[Row], given: Sequence[str], candidates: Sequence[str], how: Confidence
) -> list[Verdict]:
    """The verdict of the base shown both answers in both orders; verdicts that disagree are a tie.

    Its confidence is that of the less confident of the two judgements.
    """
    orders: list[list[tuple[str | None, float]]] = []
    for first, second in ((given, candidates), (candidates, given)):
        shown = [
            targets_of.asked(
                row,
                targets_of.filled(JUDGE, question=targets_of.question_of(row), first=a.strip(), second=b.strip()),
            )
            for row, a, b in zip(rows, first, second, strict=True)
        ]
        options = {"max_new_tokens": 8, "batch_rows": how.batch_rows}
        greedy = [chosen_label(c.text, "ABC") for (c,) in ctx.generate(shown, decoding="greedy", **options)]
        temperature = how.sampling["temperature"]
        drawn = ctx.generate(shown, samples=how.k, decoding="sample", temperature=temperature, **options)
        equal_N = np.array(
            [np.mean([chosen_label(c.text, "ABC") == v for c in some]) for some, v in zip(drawn, greedy, strict=True)]
        )
        reflected_N = None
        if how.beta < 1:
            verdicts = [with_answer(row, v or "C") for row, v in zip(shown, greedy, strict=True)]
            reflected_N, _ = sure.reflected(ctx, verdicts, how.reflection, how.batch_rows)
        orders.append(list(zip(greedy, sure.combined(equal_N, reflected_N, how.beta).tolist(), strict=True)))
    found: list[Verdict] = []
    for (one, c_one), (two, c_two) in zip(*orders, strict=True):
        verdict = {("B", "A"): "candidate", ("A", "B"): "given"}.get((one or "", two or ""), "tie")
        found.append((verdict, min(c_one, c_two)))
    return found


def table(
    rows: Sequence[Row],
    measured: dict[str, np.ndarray],
    gamma: float,
    kept_N: np.ndarray,
    decisions: Sequence[str],
    candidates: Sequence[Answer | None],
    verdicts: Sequence[Verdict],
) -> Iterator[dict[str, Any]]:
    """The table, row by row."""
    for i, (row, decision, candidate, (verdict, certain)) in enumerate(
        zip(rows, decisions, candidates, verdicts, strict=True)
    ):
        yield {
            **tables.name_of(row),
            "decision": decision,
            "reason": f"confidence {'at least' if kept_N[i] else 'below'} {gamma:.4g}; prefers {verdict}",
            **{name: tables.finite(values[i]) for name, values in measured.items()},
            "verdict_confidence": certain,
            "answer": targets_of.gold_of(row),
            "candidate": None if candidate is None else candidate.text,
        }
