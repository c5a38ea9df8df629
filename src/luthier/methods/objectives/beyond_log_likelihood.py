"""Token losses f(p) of the target's probability p that replace -log p: how much should unlikely targets count?

    loss = sum_n m_n w_n f(p_n) / sum_n m_n

``p_n`` [N] probability of each target, ``w_n`` [N] position weights, ``m_n`` 1 inside the threshold set and 0 outside
(always 1 for members without a threshold). The members of f and their view as a weighted likelihood are in
:mod:`luthier.functional.probability_losses`. With ``p`` or ``general`` (alpha > 0) unlikely and often noisy targets
count less, which helps where the base model already gives the targets high probability; where it does not, ``nll``
learns more. The analysis ``continuum`` tells where a model and a dataset lie, and ``auto`` acts on it.

A threshold also takes tokens out of the denominator (``denominator: kept``). Position weights of transforms or
selectors multiply the numerator; they enter the denominator only with ``denominator: weights``.

Paper: "Beyond Log Likelihood: Probability-Based Objectives for Supervised Fine-Tuning across the Model Capability
Continuum", 2025, arXiv 2510.00526. Official repository: GaotangLi/Beyond-Log-Likelihood. The released trainer averages
the means of its micro-batches (``micro_mean: true``); the default here is the mean over all tokens of the step.

Example::

    objective:
      beyond-log-likelihood: {objective: general-2}     # or p, top_p-0.3, ...
    training: {learning_rate: 5.0e-6}                   # smaller than for sft on a strong model
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from luthier.core.errors import LuthierError, UserError
from luthier.core.own_code import function_of
from luthier.core.protocols import Batch, Context, Loss, Needs, Outputs
from luthier.core.registry import objective
from luthier.functional.continuum import STRONG_FROM, WEAK_UP_TO, Continuum, diagnose
from luthier.functional.probability_losses import LARGEST_EXPONENT, Member, kept, parse, token_loss

TokenFunction = Callable[["torch.Tensor"], "torch.Tensor"]

logger = logging.getLogger("luthier")

# Prior-leaning members scale the gradient by p, so below this mean probability next to nothing is learnt.
TOO_WEAK = 0.05
WATCHED_STEPS = 10


@objective(
    "beyond-log-likelihood",
    identity={"objective": "nll", "denominator": "weights"},
    example={"objective": "general", "alpha": 0.5},
    paper="Beyond Log Likelihood: Probability-Based Objectives for Supervised Fine-Tuning across the Model Capability "
    "Continuum, 2025, arXiv 2510.00526",
)
class BeyondLogLikelihood:
    """Token losses f(p) of the target probability, from plain likelihood to ones that trust the model's own beliefs."""

    def __init__(
        self,
        *,
        objective: Annotated[
            str,
            Field(
                description="nll, p, general, top_p, bottom_p, top_logp, bottom_logp or custom; also in compact form: "
                "general-2, top_p-0.3"
            ),
        ] = "p",
        alpha: Annotated[float | None, Field(description="exponent of general; 0 is nll, 1 is p")] = None,
        q: Annotated[float | None, Field(ge=0, le=1, description="probability threshold of top_* and bottom_*")] = None,
        custom: Annotated[
            str | None,
            Field(description="f as a function of log p, decreasing, f(0) = 0: path/to/file.py:name or module:name"),
        ] = None,
        denominator: Annotated[
            Literal["kept", "all", "weights"],
            Field(description="count of kept tokens, of all tokens, or the sum of position weights of kept tokens"),
        ] = "kept",
        micro_mean: Annotated[
            bool, Field(description="average the means of micro-batches, as the released code")
        ] = False,
        auto: Annotated[bool, Field(description="measure the base model first and choose p or nll by it")] = False,
        strong_from: Annotated[
            float, Field(ge=0, le=1, description="auto: mean p from which a model is strong")
        ] = STRONG_FROM,
        weak_up_to: Annotated[
            float, Field(ge=0, le=1, description="auto: mean p up to which a model is weak")
        ] = WEAK_UP_TO,
    ) -> None:
        self.denominator, self.micro_mean = denominator, micro_mean
        self.auto, self.strong_from, self.weak_up_to = auto, strong_from, weak_up_to
        self.custom: TokenFunction | None = None
        self.member: Member | None = None
        if auto and (objective != "p" or alpha is not None or q is not None or custom is not None):
            raise UserError(
                "beyond-log-likelihood: auto chooses the member itself; remove objective, alpha, q and custom."
            )
        if auto and not weak_up_to < strong_from:
            raise UserError("beyond-log-likelihood: weak_up_to must be smaller than strong_from.")
        if (objective == "custom") != (custom is not None):
            raise UserError(
                "beyond-log-likelihood: 'objective: custom' and 'custom: file.py:name' go together; give both."
            )
        if custom is not None:
            if alpha is not None or q is not None:
                raise UserError("beyond-log-likelihood: a custom f has no alpha and no q; remove them.")
            self.custom = checked(function_of(custom, "custom"), custom)
        elif not auto:
            try:
                self.member = parse(objective, alpha=alpha, q=q)
            except ValueError as error:
                raise UserError(f"beyond-log-likelihood: {error}.") from None
        self._early_p: torch.Tensor | None = None
        self._early_n: torch.Tensor | None = None
        self._warned_clamp = False

    def __str__(self) -> str:
        chosen = "custom" if self.custom else str(self.member) if self.member else "auto (not yet measured)"
        return f"beyond-log-likelihood: {chosen}, denominator {self.denominator}"

    @property
    def thresholded(self) -> bool:
        """Whether the set of tokens that count depends on the model."""
        return self.member is not None and self.member.thresholded

    @property
    def needs(self) -> Needs:
        """Log-probabilities; the weight is fixed by the batch unless a threshold counts the kept tokens."""
        return Needs(
            statistics=("logp",),
            positionwise=not self.micro_mean,
            fixed_weight=not self.micro_mean and (not self.thresholded or self.denominator == "all"),
        )

    def prepare(self, ctx: Context, dataset: Any) -> None:
        """With ``auto``: score the training rows with the model as it stands and choose the member, before step 0."""
        if not self.auto or self.member is not None:
            return
        found = choose(ctx.score(dataset), strong_from=self.strong_from, weak_up_to=self.weak_up_to)
        self.member = found.member
        ctx.log(continuum_mean_p=found.mean_p, continuum_prior_leaning=float(self.member.prior_leaning))
        logger.info(
            "beyond-log-likelihood auto: mean target probability %.3f over %d tokens is %s (strong from %g, weak up "
            "to %g); using '%s'. %s.",
            *(found.mean_p, found.n, found.position, found.strong_from, found.weak_up_to, self.member),
            found.recommendation,
        )

    def loss(self, out: Outputs, batch: Batch, ctx: Context) -> Loss:
        """Sum of the kept tokens' weighted f(p); the weight is what ``denominator`` says."""
        logp_N, weight_N = out.logp_N, batch.weight_N
        member = self._member()
        self._watch(logp_N, ctx)
        loss_N = self.custom(logp_N) if self.custom else token_loss(member, logp_N)
        if self.thresholded:
            kept_N = kept(member, logp_N)
            # A dropped token must not reach the sum even as 0 * inf.
            loss_N = torch.where(kept_N, loss_N, torch.zeros_like(loss_N))
        total = (loss_N * weight_N).sum()
        # A position of weight 0 is not supervised.
        counted_N = (weight_N != 0).to(weight_N.dtype) if self.denominator != "weights" else weight_N
        weight = counted_N.sum()
        metrics: dict[str, tuple[Any, Any]] = {}
        if self.thresholded:
            inside = (counted_N * kept_N).sum()
            metrics["kept_share"] = (inside, weight)
            metrics["nothing_kept"] = ((inside == 0).to(weight_N.dtype), 1.0)
            if self.denominator != "all":
                # As the released code: a step that keeps nothing divides 0 by this, and any count swallows it.
                weight = inside + 1e-8
        if self.micro_mean:
            return Loss(sum=total / (weight + 1e-8), weight=1.0, unit="batch", metrics=metrics)
        return Loss(sum=total, weight=weight, metrics=metrics)

    def state(self) -> dict[str, Any]:
        """The member that ``auto`` chose."""
        return {"member": None if self.member is None else str(self.member)}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        if self.auto and state["member"] is not None:
            self.member = parse(state["member"])

    def _member(self) -> Member:
        if self.member is not None:
            return self.member
        if self.custom is not None:
            return Member("nll")
        raise LuthierError("beyond-log-likelihood: auto has not measured the model yet; name a member instead of auto.")

    def _watch(self, logp_N: torch.Tensor, ctx: Context) -> None:
        """Warn where this member cannot learn: weak model and prior-leaning loss, or clamped log-probabilities."""
        member = self.member
        if member is None:
            return
        if member.prior_leaning and ctx.step < WATCHED_STEPS:
            p, n = logp_N.detach().exp().sum(), torch.tensor(logp_N.numel(), device=logp_N.device)
            self._early_p = p if self._early_p is None else self._early_p + p
            self._early_n = n if self._early_n is None else self._early_n + n
        elif self._early_p is not None and self._early_n is not None:
            mean = float(self._early_p) / max(int(self._early_n), 1)
            self._early_p = self._early_n = None
            if mean < TOO_WEAK:
                warnings.warn(
                    f"the mean target probability of the first {WATCHED_STEPS} steps is {mean:.3f}: '{member}' scales "
                    "gradients by it and will hardly learn. Use nll for this model and data.",
                    stacklevel=3,
                )
        if member.alpha is not None and member.alpha < 0 and not self._warned_clamp:
            lowest = -LARGEST_EXPONENT / -member.alpha
            if bool((logp_N.detach() < lowest).any()):
                self._warned_clamp = True
                warnings.warn(
                    f"log-probabilities below {lowest:.1f} are clamped for '{member}' (p^alpha would overflow); those "
                    "tokens give no gradient. Use an alpha nearer to 0.",
                    stacklevel=3,
                )


def choose(scores: Iterable[Any], *, strong_from: float, weak_up_to: float) -> Continuum:
    """The diagnosis of per-row target log-probabilities (a sequence of tensors or arrays)."""
    logp_N = np.concatenate([np.ravel(np.asarray(row, dtype=np.float64)) for row in scores] or [np.zeros(0)])
    if logp_N.size == 0:
        raise UserError("beyond-log-likelihood: auto found no supervised token in the training rows.")
    return diagnose(logp_N, strong_from=strong_from, weak_up_to=weak_up_to)


def checked(function: TokenFunction, name: str) -> TokenFunction:
    """The function, after trying it on log-probabilities from -10 to 0.

    Raises:
        UserError: it does not return one value per position, is not decreasing in p, or f(1) is not 0.
    """
    logp_N = torch.linspace(-10.0, 0.0, 101, dtype=torch.float64)
    value_N = function(logp_N)
    if not isinstance(value_N, torch.Tensor) or value_N.shape != logp_N.shape:
        raise UserError(f"custom: '{name}' must return a tensor of its argument's shape, one loss per position.")
    if not abs(float(value_N[-1])) < 1e-6:
        raise UserError(f"custom: '{name}' must be 0 at p = 1 (log p = 0), got {float(value_N[-1]):g}.")
    if not bool((value_N.diff() <= 1e-9).all()):
        raise UserError(f"custom: '{name}' must not increase with the probability.")
    return function
