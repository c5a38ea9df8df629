"""Masked thought: corrupt some input tokens of the solution while its labels stay intact.

    x'_j = corruption token  with probability r,  else x_j        for solution tokens j
    loss = -sum_j log p(x_j | x'_<j)                              over all j, corrupted or not

Unable to lean on the nearest words, the model looks back to the question and to earlier steps. ``r`` grows linearly
over the first ``rate_warmup`` of the steps: r(step) = min(rate_max, rate_max * step / (total * rate_warmup + 1)).
The corruption token is a mask token (``mask``), a uniformly random ordinary token (``random``), a mix of both, or the
model's own prediction (``predict``). For comparison the tokens may stay and their embeddings e [H] change::

    noise    e + U(-1, 1) * noise_alpha / sqrt(L H)          L tokens of the row, as NEFTune scales it
    blend    (1 - blend_share) e + blend_share e(v)          v a random ordinary token

Masking the question (``where: source``) is known to hurt and is there for comparison too. Special tokens other than the
end of sequence are never corrupted. Padding is known by the attention mask, never by an id, so the pad token may serve
as the mask token. Noise is a pure function of (seed, epoch, row).

Paper: "Masked Thought: Simply Masking Partial Reasoning Steps Can Improve Mathematical Reasoning Learning of Language
Models", 2024, arXiv 2403.02178 (ACL 2024). Official repository: ChangyuChen347/MaskedThought. Its collator form of the
schedule (by examples seen) is ``rate_warmup_examples``, counted here over all processes.

Example::

    transforms:
      - masked-thought: {rate_max: 0.4, corruption: random}
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core.errors import LuthierError, UserError
from luthier.core.protocols import Batch, Context, Needs
from luthier.core.registry import transform
from luthier.functional.input_corruption import (
    EmbeddingChanges,
    corrupt,
    embedding_noise,
    last_occurrence,
    linear_rate,
)
from luthier.functional.mask_tokens import add_mask_token, mask_token_id, strip_mask_token

# The paper's larger rate is for small datasets, where the same solutions are seen many times.
SMALL_DATASET, RATE_SMALL, RATE_LARGE = 20_000, 0.4, 0.2
# Kinds that leave the ids as they are.
ON_EMBEDDINGS = ("noise", "blend")


@transform(
    "masked-thought",
    identity={"rate_max": 0.0},
    example={"rate_max": 0.3, "rate_schedule": "constant", "mask_token": "pad"},
    tasks=("causal-lm",),
    paper="Masked Thought: Simply Masking Partial Reasoning Steps Can Improve Mathematical Reasoning Learning of "
    "Language Models, 2024, arXiv 2403.02178",
)
class MaskedThought:
    """Masked thought: corrupt part of the solution's input tokens and still learn all of its labels."""

    def __init__(
        self,
        *,
        rate_max: Annotated[
            float | None,
            Field(ge=0, lt=1, description="largest corruption rate; by default 0.4, or 0.2 from 20,000 rows on"),
        ] = None,
        rate_schedule: Annotated[
            Literal["linear", "constant", "random"],
            Field(description="grow to rate_max, stay at it, or draw each step's rate from 0 to it"),
        ] = "linear",
        rate_warmup: Annotated[float, Field(ge=0, le=1, description="fraction of the steps over which it grows")] = 2
        / 3,
        rate_warmup_examples: Annotated[
            int | None, Field(ge=1, description="grow over this many examples (all processes) instead")
        ] = None,
        corruption: Annotated[
            Literal["mask", "random", "mix", "predict", "noise", "blend"],
            Field(
                description="a mask token, random tokens, a mix, the model's own prediction; or changed embeddings: "
                "noise on them, or a blend with a random token's"
            ),
        ] = "mask",
        mix_rho: Annotated[float, Field(ge=0, le=1, description="corruption: mix, share of random tokens")] = 0.5,
        noise_alpha: Annotated[float, Field(gt=0, description="corruption: noise, its scale, as in NEFTune")] = 5.0,
        blend_share: Annotated[
            float, Field(ge=0, le=1, description="corruption: blend, share of the random token's embedding")
        ] = 0.3,
        mask_token: Annotated[
            str,
            Field(description="auto (the tokenizer's mask token, else its pad token), add, pad, or an existing token"),
        ] = "auto",
        where: Annotated[
            Literal["target", "reasoning", "source", "all"],
            Field(description="solution, solution before the answer marker, question, or both"),
        ] = "target",
        answer_marker: Annotated[
            str, Field(min_length=1, description="where: reasoning, what opens the answer")
        ] = "####",
        drop_attention: Annotated[bool, Field(description="hide corrupted positions from attention")] = False,
        exclude_ids: Annotated[
            list[int] | None, Field(description="further token ids that are never corrupted or drawn")
        ] = None,
        seed: Annotated[int, Field(ge=0, description="another draw of the noise under the same run seed")] = 0,
        strip_mask_token: Annotated[
            bool, Field(description="take an added mask token out again after training")
        ] = True,
    ) -> None:
        self.rate_max, self.rate_schedule, self.rate_warmup = rate_max, rate_schedule, rate_warmup
        self.rate_warmup_examples, self.corruption, self.mix_rho = rate_warmup_examples, corruption, mix_rho
        self.noise_alpha, self.blend_share = noise_alpha, blend_share
        self.mask_token, self.where, self.answer_marker = mask_token, where, answer_marker
        self.drop_attention, self.exclude_ids, self.seed = drop_attention, list(exclude_ids or []), seed
        self.strip_mask_token = strip_mask_token
        # The tokenizer as it was before a mask token was added.
        self._plain: dict[str, Any] | None = None
        self._mask_id: int | None = None
        self._allowed: torch.Tensor | None = None
        self._markers: list[list[int]] | None = None
        self._embeddings = EmbeddingChanges()
        self._changed_step: int | None = None
        # Examples of all processes before the current step, and including it so far.
        self._step, self._before, self._seen = -1, 0, 0

    @property
    def needs(self) -> Needs:
        """The most likely token where predictions are the corruption; otherwise nothing of its own."""
        return Needs(statistics=("logp", "top1") if self.corruption == "predict" else ("logp",))

    # -- hooks of the engine

    def prepare(self, ctx: Context, dataset: Any) -> None:
        """Choose the rate by the number of training rows, where the recipe names none; watch the embeddings."""
        if self.corruption in ON_EMBEDDINGS and not self._embeddings.watching:
            self._embeddings.watch(ctx.model.get_input_embeddings())
        if self.rate_max is None:
            self.rate_max = RATE_SMALL if len(dataset) < SMALL_DATASET else RATE_LARGE
            ctx.log(masked_thought_rate_max=self.rate_max)

    def prepare_model(self, model: Any, processor: Any) -> None:
        """With ``mask_token: add``: put the token into the vocabulary before parameters are chosen.

        Embeddings that are to change are watched from here on, so that a reference copied from the model sees the same.
        """
        if self.corruption in ON_EMBEDDINGS:
            self._embeddings.watch(model.get_input_embeddings())
        if self.mask_token == "add":
            before = copy.deepcopy(processor)
            if add_mask_token(model, processor) >= len(before):
                self._plain = vars(before)

    def finish_model(self, model: Any, processor: Any) -> None:
        """Take an added mask token out of tokenizer and embeddings again, unless it is to stay."""
        self._embeddings.close()
        if self._plain is not None and self.strip_mask_token:
            strip_mask_token(model, mask_token_id(processor, "add"))
            # Tokenizers cannot forget a token, so the one in use becomes what it was.
            vars(processor).clear()
            vars(processor).update(self._plain)
            self._plain = None

    def __call__(self, batch: Batch, ctx: Context) -> Batch:
        """The batch with corrupted input ids; labels, weights, lengths and padding as they were."""
        # A batch of weight 0 only fills a place where other processes still have rows.
        rate = self.rate(ctx, batch.examples if bool(batch.weight_N.any()) else 0)
        if rate == 0.0:
            return batch
        if batch.adjustable_BT is None or batch.supervised_BT is None:
            raise UserError("masked-thought corrupts tokens, and this task's batches have none. Remove it.")
        ids_BT = batch.inputs["input_ids"]
        candidates_BT = self._candidates(batch, ctx)
        uniform_BT, replacement_BT, noise_BTH = self._draw(batch, candidates_BT, ctx)
        new_BT, corrupted_BT = corrupt(ids_BT, candidates_BT, uniform_BT, rate, replacement_BT)
        if self.corruption in ON_EMBEDDINGS:
            new_BT = ids_BT.clone()
            self._change_embeddings(new_BT, corrupted_BT, replacement_BT, noise_BTH, ctx)
        inputs = {"input_ids": new_BT}
        if self.drop_attention:
            mask_BT = batch.inputs.get("attention_mask")
            if mask_BT is None or mask_BT.dim() != 2:
                raise UserError("masked-thought: drop_attention needs an attention mask with one entry per token.")
            inputs["attention_mask"] = mask_BT.masked_fill(corrupted_BT, 0)
        ctx.log(
            masked_thought_rate=rate,
            masked_thought_corrupted=float(corrupted_BT.sum()) / max(int(candidates_BT.sum()), 1),
        )
        changed = batch.with_inputs(**inputs)
        # Position n's hidden row is the input token just before its target.
        columns = {**changed.columns, "predecessor_corrupted_N": corrupted_BT.reshape(-1)[batch.position_N]}
        return replace(changed, columns=columns)

    def state(self) -> dict[str, Any]:
        """The rate chosen by size, and the examples seen."""
        return {"rate_max": self.rate_max, "step": self._step, "before": self._before, "seen": self._seen}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        self.rate_max = state["rate_max"]
        self._step, self._before, self._seen = int(state["step"]), int(state["before"]), int(state["seen"])

    # -- parts

    def rate(self, ctx: Context, examples: int = 0) -> float:
        """The corruption rate of the current step; ``examples`` of it are about to be seen by this process.

        Raises:
            UserError: the schedule needs the number of steps and the run has none.
        """
        if self.rate_max is None:
            raise LuthierError("masked-thought: the number of training rows is not known; set rate_max (0.2 or 0.4).")
        if self.rate_warmup_examples is not None:
            self._count(ctx, examples)
        if self.rate_max == 0.0 or self.rate_schedule == "constant":
            return self.rate_max
        if self.rate_schedule == "random":
            generator = ctx.rng("noise", "masked-thought rate", self.seed, ctx.step)
            return self.rate_max * float(torch.rand((), generator=generator))
        if self.rate_warmup_examples is not None:
            return self.rate_max * min(1.0, self._before / self.rate_warmup_examples)
        if ctx.total_steps is None:
            raise UserError(
                "masked-thought: the rate grows over a share of the steps, and their number is not known. Set "
                "training.max_steps, or rate_warmup_examples, or rate_schedule: constant."
            )
        return linear_rate(ctx.step, ctx.total_steps, self.rate_max, self.rate_warmup)

    def _count(self, ctx: Context, examples: int) -> None:
        # The rate is that of the step's start, so that accumulation and the number of processes do not change it.
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        processes = torch.distributed.get_world_size() if distributed else 1
        if ctx.step != self._step:
            self._step, self._before = ctx.step, self._seen
        self._seen += examples * processes

    def _candidates(self, batch: Batch, ctx: Context) -> torch.Tensor:
        assert batch.adjustable_BT is not None
        assert batch.supervised_BT is not None
        ids_BT = batch.inputs["input_ids"]
        if self.where == "all":
            chosen_BT = batch.adjustable_BT
        elif self.where == "source":
            chosen_BT = batch.adjustable_BT & ~batch.supervised_BT
        else:
            chosen_BT = batch.adjustable_BT & batch.supervised_BT
        if self.where == "reasoning":
            if self._markers is None:
                texts = (self.answer_marker, f" {self.answer_marker}", f"\n{self.answer_marker}")
                self._markers = [ctx.processor.encode(t, add_special_tokens=False) for t in texts]
            starts = [last_occurrence(row, self._markers) for row in ids_BT.tolist()]
            place_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
            chosen_BT = chosen_BT & (place_T < torch.tensor(starts, device=ids_BT.device).unsqueeze(1))
        if self.exclude_ids:
            chosen_BT = chosen_BT & ~torch.isin(ids_BT, torch.tensor(self.exclude_ids, device=ids_BT.device))
        return chosen_BT

    def _change_embeddings(
        self,
        ids_BT: torch.Tensor,
        corrupted_BT: torch.Tensor,
        other_BT: torch.Tensor,
        noise_BTH: torch.Tensor | None,
        ctx: Context,
    ) -> None:
        """Let the models' embeddings of these ids be noisy or blended where they are corrupted."""
        if ctx.step != self._changed_step:
            if self._embeddings.unused:
                raise LuthierError(
                    f"masked-thought: corruption: {self.corruption} has not reached the model: it does not look up its "
                    "input embedding with the ids of the batch. Use corruption: mask or random."
                )
            self._changed_step = ctx.step
        here_BT1, share = corrupted_BT.unsqueeze(-1), self.blend_share

        def noisy(embedded_BTH: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
            assert noise_BTH is not None
            return embedded_BTH + torch.where(here_BT1, noise_BTH, 0.0).to(embedded_BTH)

        def blended(embedded_BTH: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
            mixed_BTH = (1 - share) * embedded_BTH + share * layer(other_BT)
            return torch.where(here_BT1, mixed_BTH, embedded_BTH)

        self._embeddings.of(ids_BT, noisy if self.corruption == "noise" else blended)

    def _draw(
        self, batch: Batch, candidates_BT: torch.Tensor, ctx: Context
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Uniform numbers and replacement ids [B, T], and noise [B, T, H] where embeddings get it.

        All are drawn per row over its candidates alone, whatever the padding.
        """
        ids_BT = batch.inputs["input_ids"]
        uniform_BT = torch.ones(ids_BT.shape)
        replacement_BT = ids_BT.clone()
        if self.corruption == "predict":
            # The prediction for target n belongs to the input place just behind its hidden row.
            guess_N = ctx.forward(batch, grad=False).top1_N
            replacement_BT.view(-1)[batch.position_N + 1] = guess_N.to(ids_BT)
        elif self.corruption in ("mask", "mix"):
            replacement_BT.fill_(self._mask(ctx))
        noise_BTH: torch.Tensor | None = None
        if self.corruption == "noise":
            width = int(ctx.model.get_input_embeddings().weight.shape[1])
            noise_BTH = torch.zeros(*ids_BT.shape, width)
        drawn = {"random": 1.0, "blend": 1.0, "mix": self.mix_rho}.get(self.corruption, 0.0)
        for b, row in enumerate(batch.row_B.tolist()):
            place_n = candidates_BT[b].nonzero().squeeze(1)
            generator = ctx.rng("noise", "masked-thought", self.seed, ctx.epoch, row)
            uniform_BT[b, place_n.cpu()] = torch.rand(place_n.numel(), generator=generator)
            if drawn > 0:
                allowed = self._vocabulary(ctx)
                index_n = torch.randint(allowed.numel(), (place_n.numel(),), generator=generator)
                chosen_n = torch.rand(place_n.numel(), generator=generator) < drawn
                id_n = allowed[index_n].to(ids_BT.device)
                replacement_BT[b, place_n] = torch.where(chosen_n.to(ids_BT.device), id_n, replacement_BT[b, place_n])
            if noise_BTH is not None:
                length = int(batch.inputs["attention_mask"][b].sum())
                noise_BTH[b, place_n.cpu()] = embedding_noise(
                    place_n.numel(), length, width, self.noise_alpha, generator
                )
        if noise_BTH is not None:
            noise_BTH = noise_BTH.to(ids_BT.device)
        return uniform_BT.to(ids_BT.device), replacement_BT, noise_BTH

    def _vocabulary(self, ctx: Context) -> torch.Tensor:
        """Ids that may be drawn: every ordinary token."""
        if self._allowed is None:
            forbidden = {*ctx.processor.all_special_ids, *self.exclude_ids}
            self._allowed = torch.tensor([i for i in range(len(ctx.processor)) if i not in forbidden])
            if self._allowed.numel() == 0:
                raise UserError("masked-thought: exclude_ids leaves no token to draw.")
        return self._allowed

    def _mask(self, ctx: Context) -> int:
        if self._mask_id is None:
            self._mask_id = mask_token_id(ctx.processor, self.mask_token)
        return self._mask_id
