"""How firm a model is: against other wordings, against contrary tuning, and against a step towards the undesirable.

- *Wordings.* The questions of held-out rows are put in other words; given are the loss and the share of right answers
  for each wording, and their mean and standard deviation over wordings.
- *Contrary tuning.* A copy of the tuned model learns contradicting answers to training questions by plain fine-tuning;
  every few steps it is asked held-out questions. Given are loss and right answers of the wanted answers by step, and
  the first step after which fewer than half as many are right as before.
- *Shift.* The twin of the objective of the same name takes one normalised step of gradient ascent of length alpha.
  Given are, for base and tuned model, how far the twin's states are at each block l,
  ``sqrt(mean_rows( sum_t ||h_lt - h'_lt||^2 / sum_t ||h_lt||^2 ))``, and how much its loss is above the model's own.
  The alphas of a list show what step length means before anything is trained.

Paper: "Learning from the Undesirable: Robust Adaptation of Language Models without Forgetting", AAAI 2026, arXiv
2511.13052.

Example::

    objective: learning-from-undesirable
    analysis:
      - learning-from-undesirable: {templates: ["{prompt}", "Please answer: {prompt}"], contrary: shuffled}
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from luthier.core import registry
from luthier.core.errors import UserError
from luthier.core.protocols import Table
from luthier.core.registry import analysis
from luthier.core.rng import derive_seed, stream
from luthier.functional.discriminative import given_answer, place, with_answer
from luthier.functional.questions import numbers, with_question
from luthier.functional.statistics import ClusteredMean, score_mean

SLUG = "learning-from-undesirable"
COLUMNS = ("run", "model", "quantity", "condition", "value", "n", "low", "high", "unit")
Row = dict[str, Any]


def contradicting(rows: Sequence[Mapping[str, Any]], how: str) -> list[Row]:
    """Rows with contradicting answers.

    Args:
        rows: canonical rows.
        how: ``shuffled`` gives each row the answer of the next one that answers otherwise; anything else is the name of
            a column of the rows that holds the contradicting answer.

    Raises:
        UserError: rows have no such column, or all have one answer.
    """
    if how != "shuffled":
        given = [json.loads(row["extra"] or "{}").get(how) for row in rows]
        if missing := [row for row, answer in zip(rows, given, strict=True) if not isinstance(answer, str)]:
            raise UserError(
                f"{SLUG}: contrary: the training row has no text in a column '{how}'. Name a column that holds the "
                "contradicting answer, or write shuffled.",
                where=place(missing[0]),
            )
        return [with_answer(row, answer) for row, answer in zip(rows, given, strict=True)]
    found = []
    for i, row in enumerate(rows):
        others = (given_answer(rows[(i + step) % len(rows)]) for step in range(1, len(rows)))
        other = next((text for text in others if text.strip() != given_answer(row).strip()), None)
        if other is None:
            raise UserError(f"{SLUG}: contrary: shuffled: all training rows have one answer; name a column of answers.")
        found.append(with_answer(row, other))
    return found


def half_life(curve: Sequence[tuple[int, float]]) -> int | None:
    """The first step at which a score is below half of what it was at first; None where it never is."""
    return next((step for step, score in curve if score < curve[0][1] / 2), None)


@analysis(
    "learning-from-undesirable",
    example={"rows": 4, "templates": ["{prompt}", "{prompt} "], "contrary": "shuffled", "steps": 2, "answers": False},
    tasks=("causal-lm",),
    paper="Learning from the Undesirable: Robust Adaptation of Language Models without Forgetting, AAAI 2026, "
    "arXiv 2511.13052",
)
class Firmness:
    """How firm a model is: against other wordings, contrary tuning, and one step towards a worse loss."""

    def __init__(
        self,
        *,
        templates: Annotated[
            list[str] | None, Field(min_length=2, description="wordings of the question, with {groups} of the pattern")
        ] = None,
        pattern: Annotated[
            str, Field(min_length=1, description="regular expression with named groups that takes questions apart")
        ] = r"(?P<prompt>[\s\S]*)",
        contrary: Annotated[
            str | None,
            Field(
                min_length=1, description="contrary tuning: shuffled answers, or the column that holds other answers"
            ),
        ] = None,
        steps: Annotated[int, Field(ge=1, description="steps of contrary tuning")] = 50,
        every: Annotated[int, Field(ge=1, description="steps from one measurement to the next")] = 5,
        learning_rate: Annotated[float, Field(gt=0, description="of contrary tuning, constant, AdamW")] = 1e-4,
        batch_rows: Annotated[int, Field(ge=1, description="rows of a step of contrary tuning")] = 8,
        aux: Annotated[Literal["lora", "steer"], Field(description="shift: what the twin differs by")] = "lora",
        alphas: Annotated[
            list[Annotated[float, Field(ge=0)]] | None,
            Field(description="shift: lengths of the step, 0.1 by default for lora, 0.05 for steer; empty for none"),
        ] = None,
        answers: Annotated[bool, Field(description="let the models answer, and judge it")] = True,
        rows: Annotated[int, Field(ge=1, description="held-out rows, evenly spaced")] = 64,
        confidence: Annotated[float, Field(gt=0, lt=1, description="of the intervals")] = 0.95,
        seed: Annotated[int, Field(ge=0, description="of the order of contrary tuning")] = 0,
    ) -> None:
        try:
            self.pattern = re.compile(pattern)
            for template in templates or ():
                template.format(**dict.fromkeys(self.pattern.groupindex, ""))
        except re.error as error:
            raise UserError(f"{SLUG}: pattern: {pattern!r} is no regular expression: {error}.") from None
        except (KeyError, IndexError, ValueError) as error:
            known = ", ".join(f"{{{name}}}" for name in self.pattern.groupindex) or "none"
            raise UserError(
                f"{SLUG}: templates: {template!r} names what the pattern has not ({error}); its groups: {known}."
            ) from None
        self.templates, self.contrary, self.steps, self.every = templates or [], contrary, steps, every
        self.learning_rate, self.batch_rows, self.aux = learning_rate, batch_rows, aux
        self.alphas = [{"lora": 0.1, "steer": 0.05}[aux]] if alphas is None else list(alphas)
        self.answers, self.rows, self.confidence, self.seed = answers, rows, confidence, seed

    def run(self, runs: Iterable[Any], ctx: Any) -> Table:
        """One table over all runs; nothing is measured where a run has no held-out rows.

        Args:
            runs: finished runs; each has a ``folder``, whose name stands in the table, and a ``model``.
            ctx: gives ``data``, ``base`` (the base's session) and ``shop``, whose ``session(model)`` evaluates, renders
                and generates with a model and whose ``measure.verifier`` judges answers.
        """
        rows: list[tuple[Any, ...]] = []
        notes: list[str] = []
        for run in runs:
            label = run.folder.name
            if ctx.data.test is None:
                notes.append(f"{label}: there are no held-out rows (data.test)")
                continue
            asked = _spaced(ctx.data.test, self.rows)
            if not asked:
                notes.append(f"{label}: the held-out rows have no questions")
                continue
            models = {"base": ctx.base, "tuned": ctx.shop.session(run.model)}
            for name, session in models.items():
                session.model.eval()
                rows += [(label, name, *row) for row in self._wordings(session, asked, ctx, notes)]
            if self.contrary is not None:
                rows += [(label, "tuned", *row) for row in self._contrary(run.model, asked, ctx)]
            for name, session in models.items():
                rows += [(label, name, *row) for row in self._shift(session, asked, ctx)]
        return Table(
            title="How firm the model is",
            columns=COLUMNS,
            rows=tuple(rows),
            units={"value": "see unit", "n": "targets, answers, wordings or rows"},
            notes=tuple(dict.fromkeys(notes)),
        )

    # -- measuring a model on rows

    def _measured(self, session: Any, rows: list[Row], ctx: Any) -> dict[str, Any]:
        """Estimates of ``loss`` and, where answers are judged, ``right answers``."""
        mean = ClusteredMean()
        for part in _parts(rows, ctx):
            batch = session.render(part)
            loss_N = -session.evaluate_batch(batch, ("logp",)).logp_N.double().cpu().numpy()
            owner_N = batch.sequence_N.cpu().numpy()
            sum_B = np.bincount(owner_N, loss_N, minlength=len(part))
            mean.add(sum_B, np.bincount(owner_N, minlength=len(part)))
        found = {"loss": mean.estimate(self.confidence)}
        if self.answers:
            texts = [one[0].text for one in session.generate(rows)]
            scores = [s for s in ctx.shop.measure.verifier(rows, texts, None) if s is not None]
            if scores:
                found["right answers"] = score_mean(scores, self.confidence)
        return found

    def _reworded(self, template: str, text: str) -> str | None:
        """A question in the words of a template; None where the pattern does not match the whole of it."""
        found = self.pattern.fullmatch(text)
        return None if found is None else template.format(**found.groupdict())

    def _wordings(self, session: Any, asked: list[Row], ctx: Any, notes: list[str]) -> Iterator[tuple[Any, ...]]:
        values: dict[str, list[float]] = {}
        for template in self.templates:
            made = [with_question(row, partial(self._reworded, template)) for row in asked]
            put = [row for row in made if row is not None]
            if len(put) < len(made):
                notes.append(f"the pattern does not match {len(made) - len(put)} of {len(made)} questions")
            if not put:
                continue
            for quantity, estimate in self._measured(session, put, ctx).items():
                values.setdefault(quantity, []).append(estimate.value)
                yield quantity, f"wording {template!r}", *numbers(estimate), UNITS[quantity]
        for quantity, found in values.items():
            yield quantity, "mean over wordings", float(np.mean(found)), len(found), None, None, UNITS[quantity]
            yield quantity, "deviation over wordings", float(np.std(found)), len(found), None, None, UNITS[quantity]

    # -- contrary tuning

    def _contrary(self, model: Any, asked: list[Row], ctx: Any) -> Iterator[tuple[Any, ...]]:
        assert self.contrary is not None
        rows = contradicting(_spaced(ctx.data.train, len(ctx.data.train.prepared)), self.contrary)
        session = ctx.shop.session(copy.deepcopy(model).requires_grad_(True))
        curves: dict[str, list[tuple[int, float]]] = {}
        for step in range(self.steps + 1):
            if step % self.every == 0 or step == self.steps:
                session.model.eval()
                for quantity, estimate in self._measured(session, asked, ctx).items():
                    curves.setdefault(quantity, []).append((step, estimate.value))
                    yield quantity, f"contrary tuning, step {step}", *numbers(estimate), UNITS[quantity]
            if step < self.steps:
                self._learn(session, rows, step)
        if curve := curves.get("right answers"):
            yield "steps until half are right", "contrary tuning", half_life(curve), len(asked), None, None, "steps"

    def _learn(self, session: Any, rows: list[Row], step: int) -> None:
        """One step of plain fine-tuning; rows and dropout are functions of seed and step."""
        if step == 0:
            parameters = [p for p in session.model.parameters() if p.is_floating_point()]
            self._optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=0.0)
        session.model.train()
        order = torch.randperm(len(rows), generator=stream(self.seed, "data", SLUG, "contrary", step))
        batch = session.render([rows[i] for i in order[: self.batch_rows].tolist()])
        with torch.random.fork_rng([session.device] if session.device.type == "cuda" else []):
            torch.manual_seed(derive_seed(self.seed, "dropout", SLUG, step))
            out = session.forward(batch, grad=True)
            (-(out.logp_N * batch.weight_N).sum() / batch.weight_N.sum()).backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    # -- the twin

    def _shift(self, session: Any, asked: list[Row], ctx: Any) -> Iterator[tuple[Any, ...]]:
        for alpha in self.alphas:
            options = {"aux": self.aux, "alpha": float(alpha), "layer_norm_targets": True}
            twin = registry.get("objective", SLUG).build({**options, "consistency_weight": 0.0, "fused": False})
            sums: dict[str, np.ndarray] = {}
            session.model.eval()
            twin.prepare(session, None)
            try:
                for number, part in enumerate(_parts(asked, ctx)):
                    batch = session.render(part)
                    session.step = 0
                    session.micro = number
                    session.totals = {"token": float(batch.weight_N.sum()), "sequence": float(batch.examples)}
                    loss = twin.loss(session.forward(batch, grad=True), batch, session)
                    for name, (amount, count) in loss.metrics.items():
                        sums[name] = sums.get(name, np.zeros(2)) + np.array([float(amount), float(count)])
            finally:
                twin.finish_model(session.model, None)
            for name, (amount, count) in sums.items():
                if found := re.fullmatch(r"consistency_block_(\d+)", name):
                    value = float(np.sqrt(amount / count))
                    condition = f"block {found[1]}, alpha {alpha:g}"
                    yield "shift of the twin", condition, value, int(count), None, None, "share of the norm"
            (own, count), (worse, _) = sums["base_loss"], sums["twin_nll"]
            yield (
                "loss of the twin above its own",
                f"alpha {alpha:g}",
                (worse - own) / count,
                int(count),
                None,
                None,
                "nats",
            )


UNITS = {"loss": "nats", "right answers": "share"}


def _spaced(source: Any, count: int) -> list[Row]:
    """Evenly spaced canonical rows of a source that have a question."""
    prepared = source.prepared
    index = np.unique(np.linspace(0, len(prepared) - 1, min(count, len(prepared))).astype(np.int64))
    rows = [prepared.canonical(int(i)) for i in index]
    return [row for row in rows if row["kind"] in ("pair", "chat")]


def _parts(rows: list[Row], ctx: Any) -> Iterator[list[Row]]:
    size = ctx.plan.recipe.evaluation.batch_rows
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
