"""Masked thought: corrupt some input tokens of the solution while its labels stay intact.

    x'_j = corruption token  with probability r,  else x_j        for solution tokens j
    loss = -sum_j log p(x_j | x'_<j)                              over all j, corrupted or not

Unable to lean on the nearest words, the model looks back to the question and to earlier steps. ``r`` grows linearly
over the first ``rate_warmup`` of the steps: r(step) = min(rate_max, rate_max * step / (total * rate_warmup + 1)).
The corruption token is a mask token (``mask``), a uniformly random ordinary token (``random``), a mix of both, or the
model's own prediction (``predict``). Masking the question (``where: source``) is known to hurt and is there for
comparison. Special tokens other than the end of sequence are never corrupted. Padding is known by the attention mask,
never by an id, so the pad token may serve as the mask token. Noise is a pure function of (seed, epoch, row).

Paper: "Masked Thought: Simply Masking Partial Reasoning Steps Can Improve Mathematical Reasoning Learning of Language
Models", 2024, arXiv 2403.02178 (ACL 2024). Official repository: ChangyuChen347/MaskedThought. Its collator form of the
schedule (by examples seen) is ``rate_warmup_examples``, counted here over all processes.

Example::

    transforms:
      - masked-thought: {rate_max: 0.4, corruption: random}
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core.errors import LuthierError, UserError
from luthier.core.protocols import Batch, Context, Needs
from luthier.core.registry import transform

ADDED_TOKEN = "<mask>"
# The paper's larger rate is for small datasets, where the same solutions are seen many times.
SMALL_DATASET, RATE_SMALL, RATE_LARGE = 20_000, 0.4, 0.2


def linear_rate(step: int, total_steps: int, rate_max: float, warmup: float) -> float:
    """Corruption rate of a step, warmed up over ``warmup`` (a fraction) of all steps."""
    return min(rate_max, rate_max * step / (total_steps * warmup + 1))


def corrupt(
    ids_BT: torch.Tensor,
    candidates_BT: torch.Tensor,
    uniform_BT: torch.Tensor,
    rate: float,
    replacement_BT: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """New token ids [B, T], replaced where a candidate's number is below ``rate``, and where that was (bool)."""
    corrupted_BT = candidates_BT & (uniform_BT < rate)
    return torch.where(corrupted_BT, replacement_BT, ids_BT), corrupted_BT


def last_occurrence(ids: Sequence[int], patterns: Sequence[Sequence[int]]) -> int:
    """Start of the last occurrence of any of the patterns in a row of ids; its length where there is none."""
    for start in range(len(ids) - 1, -1, -1):
        if any(pattern and list(ids[start : start + len(pattern)]) == list(pattern) for pattern in patterns):
            return start
    return len(ids)


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
            Literal["mask", "random", "mix", "predict"],
            Field(description="a mask token, random tokens, a mix, or the model's own prediction"),
        ] = "mask",
        mix_rho: Annotated[float, Field(ge=0, le=1, description="corruption: mix, share of random tokens")] = 0.5,
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
        self.mask_token, self.where, self.answer_marker = mask_token, where, answer_marker
        self.drop_attention, self.exclude_ids, self.seed = drop_attention, list(exclude_ids or []), seed
        self.strip_mask_token = strip_mask_token
        # The tokenizer as it was before a mask token was added.
        self._plain: dict[str, Any] | None = None
        self._mask_id: int | None = None
        self._allowed: torch.Tensor | None = None
        self._markers: list[list[int]] | None = None
        # Examples of all processes before the current step, and including it so far.
        self._step, self._before, self._seen = -1, 0, 0

    @property
    def needs(self) -> Needs:
        """The most likely token where predictions are the corruption; otherwise nothing of its own."""
        return Needs(statistics=("logp", "top1") if self.corruption == "predict" else ("logp",))

    # -- hooks of the engine

    def prepare(self, ctx: Context, dataset: Any) -> None:
        """Choose the rate by the number of training rows, where the recipe names none."""
        if self.rate_max is None:
            self.rate_max = RATE_SMALL if len(dataset) < SMALL_DATASET else RATE_LARGE
            ctx.log(masked_thought_rate_max=self.rate_max)

    def prepare_model(self, model: Any, processor: Any) -> None:
        """With ``mask_token: add``: put the token into the vocabulary before parameters are chosen."""
        if self.mask_token == "add":
            before = copy.deepcopy(processor)
            if add_mask_token(model, processor) >= len(before):
                self._plain = vars(before)

    def finish_model(self, model: Any, processor: Any) -> None:
        """Take an added mask token out of tokenizer and embeddings again, unless it is to stay."""
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
        uniform_BT, replacement_BT = self._draw(batch, candidates_BT, ctx)
        new_BT, corrupted_BT = corrupt(ids_BT, candidates_BT, uniform_BT, rate, replacement_BT)
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

    def _draw(self, batch: Batch, candidates_BT: torch.Tensor, ctx: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """Uniform numbers and replacement ids [B, T], drawn per row over its candidates alone, whatever the padding."""
        ids_BT = batch.inputs["input_ids"]
        uniform_BT = torch.ones(ids_BT.shape)
        replacement_BT = ids_BT.clone()
        if self.corruption == "predict":
            # The prediction for target n belongs to the input place just behind its hidden row.
            guess_N = ctx.forward(batch, grad=False).top1_N
            replacement_BT.view(-1)[batch.position_N + 1] = guess_N.to(ids_BT)
        elif self.corruption != "random":
            replacement_BT.fill_(self._mask(ctx))
        drawn = {"random": 1.0, "mix": self.mix_rho}.get(self.corruption, 0.0)
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
        return uniform_BT.to(ids_BT.device), replacement_BT

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


def mask_token_id(tokenizer: Any, choice: str) -> int:
    """The id of the corruption token.

    Raises:
        UserError: the tokenizer has no such token.
    """
    pad, mask = tokenizer.pad_token_id, getattr(tokenizer, "mask_token_id", None)
    if choice in ("auto", "pad"):
        found = mask if choice == "auto" and mask is not None else pad
        if found is None:
            raise UserError(
                "masked-thought: the tokenizer has neither a mask nor a pad token. Set mask_token to one of its tokens "
                "or to 'add', or use corruption: random."
            )
        return int(found)
    token = ADDED_TOKEN if choice == "add" else choice
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary:
        raise UserError(
            f"masked-thought: the tokenizer has no token '{token}'. Set mask_token to 'pad', to 'add' or to one of its "
            "tokens, or use corruption: random."
        )
    return int(vocabulary[token])


def add_mask_token(model: Any, tokenizer: Any) -> int:
    """Add ``<mask>`` to tokenizer and embeddings and keep it out of what the model writes; returns its id.

    The new rows of the input and the output embedding are the means of the old ones.
    """
    old = len(tokenizer)
    if ADDED_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"mask_token": ADDED_TOKEN})
    token_id = int(tokenizer.get_vocab()[ADDED_TOKEN])
    if token_id < old:
        return token_id
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    means = [None if layer is None else layer.weight.detach()[:old].mean(dim=0) for layer in layers]
    # Some checkpoints have spare rows, and then the new id needs no resizing.
    if token_id >= layers[0].weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for layer, mean in zip([model.get_input_embeddings(), model.get_output_embeddings()], means, strict=True):
            if mean is not None:
                layer.weight[token_id] = mean
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.suppress_tokens = [*(model.generation_config.suppress_tokens or []), token_id]
    return token_id


def strip_mask_token(model: Any, token_id: int) -> None:
    """Take the last row, that of the added mask token, out of the embeddings again.

    Raises:
        LuthierError: other tokens stand behind it.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if token_id != rows - 1:
        raise LuthierError(f"masked-thought: the mask token {token_id} is not the last of {rows} rows; it stays.")
    model.resize_token_embeddings(token_id)
    settings = getattr(model, "generation_config", None)
    if settings is not None and settings.suppress_tokens:
        settings.suppress_tokens = [i for i in settings.suppress_tokens if i != token_id] or None
