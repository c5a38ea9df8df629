"""Measure a base and its data before anything is trained: on samples of stated size, each number with a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from luthier.advisor import base, rows
from luthier.advisor.findings import Finding, Findings, unmeasured
from luthier.core.registry import TOKEN_TASKS
from luthier.core.rng import numpy_stream

SAMPLE_ROWS = 512
ANSWERED_ROWS = 64


def measure(
    plan: Any,
    *,
    sample_rows: int = SAMPLE_ROWS,
    answered_rows: int = ANSWERED_ROWS,
    say: Callable[[str], None] = lambda text: None,
) -> Findings:
    """Every finding about a recipe's base and data.

    Args:
        plan: the plan of a recipe; its task is settled here.
        sample_rows: training rows that the base scores, drawn by the recipe's seed.
        answered_rows: training rows, and as many test rows, that the base answers.
        say: told what is being done.

    Raises:
        UserError: the recipe's data cannot be read, or nothing in it can be learnt.
    """
    from luthier.runs import setup
    from luthier.runs.api import open_data
    from luthier.runs.workshop import Workshop, open_model

    setup.settings(plan)
    setup.require_tools(plan)
    say("reading the rows")
    data, info, task = open_data(plan, keep=False)
    say("comparing the rows")
    found = from_rows(data, info.parameters, plan.recipe.data.max_length or info.max_length, task)
    say("asking the base")
    loaded = open_model(plan, data.labels)
    shop = Workshop(plan, data, loaded, Path(plan.recipe.output))
    return Findings([*found, *from_base(shop, sample_rows, answered_rows)])


def from_rows(data: Any, parameters: int, limit: int | None, task: str) -> list[Finding]:
    """What the rows tell without a model."""
    train, report = data.train, data.train.prepared.report.to_dict()
    dataset = train.rows.dataset
    rejected = sum(train.rows.report.rejected.values())
    found = [
        rows.row_count(report),
        rows.size(report, parameters),
        *rows.lengths(report, limit),
        rows.template_problems(report, rejected),
    ]
    if task == "image-classification":
        why = "these rows are pictures."
        names = ("near_duplicates", "contradictions", "test_in_train", "test_near_train")
        exact, _ = rows.exact_duplicates(dataset)
        return [*found, exact, *(unmeasured(name, why) for name in names), *rows.balance(dataset, task)]
    return [
        *found,
        *rows.duplicates(dataset),
        rows.contradictions(dataset),
        *rows.leaks(dataset, data.test.rows.dataset if data.test else None),
        *rows.balance(dataset, task),
    ]


def from_base(shop: Any, sample_rows: int, answered_rows: int) -> list[Finding]:
    """What the base makes of a sample of the training rows, and how it answers some of them and of the test rows."""
    plan, data, loaded = shop.plan, shop.data, shop.loaded
    prepared, seed, size = data.train.prepared, plan.recipe.seed, plan.recipe.evaluation.batch_rows
    index_R = base.sample(len(prepared), sample_rows, numpy_stream(seed, "data", "advise"))
    session = shop.session(loaded.model)
    answered_R = base.sample(len(prepared), answered_rows, numpy_stream(seed, "data", "advise", "answers"))
    found = [base.own_answers("right_answers", shop, session, data.train, answered_R, "training")]
    if data.test is None:
        found.append(unmeasured("right_test_answers", "there are no test rows."))
    else:
        test_R = base.sample(len(data.test.prepared), answered_rows, numpy_stream(seed, "data", "advise", "test"))
        found.append(base.own_answers("right_test_answers", shop, session, data.test, test_R, "test"))
    if plan.task == "masked-lm":
        why = "a masked language model has no probability of a whole text."
        names = ("mean_probability", "entropy", "label_noise", "agreement", "answer_tokens")
        return [*(unmeasured(name, why) for name in names), *found]
    if plan.task not in TOKEN_TASKS:
        if plan.task == "token-classification":
            why = "the tags of one text are not independent labels."
            noise = [unmeasured(name, why) for name in ("label_noise", "agreement")]
        else:
            noise = base.noise_in_labels(
                *base.features(session, prepared, index_R, size), len(data.labels), plan.recipe.seed
            )
        if not base.has_trained_head(loaded):
            why = "the base has no trained head for these labels."
            return [unmeasured("mean_probability", why), unmeasured("entropy", why), *noise, *found]
        return [*base.probabilities(base.score(session, prepared, index_R, size)), *noise, *found]
    scores = base.score(session, prepared, index_R, size)
    return [*base.probabilities(scores), *base.noise_in_text(scores), base.answer_length(scores), *found]
