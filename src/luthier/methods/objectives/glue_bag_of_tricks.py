"""Adversarial fine-tuning: the prediction stays where it is when the word embeddings move a little.

    loss  = L(f(e)) + lambda * D(f(e), f(e'))          e' = e + s(e) delta
    D     = KL(p | p') + KL(p' | p)                    over the classes (or the vocabulary), at each supervised position
    D     = (f - f')^2                                 where the model predicts a number; L is then the squared error
    delta <- project(delta + step * g / ||g||),  g = d D(sg f(e), f(e')) / d delta,  from delta ~ N(0, sigma^2)

``e`` [B, T, D] are the word embeddings, ``s(e)`` the standard deviation of each over D, so that delta perturbs
normalised embeddings (SiFT). delta [B, T, D] is 0 on padding and in float32; its norm is per token and at most
``radius``; in the loss it is constant. Positions and segments are not perturbed. ``sg`` stops the gradient; in the loss
both sides have one, unless ``detach_clean``. All passes see the same dropout. The noise is a function of seed, step and
row, so neither accumulation nor the number of processes changes it. Variants::

    sift     as above                              r3f      the noise alone, no ascent
    smart    delta on e itself, s(e) = 1           dropout  delta = 0 and another dropout mask, the cheap control
    fgm      g is the gradient of L, and L(f(e')) stands in place of D (FGM; with several steps as in FreeAT)

Rows of a classification may carry what the procedure of the same name writes: ``glue_target`` (class probabilities in
place of the label; in a regression a number), ``glue_weight`` (a factor on L), ``glue_pseudo`` (true: the factor rises
over ``pseudo_ramp``).

Paper: "Bag of Tricks for Effective Language Model Pretraining and Downstream Adaptation: A Case Study on GLUE", 2023,
arXiv 2302.09268. It has no code and gives few details: the forms are those of the methods it names, the numbers are
this library's.

Example::

    objective:
      glue-bag-of-tricks: {adversarial_weight: 1.0, radius: 1.0, step_size: 0.1}
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core.errors import LuthierError, UserError
from luthier.core.protocols import Batch, Context, Loss, Needs, Outputs
from luthier.core.registry import NUMBER_TASKS, objective
from luthier.functional.adversarial import (
    ascend,
    embedding_scale,
    length,
    project,
    squared_difference,
    symmetric_divergence,
)
from luthier.functional.chunked_projection import product_type
from luthier.functional.exits import transformers_model
from luthier.functional.pseudo_labels import PSEUDO, TARGET, WEIGHT, ramp

SLUG = "glue-bag-of-tricks"

LogitsAt = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Seen:
    """The pass whose outputs the loss is given.

    Attributes:
        ids: the token ids it looked up.
        dropout: state of the random generators before the first dropout, on the CPU and on the model's device.
        width: D.
        kind: the type of a perturbation.
    """

    ids: torch.Tensor
    dropout: tuple[torch.Tensor, torch.Tensor | None]
    width: int
    kind: torch.dtype


@objective(
    "glue-bag-of-tricks",
    identity={"adversarial_weight": 0.0},
    example={"adversarial_weight": 1.0, "step_size": 0.5},
    tasks=("causal-lm", "sequence-classification", "sequence-regression", "token-classification"),
    numbers=True,
    conflicts={
        "objective:label-smoothing": "targets that are class probabilities already spread the label out",
        "sharding:fsdp2": "gradients of sharded weights cannot be formed outside the backward pass of the engine",
    },
    paper="Bag of Tricks for Effective Language Model Pretraining and Downstream Adaptation: A Case Study on GLUE, "
    "2023, arXiv 2302.09268",
)
class AdversarialFineTuning:
    """Adversarial fine-tuning: keep the prediction where it is when word embeddings move in the worst direction."""

    def __init__(
        self,
        *,
        variant: Annotated[
            Literal["sift", "smart", "fgm", "r3f", "dropout"],
            Field(description="what moves the prediction; r3f is random noise, dropout another mask"),
        ] = "sift",
        adversarial_weight: Annotated[float, Field(ge=0, description="lambda; 0 is plain fine-tuning")] = 1.0,
        radius: Annotated[float, Field(gt=0, description="largest norm of a token's perturbation")] = 1.0,
        step_size: Annotated[float, Field(gt=0, description="length of a step of ascent")] = 0.1,
        steps: Annotated[int, Field(ge=1, description="steps of ascent, each a forward and a backward pass")] = 1,
        noise: Annotated[float, Field(ge=0, description="sigma, standard deviation of the first perturbation")] = 1e-3,
        norm: Annotated[
            Literal["l2", "inf"], Field(description="of a token: Euclidean, or the largest absolute value")
        ] = "l2",
        normalise: Annotated[
            bool | None,
            Field(description="perturb normalised embeddings, so that lengths have no unit; by default but for smart"),
        ] = None,
        detach_clean: Annotated[
            bool, Field(description="no gradient to the unperturbed side of the divergence")
        ] = False,
        pseudo_ramp: Annotated[
            float, Field(ge=0, le=1, description="share of the steps in which the weight of pseudo-labels rises")
        ] = 0.5,
    ) -> None:
        if noise == 0 and variant in ("sift", "smart", "r3f"):
            raise UserError(
                f"{SLUG}: noise: 0 leaves {variant} without a direction (the divergence has no slope at its minimum); "
                "give a small number such as 0.001."
            )
        if detach_clean and variant == "fgm":
            raise UserError(f"{SLUG}: variant fgm has no divergence whose side could be detached; remove detach_clean.")
        self.variant, self.adversarial_weight = variant, adversarial_weight
        self.radius, self.step_size, self.steps, self.noise = radius, step_size, steps, noise
        self.norm: Literal["l2", "inf"] = norm
        self.normalise = normalise if normalise is not None else variant != "smart"
        self.detach_clean, self.pseudo_ramp = detach_clean, pseudo_ramp
        self._hook: Any = None
        self._seen: Seen | None = None
        # While a perturbed pass runs: what is added, the generators' state to start from, and how often it was added.
        self._busy = False
        self._delta: torch.Tensor | None = None
        self._start: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._calls = 0

    @property
    def needs(self) -> Needs:
        """Without the regulariser a plain token loss; with it every position's whole prediction."""
        alone = self.adversarial_weight == 0
        return Needs(statistics=("logp",), positionwise=alone, vocabulary=not alone, columns=(TARGET, WEIGHT, PSEUDO))

    # -- hooks of a run

    def prepare(self, ctx: Context, dataset: Any) -> None:
        """Find the word embeddings and watch them.

        Raises:
            UserError: the model has none, or has two stacks.
        """
        if self.adversarial_weight == 0:
            return
        config = getattr(transformers_model(ctx.model), "config", None)
        name = type(transformers_model(ctx.model)).__name__
        if getattr(config, "is_encoder_decoder", False):
            raise UserError(f"{SLUG}: {name} is an encoder-decoder, which reads words in two places; use one stack.")
        try:
            embedding = ctx.model.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            embedding = None
        if embedding is None:
            raise UserError(f"{SLUG}: {name} has no word embeddings to perturb; set adversarial_weight: 0.")
        self._unhook()
        self._hook = embedding.register_forward_hook(lambda module, given, out: self._embedded(given, out, ctx))

    def finish_model(self, model: Any, processor: Any) -> None:
        """Stop watching: the model is as it came."""
        self._unhook()

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _embedded(self, given: Any, out_BTD: torch.Tensor, ctx: Context) -> torch.Tensor | None:
        """Note where the generators stand in an ordinary pass, add delta in a perturbed one."""
        device = ctx.device if ctx.device.type == "cuda" else None
        if not self._busy:
            if torch.is_grad_enabled():
                state = torch.get_rng_state(), None if device is None else torch.cuda.get_rng_state(device)
                kind = torch.promote_types(out_BTD.dtype, torch.float32)
                self._seen = Seen(given[0], state, out_BTD.shape[-1], kind)
            return None
        self._calls += 1
        if self._start is not None:
            torch.set_rng_state(self._start[0])
            if self._start[1] is not None:
                torch.cuda.set_rng_state(self._start[1], ctx.device)
        if self._delta is None:
            return None
        moved_BTD = self._delta * embedding_scale(out_BTD) if self.normalise else self._delta
        return (out_BTD + moved_BTD).to(out_BTD.dtype)

    # -- the loss

    def loss(self, out: Outputs, batch: Batch, ctx: Context) -> Loss:
        """The task's loss and lambda times the divergence, sums over the positions.

        Raises:
            LuthierError: the outputs are not of the pass that was watched.
            UserError: a row's ``glue_target`` has another number of classes, or the task takes none.
        """
        weight = batch.weight_N.sum()
        task = task_loss(out, batch, ctx, self.pseudo_ramp)
        if self.adversarial_weight == 0 or not torch.is_grad_enabled():
            return Loss(sum=task, weight=weight)
        seen, self._seen = self._seen, None
        if seen is None or seen.ids.data_ptr() != batch.inputs["input_ids"].data_ptr():
            raise LuthierError(f"{SLUG}: it has not seen the forward pass of these outputs; was prepare() called?")
        clean = clean_logits(out, ctx)
        delta, metrics = self._perturbation(clean, seen, batch, ctx)
        moved = self._forward(batch, ctx, delta, None if self.variant == "dropout" else seen)
        if self.variant == "fgm":
            extra = task_loss(moved, batch, ctx, self.pseudo_ramp)
            metrics["perturbed_loss"] = (extra.detach(), weight)
        else:
            extra = (divergence(moved, clean, self.detach_clean) * batch.weight_N).sum()
            metrics["divergence"] = (extra.detach(), weight)
            if self.variant == "dropout" and ctx.step == 0 and extra == 0 and weight > 0:
                raise UserError(
                    f"{SLUG}: variant dropout needs a model with dropout, and two passes of this one are the same; "
                    "raise the dropout in its config.json, or use another variant."
                )
        metrics["task_loss"] = (task.detach(), weight)
        return Loss(sum=task + self.adversarial_weight * extra, weight=weight, metrics=metrics)

    def _perturbation(
        self, clean: LogitsAt | torch.Tensor, seen: Seen, batch: Batch, ctx: Context
    ) -> tuple[torch.Tensor | None, dict[str, tuple[Any, Any]]]:
        """The perturbation [B, T, D] after the ascent, as a constant, and what is logged about it."""
        metrics: dict[str, tuple[Any, Any]] = {}
        if self.variant == "dropout":
            return None, metrics
        mask_BT = batch.inputs.get("attention_mask", torch.ones_like(batch.inputs["input_ids"])).bool()
        delta = project(self._noise(mask_BT, seen, batch, ctx), self.radius, self.norm)
        for number in range(0 if self.variant == "r3f" else self.steps):
            delta.requires_grad_()
            moved = self._forward(batch, ctx, delta, seen)
            if self.variant == "fgm":
                value = task_loss(moved, batch, ctx, self.pseudo_ramp)
            else:
                value = (divergence(moved, clean, detach=True) * batch.weight_N).sum()
            # With respect to delta alone: the gradients of the weights are neither formed nor touched.
            (gradient,) = torch.autograd.grad(value, delta)
            if number == 0:
                metrics["before_ascent"] = (value.detach(), batch.weight_N.sum())
            delta = ascend(
                delta.detach(),
                gradient * mask_BT[..., None],
                step_size=self.step_size,
                radius=self.radius,
                norm=self.norm,
            )
        metrics["delta_norm"] = (length(delta, self.norm).sum(), mask_BT.sum())
        return delta, metrics

    def _noise(self, mask_BT: torch.Tensor, seen: Seen, batch: Batch, ctx: Context) -> torch.Tensor:
        """Each row's noise is drawn for its real tokens alone, so that padding does not change it."""
        drawn = [
            torch.randn(int(count), seen.width, generator=ctx.rng("noise", SLUG, ctx.step, row), dtype=seen.kind)
            for row, count in zip(batch.row_B.tolist(), mask_BT.sum(1).tolist(), strict=True)
        ]
        delta = torch.zeros(*mask_BT.shape, seen.width, dtype=seen.kind, device=mask_BT.device)
        delta[mask_BT] = self.noise * torch.cat(drawn).to(mask_BT.device)
        return delta

    def _forward(self, batch: Batch, ctx: Context, delta: torch.Tensor | None, same: Seen | None) -> Outputs:
        """A perturbed pass with the dropout of a seen one, or a fresh mask; the generators are left as they were."""
        self._busy, self._delta, self._calls = True, delta, 0
        self._start = None if same is None else same.dropout
        try:
            with torch.random.fork_rng(devices=[ctx.device] if ctx.device.type == "cuda" else []):
                out = ctx.forward(batch)
        finally:
            self._busy, self._delta, self._start = False, None, None
        if self._calls != 1:
            raise LuthierError(
                f"{SLUG}: {type(transformers_model(ctx.model)).__name__} looked its word embeddings up {self._calls} "
                "times in one pass; it must be once to perturb them."
            )
        return out


def task_loss(out: Outputs, batch: Batch, ctx: Context, pseudo_ramp: float) -> torch.Tensor:
    """L, a sum over positions: cross-entropy with the label or with the row's class probabilities, times its factor."""
    targets, factors, pseudo = (_given(batch, name) for name in (TARGET, WEIGHT, PSEUDO))
    weight_N = batch.weight_N
    if factors is not None or pseudo is not None:
        risen = ramp(ctx.step, ctx.total_steps or 0, pseudo_ramp)
        factor_B = [
            (1.0 if f is None else float(f)) * (risen if p else 1.0)
            for f, p in zip(factors or [None] * batch.examples, pseudo or [None] * batch.examples, strict=True)
        ]
        weight_N = weight_N * torch.tensor(factor_B, device=weight_N.device).to(weight_N)[batch.sequence_N]
    if targets is None:
        return -(out.logp_N * weight_N).sum()
    if ctx.task.name in NUMBER_TASKS:
        known = [y if given is None else given for given, y in zip(targets, batch.target_N.tolist(), strict=True)]
        number_N = out.numbers()
        return ((number_N - torch.tensor(known, dtype=torch.float64).to(number_N)).square() * weight_N).sum()
    if batch.target_N.numel() != batch.examples:
        raise UserError(f"{SLUG}: {TARGET} is for one class per row, and rows of {ctx.task.name} have many targets.")

    def cross_entropy(logits_CV: torch.Tensor, index_C: torch.Tensor) -> torch.Tensor:
        classes = logits_CV.shape[1]
        wrong = next((t for t in targets if t is not None and len(t) != classes), None)
        if wrong is not None:
            raise UserError(f"{SLUG}: {TARGET} of a row has {len(wrong)} classes, and the model has {classes}.")
        target_NC = torch.nn.functional.one_hot(batch.target_N, classes).to(logits_CV)
        for row, given in enumerate(targets):
            if given is not None:
                target_NC[row] = torch.tensor(given, dtype=torch.float64).to(target_NC)
        return -(target_NC[index_C] * torch.log_softmax(logits_CV, -1)).sum(-1)

    return (out.over_vocabulary(cross_entropy) * weight_N).sum()


def _given(batch: Batch, name: str) -> list[Any] | None:
    """A column of the batch; None where no row has a value."""
    values = batch.columns.get(name)
    return None if values is None or all(v is None for v in values) else list(values)


def clean_logits(out: Outputs, ctx: Context) -> LogitsAt | torch.Tensor:
    """``at(index_C) -> [C, V]``, the logits of finished outputs at some positions, with their graph.

    Predicted numbers [N] are given as they are. Logits over a vocabulary are computed again where they are asked for,
    so that [N, V] never lives.
    """
    if ctx.task.name in NUMBER_TASKS:
        return out.numbers()
    if ctx.task.name != "causal-lm":
        logits_NC = out.over_vocabulary(lambda logits_CV, index_C: logits_CV)
        return lambda index_C: logits_NC[index_C]
    hidden_NH = out.hidden(-1)
    weight_VH, bias_V, scale = ctx.output_layer()
    softcap = getattr(transformers_model(ctx.model).config.get_text_config(), "final_logit_softcapping", None)
    kind = product_type(hidden_NH, weight_VH)
    wide = torch.promote_types(kind, torch.float32)

    def at(index_C: torch.Tensor) -> torch.Tensor:
        hidden_CH = hidden_NH[index_C] if scale == 1 else hidden_NH[index_C] * scale
        bias = None if bias_V is None else bias_V.to(kind)
        logits_CV = torch.nn.functional.linear(hidden_CH.to(kind), weight_VH.to(kind), bias).to(wide)
        return logits_CV if softcap is None else softcap * torch.tanh(logits_CV / softcap)

    return at


def divergence(moved: Outputs, clean: LogitsAt | torch.Tensor, detach: bool) -> torch.Tensor:
    """D [N] of perturbed outputs from clean ones."""
    if not callable(clean):
        return squared_difference(clean.detach() if detach else clean, moved.numbers())

    def of_chunk(logits_CV: torch.Tensor, index_C: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not detach):
            clean_CV = clean(index_C)
        return symmetric_divergence(clean_CV.detach() if detach else clean_CV, logits_CV)

    return moved.over_vocabulary(of_chunk)
