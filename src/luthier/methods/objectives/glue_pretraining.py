"""Continued pretraining of an encoder before fine-tuning: replaced-token detection, and a contrast of sentences.

    L = L_MLM + w L_RTD + eta L_CL

A small generator G predicts the hidden tokens of a text (``L_MLM``, mean over hidden tokens); samples of its
prediction take their places; the encoder, with a binary head at each token, is to tell which tokens are not the
original ones (``L_RTD``, mean over all ordinary tokens). For ``L_CL`` each text is encoded twice under two dropout
masks, pooled, and the two must be nearer to each other than to the other texts of the batch (temperature tau). The
token embeddings of G and encoder are separate (``none``), one table (``shared``), or the encoder's is
``sg(table of G) + Delta`` (``gdes``). Generator and heads are gone from the saved model.

Paper: "Bag of Tricks for Effective Language Model Pretraining and Downstream Adaptation: A Case Study on GLUE", 2023,
arXiv 2302.09268. No official code; w = 50 is ELECTRA's, tau = 0.05 SimCSE's, eta = 0.1 this library's.

Example::

    model: {id: bert-base-uncased, task: masked-lm}
    objective: {glue-pretraining: {contrast_weight: 0.0}}     # then the same again with the contrast
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Batch, Context, Loss, Needs, Outputs
from luthier.core.registry import objective
from luthier.core.rng import derive_seed
from luthier.functional.exits import transformers_model
from luthier.functional.generator_pair import Pair, join, narrow, part, shallow
from luthier.functional.replaced_tokens import detection_loss, put, sample_tokens
from luthier.functional.sentence_contrast import contrast_logits, contrast_loss, has_dropout, pooled

WHO = "glue-pretraining"
_DECODER = (
    "a decoder sees only what stands before a token, so it can neither fill a gap nor tell a replaced token from what "
    "follows"
)


@objective(
    "glue-pretraining",
    identity={"detection_weight": 0.0, "contrast_weight": 0.0},
    example={"contrast_weight": 0.0},
    tasks=("masked-lm",),
    conflicts={
        "task:causal-lm": _DECODER,
        "parameters:lora": "generator and heads are trained in full and taken off at the end, but an adapter keeps "
        "them",
        "sharding:fsdp2": "the generator's and the encoder's passes share one table of embeddings, which must be whole",
    },
    paper="Bag of Tricks for Effective Language Model Pretraining and Downstream Adaptation: A Case Study on GLUE, "
    "2023, arXiv 2302.09268",
)
class GluePretraining:
    """Continued pretraining of an encoder: detect tokens that a small generator wrote, tell sentences apart."""

    needs = Needs(statistics=("logp",), vocabulary=True, tasks=("masked-lm",))

    def __init__(
        self,
        *,
        detection_weight: Annotated[
            float, Field(ge=0, description="weight w of the detection loss; 0 leaves the generator out")
        ] = 50.0,
        contrast_weight: Annotated[float, Field(ge=0, description="weight eta of the contrast; 0 leaves it out")] = 0.1,
        temperature: Annotated[float, Field(gt=0, description="temperature tau of the contrast")] = 0.05,
        pooling: Annotated[
            Literal["mean", "first"], Field(description="sentence vector: mean over tokens, or first token")
        ] = "mean",
        embeddings: Annotated[
            Literal["none", "shared", "gdes"],
            Field(description="token embeddings of generator and encoder: separate, one table, table + difference"),
        ] = "gdes",
        generator: Annotated[
            Literal["shallow", "narrow"],
            Field(description="the encoder's first blocks copied, or a new backbone of a share of its width"),
        ] = "shallow",
        generator_share: Annotated[
            float | None,
            Field(gt=0, le=1, description="share of the depth (1/3 by default) or of the width (1/2)"),
        ] = None,
        seed: Annotated[int, Field(description="seed of the first weights of heads and narrow generators")] = 0,
    ) -> None:
        self.detection_weight, self.contrast_weight = detection_weight, contrast_weight
        self.temperature, self.pooling, self.embeddings = temperature, pooling, embeddings
        self.generator, self.seed = generator, seed
        self.share = generator_share or (1 / 3 if generator == "shallow" else 1 / 2)

    def prepare_model(self, model: Any, processor: Any) -> None:
        """Add generator and heads."""
        base = transformers_model(model)
        if getattr(base.config, "is_decoder", False) or getattr(base.config, "is_encoder_decoder", False):
            raise UserError(f"{WHO}: {type(base).__name__} is no encoder: {_DECODER}. Use an encoder such as BERT.")
        width = base.config.hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, "init", WHO))
            if self.detection_weight:
                encoder = base.base_model
                if self.generator == "shallow":
                    made = shallow(encoder, max(1, round(encoder.config.num_hidden_layers * self.share)), who=WHO)
                else:
                    made = narrow(encoder, self.share, who=WHO)
                join(base, made, self.embeddings, who=WHO)
                linear = torch.nn.Linear(width, width)
                base.detection_head = torch.nn.Sequential(linear, torch.nn.GELU(), torch.nn.Linear(width, 1))
            if self.contrast_weight:
                base.contrast_head = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Tanh())

    def prepare(self, ctx: Context, dataset: Any) -> None:
        """Refuse what cannot train: frozen parts, and a contrast without dropout.

        Raises:
            UserError: the parameters leave generator or heads frozen, or every dropout rate is 0.
        """
        base = transformers_model(ctx.model)
        frozen = [
            name
            for name, parameter in base.named_parameters()
            if (".generator." in name or name.startswith(("detection_head", "contrast_head")))
            and not parameter.requires_grad
        ]
        if frozen:
            raise UserError(
                f"{WHO}: the parameters leave {len(frozen)} tensors of its generator and heads frozen, such as "
                f"'{frozen[0]}'. Use parameters: [full]."
            )
        if self.contrast_weight and not has_dropout(base):
            raise UserError(
                f"{WHO}: every dropout rate of the model is 0, so its two passes over a sentence would be the same. "
                "Set a rate in the model's config.json, or contrast_weight: 0."
            )

    def finish_model(self, model: Any, processor: Any) -> None:
        """Take generator and heads off; with ``gdes`` both tables become one."""
        if self.detection_weight:
            part(model)
            del model.detection_head
        if self.contrast_weight:
            del model.contrast_head

    def counts(self, batch: Batch, ctx: Context) -> dict[str, float]:
        """The ordinary tokens, over which detection is a mean."""
        assert batch.adjustable_BT is not None
        return {"adjustable": float((batch.adjustable_BT * _row_weights(batch)[:, None]).sum())}

    def loss(self, out: Outputs, batch: Batch, ctx: Context) -> Loss:
        """L times the count of hidden tokens of the step; each term is a mean over its own unit."""
        total = -(out.logp_N * batch.weight_N).sum()
        made = Loss(sum=total, weight=batch.weight_N.sum())
        if not self.detection_weight and not self.contrast_weight:
            return made
        ids_BT, mask_BT = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        assert batch.adjustable_BT is not None
        original_BT = put(ids_BT, batch.position_N, batch.target_N)
        weight_B = _row_weights(batch)
        contrast = self.contrast_weight > 0 and self._can_contrast(batch, ctx)
        shown = [original_BT, original_BT] if contrast else []
        if self.detection_weight:
            mixed_BT = put(original_BT, batch.position_N, self._samples(out, batch, ctx))
            shown = [mixed_BT, *shown]
        base = transformers_model(ctx.model)
        # All passes are one: rows of one batch have dropout masks of their own.
        hidden_BTH = list(self._encode(shown, batch, ctx)) if shown else []
        tokens = ctx.totals["token"]
        if self.detection_weight:
            replaced_BT = mixed_BT != original_BT
            logit_BT = base.detection_head(hidden_BTH.pop(0)).squeeze(-1)
            counted_BT = batch.adjustable_BT * weight_B[:, None]
            found = detection_loss(logit_BT, replaced_BT, counted_BT)
            made.sum = made.sum + found * (self.detection_weight * tokens / max(ctx.totals["adjustable"], 1.0))
            count = counted_BT.sum()
            right_BT = (logit_BT.detach() > 0) == replaced_BT
            made.metrics["detection_loss"] = (found.detach(), count)
            made.metrics["detection_accuracy"] = ((right_BT * counted_BT).sum(), count)
            made.metrics["replaced"] = ((replaced_BT * counted_BT).sum(), count)
        if self.contrast_weight and not contrast:
            # Every process must have a gradient of every trained tensor, if only a zero.
            made.sum = made.sum + 0.0 * sum(p.sum() for p in base.contrast_head.parameters())
        if contrast:
            v, w = (base.contrast_head(pooled(h, mask_BT, self.pooling)) for h in hidden_BTH)
            logits_BB = contrast_logits(v, w, self.temperature)
            found = contrast_loss(logits_BB, weight_B)
            made.sum = made.sum + found * (self.contrast_weight * tokens / max(ctx.totals["sequence"], 1.0))
            right_B = logits_BB.detach().argmax(-1) == torch.arange(len(logits_BB), device=logits_BB.device)
            made.metrics["contrast_loss"] = (found.detach(), weight_B.sum())
            made.metrics["contrast_accuracy"] = ((right_B * weight_B).sum(), weight_B.sum())
        return made

    def _can_contrast(self, batch: Batch, ctx: Context) -> bool:
        """False for the last row left over at the end of an epoch, and for a process without a row.

        Raises:
            UserError: the first step has micro-batches of one row.
        """
        if batch.examples > 1:
            return True
        if ctx.step == 0 and bool(batch.weight_N.any()):
            raise UserError(
                f"{WHO}: a micro-batch of one row has no other sentence to tell its own from. Raise "
                "training.batch_rows, lower training.accumulation, or set contrast_weight: 0."
            )
        return False

    def _samples(self, out: Outputs, batch: Batch, ctx: Context) -> torch.Tensor:
        """[N] one token of the generator's prediction for each hidden one; drawn by row, whatever its batch is."""
        count_B = torch.bincount(batch.sequence_N, minlength=batch.examples).tolist()
        uniform_N = torch.cat(
            [
                torch.rand(count, generator=ctx.rng("noise", WHO, ctx.epoch, row), dtype=torch.float64)
                for count, row in zip(count_B, batch.row_B.tolist(), strict=True)
            ]
        ).to(batch.sequence_N.device)
        mask = torch.tensor([ctx.processor.mask_token_id], device=uniform_N.device)

        def draw(logits_CV: torch.Tensor, index_C: torch.Tensor) -> torch.Tensor:
            # The encoder must never see the mask, which texts of its later use do not have.
            return sample_tokens(logits_CV.index_fill(1, mask, -torch.inf), uniform_N[index_C])

        with torch.no_grad():
            return out.over_vocabulary(draw)

    def _encode(self, shown: list[torch.Tensor], batch: Batch, ctx: Context) -> tuple[torch.Tensor, ...]:
        """The encoder's last hidden states [B, T, H] for each of several versions of the batch's tokens."""
        ids_BT = torch.cat(shown)
        times = len(shown)
        inputs = {k: v.repeat(times, *[1] * (v.dim() - 1)) for k, v in batch.inputs.items()}
        # No position is asked about, so that nothing behind the backbone has work to do.
        none_N = batch.position_N[:0]
        whole = replace(
            batch.positions(none_N),
            inputs={**inputs, "input_ids": ids_BT},
            row_B=batch.row_B.repeat(times),
            columns={},
            keys_B=None,
            adjustable_BT=None,
            supervised_BT=None,
            part_of=None,
        )
        body = transformers_model(ctx.model).base_model
        left: list[torch.Tensor] = []
        hook = body.register_forward_hook(lambda module, args, out: left.append(out.last_hidden_state))
        try:
            with body.encoding() if isinstance(body, Pair) else nullcontext():
                ctx.forward(whole)
        finally:
            hook.remove()
        return left[-1].float().chunk(times)


def _row_weights(batch: Batch) -> torch.Tensor:
    """[B] the mean weight of each row's positions."""
    sum_B = torch.zeros(batch.examples, device=batch.weight_N.device).index_add(0, batch.sequence_N, batch.weight_N)
    return sum_B / torch.bincount(batch.sequence_N, minlength=batch.examples).clamp(min=1)
