"""Discriminative fine-tuning (DFT, DFT2): the given answer must beat answers that the base model itself would give.

    F = mean_i [ -s(y_i, x_i) + tau * log E_{y' ~ P0(.|x_i)} exp(s(y', x_i) / tau) / P0(y'|x_i) ]

with scores s that are log-likelihoods of whole answers under the model being trained. A step takes
B = ``samples_per_prompt`` negatives y'_ij of each example, sampled from the base P0 beforehand by the data stage of the
same name:

    d_ij   = s(y'_ij) / tau - q_ij
    exp(u_i) <- (1 - gamma) exp(u_i) + gamma * mean_j exp(d_ij)          before it is used; kept in log space
    p_ij   = stop_gradient(exp(d_ij - u_i))                               may exceed 1
    loss_i = -s(y_i) + mean_j p_ij s(y'_ij)

The value of loss_i is not F: only its gradient is meant. F's estimate -s(y_i) + tau * u_i is logged as ``objective``.

``s``    ``variant: dft``: sum of the answer's token log-probabilities; ``dft2``: their mean (divisor + 1e-8)
``q_ij`` log P0(y'_ij|x_i) under the frozen starting model with the training prompt; 0 for ``dft2`` (no reference)
``u_i``  one scalar per training row, carried over epochs and checkpoints; it starts at ``u_init``

All supervised tokens of a row are its answer (of a conversation the earlier turns are the same on both sides). Example
weights of a selector multiply loss_i; position weights that differ within an answer would change s and are refused.

Paper: "Discriminative Finetuning of Generative Large Language Models without Reward Models and Preference Data", ICML
2025, arXiv 2502.18679. Official repository: PenGuln/DFT. The released code averages u over processes at the end of an
epoch, which gives NaN for rows that no process has seen; here every process knows every visit at once, and an unseen
row keeps its value. Not to be confused with ``dynamic-ft``, which shares the acronym.

Example::

    data: {train: rows.jsonl, stages: [discriminative-ft: {samples: 4}]}
    objective: {discriminative-ft: {variant: dft}}
    training: {epochs: 2, learning_rate: 2.0e-6}
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core import registry
from luthier.core.errors import LuthierError, UserError
from luthier.core.protocols import Batch, Context, Loss, Needs, Outputs
from luthier.core.registry import objective
from luthier.core.store import content_hash
from luthier.functional.discriminative import (
    as_answer,
    given_answer,
    merged,
    negative_weights,
    place,
    scores,
    surrogate,
    updated,
    with_answer,
)
from luthier.functional.spans import answer_starts

COLUMN = "negatives"
ROW = ("kind", "prompt", "separator", "completion", "system", "messages", "tools")
# By variant, from the released recipes.
GAMMA = {"dft": 0.85, "dft2": 0.9}
TAU = {"dft": 1.0, "dft2": 0.3}
WATCHED_STEPS = 20
FALLEN = 1.0
SCANNED_ROWS = 1000
TOKEN_WEIGHTS = "it changes the score of the answer but not those of its negatives, and the two are compared"


@objective(
    "discriminative-ft",
    identity={"sft_warmup": 1.0},
    conflicts={
        "packing": "a packed row holds several answers, and the score is that of one",
        "transform:masked-thought": TOKEN_WEIGHTS,
        "transform:tl-training": TOKEN_WEIGHTS,
        "transform:fault-aware-ft": TOKEN_WEIGHTS,
    },
    tasks=("causal-lm",),
    paper="Discriminative Finetuning of Generative Large Language Models without Reward Models and Preference Data, "
    "ICML 2025, arXiv 2502.18679",
)
class DiscriminativeFineTuning:
    """Discriminative fine-tuning: the given answer must beat answers that the base model itself would give."""

    def __init__(
        self,
        *,
        variant: Annotated[
            Literal["dft", "dft2"], Field(description="summed scores with a reference, or mean scores without one")
        ] = "dft",
        gamma: Annotated[
            float | None,
            Field(gt=0, le=1, description="share of a visit in the normaliser: 0.85 for dft, 0.9 for dft2"),
        ] = None,
        tau: Annotated[float | None, Field(gt=0, description="temperature: 1 for dft, 0.3 for dft2")] = None,
        samples_per_prompt: Annotated[int, Field(ge=1, description="negatives of each example in a step")] = 2,
        resample_per_epoch: Annotated[bool, Field(description="other negatives in each epoch, else the first")] = True,
        u_init: Annotated[float, Field(description="log of the normaliser before the first visit")] = 0.0,
        sft_warmup: Annotated[
            float, Field(ge=0, le=1, description="share of the steps on the plain loss first; 1 is plain fine-tuning")
        ] = 0.0,
        negatives: Annotated[
            Literal["offline", "online"], Field(description="the rows' column, or the current model (not the paper)")
        ] = "offline",
        temperature: Annotated[float, Field(gt=0, description="negatives: online, of sampling")] = 0.7,
        top_k: Annotated[int, Field(ge=0, description="negatives: online, tokens kept; 0 keeps all")] = 50,
        max_new_tokens: Annotated[int, Field(ge=1, description="negatives: online, longest one in tokens")] = 320,
    ) -> None:
        self.variant, self.samples_per_prompt, self.u_init = variant, samples_per_prompt, u_init
        self.gamma = GAMMA[variant] if gamma is None else gamma
        self.tau = TAU[variant] if tau is None else tau
        self.resample_per_epoch, self.sft_warmup, self.negatives = resample_per_epoch, sft_warmup, negatives
        self.sampling = {"temperature": temperature, "top_k": top_k, "max_new_tokens": max_new_tokens}
        self._keys: list[str] = []
        self._fingerprint = ""
        self._log_u: torch.Tensor | None = None
        # Mean token log-probability of the given answers: over the first steps, and a running mean.
        self._early: list[float] = []
        self._recent = 0.0
        self._warned = False

    @property
    def needs(self) -> Needs:
        """The row's text and its negatives; the starting model for ``dft``."""
        if self.sft_warmup == 1.0:
            return Needs(statistics=("logp",), positionwise=True)
        offline = self.negatives == "offline"
        return Needs(
            statistics=("logp",),
            models=("reference",) if self.variant == "dft" else (),
            columns=(*ROW, "source", "row", *([COLUMN] if offline else [])),
            generation=not offline,
        )

    # -- hooks of the engine

    def check_data(self, dataset: Any) -> None:
        """See that every row has negatives for a step.

        Raises:
            UserError: a row has none, too few, or something that is no text.
        """
        if self.sft_warmup < 1.0 and self.negatives == "offline":
            self._scan(dataset, self.samples_per_prompt)

    def _scan(self, dataset: Any, needed: int) -> None:
        for start in range(0, len(dataset), SCANNED_ROWS):
            rows = dataset.fetch(range(start, min(start + SCANNED_ROWS, len(dataset))))
            for b in range(len(rows["key"])):
                row = {name: values[b] for name, values in rows.items()}
                enough(row.get(COLUMN), needed, {"row": start + b + 1, **row}, self.samples_per_prompt)

    def prepare(self, ctx: Context, dataset: Any) -> None:
        """One normaliser per row, and a look at all negatives before the first step.

        Raises:
            UserError: a row has no negative, or too few for the epochs of the run.
        """
        if self.sft_warmup == 1.0:
            return
        self._keys = list(dataset.keys)
        self._fingerprint = content_hash(self._keys)
        self._log_u = torch.full((len(self._keys),), self.u_init)
        if self.negatives == "online":
            if any(hasattr(p, "full_tensor") for p in ctx.model.parameters()):
                raise UserError("discriminative-ft: sharded weights cannot write negatives; use negatives: offline.")
            return
        epochs = ctx.total_epochs
        self._scan(dataset, self.samples_per_prompt * (epochs if self.resample_per_epoch else 1))

    def state(self) -> dict[str, Any]:
        """The normalisers by row, and a hash of the rows they belong to."""
        return {"rows": self._fingerprint, "log_u": self._log_u}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`.

        Raises:
            LuthierError: the state belongs to other rows.
        """
        if state["rows"] != self._fingerprint:
            raise LuthierError(
                "discriminative-ft: the normalisers of the checkpoint belong to other training rows, or to another "
                "order of them. Resume with the data the run began with, or choose another output."
            )
        self._log_u = None if state["log_u"] is None else state["log_u"].clone()

    # -- the loss

    def loss(self, out: Outputs, batch: Batch, ctx: Context) -> Loss:
        """Sum over examples of weight times loss_i; the weight is the sum of the example weights.

        Raises:
            UserError: a transform changed inputs or token weights, or a row has no negative for this epoch.
        """
        if self._in_warmup(ctx):
            return Loss(sum=-(out.logp_N * batch.weight_N).sum(), weight=batch.weight_N.sum())
        weight_B, rows = example_weights(batch), batch.row_B.tolist()
        self._check(batch, rows)
        examples, mean = batch.examples, self.variant == "dft2"
        negatives = self._negatives(batch, ctx)
        size = (examples, negatives.examples // examples)
        compared(batch, negatives)

        a_B, tokens_B = scores(out.logp_N, batch.sequence_N, examples, mean=mean)
        logp_N = ctx.forward(negatives).logp_N
        r_BK, length_BK = (x.view(size) for x in scores(logp_N, negatives.sequence_N, negatives.examples, mean=mean))
        metrics: dict[str, tuple[Any, Any]] = {}
        q_BK = torch.zeros_like(r_BK)
        if not mean:
            reference_N = ctx.forward(negatives, "reference").logp_N
            q_BK = scores(reference_N, negatives.sequence_N, negatives.examples, mean=False)[0].view(size)
            # Over answers of the base, its own log-probability less the model's is the divergence from base to model.
            ratio_BK = (q_BK - r_BK.detach()) * weight_B[:, None]
            metrics["kl_on_negatives"] = (ratio_BK.sum(), (length_BK * weight_B[:, None]).sum())
        d_BK = r_BK.detach() / self.tau - q_BK
        u_B = updated(self._known(rows).to(d_BK), d_BK, self.gamma)
        if ctx.model.training:
            self._store(rows, u_B, weight_B)
        p_BK, clamped = negative_weights(d_BK, u_B)
        loss_B = surrogate(a_B, r_BK, p_BK)

        total, a_B, r_B = weight_B.sum(), a_B.detach(), r_BK.detach().mean(dim=1)
        for name, value_B in (
            ("score", a_B),
            ("negative_score", r_B),
            ("margin", a_B - r_B),
            ("log_normaliser", u_B),
            ("negative_weight", p_BK.mean(dim=1)),
            ("objective", self.tau * u_B - a_B),
        ):
            metrics[name] = ((value_B * weight_B).sum(), total)
        metrics["clamped_weights"] = (clamped, p_BK.numel())
        self._watch(float((a_B if mean else a_B / tokens_B).mean()))
        return Loss(sum=(loss_B * weight_B).sum(), weight=total, unit="sequence", metrics=metrics)

    # -- parts

    def _in_warmup(self, ctx: Context) -> bool:
        if self.sft_warmup in (0.0, 1.0):
            return bool(self.sft_warmup)
        if ctx.total_steps is None:
            raise UserError("discriminative-ft: sft_warmup is a share of the steps; set training.max_steps.")
        return ctx.step < round(self.sft_warmup * ctx.total_steps)

    def _check(self, batch: Batch, rows: list[int]) -> None:
        """The batch holds rows of the data that was prepared, each once, with inputs as they were."""
        if self._log_u is None:
            raise LuthierError("discriminative-ft: the training rows are not known; use Luthier's own training loop.")
        if batch.keys_B is None:
            raise UserError(
                "discriminative-ft: a transform changed the inputs of the given answers, but not of their negatives. "
                "Remove that transform."
            )
        if len(set(rows)) < len(rows):
            raise LuthierError("discriminative-ft: one training row is twice in a batch, and it has one normaliser.")
        if [self._keys[row] for row in rows] != batch.keys_B:
            raise LuthierError("discriminative-ft: the batch holds rows of other data than the run was prepared with.")

    def _known(self, rows: list[int]) -> torch.Tensor:
        assert self._log_u is not None
        return self._log_u[rows]

    def _store(self, rows: list[int], u_B: torch.Tensor, weight_B: torch.Tensor) -> None:
        """Keep the new normalisers, those of all processes; a batch of weight 0 only fills a place."""
        assert self._log_u is not None
        seen = weight_B.detach().cpu() > 0
        values = u_B.float().cpu()[seen].tolist()
        visit = ([row for row, there in zip(rows, seen.tolist(), strict=True) if there], values)
        visits: list[Any] = [visit]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            visits = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(visits, visit)
        touched = sorted({row for part, _ in visits for row in part})
        at = {row: i for i, row in enumerate(touched)}
        self._log_u[touched] = merged(self._log_u[touched], [([at[r] for r in part], v) for part, v in visits])

    def _negatives(self, batch: Batch, ctx: Context) -> Batch:
        """This step's negatives as a batch of B * K rows, those of an example one after the other."""
        names = [name for name in (*ROW, "source", "row") if name in batch.columns]
        rows = [{name: batch.columns[name][b] for name in names} for b in range(batch.examples)]
        texts = self._written(batch, rows, ctx) if self.negatives == "online" else self._sampled(batch, rows, ctx)
        pairs = [(b, text) for b, some in enumerate(texts) for text in some]
        made = ctx.render([with_answer(rows[b], text) for b, text in pairs])
        assert batch.keys_B is not None
        # A row's key stands for its prompt as it is rendered, so with the text it tells the negative's tokens.
        keys = [content_hash("discriminative-ft", batch.keys_B[b], text) for b, text in pairs]
        return replace(made, keys_B=keys)

    def _sampled(self, batch: Batch, rows: list[dict[str, Any]], ctx: Context) -> list[list[str]]:
        """The rows' own negatives of this epoch."""
        K = self.samples_per_prompt
        start = ctx.epoch * K if self.resample_per_epoch else 0
        columns = batch.columns.get(COLUMN) or [None] * batch.examples
        for row, texts in zip(rows, columns, strict=True):
            enough(texts, start + K, row, K)
        return [texts[start : start + K] for texts in columns]

    def _written(self, batch: Batch, rows: list[dict[str, Any]], ctx: Context) -> list[list[str]]:
        """Answers of the model as it is now."""
        K = self.samples_per_prompt
        prompts = [
            ids[:start].tolist()
            for ids, start in zip(batch.inputs["input_ids"], answer_starts(batch)[1].tolist(), strict=True)
        ]
        decoder = registry.get("decoding", "sample").build(self.sampling)
        found = decoder.generate(ctx.model, [p for p in prompts for _ in range(K)], ctx)
        given = [given_answer(row) for row in rows]
        return [[as_answer(c.text, given[b]) for c in found[b * K : (b + 1) * K]] for b in range(batch.examples)]

    def _watch(self, value: float) -> None:
        """Warn once when the given answers themselves become less likely: the negative term has no lower bound."""
        if not math.isfinite(value) or self._warned:
            return
        if len(self._early) < WATCHED_STEPS:
            self._early.append(value)
            self._recent = sum(self._early) / len(self._early)
            return
        self._recent += 0.1 * (value - self._recent)
        start = sum(self._early) / WATCHED_STEPS
        if self._recent < start - FALLEN:
            self._warned = True
            warnings.warn(
                f"discriminative-ft: the mean token log-probability of the given answers fell from {start:.2f} to "
                f"{self._recent:.2f}; pushing the negatives down carries them along. Lower training.learning_rate, "
                "lower tau, or begin with sft_warmup.",
                stacklevel=2,
            )


def enough(texts: Any, needed: int, row: dict[str, Any], per_step: int) -> None:
    """Check the negatives of one row.

    Raises:
        UserError: there are none, too few, or they are not texts.
    """
    if not texts:
        raise UserError(
            "no negative available for this prompt: put the data stage 'discriminative-ft' into data.stages, or give "
            f"the rows a column '{COLUMN}' (a list of texts).",
            where=place(row),
        )
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"the column '{COLUMN}' must be a list of texts.", where=place(row))
    if len(texts) < needed:
        raise UserError(
            f"no negative available for this prompt in every epoch: {needed} are needed ({per_step} per step and "
            f"epoch), {len(texts)} are there. Set samples: {needed} in the data stage, lower samples_per_prompt or "
            "training.epochs, or set resample_per_epoch: false.",
            where=place(row),
        )


def example_weights(batch: Batch) -> torch.Tensor:
    """The weight of each example [B].

    Raises:
        UserError: positions of one example have different weights.
    """
    low_B = batch.weight_N.new_full((batch.examples,), torch.inf)
    low_B = low_B.scatter_reduce(0, batch.sequence_N, batch.weight_N, "amin")
    high_B = torch.zeros_like(low_B).scatter_reduce(0, batch.sequence_N, batch.weight_N, "amax")
    if not torch.equal(low_B, high_B):
        raise UserError(
            "discriminative-ft: a transform weights the tokens of an answer, which changes its score and not those of "
            "its negatives. Remove that transform."
        )
    return high_B


def compared(batch: Batch, negatives: Batch) -> None:
    """Check that the negatives answer the prompts of the batch, and say something.

    Raises:
        UserError: prompts differ by more than one token, or a negative has no token to score.
    """
    count = torch.bincount(negatives.sequence_N, minlength=negatives.examples)
    if not bool((count > 0).all()):
        raise UserError(
            "discriminative-ft: a negative has no token to score: it is empty and the rows end without a stop token. "
            "Leave out empty negatives, or use a tokenizer or template that ends answers."
        )
    start_B, other_BK = answer_starts(batch)[0], answer_starts(negatives)[0].view(batch.examples, -1)
    if bool(((other_BK - start_B[:, None]).abs() > 1).any()):
        raise UserError(
            "discriminative-ft: a prompt is rendered with other tokens before its negative than before its answer; "
            "use another data.template."
        )
