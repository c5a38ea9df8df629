"""Learn your own correct answers: gold answers only where the model has no good one of its own (S3FT).

The untouched model answers every training prompt, a judge compares, and each row is trained on::

    its own answer            where the judge accepts it
    its own paraphrase        of the given answer, otherwise, where the judge accepts that
    the given answer          otherwise

    L = - sum_i w_s(i) sum_u log p(t_iu | x_i, t_i<u) / sum_i w_s(i) |t_i|

t_i is the chosen target of row i with its end token, s(i) where it comes from, w its weight (1). The judge is the
recipe's ``data.verifier`` (or the one each row names), or those under ``judges``, which must all accept. The model's
own answers are trained on as the tokens it wrote. ``targets: self_only`` drops the other rows (rejection sampling),
``paraphrase_only`` paraphrases every given answer (self-distillation), ``paraphrase: false`` is selective
self-rehearsal. A judge that accepts nothing leaves plain SFT, bit for bit. What became of each row stands in
``s3ft.jsonl``.

Paper: "Selective Self-to-Supervised Fine-Tuning for Generalization in Large Language Models", Findings of NAACL 2025,
arXiv 2502.08130. It has no code; the wording of the paraphrase prompt is this library's.

Example::

    data: {train: gsm8k/train.jsonl, verifier: numeric}
    procedure: s3ft
    objective: anchored-sft
    parameters: [half-ft]
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Artefact
from luthier.core.registry import procedure
from luthier.core.store import write_atomic
from luthier.functional import target_rewriting as targets_of
from luthier.functional.target_rewriting import Answer, Writing

SLUG = "s3ft"
PROMPT = (
    "Question:\n{question}\n\nReference answer:\n{answer}\n\nGive the same answer to the question in your own words.\n"
)
SLOTS = ("{question}", "{answer}")
Targets = Literal["best", "self_only", "paraphrase_only"]


@procedure(
    "s3ft",
    example={"paraphrase": False, "max_new_tokens": 8},
    tasks=("causal-lm",),
    paper="Selective Self-to-Supervised Fine-Tuning for Generalization in Large Language Models, Findings of NAACL "
    "2025, arXiv 2502.08130",
)
def s3ft(
    ctx: Any,
    *,
    judges: Annotated[
        list[Any] | None, Field(min_length=1, description="verifiers that must all accept; null: the recipe's")
    ] = None,
    threshold: Annotated[float, Field(ge=0, le=1, description="least score that a judge accepts")] = 0.5,
    targets: Annotated[
        Targets, Field(description="best, self_only (drop what is not accepted) or paraphrase_only")
    ] = "best",
    paraphrase: Annotated[bool, Field(description="let the model paraphrase the answers it cannot give")] = True,
    paraphrase_prompt: Annotated[
        str, Field(description="asks for the paraphrase; has {question} and {answer}")
    ] = PROMPT,
    attempts: Annotated[
        int, Field(ge=1, le=8, description="paraphrases to each row, sampled where there are several")
    ] = 1,
    strip: Annotated[
        list[str] | None, Field(description="regular expressions of lead-ins that are taken off a paraphrase")
    ] = None,
    samples: Annotated[int, Field(ge=1, description="answers to each prompt, likeliest first; 1 is greedy")] = 1,
    temperature: Annotated[float, Field(gt=0, description="of sampling, where samples or attempts are several")] = 0.7,
    max_new_tokens: Annotated[
        int | None, Field(ge=1, description="longest answer; null: 1.5 times the 95th percentile of the given ones")
    ] = None,
    batch_rows: Annotated[int, Field(ge=1, description="prompts completed together")] = 16,
    source_weights: Annotated[
        dict[Literal["self", "paraphrase", "gold"], float] | None,
        Field(description="what a row counts by the source of its target; 1 each"),
    ] = None,
    rounds: Annotated[int, Field(ge=1, description="times that targets are written anew by the trained model")] = 1,
) -> Artefact:
    """Train on the model's own answer where a judge accepts it, on its paraphrase or the given answer elsewhere."""
    check(paraphrase_prompt, strip or ())
    dataset, rows = targets_of.training_rows(ctx)
    longest = max_new_tokens or targets_of.longest_answer(ctx.data.train.prepared)
    how = Writing(judges or (), threshold, longest, batch_rows, samples, temperature)
    paraphrasing = replace(how, samples=attempts, strip=strip or ())
    given: dict[str, float] = {str(kind): value for kind, value in (source_weights or {}).items()}
    weight = {"self": 1.0, "paraphrase": 1.0, "gold": 1.0, **given}
    if targets == "self_only":
        weight |= {"paraphrase": 0.0, "gold": 0.0}
    gold = targets_of.likelihoods(ctx, ctx.data.train, range(len(rows)), len(rows))
    model = None
    for number in range(1, rounds + 1):
        own: list[Answer | None] = [None] * len(rows)
        if targets != "paraphrase_only":
            own = list(targets_of.answers(ctx, rows, rows, how, model))
        other: list[Answer | None] = [None] * len(rows)
        if targets == "paraphrase_only" or (paraphrase and targets == "best"):
            failed = [i for i, answer in enumerate(own) if answer is None or not answer.ok]
            found = targets_of.paraphrases(ctx, [rows[i] for i in failed], paraphrase_prompt, paraphrasing, model)
            for i, answer in zip(failed, found, strict=True):
                other[i] = answer
        sources = targets_of.route(own, other)
        chosen = [{"self": a, "paraphrase": b}.get(s) for s, a, b in zip(sources, own, other, strict=True)]
        source, kept = targets_of.rewritten(ctx, dataset, chosen, [weight[s] for s in sources])
        target = targets_of.likelihoods(ctx, source, kept, len(rows))
        last = number == rounds
        if last and ctx.processes.main:
            lines = targets_of.table(rows, sources, own, other, list(zip(gold, target, strict=True)))
            write_atomic(ctx.folder / f"{SLUG}.jsonl", "".join(lines))
        made = ctx.train(source, stage=None if last else f"round-{number}")
        model = made.model
    record = {**targets_of.counts(sources), "max_new_tokens": longest}
    notes = targets_of.warnings(SLUG, sources)
    return replace(made, metrics={**made.metrics, SLUG: record}, notes=(*made.notes, *notes))


def check(prompt: str, strip: Any) -> None:
    """Refuse a paraphrase prompt without its slots, and expressions that are none.

    Raises:
        UserError: a slot is missing, or an expression cannot be compiled.
    """
    if missing := [slot for slot in SLOTS if slot not in prompt]:
        raise UserError(f"{SLUG}: paraphrase_prompt has no {' and no '.join(missing)}; put them where they belong.")
    for pattern in strip:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{SLUG}: strip: '{pattern}' is no regular expression: {error}.") from error
