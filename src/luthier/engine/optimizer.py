"""Optimiser, learning-rate schedules and the last steps on gradients."""

from __future__ import annotations

import math
from typing import Any

import torch

from luthier.core.errors import LuthierError, UserError
from luthier.engine.stack import Stack

SCHEDULES = ("cosine", "linear", "constant", "warmup-stable-decay")
STABLE_SHARE = 0.8


def schedule_factor(schedule: str, step: int, total: int, warmup: float) -> float:
    """The factor on the learning rate for a step counted from 0; a pure function, so nothing of it is saved.

    Args:
        schedule: one of :data:`SCHEDULES`. ``warmup-stable-decay`` holds until 80% of the steps, then falls linearly.
        step: the step about to be taken.
        total: steps of the run.
        warmup: a fraction of the steps when below 1, otherwise a number of steps.
    """
    rising = round(total * warmup) if warmup < 1 else int(warmup)
    if step < rising:
        return (step + 1) / rising
    left = max(total - rising, 1)
    done = min((step - rising) / left, 1.0)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - done
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    if schedule == "warmup-stable-decay":
        fall_from = max(STABLE_SHARE * total, rising)
        return 1.0 if step < fall_from else max(0.0, (total - step) / max(total - fall_from, 1))
    raise UserError(f"unknown schedule '{schedule}'. Accepted: {', '.join(SCHEDULES)}.")


def open_parameters(model: torch.nn.Module, stack: Stack, ctx: Any) -> torch.nn.Module:
    """Freeze everything, let each parameter method open what it claims, refuse overlapping claims.

    Raises:
        UserError: two methods claim one tensor, or nothing is left to train.
    """
    model.requires_grad_(False)
    # By tensor and not by name: adapters rename what they wrap.
    claimed: dict[int, str] = {}
    for method in stack.parameters:
        label = next(name for name, value in stack.named.items() if value is method)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model = method.apply(model, ctx)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                if id(parameter) in claimed:
                    raise UserError(
                        f"{claimed[id(parameter)]} and {label} both claim the tensor '{name}'. Keep one of the two."
                    )
                claimed[id(parameter)] = label
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in claimed)
    if not claimed:
        raise UserError("the parameter methods leave nothing to train.")
    return model


def make_optimizer(model: torch.nn.Module, stack: Stack, training: Any) -> torch.optim.Optimizer:
    """AdamW or SGD over the groups of the parameter methods, and of others that train modules of their own.

    Vectors (norms, biases) are not decayed, unless a group states its own ``weight_decay``.
    """
    groups: list[dict[str, Any]] = []
    for method in (m for m in stack.named.values() if hasattr(m, "groups")):
        for group in method.groups(model):
            wanted = [p for p in group["params"] if p.requires_grad]
            scale = float(group.get("lr_scale", 1.0))
            own = group.get("weight_decay")
            matrices, vectors = [p for p in wanted if p.dim() > 1], [p for p in wanted if p.dim() < 2]
            parts = [(wanted, own)] if own is not None else [(matrices, training.weight_decay), (vectors, 0.0)]
            groups += [{"params": ps, "weight_decay": decay, "lr_scale": scale} for ps, decay in parts if ps]
    groups = _joined(groups)
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=training.learning_rate, momentum=training.beta1)
    sharded = any(hasattr(p, "full_tensor") for g in groups for p in g["params"])
    return torch.optim.AdamW(
        groups,
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
        eps=training.epsilon,
        fused=None if sharded else True,
    )


def _joined(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups that differ in nothing but their tensors as one, so that the fused optimiser is called once."""
    joined: dict[tuple[float, float], dict[str, Any]] = {}
    for group in groups:
        key = (group["weight_decay"], group["lr_scale"])
        joined.setdefault(key, {**group, "params": []})["params"].extend(group["params"])
    return list(joined.values())


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """The step's learning rate, times each group's own scale."""
    for group in optimizer.param_groups:
        group["lr"] = value * group["lr_scale"]


def gradients(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The gradients that are there, whole: a loss that does not reach the output layer may leave one by rows."""
    for parameter in (p for g in optimizer.param_groups for p in g["params"]):
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.to_dense()
    return [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]


def gradient_norm(grads: list[torch.Tensor]) -> float:
    """Euclidean norm over all gradients (over all shards, when sharded)."""
    if not grads:
        return 0.0
    norm = torch.nn.utils.get_total_norm(grads)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def clip(grads: list[torch.Tensor], norm: float, limit: float | None) -> None:
    """Scale the gradients down to norm ``limit`` where they exceed it."""
    if limit is not None and norm > limit:
        torch._foreach_mul_(grads, limit / (norm + 1e-6))


def optimizer_state(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, torch.Tensor]:
    """``<parameter>::<key>`` -> tensor for everything the optimiser remembers."""
    found: dict[str, torch.Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                found[f"{names[id(parameter)]}::{key}"] = torch.as_tensor(value)
    return found


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, names: dict[int, str], saved: dict[str, torch.Tensor], like: Any
) -> None:
    """The inverse of :func:`optimizer_state`; ``like(full, parameter)`` shards a tensor as the parameter is.

    Raises:
        LuthierError: the checkpoint holds states of other tensors.
    """
    own = {name: key for key, name in names.items()}
    by_id = {id(p): p for g in optimizer.param_groups for p in g["params"]}
    for full_name, value in saved.items():
        name, _, key = full_name.rpartition("::")
        parameter = by_id.get(own.get(name, -1))
        if parameter is None:
            raise LuthierError(f"the checkpoint trains '{name}', this recipe does not: resume with the same recipe.")
        optimizer.state[parameter][key] = like(value, parameter) if value.dim() else value


def rebuild(optimizer: torch.optim.Optimizer, model: torch.nn.Module, stack: Stack, training: Any) -> Any:
    """A new optimiser after the trained set changed: tensors that stay keep their state, others start fresh."""
    fresh = make_optimizer(model, stack, training)
    for group in fresh.param_groups:
        for parameter in group["params"]:
            if parameter in optimizer.state:
                fresh.state[parameter] = optimizer.state[parameter]
    return fresh
