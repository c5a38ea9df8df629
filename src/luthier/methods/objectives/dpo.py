"""DPO and its family: prefer one answer to another by more than the starting model does.

    rho(y) = log p(y|x) - log p_ref(y|x)              summed over the answer's tokens
    h      = beta (rho(chosen) - rho(rejected))
    loss   = -log sigma(h)                            mean over pairs

``loss`` chooses another function of the margin::

    hinge     max(0, 1 - h)
    ipo       (rho(chosen)/|chosen| - rho(rejected)/|rejected| - 1/(2 beta))^2
    robust    (-(1 - e) log sigma(h) + e log sigma(-h)) / (1 - 2 e)        e = flipped, unbiased under wrong labels
    sigmoid   with flipped e > 0:  -(1 - e) log sigma(h) - e log sigma(-h)

``tail_weight`` below 1 lets tokens behind the length of the shorter answer count less (length-desensitised). Pairs
are rows with ``chosen`` and ``rejected`` answers. ``rejected_from: negatives`` takes a list of rejected answers from
the column ``negatives`` of ordinary rows (the data stages ``self-contrast`` and ``discriminative-ft`` make it): the
loss of a row is then the mean over its pairs, a step has as many prompts however many negatives there are, and the
chosen answer is read once. Log-probabilities under the starting model are kept on disk. For a term of plain
likelihood on the chosen answers (RPO) add ``sft`` to the objective.

Papers: "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", 2023, arXiv 2305.18290; IPO,
2023, arXiv 2310.12036; SLiC, 2023, arXiv 2305.10425; robust DPO, 2024, arXiv 2403.00409; length-desensitised DPO, 2024,
arXiv 2409.06411.

Example::

    data: {train: pairs.jsonl}
    objective: [dpo: {beta: 0.1}, {sft: {}, weight: 0.2}]
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Batch, Context, Loss, Needs, Outputs
from luthier.core.registry import objective
from luthier.core.store import content_hash
from luthier.functional.discriminative import place, with_answer
from luthier.functional.policy_gradient import sums
from luthier.functional.preference_losses import Preference, preference_loss, tail_weights
from luthier.functional.rollouts import moved

NEGATIVES = "negatives"
SIDE = ("rejected_ids", "rejected_spans")
ROW = ("kind", "prompt", "separator", "completion", "system", "messages", "tools")
ONE_SIDED = "it changes the chosen answers and not the rejected ones, and the two are compared"


@objective(
    "dpo",
    conflicts={
        "packing": "a packed row holds several answers, and a pair is of two",
        "transform:masked-thought": ONE_SIDED,
        "transform:tl-training": ONE_SIDED,
        "transform:fault-aware-ft": ONE_SIDED,
        "transform:rollouts": "its pairs are those of the data",
    },
    tasks=("causal-lm",),
    paper="Direct Preference Optimization: Your Language Model is Secretly a Reward Model, 2023, arXiv 2305.18290",
)
class DirectPreferenceOptimization:
    """DPO and its family: prefer one answer to another by more than the starting model does."""

    def __init__(
        self,
        *,
        beta: Annotated[float, Field(gt=0, description="how near the model stays to where it started")] = 0.1,
        loss: Annotated[
            Literal["sigmoid", "hinge", "ipo", "robust"], Field(description="the function of the margin")
        ] = "sigmoid",
        flipped: Annotated[
            float, Field(ge=0, lt=0.5, description="e, share of pairs that are the wrong way round (sigmoid, robust)")
        ] = 0.0,
        tail_weight: Annotated[
            float, Field(ge=0, le=1, description="weight of tokens behind the length of the shorter answer")
        ] = 1.0,
        rejected_from: Annotated[
            Literal["row", "negatives"], Field(description="the row's rejected answer, or its list of negatives")
        ] = "row",
        negatives: Annotated[
            int | None, Field(ge=1, description="rejected_from: negatives, how many of them; all by default")
        ] = None,
    ) -> None:
        if flipped and loss in ("hinge", "ipo"):
            raise UserError(f"dpo: flipped is for loss: sigmoid or robust, not {loss}; remove it.")
        if negatives is not None and rejected_from == "row":
            raise UserError("dpo: negatives counts those of rejected_from: negatives; set that, or remove it.")
        self.kind: Preference = loss
        self.beta, self.flipped, self.tail_weight = beta, flipped, tail_weight
        self.listed, self.count = rejected_from == "negatives", negatives

    @property
    def needs(self) -> Needs:
        """The starting model, and the rejected answers: token ids of the row, or its text and the list."""
        columns = (*ROW, NEGATIVES, "source", "row") if self.listed else SIDE
        return Needs(statistics=("logp",), models=("reference",), columns=columns)

    def loss(self, out: Outputs, batch: Batch, ctx: Context) -> Loss:
        """Sum over rows of weight times the mean loss of its pairs; the weight is the sum of the row weights.

        Raises:
            UserError: a row has no rejected answer.
        """
        if batch.keys_B is None:
            raise UserError("dpo: a transform changed the chosen answers but not the rejected ones. Remove it.")
        B = batch.examples
        other = self._negatives(batch, ctx) if self.listed else self._rejected(batch, ctx)
        K = other.examples // B
        weight_B = batch.weight_N.new_zeros(B).scatter_reduce(0, batch.sequence_N, batch.weight_N, "amax")
        length_B, length_BK = (torch.bincount(b.sequence_N, minlength=b.examples) for b in (batch, other))
        if not bool((length_BK > 0).all()):
            raise UserError("dpo: a rejected answer has no token to score; leave such rows out.")
        reference_N = ctx.forward(batch, "reference").logp_N
        logp_M, reference_M = ctx.forward(other).logp_N, ctx.forward(other, "reference").logp_N
        shared_BK = torch.minimum(length_B.repeat_interleave(K), length_BK)
        gap_N, gap_M = out.logp_N - reference_N, logp_M - reference_M
        if self.tail_weight < 1:
            # The chosen answer of a row with several negatives is as long as it counts beside each of them.
            gap_NK = torch.cat([gap_N[batch.sequence_N == b].repeat(K) for b in range(B)])
            owner_NK = torch.repeat_interleave(torch.arange(B * K, device=gap_N.device), length_B.repeat_interleave(K))
            weight_NK = tail_weights(owner_NK, length_B.repeat_interleave(K), shared_BK, self.tail_weight)
            chosen_BK = sums(gap_NK * weight_NK, owner_NK, B * K)
            gap_M = gap_M * tail_weights(other.sequence_N, length_BK, shared_BK, self.tail_weight)
        else:
            chosen_BK = sums(gap_N, batch.sequence_N, B).repeat_interleave(K)
        rejected_BK = sums(gap_M, other.sequence_N, B * K)
        if self.kind == "ipo":
            scaled = (chosen_BK / length_B.clamp(min=1).repeat_interleave(K), rejected_BK / length_BK)
        else:
            scaled = (chosen_BK, rejected_BK)
        loss_B = preference_loss(*scaled, self.beta, self.kind, self.flipped).view(B, K).mean(1)
        total = weight_B.sum()
        with torch.no_grad():
            score_B = sums(out.logp_N.detach(), batch.sequence_N, B)
            said_B = sums(logp_M.detach(), other.sequence_N, B * K).view(B, K).mean(1)
            ahead_B = (chosen_BK > rejected_BK).float().view(B, K).mean(1)
            watched = {
                "chosen_reward": self.beta * chosen_BK.view(B, K).mean(1),
                "rejected_reward": self.beta * rejected_BK.view(B, K).mean(1),
                "preferred": ahead_B,
                "chosen_logp": score_B,
                "rejected_logp": said_B,
            }
            metrics: dict[str, tuple[Any, Any]] = {n: ((v * weight_B).sum(), total) for n, v in watched.items()}
        return Loss(sum=(loss_B * weight_B).sum(), weight=total, unit="sequence", metrics=metrics)

    def _rejected(self, batch: Batch, ctx: Context) -> Batch:
        """The rejected answers of the rows, one each."""
        ids, spans = (batch.columns.get(name) or [None] * batch.examples for name in SIDE)
        if any(i is None or len(i) == 0 for i in ids):
            raise UserError(
                "dpo: a row has no rejected answer. Give rows with chosen and rejected answers (data.layout: "
                "preference), or a list of negatives with rejected_from: negatives."
            )
        assert batch.keys_B is not None
        keys = [content_hash("rejected", key) for key in batch.keys_B]
        made = ctx.task.collate({"input_ids": ids, "spans": spans, "key": keys}, batch.row_B.cpu().numpy())
        return moved(made, batch.weight_N.device)

    def _negatives(self, batch: Batch, ctx: Context) -> Batch:
        """K rejected answers of each row, one after the other."""
        names = [name for name in (*ROW, "source", "row") if name in batch.columns]
        rows = [{name: batch.columns[name][b] for name in names} for b in range(batch.examples)]
        listed = batch.columns.get(NEGATIVES) or [None] * batch.examples
        counts = {len(texts or ()) for texts in listed}
        wanted = self.count or min(counts)
        for row, texts in zip(rows, listed, strict=True):
            if not texts or len(texts) < wanted:
                raise UserError(
                    f"dpo: the row has {len(texts or ())} negatives, {max(wanted, 1)} are needed. Put a data stage "
                    "that makes them into data.stages (self-contrast), or lower negatives.",
                    where=place(row),
                )
            if self.count is None and len(counts) > 1:
                raise UserError("dpo: rows have different numbers of negatives; set negatives: to the least of them.")
        assert batch.keys_B is not None
        pairs = [(b, text) for b, texts in enumerate(listed) for text in texts[:wanted]]
        made = ctx.render([with_answer(rows[b], text) for b, text in pairs])
        keys = [content_hash("negative", batch.keys_B[b], text) for b, text in pairs]
        return replace(made, keys_B=keys)
