"""One normalised gradient step on temporary additions to a model, and how far it moves the hidden states.

Additions are tensors ``[S, ...]``: S = 1 for one perturbed twin of a whole batch, S = B for a twin per example.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import torch

from luthier.core.errors import LuthierError

EPSILON = 1e-12


def per_twin(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of squares of everything but the first dimension, [S]."""
    return tensor.square().flatten(1).sum(1)


def normalised_step(
    gradients: Sequence[torch.Tensor], groups: Sequence[int], size_S: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """``size * g / (||g||_2 + 1e-12)``, with one norm for each group of tensors and each twin.

    Args:
        gradients: tensors [S, ...].
        groups: the group of each tensor; the same number everywhere for one norm over all.
        size_S: the length of the step of each twin and group; a negative one goes downhill.

    Returns:
        The step of each tensor, and the norm over all tensors [S].
    """
    squares: dict[int, torch.Tensor] = {}
    for group, gradient in zip(groups, gradients, strict=True):
        squares[group] = squares[group] + per_twin(gradient) if group in squares else per_twin(gradient)
    factor = {group: size_S / (square_S.sqrt() + EPSILON) for group, square_S in squares.items()}
    steps = [
        gradient * factor[group].to(gradient).view(-1, *[1] * (gradient.dim() - 1))
        for group, gradient in zip(groups, gradients, strict=True)
    ]
    return steps, torch.stack(list(squares.values())).sum(0).sqrt()


def row_mean(value_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of each row that the mask keeps, [B]; 0 for a row without any."""
    kept_BT = mask_BT.to(value_BT)
    return (value_BT * kept_BT).sum(1) / kept_BT.sum(1).clamp(min=1)


def row_distance(
    state_BTH: torch.Tensor,
    target_BTH: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    distance: Literal["mse", "cosine"] = "mse",
    mean_dim: bool = True,
    relative: bool = False,
) -> torch.Tensor:
    """Distance of two sets of hidden states, mean over the tokens of each row, [B], at least float32.

    Args:
        state_BTH: hidden states.
        target_BTH: those they are compared with.
        mask_BT: tokens that count.
        distance: squared Euclidean distance, or one minus the cosine.
        mean_dim: divide the squared distance by H.
        relative: divide the squared distance by the row's mean squared norm of the target (without gradient); H then
            cancels, so ``mean_dim`` makes no difference.
    """
    wide = torch.promote_types(state_BTH.dtype, torch.float32)
    state_BTH, target_BTH = state_BTH.to(wide), target_BTH.to(wide)
    if distance == "cosine":
        return row_mean(1 - torch.nn.functional.cosine_similarity(state_BTH, target_BTH, dim=-1), mask_BT)
    moved_B = row_mean((state_BTH - target_BTH).square().sum(-1), mask_BT)
    if relative:
        return moved_B / row_mean(target_BTH.detach().square().sum(-1), mask_BT).clamp(min=EPSILON)
    return moved_B / state_BTH.shape[-1] if mean_dim else moved_B


@cache
def _formed_gradients() -> Any:
    # Made on first use: as a class of the module it would load torch as soon as a method of the registry is looked at.
    class FormedGradients(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: torch.Tensor, gradients: Any, *tensors: torch.Tensor) -> torch.Tensor:
            ctx.gradients = gradients
            return value.clone()

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            if ctx.gradients is None:
                raise LuthierError("this loss carries gradients formed with it, which can be used once only")
            (scale,), gradients, ctx.gradients = upstream, ctx.gradients, None
            if scale.device.type != "cpu" or scale != 1:  # elsewhere the comparison would wait for the device
                gradients = [g.mul_(scale) for g in gradients]
            return (None, None, *gradients)

    return FormedGradients


def with_gradients(
    value: torch.Tensor, tensors: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]
) -> torch.Tensor:
    """A scalar whose gradients with respect to some tensors are already known; its backward pass uses them up.

    Args:
        value: the scalar; its own graph is dropped.
        tensors: tensors that require a gradient.
        gradients: that of each; scaled in place by the backward pass.
    """
    attached: torch.Tensor = _formed_gradients().apply(value.detach(), list(gradients), *tensors)
    return attached
