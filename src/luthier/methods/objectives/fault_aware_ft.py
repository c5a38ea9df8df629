"""Fault-aware fine-tuning (FAIT): the tokens that tell a correct program from a similar wrong one count more.

    loss  = sum_ij w_ij nll_ij / sum_ij 1                             over the response tokens j of all examples i
    w_ij  = omega_i at flagged tokens, 1 elsewhere; with ``both`` 1 + (omega_i - 1) line_share where only the line is
    omega = clip(1 + a g, 1, w_max)                                   a = ``emphasis``, w_max = ``max_weight``
    g     = 2 sigmoid((e- - e+) / temperature)                        ``dynamic``: 0 < g < 2, 1 where it cannot tell
    g     = exp(clip(e- - e+, -c, c))                                 ``ratio``: c = ``ratio_clip``
    g     = 1                                                         ``static``

``e+`` is the mean log-probability of the flagged tokens of the correct answer c+ under the model as it is, ``e-`` that
of the flagged tokens of the wrong answer c-, from a pass over c- without gradient and in evaluation mode. Weights carry
no gradient: once the model prefers the correct answer they fade. The data stage of the same name finds c- and flags the
tokens; rows without a pair are trained on plainly. ``curriculum`` lets ``a`` grow linearly from 0 over a share of the
steps. ``unlikelihood`` adds mu times the mean over examples of -log(1 - p) of the token with which c- leaves c+ (not in
the paper). ``member`` puts a loss of beyond-log-likelihood in the place of nll.

``refresh: step`` runs c- in each step; ``epoch`` runs all of them at the start of each epoch and keeps e-. Every row is
seen once per epoch, so both pass over each c- as often; the sweep batches them better, and its e- is that of the
epoch's start. c- is cut behind its last flagged token, and the vocabulary is only looked at there.

Paper: "FAIT: Fault-Aware Fine-Tuning for Better Code Generation", 2025, arXiv 2503.16913 (FGIT in its second version).
No released code is known; the paper's weight could not be read, and the one above is this library's.

Example::

    data: {train: mbpp.jsonl, stages: [fault-aware-ft]}
    objective: {fault-aware-ft: {mode: dynamic, emphasis: 1.0}}
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core.errors import LuthierError, UserError
from luthier.core.protocols import Batch, Context, Loss, Needs, Outputs
from luthier.core.registry import objective
from luthier.core.store import content_hash
from luthier.functional.error_sensitive import (
    SENSITIVE,
    WRONG,
    Granularity,
    Mode,
    checksum,
    emphasised,
    factor,
    levels,
    mean_by,
    of_row,
    rows_of,
    token_weights,
)
from luthier.functional.probability_losses import kept, parse, token_loss

SLUG = "fault-aware-ft"
SCANNED_ROWS = 1000
# Tokens of wrong answers in one batch of the sweep at the start of an epoch.
SWEEP_TOKENS = 8192


@objective(
    "fault-aware-ft",
    identity={"emphasis": 0.0},
    example={"emphasis": 2.0, "require_pairs": False},
    conflicts={"packing": "flags are places in the tokens of one row"},
    tasks=("causal-lm",),
    paper="FAIT: Fault-Aware Fine-Tuning for Better Code Generation, 2025, arXiv 2503.16913",
)
class FaultAwareFineTuning:
    """Fault-aware fine-tuning: tokens that tell a correct program from a similar wrong one count more."""

    def __init__(
        self,
        *,
        mode: Annotated[
            Mode, Field(description="the factor g: by the model's preference (dynamic, ratio), or 1 (static)")
        ] = "dynamic",
        emphasis: Annotated[float, Field(ge=0, description="a, the weight added at g = 1; 0 is plain SFT")] = 1.0,
        max_weight: Annotated[float, Field(ge=1, description="w_max, the largest weight")] = 5.0,
        temperature: Annotated[float, Field(gt=0, description="dynamic: of the sigmoid, in nats")] = 1.0,
        ratio_clip: Annotated[float, Field(gt=0, le=50, description="ratio: c, largest difference in nats")] = 2.0,
        granularity: Annotated[
            Granularity, Field(description="flags by line, by token, or both with line_share for the rest of a line")
        ] = "both",
        line_share: Annotated[
            float, Field(ge=0, le=1, description="both: share of omega - 1 for tokens flagged by their line alone")
        ] = 0.5,
        curriculum: Annotated[
            float, Field(ge=0, le=1, description="share of the steps over which a grows from 0; 0 is off, try 0.2")
        ] = 0.0,
        refresh: Annotated[
            Literal["step", "epoch"], Field(description="e- of the current model, or of the epoch's start")
        ] = "step",
        variants: Annotated[
            Literal["union", "sample"],
            Field(description="rows with several wrong answers: all of them, or one drawn in each epoch"),
        ] = "union",
        normalise: Annotated[
            Literal["tokens", "weights"], Field(description="divide by the number of tokens, or by their weights")
        ] = "tokens",
        unlikelihood: Annotated[
            float, Field(ge=0, description="mu, push against the token with which c- leaves c+; not in the paper")
        ] = 0.0,
        member: Annotated[
            str | None,
            Field(description="a member of beyond-log-likelihood, such as p or top_p-0.3, in place of nll"),
        ] = None,
        require_pairs: Annotated[
            bool, Field(description="stop where no row has a wrong answer; false trains plainly then")
        ] = True,
    ) -> None:
        if unlikelihood and normalise == "weights":
            raise UserError(
                f"{SLUG}: unlikelihood is a mean over examples beside a mean over tokens; use normalise: tokens."
            )
        try:
            self.member = None if member is None else parse(member)
        except ValueError as error:
            raise UserError(f"{SLUG}: member: {error}.") from None
        self.mode, self.emphasis, self.max_weight = mode, emphasis, max_weight
        self.temperature, self.ratio_clip = temperature, ratio_clip
        self.granularity: Granularity = granularity
        self.line_share, self.curriculum, self.refresh, self.variants = line_share, curriculum, refresh, variants
        self.normalise, self.unlikelihood, self.require_pairs = normalise, unlikelihood, require_pairs
        # e- of each training row (NaN without a pair), and the epoch it was taken in.
        self._wrong: torch.Tensor | None = None
        self._epoch = -1
        self._fingerprint = ""
        self._data: Any = None
        self._counts = {"rows": 0, "rows_with_a_pair": 0, "variants": 0, "flagged_tokens": 0}

    @property
    def compares(self) -> bool:
        """Whether e- is needed."""
        return self.emphasis > 0 and self.mode != "static"

    @property
    def needs(self) -> Needs:
        """Flags; the wrong answers too where they are run, for then a weight joins the positions of an example."""
        runs_wrong = self.compares or self.unlikelihood > 0
        off = not runs_wrong and self.emphasis == 0
        return Needs(
            statistics=("logp",),
            positionwise=not runs_wrong,
            columns=() if off else (SENSITIVE, WRONG) if runs_wrong else (SENSITIVE,),
            fixed_weight=off or self.normalise == "tokens",
        )

    # -- hooks of the engine

    def check_data(self, dataset: Any) -> None:
        """Look at the flags of all rows.

        Raises:
            UserError: no row has a pair, or flags belong to other tokens than those that are trained on.
        """
        if not self.needs.columns:
            return
        counts = dict.fromkeys(self._counts, 0)
        for start in range(0, len(dataset), SCANNED_ROWS):
            rows = dataset.fetch(range(start, min(start + SCANNED_ROWS, len(dataset))))
            flags_B = rows.get(SENSITIVE) or [None] * len(rows["input_ids"])
            for b, flags in enumerate(flags_B):
                counts["rows"] += 1
                if flags and flags["line"]:
                    self._check(flags, rows, b, start)
                    counts["rows_with_a_pair"] += 1
                    counts["variants"] += len(flags["line"])
                    counts["flagged_tokens"] += len(of_row(flags, None, self.granularity))
        self._counts = counts
        if not counts["rows_with_a_pair"] and self.require_pairs:
            raise UserError(
                f"{SLUG}: no training row has a wrong answer with flags. Put the data stage {SLUG} last in "
                "data.stages, or set require_pairs: false to train plainly."
            )

    def prepare(self, ctx: Context, dataset: Any) -> None:
        """Count pairs and flags, and make place for the scores of wrong answers.

        Raises:
            UserError: as :meth:`check_data` does.
        """
        if not self.needs.columns:
            return
        self.check_data(dataset)
        self._data = dataset
        self._fingerprint = content_hash(list(dataset.keys))
        if self.compares and self.refresh == "epoch":
            self._wrong, self._epoch = torch.full((len(dataset),), torch.nan), -1

    def _check(self, flags: dict[str, Any], rows: dict[str, Any], b: int, start: int) -> None:
        if flags["check"] != checksum(rows["input_ids"][b]):
            source = (rows.get("source") or {b: None})[b] or "data.train"
            raise UserError(
                f"the flags of {SLUG} belong to other tokens than the row has now: a later data stage, or another "
                "tokenizer or template, changed it. Put the data stage last.",
                where=f"{source}, row {(rows.get('row') or {b: start + b + 1})[b]}",
            )

    def record(self) -> dict[str, int]:
        """How many rows have a pair."""
        return self._counts

    def state(self) -> dict[str, Any]:
        """e- by row and its epoch, with a hash of the rows they belong to."""
        return {"rows": self._fingerprint, "epoch": self._epoch, "wrong": self._wrong}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`.

        Raises:
            LuthierError: the state belongs to other rows.
        """
        if state["rows"] != self._fingerprint:
            raise LuthierError(
                f"{SLUG}: the checkpoint belongs to other training rows, or to another order of them. Resume with the "
                "data the run began with, or choose another output."
            )
        self._epoch = state["epoch"]
        self._wrong = None if state["wrong"] is None else state["wrong"].clone()

    # -- the loss

    def loss(self, out: Outputs, batch: Batch, ctx: Context) -> Loss:
        """The weighted negative log-likelihood; the weight is the number of tokens, or their weights."""
        logp_N, weight_N = out.logp_N, batch.weight_N
        nll_N = -logp_N if self.member is None else token_loss(self.member, logp_N) * kept(self.member, logp_N)
        if not self.needs.columns:
            return Loss(sum=(nll_N * weight_N).sum(), weight=weight_N.sum())
        picked = self._picked(batch, ctx)
        columns = batch.columns.get(SENSITIVE) or [None] * batch.examples
        flags_B = [of_row(flags, k, self.granularity) for flags, k in zip(columns, picked, strict=True)]
        level_N = levels(flags_B, batch.position_N, batch.inputs["input_ids"].shape[1])
        flagged_N = level_N > 0
        count = weight_N.sum()
        amount = self.emphasis * self._grown(ctx)
        metrics: dict[str, tuple[Any, Any]] = {
            "nll_sensitive": (-(logp_N.detach() * weight_N * flagged_N).sum(), (weight_N * flagged_N).sum()),
            "sensitive_share": ((weight_N * flagged_N).sum(), count),
        }
        with torch.no_grad():
            good_B = mean_by(logp_N.detach()[flagged_N], batch.sequence_N[flagged_N], batch.examples)
            wrong_B = good_B
            if self.compares:
                wrong_B = self._wrong_now(batch, picked, ctx).to(good_B)
                # A row without a pair has no flag, so its factor is never used.
                wrong_B = torch.where(wrong_B.isnan(), good_B, wrong_B)
            g_B = factor(good_B, wrong_B, self.mode, temperature=self.temperature, ratio_clip=self.ratio_clip)
            omega_B = emphasised(g_B, amount, self.max_weight)
            omega_N = omega_B[batch.sequence_N]
            full = {"line_share": self.line_share, "max_weight": self.max_weight}
            used_N = token_weights(level_N, omega_N, weight_N, **full)
        if not self.needs.positionwise:
            paired_B = torch.bincount(batch.sequence_N[flagged_N & (weight_N > 0)], minlength=batch.examples) > 0
            pairs = paired_B.sum()
            told = {"omega": omega_B, "good_logp": good_B}
            told |= {"wrong_logp": wrong_B, "factor": g_B} if self.compares else {}
            metrics |= {name: (value_B[paired_B].sum(), pairs) for name, value_B in told.items()}
        total = (nll_N * used_N).sum()
        if self.unlikelihood:
            term, examples = self._pushed(batch, picked, ctx)
            metrics["unlikelihood"] = (term.detach(), examples)
            # A mean over the step's examples, brought to the scale of its count of tokens.
            total = total + self.unlikelihood * term * (ctx.totals["token"] / max(ctx.totals["sequence"], 1.0))
        return Loss(sum=total, weight=count if self.normalise == "tokens" else used_N.sum(), metrics=metrics)

    # -- parts

    def _grown(self, ctx: Context) -> float:
        """The share of the emphasis at this step."""
        if not self.curriculum:
            return 1.0
        if ctx.total_steps is None:
            raise UserError(f"{SLUG}: curriculum is a share of the steps; set training.max_steps.")
        return min(1.0, ctx.step / max(self.curriculum * ctx.total_steps, 1e-9))

    def _picked(self, batch: Batch, ctx: Context) -> list[int | None]:
        """Which variant of each example is used in this epoch; None for all."""
        if self.variants == "union":
            return [None] * batch.examples
        columns = batch.columns.get(SENSITIVE) or [None] * batch.examples
        return [self._drawn(flags, int(row), ctx) for flags, row in zip(columns, batch.row_B.tolist(), strict=True)]

    def _drawn(self, flags: dict[str, Any] | None, row: int, ctx: Context) -> int | None:
        if self.variants == "union" or not flags or len(flags["line"]) < 2:
            return None
        generator = ctx.rng("data", SLUG, ctx.epoch, row)
        return int(torch.randint(len(flags["line"]), (), generator=generator))

    @staticmethod
    def _used(variants: list[Any] | None, picked: int | None) -> list[Any]:
        found = variants or []
        return found if picked is None else found[picked : picked + 1]

    def _wrong_now(self, batch: Batch, picked: list[int | None], ctx: Context) -> torch.Tensor:
        """e- of each example [B]; NaN without a pair."""
        if self.refresh == "epoch":
            if self._wrong is None:
                raise LuthierError(f"{SLUG}: refresh: epoch needs the training rows; use Luthier's own training loop.")
            if self._epoch != ctx.epoch:
                self._sweep(ctx)
            return self._wrong[batch.row_B.cpu()]
        columns = batch.columns.get(WRONG) or [None] * batch.examples
        used = [self._used(variants, k) for variants, k in zip(columns, picked, strict=True)]
        return self._scored(used, batch, ctx)

    def _scored(self, variants: list[list[Any]], batch: Batch | None, ctx: Context) -> torch.Tensor:
        """Mean log-probability of the flagged tokens of each example's wrong answers, [len(variants)]."""
        made = rows_of(variants, self.granularity)
        owner_K = torch.tensor(made.pop("owner"), dtype=torch.long, device=ctx.device)
        if not len(owner_K):
            if not _together():
                return torch.full((len(variants),), torch.nan)
            # Every process takes part in every forward pass.
            made = {"input_ids": [[0, 0]], "spans": [[1, 2]]}
        model = ctx.model
        was_training = model.training
        model.eval()
        try:
            wrong = collated(made, ctx)
            logp_N = ctx.forward(wrong, grad=False).logp_N.detach()
        finally:
            model.train(was_training)
        if not len(owner_K):
            return torch.full((len(variants),), torch.nan)
        group_N = owner_K[wrong.sequence_N]
        mean = mean_by(logp_N, group_N, len(variants))
        return torch.where(torch.bincount(group_N, minlength=len(variants)) > 0, mean, torch.nan)

    def _sweep(self, ctx: Context) -> None:
        """e- of all rows under the model as it is, shared out over the processes."""
        assert self._wrong is not None
        sizes: list[tuple[int, int]] = []
        for start in range(0, len(self._data), SCANNED_ROWS):
            index = range(start, min(start + SCANNED_ROWS, len(self._data)))
            found = self._data.fetch(index).get(WRONG) or []
            for row, variants in enumerate(found, start=start):
                if variants:
                    sizes.append((sum(len(v["ids"]) for v in variants), row))
        batches: list[list[int]] = []
        room = 0
        for size, row in sorted(sizes):
            if room < size or not batches:
                batches.append([])
                room = SWEEP_TOKENS
            batches[-1].append(row)
            room -= size
        rank, world = _process()
        values: list[tuple[int, float]] = []
        for k in range(0, len(batches), world):
            rows = batches[k + rank] if k + rank < len(batches) else []
            fetched = self._data.fetch(rows) if rows else {SENSITIVE: [], WRONG: []}
            used = [
                self._used(variants, self._drawn(flags, row, ctx))
                for variants, flags, row in zip(fetched[WRONG], fetched[SENSITIVE], rows, strict=True)
            ]
            values += zip(rows, self._scored(used, None, ctx).tolist(), strict=True)
        everyone: list[Any] = [values]
        if world > 1:
            everyone = [None] * world
            torch.distributed.all_gather_object(everyone, values)
        for part in everyone:
            for row, value in part:
                self._wrong[row] = value
        self._epoch = ctx.epoch

    def _pushed(self, batch: Batch, picked: list[int | None], ctx: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum over examples of the mean of -log(1 - p) at the first token of c- that c+ does not have; their weight."""
        columns = batch.columns.get(WRONG) or [None] * batch.examples
        made: dict[str, list[Any]] = {"input_ids": [], "spans": []}
        owner: list[int] = []
        for b, (variants, k) in enumerate(zip(columns, picked, strict=True)):
            for variant in self._used(variants, k):
                at = variant["diverges"]
                # Where the shorter answer is all of the other there is no such token.
                if 0 < at < len(variant["ids"]):
                    made["input_ids"].append(variant["ids"][: at + 1])
                    made["spans"].append([at, at + 1])
                    owner.append(b)
        counts_B = torch.bincount(batch.sequence_N, minlength=batch.examples)
        weight_B = torch.zeros_like(counts_B, dtype=torch.float32).index_add(0, batch.sequence_N, batch.weight_N)
        weight_B = weight_B / counts_B.clamp(min=1)
        stand_in = not owner
        if stand_in:
            if not _together():
                return weight_B.new_zeros(()), weight_B.sum()
            made, owner = {"input_ids": [[0, 0]], "spans": [[1, 2]]}, [0]
        logp_K = ctx.forward(collated(made, ctx), grad=True).logp_N
        group_K = torch.tensor(owner, device=logp_K.device)
        push_K = -torch.log1p(-logp_K.exp().clamp(max=1 - 1e-6))
        term_B = torch.zeros_like(weight_B).index_add(0, group_K, push_K.float())
        term_B = term_B / torch.bincount(group_K, minlength=batch.examples).clamp(min=1)
        return (term_B * weight_B).sum() * (0.0 if stand_in else 1.0), weight_B.sum()


def _process() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _together() -> bool:
    return _process()[1] > 1


def collated(rows: dict[str, list[Any]], ctx: Context) -> Batch:
    """A batch of rows of token ids on the run's device."""
    batch = ctx.task.collate(rows, range(len(rows["input_ids"])))
    moved = {k: v.to(ctx.device) for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    return dataclasses.replace(batch, inputs={k: v.to(ctx.device) for k, v in batch.inputs.items()}, **moved)
