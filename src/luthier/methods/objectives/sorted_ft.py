"""Sorted fine-tuning: one run makes several depths of the model usable, each with the model's own norm and head.

    f_n(x) = H(N(h_n))                         L = (1/M) sum_{n in S} c_n (L_n + mu KL_n)

``h_n`` is what leaves block n, N the final norm and H the output embedding, the same at every exit; nothing is added
to the model. ``S = {n_1 < ... < n_M = K}`` are the exits, the last being the whole model; ``L_n`` is the mean over
supervised positions of the token objective ``inner`` at exit n. ``c_n`` is 1 (``exit_weights: mean``), n/K (``depth``)
or given; ``sum`` leaves out 1/M, which multiplies the learning rate by M. With ``sampling`` M counts the exits of the
step: ``one`` or r of them are drawn (uniformly, for each step), beside the whole model with ``keep_full``;
``progressive`` begins with the deepest exit and adds the next shallower one every total/M steps. ``distill`` (mu, not
in the paper) adds ``KL_n = T^2 KL(softmax(z_K / T) || softmax(z_n / T))`` for n < K, without gradient to the whole
model's logits z_K.

An exit's gradient is formed chunk by chunk together with its loss, so that no exit's logits outlive it, and the head's
gradient is summed over the exits in one place (where ``inner`` is a sum over positions).

Paper: "Sorted LLaMA: Unlocking the Potential of Intermediate Layers of Large Language Models for Dynamic Inference
(Using Sorted Fine-Tuning)", 2023, arXiv 2309.08968; the sampling of sub-models is that of "SortedNet", 2023, arXiv
2309.00255. No official code was available; the default exits (30% of the blocks, then every 10%) give the paper's
12, 16, ... 40 for 40 blocks. Use the result with the decoder of the same name.

Example::

    objective: {sorted-ft: {exits: [2, 4, 6]}}
    decoding: {sorted-ft: {mode: speculative, exit: 2}}
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core import registry
from luthier.core.errors import LuthierError, UserError
from luthier.core.protocols import Batch, Context, Loss, Needs, Outputs
from luthier.core.registry import objective
from luthier.functional.chunked_projection import share_head_gradients
from luthier.functional.exits import blocks_of, check_exits, default_exits, fit_exits, transformers_model


def exit_factors(
    exits: Sequence[int], depth: int, weights: str | Sequence[float], chosen: Sequence[int]
) -> list[float]:
    """The factor on the loss of each exit of a step.

    Args:
        exits: all exits.
        depth: K.
        weights: ``mean``, ``sum``, ``depth`` or one number for each exit.
        chosen: the exits of the step.
    """
    if weights == "sum":
        return [1.0] * len(chosen)
    if weights == "mean":
        given = [1.0] * len(exits)
    elif weights == "depth":
        given = [n / depth for n in exits]
    else:
        given = [float(w) for w in weights]
    of = dict(zip(exits, given, strict=True))
    return [of[n] / len(chosen) for n in chosen]


def distillation(teacher_CV: torch.Tensor, logits_CV: torch.Tensor, temperature: float) -> torch.Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(logits / T))`` [C], without gradient to the teacher."""
    teacher_CV = torch.log_softmax(teacher_CV.detach().float() / temperature, dim=-1)
    student_CV = torch.log_softmax(logits_CV.float() / temperature, dim=-1)
    return temperature**2 * (teacher_CV.exp() * (teacher_CV - student_CV)).sum(-1)


class _Simple:
    """An objective in function form."""

    needs = Needs(statistics=("logp",), positionwise=True)

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self.function = function

    def loss(self, out: Outputs, batch: Batch, ctx: Context) -> Loss:
        return Loss(sum=self.function(out.logp_N, batch.weight_N).sum(), weight=batch.weight_N.sum())


def build_inner(inner: str | dict[str, dict[str, Any]]) -> Any:
    """The token objective of each exit.

    Raises:
        UserError: it does not exist, its options are wrong, or it is more than a loss of one forward pass.
    """
    if isinstance(inner, dict) and len(inner) != 1:
        raise UserError("sorted-ft: inner: one objective, by its name or as {name: {options}}.")
    slug, options = (inner, {}) if isinstance(inner, str) else next(iter(inner.items()))
    method = registry.get("objective", slug)
    try:
        built = method.build(options)
    except ValueError as error:
        raise UserError(f"sorted-ft: inner: {slug}: {' '.join(str(error).split())}") from None
    made = _Simple(built) if method.is_function else built
    needs = made.needs
    reason = (
        "divides by a count that depends on the model, which would differ between the exits"
        if not needs.fixed_weight
        else "reads hidden layers, which an exit has no meaning for"
        if needs.hidden
        else "lets the model write text"
        if needs.generation
        else None
    )
    if reason:
        raise UserError(f"sorted-ft: inner: '{slug}' {reason}. Choose a token objective, such as sft.")
    return made


@objective(
    "sorted-ft",
    identity={"exits": "full"},
    example={"exits": [1, 2]},
    tasks=("causal-lm",),
    conflicts={
        "objective:learning-from-undesirable": "its second forward pass would have to use the same exits, and it uses "
        "the whole model",
    },
    paper="Sorted LLaMA: Unlocking the Potential of Intermediate Layers of Large Language Models for Dynamic Inference "
    "(Using Sorted Fine-Tuning), 2023, arXiv 2309.08968",
)
class SortedFineTuning:
    """Sorted fine-tuning: train several depths of one model together, so that it can be cut or left early."""

    def __init__(
        self,
        *,
        exits: Annotated[
            list[int] | Literal["auto", "full"],
            Field(description="block numbers, the last being the whole model; auto: 30% of the blocks, then every 10%"),
        ] = "auto",
        exit_weights: Annotated[
            Literal["mean", "sum", "depth"] | list[float],
            Field(description="mean or sum over the exits, mean weighted by depth, or one number for each exit"),
        ] = "mean",
        sampling: Annotated[
            Literal["all", "one", "progressive"] | int,
            Field(description="exits of a step: all, one or that many at random, or ever more from the deepest on"),
        ] = "all",
        keep_full: Annotated[bool, Field(description="random exits come beside the whole model")] = True,
        inner: Annotated[
            str | dict[str, dict[str, Any]],
            Field(description="token objective of each exit: its name, or {name: {options}}"),
        ] = "sft",
        distill: Annotated[
            float, Field(ge=0, description="factor mu of the divergence from the whole model; not in the paper")
        ] = 0.0,
        distill_temperature: Annotated[float, Field(gt=0, description="temperature T of that divergence")] = 1.0,
    ) -> None:
        self.exits, self.exit_weights, self.sampling, self.keep_full = exits, exit_weights, sampling, keep_full
        self.distill, self.distill_temperature = distill, distill_temperature
        self.inner = build_inner(inner)
        if isinstance(exits, list):
            check_exits(exits)
        if isinstance(sampling, int) and sampling < 1:
            raise UserError(f"sorted-ft: sampling: {sampling} exits of a step; give at least 1.")
        if isinstance(exit_weights, list):
            if not isinstance(exits, list) or len(exits) != len(exit_weights):
                raise UserError("sorted-ft: exit_weights as a list needs exits as a list of the same length.")
            if min(exit_weights) < 0 or max(exit_weights) == 0:
                raise UserError("sorted-ft: exit_weights must be 0 or more, and one of them above 0.")
        self._fitted: tuple[int, ...] | None = None
        # Hooks are looked up by name: those of the inner objective are offered where it has them.
        if hasattr(self.inner, "state"):
            self.state, self.load = self.inner.state, self.inner.load
        if hasattr(self.inner, "check_data"):
            self.check_data = self.inner.check_data

    @property
    def alone(self) -> bool:
        """Whether the whole model is the only exit."""
        return self.exits == "full"

    @property
    def needs(self) -> Needs:
        """What the inner objective needs, at every exit."""
        own = self.inner.needs
        return Needs(
            statistics=own.statistics,
            positionwise=own.positionwise and self.alone,
            vocabulary=own.vocabulary or self.distill > 0,
            hidden=not self.alone,
            models=own.models,
            columns=own.columns,
            tasks=("causal-lm",),
        )

    def prepare(self, ctx: Context, dataset: Any) -> None:
        """Check the exits against the model before the first step."""
        if not self.alone:
            self._exits(ctx)
        if hasattr(self.inner, "prepare"):
            self.inner.prepare(ctx, dataset)

    def finish_model(self, model: Any, processor: Any) -> None:
        """Note the exits in the model's configuration, where the decoder of the same name finds them."""
        if self._fitted is not None:
            transformers_model(model).config.sorted_exits = list(self._fitted)

    def loss(self, out: Outputs, batch: Batch, ctx: Context) -> Loss:
        """The weighted sum over the exits of their losses; the weight is that of one exit."""
        if self.alone:
            return self.inner.loss(out, batch, ctx)
        exits = self._exits(ctx)
        chosen = self.chosen(exits, ctx)
        depth = exits[-1]
        factors = exit_factors(exits, depth, self.exit_weights, chosen)
        # One object for all exits, so that a frozen model reads it once for all of them.
        whole = replace(batch, part_of=None)
        first: torch.Tensor | None = None
        total: torch.Tensor | None = None
        made: Loss | None = None
        metrics: dict[str, tuple[Any, Any]] = {}
        for n, factor in zip(chosen, factors, strict=True):
            # The whole model's outputs are there already.
            at = out if n == depth else out.exit(n)
            term = self._term(n, factor, whole, out if n < depth else None, ctx)
            made = at.positionwise(whole, term) if self.inner.needs.positionwise else term(at, whole)
            if first is None:
                first = made.sum
            else:
                share_head_gradients(made.sum, first)
            metrics |= made.metrics
            total = made.sum if total is None else total + made.sum
        assert total is not None
        assert made is not None
        return replace(made, sum=total, metrics=metrics)

    def _term(
        self, n: int, factor: float, whole: Batch, deepest: Outputs | None, ctx: Context
    ) -> Callable[[Outputs, Batch], Loss]:
        """The weighted loss of exit n on a part of the batch, with the divergence from the ``deepest`` outputs."""
        divergence = self._from_whole_model(deepest, ctx) if self.distill and deepest is not None else None

        def loss(at: Outputs, part: Batch) -> Loss:
            made: Loss = self.inner.loss(at, part, ctx)
            term = made.sum
            metrics = {f"exit_{n}/{name}": value for name, value in made.metrics.items()}
            metrics[f"exit_{n}/loss"] = (made.sum.detach(), made.weight)
            if divergence is not None:
                place_N = None if part is whole or part.part_of is None else part.part_of[1]
                apart_N = at.over_vocabulary(
                    lambda logits_CV, index_C: divergence(logits_CV, index_C if place_N is None else place_N[index_C])
                )
                apart_N = apart_N * part.weight_N
                term = term + self.distill * apart_N.sum()
                metrics[f"exit_{n}/divergence"] = (apart_N.detach().sum(), part.weight_N.sum())
            return replace(made, sum=term * factor, metrics=metrics)

        return loss

    def chosen(self, exits: Sequence[int], ctx: Context) -> list[int]:
        """The exits of the current step, a function of the step alone."""
        count = len(exits)
        if self.sampling == "all":
            return list(exits)
        if self.sampling == "progressive":
            if not ctx.total_steps:
                raise LuthierError("sorted-ft: sampling: progressive needs a run of a known number of steps.")
            return list(exits[-min(1 + ctx.step * count // ctx.total_steps, count) :])
        wanted = 1 if self.sampling == "one" else int(self.sampling)
        pool = exits[:-1] if self.keep_full else exits
        drawn = torch.randperm(len(pool), generator=ctx.rng("noise", "sorted-ft", ctx.step))[:wanted].tolist()
        return sorted(pool[i] for i in drawn) + ([exits[-1]] if self.keep_full else [])

    def _exits(self, ctx: Context) -> tuple[int, ...]:
        if self._fitted is None:
            depth = len(blocks_of(ctx.model))
            self._fitted = default_exits(depth) if isinstance(self.exits, str) else fit_exits(self.exits, depth)
            if isinstance(self.sampling, int) and self.sampling > len(self._fitted) - self.keep_full:
                raise UserError(
                    f"sorted-ft: sampling: {self.sampling} exits of a step"
                    f"{' beside the whole model' if self.keep_full else ''}, but exits are {list(self._fitted)}."
                )
        return self._fitted

    def _from_whole_model(self, out: Outputs, ctx: Context) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """A function of a chunk's logits: their divergence from the whole model's, computed for the chunk alone."""
        hidden_NH = out.hidden(-1).detach()
        weight_VH, bias_V, scale = ctx.output_layer()
        softcap = getattr(transformers_model(ctx.model).config.get_text_config(), "final_logit_softcapping", None)

        def divergence(logits_CV: torch.Tensor, index_C: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                hidden_CH = (hidden_NH[index_C] * scale).to(weight_VH.dtype)
                teacher_CV = torch.nn.functional.linear(hidden_CH, weight_VH, bias_V)
                if softcap is not None:
                    teacher_CV = softcap * torch.tanh(teacher_CV / softcap)
            return distillation(teacher_CV, logits_CV, self.distill_temperature)

        return divergence
