"""Preference-oriented SFT (PoFT): like each answer better than already aligned models do.

    loss_i = -log sigmoid( beta (l_i - S_i) + gamma )          mean over the sequences of the step
    l_i    = (1 / n_i) sum_t log p(y_t)                         the model being trained
    S_i    = the same under aligned models, merged              constant, from the data stage of the same name

Its gradient is -beta c_i grad l_i with c_i = sigmoid(beta (S_i - l_i) - gamma) in (0, 1): of two answers that the model
finds equally likely, the one that aligned models find less likely (noise) counts less, and an answer fades out as l_i
passes S_i. At beta = 1 and l_i = S_i a step is half that of plain fine-tuning; a large beta is a gate on l_i < S_i.

``variant: reference_free``   S_i is ``constant``: the effect of the loss's shape alone
``variant: quality_weight``   loss_i = sigmoid(beta S_i) (-l_i): a weight that does not follow the model
``normalise: char``           l_i and S_i are divided by the characters of the answer instead of its tokens, for
                              scorers whose vocabulary is another one
``sft_mix``                   adds sft_mix (-l_i)

n_i counts the supervised tokens of the row after truncation. The released script takes l_i over all tokens of the
conversation (``train_targets: all``) while its scores count the answers' content alone; here both sides count what
training supervises by default: the content and the token that ends it.

Paper: "Preference-Oriented Supervised Fine-Tuning: Favoring Target Model Over Aligned Large Language Models", AAAI
2025, arXiv 2412.12865. Official repository: Savannah120/alignment-handbook-PoFT.

Example::

    data: {train: rows.jsonl, stages: [preference-oriented-sft: {scorers: [./aligned-a, ./aligned-b]}]}
    objective: {preference-oriented-sft: {beta: 1.0}}
    training: {epochs: 1, learning_rate: 1.0e-6, warmup: 0.1}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Batch, Context, Loss, Needs, Outputs
from luthier.core.registry import objective
from luthier.functional.discriminative import place
from luthier.functional.preference_oriented import (
    COLUMN,
    ROW,
    Correlation,
    answer_likelihood,
    characters,
    preference_loss,
    quality_weight,
    quantiles,
    score_of,
    text_hash,
)

SCANNED_ROWS = 1000


@objective(
    "preference-oriented-sft",
    identity={"sft_warmup": 1.0},
    example={"beta": 2.0},
    conflicts={"packing": "a packed row holds several answers, and each has a score of its own"},
    paper="Preference-Oriented Supervised Fine-Tuning: Favoring Target Model Over Aligned Large Language Models, "
    "AAAI 2025, arXiv 2412.12865",
)
class PreferenceOrientedFineTuning:
    """Preference-oriented fine-tuning: like each answer better than aligned models do, which noise soon satisfies."""

    def __init__(
        self,
        *,
        beta: Annotated[float, Field(gt=0, description="sharpness of the preference")] = 1.0,
        gamma: Annotated[float, Field(description="added to the margin")] = 0.0,
        variant: Annotated[
            Literal["poft", "reference_free", "quality_weight"],
            Field(description="the method, or an ablation: one score for all rows, or a weight on the plain loss"),
        ] = "poft",
        constant: Annotated[float, Field(description="variant: reference_free, the score of every row")] = 0.0,
        train_targets: Annotated[
            Literal["assistant", "all"],
            Field(description="tokens of l: the answers, or all of the row as the released code"),
        ] = "assistant",
        normalise: Annotated[
            Literal["token", "char"], Field(description="what l is the mean over; as in the data stage")
        ] = "token",
        sft_mix: Annotated[float, Field(ge=0, description="weight of the plain loss -l beside it")] = 0.0,
        sft_warmup: Annotated[
            float, Field(ge=0, le=1, description="share of the steps on the plain loss first; 1 is plain fine-tuning")
        ] = 0.0,
        transformed: Annotated[
            Literal["refuse", "allow"],
            Field(description="transforms that change inputs or token weights, and so what S is compared with"),
        ] = "refuse",
        quality: Annotated[
            str, Field(min_length=1, description="column with the quality of a row (true/false or a number), to log")
        ] = "quality",
    ) -> None:
        if constant and variant != "reference_free":
            raise UserError("preference-oriented-sft: constant is the score of variant: reference_free; remove it.")
        if normalise == "char" and train_targets == "all":
            raise UserError(
                "preference-oriented-sft: normalise: char counts the characters of answers, and train_targets: all "
                "takes the prompt too. Choose one of them."
            )
        self.beta, self.gamma, self.variant, self.constant = beta, gamma, variant, constant
        self.train_targets, self.normalise, self.sft_mix = train_targets, normalise, sft_mix
        self.sft_warmup, self.transformed, self.quality = sft_warmup, transformed, quality
        self._sources: dict[str, Any] = {}
        self._correlation, self._epoch = Correlation(), 0

    @property
    def needs(self) -> Needs:
        """The rows' scores, and the text that these belong to."""
        if self.sft_warmup == 1.0:
            return Needs(statistics=("logp",), positionwise=True)
        scored = self.variant != "reference_free"
        text = (*ROW, "source", "row") if scored or self.normalise == "char" else ()
        return Needs(statistics=("logp",), columns=(*((COLUMN,) if scored else ()), *text, self.quality))

    # -- hooks of the engine

    def check_data(self, dataset: Any) -> None:
        """See that every row has a score of its own text.

        Raises:
            UserError: a row has no score, or one of another text or unit.
        """
        if self.sft_warmup < 1.0 and self.variant != "reference_free":
            self._scan(dataset)

    def _scan(self, dataset: Any) -> tuple[list[float], list[str]]:
        """Score and source of every row."""
        found, sources = [], []
        for start in range(0, len(dataset), SCANNED_ROWS):
            columns = dataset.fetch(range(start, min(start + SCANNED_ROWS, len(dataset))))
            for b, row in enumerate(_rows(columns, len(columns["key"]))):
                row = {"row": start + b + 1, **row}
                found.append(self._score(row))
                sources.append(str(row.get("source") or "data.train"))
        return found, sources

    def prepare(self, ctx: Context, dataset: Any) -> None:
        """Look at every row's score before the first step.

        Raises:
            UserError: a row has no score, one of another text or unit; or the task has no tokens for ``all``.
        """
        if self.sft_warmup == 1.0:
            return
        if self.train_targets == "all" and ctx.task.name != "causal-lm":
            raise UserError(f"preference-oriented-sft: train_targets: all is not for {ctx.task.name}; use assistant.")
        if self.variant == "reference_free":
            return
        self._sources = quantiles(*self._scan(dataset))

    def record(self) -> dict[str, Any]:
        """Rows and quantiles of their scores by source, and how the weights follow the quality of the rows."""
        return {"scores": self._sources, "quality_correlation": self._correlation.value}

    def state(self) -> dict[str, Any]:
        """The sums of the correlation with the rows' quality."""
        return {"correlation": list(self._correlation.sums), "epoch": self._epoch}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        self._correlation, self._epoch = Correlation(state["correlation"]), state["epoch"]

    # -- the loss

    def loss(self, out: Outputs, batch: Batch, ctx: Context) -> Loss:
        """Sum over examples of weight times loss_i; the weight is the sum of the example weights.

        Raises:
            UserError: a transform changed inputs or token weights, or a row has no score.
        """
        if self._in_warmup(ctx):
            return Loss(sum=-(out.logp_N * batch.weight_N).sum(), weight=batch.weight_N.sum())
        self._check(batch)
        l_B, weight_B, count_B = answer_likelihood(out.logp_N, batch.weight_N, batch.sequence_N, batch.examples)
        if self.train_targets == "all":
            whole = all_tokens(batch)
            # The prompt has no weights of its own; those of the examples stay.
            l_B = answer_likelihood(ctx.forward(whole).logp_N, whole.weight_N, whole.sequence_N, batch.examples)[0]
        rows = list(_rows(batch.columns, batch.examples))
        if self.normalise == "char":
            size_B = torch.tensor([max(characters(row), 1) for row in rows], dtype=l_B.dtype, device=l_B.device)
            l_B = l_B * count_B / size_B
        constant = self.variant == "reference_free"
        known = [self.constant] * len(rows) if constant else [self._score(row) for row in rows]
        s_B = torch.tensor(known, dtype=l_B.dtype, device=l_B.device)
        if self.variant == "quality_weight":
            c_B = torch.sigmoid(self.beta * s_B)
            loss_B = -c_B * l_B
        else:
            c_B = quality_weight(l_B.detach(), s_B, self.beta, self.gamma)
            loss_B = preference_loss(l_B, s_B, self.beta, self.gamma)
        if self.sft_mix:
            loss_B = loss_B - self.sft_mix * l_B
        total, l_B = weight_B.sum(), l_B.detach()
        metrics: dict[str, tuple[Any, Any]] = {
            "likelihood": ((l_B * weight_B).sum(), total),
            "ref_score": ((s_B * weight_B).sum(), total),
            "quality_weight": ((c_B * weight_B).sum(), total),
            "above_reference": (((l_B > s_B) * weight_B).sum(), total),
            "without_targets": ((count_B == 0).sum(), batch.examples),
        }
        if any(row.get(self.quality) is not None for row in rows):
            self._follow(rows, c_B, weight_B, metrics, ctx)
        return Loss(sum=(loss_B * weight_B).sum(), weight=total, unit="sequence", metrics=metrics)

    # -- parts

    def _in_warmup(self, ctx: Context) -> bool:
        if self.sft_warmup in (0.0, 1.0):
            return bool(self.sft_warmup)
        if ctx.total_steps is None:
            raise UserError("preference-oriented-sft: sft_warmup is a share of the steps; set training.max_steps.")
        return ctx.step < round(self.sft_warmup * ctx.total_steps)

    def _check(self, batch: Batch) -> None:
        """What l is taken over must be the text that was scored, every token alike, unless the user allows more."""
        if self.transformed == "allow":
            return
        way_out = "Remove that transform, or set transformed: allow."
        if batch.keys_B is None:
            raise UserError(
                f"preference-oriented-sft: a transform changed the inputs, but not those of the scores. {way_out}"
            )
        low_B = batch.weight_N.new_full((batch.examples,), torch.inf)
        low_B = low_B.scatter_reduce(0, batch.sequence_N, batch.weight_N, "amin")
        if not torch.equal(low_B[batch.sequence_N], batch.weight_N):
            raise UserError(
                "preference-oriented-sft: a transform weights the tokens of an answer, which changes its likelihood "
                f"and not its score. {way_out}"
            )

    def _score(self, row: Mapping[str, Any]) -> float:
        """S of a row, in the unit of l and of the text that is there."""
        score = score_of(row)
        if score.per != self.normalise:
            raise UserError(
                f"preference-oriented-sft: the score is per {score.per}, but the objective says normalise: "
                f"{self.normalise}. Give stage and objective the same.",
                where=place(row),
            )
        if score.text is not None and score.text != text_hash(row):
            raise UserError(
                "preference-oriented-sft: the text is not the one that was scored. Put the stage "
                "'preference-oriented-sft' behind those that change rows.",
                where=place(row),
            )
        return score.value

    def _follow(
        self,
        rows: list[dict[str, Any]],
        c_B: torch.Tensor,
        weight_B: torch.Tensor,
        metrics: dict[str, tuple[Any, Any]],
        ctx: Context,
    ) -> None:
        """How the weights c follow the known quality of the rows, over the epoch so far (of this process's rows)."""
        if ctx.epoch != self._epoch:
            self._correlation, self._epoch = Correlation(), ctx.epoch
        there = [
            (float(c), row[self.quality])
            for c, weight, row in zip(c_B.tolist(), weight_B.tolist(), rows, strict=True)
            if weight > 0 and row.get(self.quality) is not None
        ]
        if wrong := [q for _, q in there if not isinstance(q, int | float)]:
            raise UserError(
                f"preference-oriented-sft: the column '{self.quality}' must hold true, false or a number, not "
                f"{wrong[0]!r}. Name another with quality: column."
            )
        self._correlation.add([c for c, _ in there], [float(q) for _, q in there])
        if (value := self._correlation.value) is not None:
            ctx.log(quality_correlation=value)
        for name, kind in (("good", True), ("poor", False)):
            some = [c for c, q in there if q is kind]
            if some:
                metrics[f"quality_weight_{name}"] = (sum(some), len(some))


def all_tokens(batch: Batch) -> Batch:
    """The same rows with every token but the first as a target, padding left out and weights 1."""
    whole = batch.every_token()
    follows_N = torch.nonzero(whole.sequence_N[1:] == whole.sequence_N[:-1]).squeeze(1)
    return whole.positions(follows_N)


def _rows(columns: Mapping[str, Any], count: int) -> Iterator[dict[str, Any]]:
    """The columns of a batch row by row."""
    names = [name for name, values in columns.items() if not name.endswith("_N") and len(values) == count]
    for b in range(count):
        yield {name: columns[name][b] for name in names}
