"""Rehearse what the model can already do while it learns something new: its own answers where they are as good (SSR).

The untouched model answers every training prompt; a judge says whether the answer is as good as the given one::

    R = {i : the judge accepts}      trained on the model's own answers (rehearsal)
    G = the other rows               trained on the given answers
    L = -(1/Z) [ lambda_R sum_R sum_u log p(own_u | x) + sum_G sum_u log p(given_u | x) ]

Z counts what was summed: targets (``normalise: token``, a row of R counting lambda_R for each), or rows, each of which
is then the mean over its targets (``sequence``).

Where rows may be unanswerable, a rule decides before the judge. An answer abstains if it holds one of the phrases
``abstains`` (no case), or if the function named there says so; a given answer also where its row's column
``answerable`` is false::

    given abstains    own abstains     accepted
    yes               yes              yes
    yes               no               no
    no                yes              no
    no                no               as the judge says

What became of each row stands in ``selective-self-rehearsal.jsonl``. A judge that accepts nothing leaves plain SFT, bit
for bit.

Paper: "Selective Self-Rehearsal: A Fine-Tuning Approach to Improve Generalization in Large Language Models", 2024,
arXiv 2409.04787. It has no code.

Example::

    data: {train: rows.jsonl, verifier: {normalised: {contained: true}}}
    procedure: {selective-self-rehearsal: {abstains: [cannot be answered, not in the document]}}
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.own_code import function_of
from luthier.core.protocols import Artefact
from luthier.core.registry import procedure
from luthier.core.rng import numpy_stream
from luthier.core.store import write_atomic
from luthier.functional import target_rewriting as targets_of
from luthier.functional.target_rewriting import Answer, Row, Rule, Writing

SLUG = "selective-self-rehearsal"
# A detector that fires on more of the given answers than this is taken to be wrong.
MOST_ABSTAIN = 0.9
# Rows of G of one kind above this share may teach nothing but that kind.
LOPSIDED = 0.8


@procedure(
    "selective-self-rehearsal",
    example={"max_new_tokens": 8},
    tasks=("causal-lm",),
    paper="Selective Self-Rehearsal: A Fine-Tuning Approach to Improve Generalization in Large Language Models, 2024, "
    "arXiv 2409.04787",
)
def selective_self_rehearsal(
    ctx: Any,
    *,
    judges: Annotated[
        list[Any] | None, Field(min_length=1, description="verifiers that must all accept; null: the recipe's")
    ] = None,
    threshold: Annotated[float, Field(ge=0, le=1, description="least score that a judge accepts")] = 0.5,
    abstains: Annotated[
        list[str] | str | None,
        Field(min_length=1, description="phrases by which an answer abstains, or path.py:function of a text"),
    ] = None,
    answerable: Annotated[str | None, Field(description="column that is false where a row has no answer")] = None,
    rehearsal_weight: Annotated[
        float, Field(ge=0, description="lambda_R, what a rehearsed row counts; 0 trains on the others alone")
    ] = 1.0,
    normalise: Annotated[Literal["token", "sequence"], Field(description="what the loss is a mean over")] = "token",
    gold_fraction_min: Annotated[
        float, Field(ge=0, le=1, description="least share of given answers; rows drawn from R fill it up")
    ] = 0.0,
    max_new_tokens: Annotated[
        int | None, Field(ge=1, description="longest answer; null: 1.5 times the 95th percentile of the given ones")
    ] = 256,
    batch_rows: Annotated[int, Field(ge=1, description="prompts completed together")] = 16,
    rounds: Annotated[int, Field(ge=1, description="times that answers are judged anew with the trained model")] = 1,
) -> Artefact:
    """Train on the model's own answer where a judge finds it as good as the given one, and on that elsewhere."""
    dataset, rows = targets_of.training_rows(ctx)
    detect = detector(abstains)
    silent = [gold_abstains(row, detect, answerable) for row in rows]
    check(silent, detect, answerable)
    longest = max_new_tokens or targets_of.longest_answer(ctx.data.train.prepared)
    rule = None if detect is None else by_answerability(detect, answerable)
    how = Writing(judges or (), threshold, longest, batch_rows, rule=rule)
    gold = targets_of.likelihoods(ctx, ctx.data.train, range(len(rows)), len(rows))
    none: list[Answer | None] = [None] * len(rows)
    model = None
    for number in range(1, rounds + 1):
        own = targets_of.answers(ctx, rows, rows, how, model)
        rehearsed = np.array([a.ok for a in own])
        rehearsed = spared(rehearsed, gold_fraction_min, numpy_stream(ctx.seed, "data", SLUG, number))
        sources = ["self" if r else "gold" for r in rehearsed]
        chosen = [a if r else None for a, r in zip(own, rehearsed, strict=True)]
        weights = np.where(rehearsed, rehearsal_weight, 1.0).tolist()
        source, kept = targets_of.rewritten(ctx, dataset, chosen, weights, per_sequence=normalise == "sequence")
        target = targets_of.likelihoods(ctx, source, kept, len(rows))
        last = number == rounds
        if last and ctx.processes.main:
            lines = targets_of.table(rows, sources, own, none, list(zip(gold, target, strict=True)))
            write_atomic(ctx.folder / f"{SLUG}.jsonl", "".join(lines))
        made = ctx.train(source, stage=None if last else f"round-{number}")
        model = made.model
    record = report(rehearsed, np.array(silent), gold, target)
    notes = (*targets_of.warnings(SLUG, sources), *lopsided(record))
    return replace(made, metrics={**made.metrics, SLUG: record}, notes=(*made.notes, *notes))


def detector(abstains: list[str] | str | None) -> Callable[[str], bool] | None:
    """Whether a text abstains: one of the phrases stands in it, or the named function says so.

    Raises:
        UserError: there is no such function.
    """
    if abstains is None:
        return None
    if isinstance(abstains, str):
        own = function_of(abstains, f"{SLUG}: abstains")
        return lambda text: bool(own(text))
    phrases = [phrase.casefold() for phrase in abstains]
    return lambda text: any(phrase in text.casefold() for phrase in phrases)


def gold_abstains(row: Row, detect: Callable[[str], bool] | None, answerable: str | None) -> bool:
    """Whether the given answer abstains."""
    if answerable is not None and json.loads(row["extra"] or "{}").get(answerable) is False:
        return True
    return detect is not None and detect(targets_of.gold_of(row))


def by_answerability(detect: Callable[[str], bool], answerable: str | None) -> Rule:
    """The rule that decides before the judge."""

    def rule(row: Row, text: str) -> bool | None:
        return accepts(gold_abstains(row, detect, answerable), detect(text))

    return rule


def accepts(given_abstains: bool, own_abstains: bool) -> bool | None:
    """Whether an answer is accepted by what abstains; None leaves it to the judge."""
    if given_abstains:
        return own_abstains
    return False if own_abstains else None


def check(silent: list[bool], detect: Any, answerable: str | None) -> None:
    """Refuse a column without a detector, and a detector that fires on nearly every given answer.

    Raises:
        UserError: either.
    """
    if answerable is not None and detect is None:
        raise UserError(
            f"{SLUG}: answerable says which rows have no answer, and abstains must say by which phrases an answer "
            "abstains."
        )
    if detect is not None and sum(silent) > MOST_ABSTAIN * len(silent):
        raise UserError(
            f"{SLUG}: {sum(silent)} of {len(silent)} given answers abstain, which is more than {MOST_ABSTAIN:.0%}; "
            "check the phrases under abstains."
        )


def spared(rehearsed_N: np.ndarray, least: float, rng: np.random.Generator) -> np.ndarray:
    """Bool [N]: the rows of R after as many were drawn from it as given answers are to be at least."""
    wanted = int(np.ceil(least * len(rehearsed_N))) - int((~rehearsed_N).sum())
    left = rehearsed_N.copy()
    if wanted > 0:
        left[rng.permutation(np.flatnonzero(rehearsed_N))[:wanted]] = False
    return left


def report(
    rehearsed: np.ndarray, silent: np.ndarray, gold: list[float | None], target: list[float | None]
) -> dict[str, Any]:
    """Counts of R and G by what the given answers are, and how likely the targets of R are under the base."""
    there = [(g, t) for g, t, r in zip(gold, target, rehearsed, strict=True) if r and g is not None and t is not None]
    means = [float(np.mean(values)) for values in zip(*there, strict=True)] if there else [None, None]
    return {
        "self": int(rehearsed.sum()),
        "gold": int((~rehearsed).sum()),
        "self_abstaining": int((rehearsed & silent).sum()),
        "gold_abstaining": int((~rehearsed & silent).sum()),
        "nll_gold_of_self": means[0],
        "nll_target_of_self": means[1],
    }


def lopsided(record: dict[str, Any]) -> tuple[str, ...]:
    """A warning where the given answers that are learnt are nearly all of one kind, and both kinds are there."""
    count, silent = record["gold"], record["gold_abstaining"]
    both = 0 < silent + record["self_abstaining"] < count + record["self"]
    if not both or not count or max(silent, count - silent) <= LOPSIDED * count:
        return ()
    kind = "abstain" if silent > count - silent else "answer"
    return (
        f"{SLUG}: {max(silent, count - silent)} of {count} given answers that are learnt {kind}; a small model may "
        "learn to do nothing else. Raise gold_fraction_min.",
    )
