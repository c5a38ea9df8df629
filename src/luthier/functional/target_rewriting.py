"""Training targets from the model's own answers: predict, judge, choose a target for each row, and say what was chosen.

    a_i true                    -> t_i = the model's own answer      source "self"
    else its paraphrase is good -> t_i = the paraphrase              source "paraphrase"
    else                        -> t_i = the given answer            source "gold"

``a_i``: a judge accepts the answer that the untouched model gives to prompt i. An answer that was cut off, is empty or
repeats the prompt is never accepted. Answers that the model wrote are trained on as the tokens it wrote.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from luthier.core.errors import UserError
from luthier.functional.discriminative import as_answer, given_answer, place, with_answer
from luthier.functional.rows import prepared_rows, replaced, with_columns

SOURCES = ("self", "paraphrase", "gold")
Row = dict[str, Any]
# Whether an answer is accepted, from the row and the text alone; None leaves it to the judge.
Rule = Callable[[Row, str], bool | None]


@dataclass(frozen=True)
class Answer:
    """What a model wrote for a row.

    Attributes:
        text: as text.
        ids: as tokens, the end token included; None where the text was changed afterwards.
        ok: whether it is accepted.
        score: the judge's, None where there is none.
        reason: why it is accepted or not.
    """

    text: str
    ids: tuple[int, ...] | None
    ok: bool
    score: float | None
    reason: str


@dataclass(frozen=True)
class Writing:
    """How answers are written and judged.

    Attributes:
        judges: verifiers as recipes write them, all of which must accept; empty for the recipe's own.
        threshold: least score that is accepted.
        max_new_tokens: longest answer.
        batch_rows: prompts completed together.
        samples: answers to each prompt, of which the first that is accepted counts, likeliest first.
        temperature: of sampling, where there are several.
        rule: decides before the judges.
        strip: regular expressions of lead-ins that are taken off before judging.
    """

    judges: Sequence[Any] = ()
    threshold: float = 0.5
    max_new_tokens: int = 256
    batch_rows: int = 16
    samples: int = 1
    temperature: float = 1.0
    rule: Rule | None = None
    strip: Sequence[str] = ()


def longest_answer(prepared: Any) -> int:
    """1.5 times the 95th percentile of the given answers' lengths in tokens, at least 32."""
    lengths = [int(s[-1] - s[-2]) for s in prepared.fetch(range(len(prepared)))["spans"]]
    return max(32, int(np.ceil(1.5 * np.percentile(lengths, 95))))


def gold_of(row: Mapping[str, Any]) -> str:
    """The given answer.

    Raises:
        UserError: the row has none, or an empty one.
    """
    if not (text := given_answer(row)).strip():
        raise UserError("the given answer is empty; remove the row, or give it an answer.", where=place(row))
    return text


def question_of(row: Mapping[str, Any]) -> str:
    """The prompt, or the last message before the answer."""
    return str(row["prompt"]) if row["kind"] == "pair" else str(json.loads(row["messages"])[-2].get("content") or "")


def asked(row: Mapping[str, Any], prompt: str) -> Row:
    """The row with another text in place of its question."""
    if row["kind"] == "pair":
        return {**row, "prompt": prompt}
    *before, last, answer = json.loads(row["messages"])
    return {**row, "messages": json.dumps([*before, {**last, "content": prompt}, answer], ensure_ascii=False)}


def answers(ctx: Any, rows: Sequence[Row], prompts: Sequence[Row], how: Writing, model: Any = None) -> list[Answer]:
    """The model's answer to each prompt with the judge's verdict on it as an answer to the row.

    Of several samples the likeliest (mean log-probability under the same model) that is accepted is taken, and the
    likeliest where none is.
    """
    options: dict[str, Any] = {"max_new_tokens": how.max_new_tokens, "batch_rows": how.batch_rows}
    if how.samples == 1:
        written = ctx.generate(prompts, model=model, decoding="greedy", **options)
    else:
        options["temperature"] = how.temperature
        written = ctx.generate(prompts, model=model, samples=how.samples, decoding="sample", **options)
    flat = [(row, stripped(c, how.strip)) for row, some in zip(rows, written, strict=True) for c in some]
    found = judged(ctx, [r for r, _ in flat], [c for _, c in flat], how)
    if how.samples == 1:
        return found
    shown = [p for p in prompts for _ in range(how.samples)]
    likely = mean_likelihood(ctx, shown, found, model)
    chosen = []
    for start in range(0, len(found), how.samples):
        order = sorted(range(start, start + how.samples), key=lambda i: (-likely[i], i))
        chosen.append(found[next((i for i in order if found[i].ok), order[0])])
    return chosen


def mean_likelihood(ctx: Any, prompts: Sequence[Row], found: Sequence[Answer], model: Any) -> np.ndarray:
    """[N] mean log-probability of each answer after its prompt; minus infinity for an answer without tokens."""
    there = [i for i, a in enumerate(found) if a.ids]
    likely = np.full(len(found), -np.inf)
    if there:
        rows = [with_answer(prompts[i], found[i].text) for i in there]
        extra = [json.dumps({"answer_ids": list(found[i].ids or ())}) for i in there]
        source = ctx.source(as_dataset(ctx, rows, extra), "samples")
        total, count = ctx.likelihood(source.prepared, model)
        likely[np.asarray(there)[source.prepared.fetch(range(len(source.prepared)))["index"]]] = total / count
    return likely


def as_dataset(ctx: Any, rows: Sequence[Row], extra: Sequence[str]) -> Any:
    """Rows as a dataset of the training rows' schema, with these further columns."""
    from datasets import Dataset

    features = ctx.data.train.rows.dataset.features
    return Dataset.from_list([{**r, "extra": e} for r, e in zip(rows, extra, strict=True)], features=features)


def judged(ctx: Any, rows: Sequence[Row], completions: Sequence[Any], how: Writing) -> list[Answer]:
    """What the rule, and then the judges say of completions; several judges give the lowest score."""
    found: list[Answer | None] = []
    for row, c in zip(rows, completions, strict=True):
        wrong = refused(row, c)
        says = how.rule(row, c.text) if how.rule is not None and not wrong else None
        if wrong or says is not None:
            found.append(Answer(c.text, tuple(c.token_ids), bool(says), None, wrong or "rule"))
        else:
            found.append(None)
    left = [i for i, a in enumerate(found) if a is None]
    texts = [completions[i].text for i in left]
    scores = [ctx.judge([rows[i] for i in left], texts, judge) for judge in how.judges or (None,)]
    for k, i in enumerate(left):
        given = [s[k] for s in scores]
        score = None if any(g is None for g in given) else min(given)
        ok = score is not None and score >= how.threshold
        reason = "not judged" if score is None else "accepted" if ok else "rejected"
        found[i] = Answer(texts[k], tuple(completions[i].token_ids), ok, score, reason)
    return [a for a in found if a is not None]


def refused(row: Row, completion: Any) -> str:
    """Why a completion is no answer, whatever a judge says of it; empty where it may be one."""
    if not completion.finished:
        return "truncated"
    if not completion.text.strip():
        return "empty"
    return "copy of the prompt" if completion.text.strip() == question_of(row).strip() else ""


def stripped(completion: Any, patterns: Sequence[str]) -> Any:
    """The completion without what the first matching pattern finds at its start."""
    for pattern in patterns:
        if match := re.match(pattern, completion.text):
            return replace(completion, text=completion.text[match.end() :])
    return completion


def filled(template: str, **values: str) -> str:
    """A text with ``{name}`` replaced by its value, in one pass, so that braces in the values stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda m: values.get(m[1], m[0]), template)


def paraphrases(ctx: Any, rows: Sequence[Row], template: str, how: Writing, model: Any = None) -> list[Answer]:
    """What the model makes of the given answers, judged as answers to the rows.

    They were written after another prompt than they are trained with, so their text counts and not their tokens.

    Args:
        ctx: the run.
        rows: canonical rows.
        template: with ``{question}`` and ``{answer}``.
        how: how they are written and judged.
        model: the model that writes; by default the untouched one.
    """
    shown = [asked(row, filled(template, question=question_of(row), answer=gold_of(row))) for row in rows]
    found = answers(ctx, rows, shown, how, model) if rows else []
    return [replace(a, text=as_answer(a.text, gold_of(r)), ids=None) for r, a in zip(rows, found, strict=True)]


def route(own: Sequence[Answer | None], paraphrased: Sequence[Answer | None]) -> list[str]:
    """The source of each row's target; None stands for an answer that was not asked for."""
    return [
        "self" if a is not None and a.ok else "paraphrase" if b is not None and b.ok else "gold"
        for a, b in zip(own, paraphrased, strict=True)
    ]


def rewritten(
    ctx: Any, rows: Any, chosen: Sequence[Answer | None], weights: Sequence[float], *, per_sequence: bool = False
) -> tuple[Any, list[int]]:
    """A source of the rows with the chosen answers in place of the given ones.

    Args:
        ctx: the run.
        rows: dataset of canonical rows.
        chosen: of each row; None leaves the given answer.
        weights: what each row counts; rows that count nothing are left out.
        per_sequence: each row's loss is a mean over its targets, so that all rows count alike.

    Returns:
        The source, the run's own training rows where nothing about them has changed; and which rows it has.

    Raises:
        UserError: no row is left.
    """
    kept = [i for i, weight in enumerate(weights) if weight > 0]
    if not kept:
        raise UserError("no row is left to train on: the judge accepts no answer, and no other target is learnt from.")
    given = [weights[i] for i in kept]
    plain = not per_sequence and all(weight == 1 for weight in given)
    if plain and len(kept) == len(ctx.data.train.prepared) and all(chosen[i] is None for i in kept):
        return ctx.data.train, kept
    some = rows.select(kept)
    changed = []
    for row, answer in zip(some, (chosen[i] for i in kept), strict=True):
        changed.append(row if answer is None else with_answer(row, answer.text))
    texts = {name: [row[name] for row in changed] for name in ("completion", "messages")}
    further = [{"answer_ids": list(a.ids)} if (a := chosen[i]) is not None and a.ids else {} for i in kept]
    made = with_columns(replaced(some, **texts), further)
    if plain:
        return ctx.source(made, "rewritten"), kept
    if per_sequence:
        prepared = ctx.source(made, "rewritten").prepared
        held = prepared.fetch(range(len(prepared)))
        for index, spans in zip(held["index"], held["spans"], strict=True):
            given[index] /= int((spans[1::2] - spans[::2]).sum())
    return ctx.source(with_columns(made, [{"row_weight": weight} for weight in given]), "rewritten"), kept


def likelihoods(ctx: Any, source: Any, kept: Sequence[int], count: int) -> list[float | None]:
    """Mean negative log-likelihood per target of ``count`` rows under the untouched model, in nats.

    Args:
        ctx: the run.
        source: the rows that are trained on.
        kept: which of the ``count`` rows they are.
        count: how many rows there are; those that are not trained on get None.
    """
    total, size = ctx.likelihood(source.prepared)
    found: list[float | None] = [None] * count
    own = source is ctx.data.train
    places = range(count) if own else source.prepared.fetch(range(len(source.prepared)))["index"]
    for index, value in zip(places, -total / size, strict=True):
        found[kept[index]] = float(value)
    return found


def training_rows(ctx: Any) -> tuple[Any, list[Row]]:
    """The prepared training rows as a dataset and as a list.

    Raises:
        UserError: a row has no prompt with one answer.
    """
    dataset = prepared_rows(ctx.data.train)
    rows = list(dataset)
    for row in rows:
        gold_of(row)
    return dataset, rows


def table(
    rows: Sequence[Row],
    sources: Sequence[str],
    own: Sequence[Answer | None],
    paraphrased: Sequence[Answer | None],
    nll: Sequence[tuple[float | None, float | None]],
) -> Iterator[str]:
    """The lines of the file that says of every row what is learnt from it and why."""

    def told(answer: Answer | None) -> dict[str, Any] | None:
        return None if answer is None else {"text": answer.text, "score": answer.score, "reason": answer.reason}

    for row, source, a, b, (gold, target) in zip(rows, sources, own, paraphrased, nll, strict=True):
        learnt = {"self": a, "paraphrase": b}.get(source)
        line = {
            "id": row["id"] if row["id"] is not None else f"{row['source']}:{row['row']}",
            "source": source,
            "target": gold_of(row) if learnt is None else learnt.text,
            "gold": gold_of(row),
            "self": told(a),
            "paraphrase": told(b),
            "nll_gold_base": gold,
            "nll_target_base": target,
        }
        yield json.dumps(line, ensure_ascii=False) + "\n"


def counts(sources: Sequence[str]) -> dict[str, int]:
    """How many rows learn from each source."""
    return {name: sum(s == name for s in sources) for name in SOURCES}


def warnings(slug: str, sources: Sequence[str]) -> tuple[str, ...]:
    """What whoever reads the run's numbers must know."""
    found, total = counts(sources), len(sources)
    said = [
        f"{slug}: of {total} rows {found['self']} learn the model's own answer, {found['paraphrase']} its paraphrase "
        f"and {found['gold']} the given answer."
    ]
    if found["self"] < 0.05 * total:
        said.append(f"{slug}: fewer than 5% of the model's own answers were accepted, so this is nearly plain SFT.")
    if found["self"] > 0.95 * total:
        said.append(f"{slug}: more than 95% of the model's own answers were accepted; there is little left to learn.")
    return tuple(said)
