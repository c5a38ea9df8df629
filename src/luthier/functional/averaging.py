"""Averages of models fine-tuned from one start: means, greedy choice, learned mixtures, and what tells when they help.

A model here is a mapping from tensor names to tensors. Sums run in float64 for one tensor at a time, so that the order
of the models does not matter and k equal models give themselves back.

Source: "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference
time", ICML 2022, arXiv 2203.05482.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Model = Mapping[str, "torch.Tensor"]


def mean(tensors: Iterable[torch.Tensor], weights: Sequence[float] | None = None) -> torch.Tensor:
    """The weighted mean of tensors of one shape, in the first one's type; plain when ``weights`` is None.

    Integer and boolean tensors (counters, position ids) are not averaged: the first is returned. A single tensor is
    returned as it is.

    Raises:
        ValueError: no tensors, unequal shapes, or weights that do not fit.
    """
    found = list(tensors)
    if not found:
        raise ValueError("nothing to average")
    first = found[0]
    if weights is not None and len(weights) != len(found):
        raise ValueError(f"{len(weights)} weights for {len(found)} tensors")
    if not first.is_floating_point() or len(found) == 1:
        return first
    factors = weights if weights is not None else [1.0] * len(found)
    total = math.fsum(factors)
    if not abs(total) > 0:
        raise ValueError("the weights sum to zero")
    result = torch.zeros_like(first, dtype=torch.float64)
    for tensor, factor in zip(found, factors, strict=True):
        if tensor.shape != first.shape:
            raise ValueError(f"shapes {tuple(first.shape)} and {tuple(tensor.shape)} differ")
        result.add_(tensor.to(torch.float64), alpha=factor)
    return (result / total).to(first.dtype)


def interpolate(one: torch.Tensor, two: torch.Tensor, t: float) -> torch.Tensor:
    """(1 - t) one + t two."""
    return mean([one, two], [1.0 - t, t]) if 0.0 < t < 1.0 else (one if t <= 0.0 else two)


class Average(Mapping[str, "torch.Tensor"]):
    """The mean of several models as one mapping, each tensor formed when it is read.

    Args:
        models: mappings with the same names.
        weights: one factor per model; equal when None.
    """

    def __init__(self, models: Sequence[Model], weights: Sequence[float] | None = None) -> None:
        self.models, self.weights = list(models), weights

    def __getitem__(self, name: str) -> torch.Tensor:
        return mean((m[name] for m in self.models), self.weights)

    def __iter__(self) -> Iterator[str]:
        return iter(self.models[0])

    def __len__(self) -> int:
        return len(self.models[0])


def first_mismatch(shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> str | None:
    """What keeps models from being averaged, as a sentence; None where nothing does.

    Args:
        shapes: label -> (tensor name -> shape).
    """
    (first, reference), *others = shapes.items()
    for label, own in others:
        for name in sorted(reference.keys() | own.keys()):
            if name not in own or name not in reference:
                has, lacks = (label, first) if name in own else (first, label)
                return f"tensor '{name}' is in '{has}' and not in '{lacks}'"
            if tuple(reference[name]) != tuple(own[name]):
                shape = tuple(own[name])
                return f"tensor '{name}' has shape {tuple(reference[name])} in '{first}' and {shape} in '{label}'"
    return None


@dataclass
class Greedy:
    """The outcome of a greedy choice.

    Attributes:
        kept: labels of the ingredients, in the order they were taken.
        score: metric of their mean.
        log: one entry per ingredient considered: label, its own score, the mean's score with it, whether it was kept.
    """

    kept: list[str]
    score: float
    log: list[dict[str, Any]] = field(default_factory=list)


def ranked(scores: Mapping[str, float], *, higher: bool = True) -> list[str]:
    """Labels from the best score to the worst; ties by name."""
    return sorted(scores, key=lambda label: (-scores[label] if higher else scores[label], label))


def greedy(
    order: Sequence[str],
    scores: Mapping[str, float],
    score_of: Callable[[list[str]], float],
    *,
    accept: Literal["gt", "ge"] = "gt",
    higher: bool = True,
) -> Greedy:
    """Go through the models once and keep each that makes the running mean better.

    Args:
        order: labels in the order of the pass; the first starts the soup.
        scores: metric of each model alone.
        score_of: metric of the mean of the models of these labels.
        accept: ``gt`` keeps a model only where the metric becomes strictly better, ``ge`` also where it stays.
        higher: whether a larger metric is better.

    Raises:
        ValueError: no models.
    """
    if not order:
        raise ValueError("nothing to average")
    first = order[0]
    result = Greedy(
        [first], scores[first], [{"label": first, "alone": scores[first], "with": scores[first], "kept": True}]
    )
    for label in order[1:]:
        value = score_of([*result.kept, label])
        gain = value - result.score if higher else result.score - value
        keep = gain > 0 or (accept == "ge" and gain == 0)
        result.log.append({"label": label, "alone": scores[label], "with": value, "kept": keep})
        if keep:
            result.kept.append(label)
            result.score = value
    return result


def mixture(models: Sequence[Model], alpha_TK: torch.Tensor) -> dict[str, torch.Tensor]:
    """sum_k softmax(alpha)_k theta_k for every floating-point tensor, differentiable in ``alpha_TK``.

    Args:
        models: K models with the same names.
        alpha_TK: one row for all tensors ([1, K]) or one per floating-point tensor in the order of the names ([T, K]).
    """
    weight_TK = torch.softmax(alpha_TK, dim=-1)
    mixed: dict[str, torch.Tensor] = {}
    row = 0
    for name, first in models[0].items():
        if first.is_floating_point():
            weight_K = weight_TK[row if len(weight_TK) > 1 else 0]
            row += 1
            mixed[name] = sum(
                (w.to(first.dtype) * m[name] for w, m in zip(weight_K[1:], models[1:], strict=True)),
                start=weight_K[0].to(first.dtype) * first,
            )
        else:
            mixed[name] = first
    return mixed


@dataclass(frozen=True)
class Learned:
    """A learned mixture: ``weight_TK`` [1 or T, K] sums to 1 over the models; ``beta`` is the inverse temperature."""

    weight_TK: torch.Tensor
    beta: float
    losses: tuple[float, ...]


def learn_mixture(
    models: Sequence[Model],
    batches: Callable[[], Iterable[Any]],
    loss: Callable[[dict[str, torch.Tensor], torch.Tensor, Any], tuple[torch.Tensor, float]],
    *,
    by_tensor: bool = False,
    learning_rate: float = 0.05,
    epochs: int = 5,
) -> Learned:
    """Minimise a held-out loss over the mixing weights and an inverse temperature, from the uniform mean.

    Args:
        models: K models, all in memory.
        batches: gives the held-out batches, once per epoch.
        loss: (mixed tensors, beta, batch) -> (sum of the loss, its weight).
        by_tensor: one weight vector per floating-point tensor instead of one for all.
        learning_rate: of AdamW, without weight decay.
        epochs: passes over the batches.
    """
    floating = sum(t.is_floating_point() for t in models[0].values())
    device = next(iter(models[0].values())).device
    alpha_TK = torch.zeros(floating if by_tensor else 1, len(models), device=device, requires_grad=True)
    beta = torch.ones((), device=device, requires_grad=True)
    optimizer = torch.optim.AdamW([alpha_TK, beta], lr=learning_rate, weight_decay=0.0)
    losses = []
    for _ in range(epochs):
        total, count = 0.0, 0.0
        for batch in batches():
            with torch.enable_grad():
                value, weight = loss(mixture(models, alpha_TK), beta, batch)
                optimizer.zero_grad()
                (value / weight).backward()
            optimizer.step()
            total, count = total + float(value.detach()), count + float(weight)
        losses.append(total / max(count, 1e-30))
    return Learned(torch.softmax(alpha_TK.detach(), dim=-1), float(beta.detach()), tuple(losses))


def barrier(losses_T: Sequence[float], ts: Sequence[float]) -> float:
    """max_t [L(t) - ((1 - t) L(0) + t L(1))] along a segment; ``ts`` begins with 0 and ends with 1."""
    if len(losses_T) != len(ts) or len(ts) < 2 or ts[0] != 0.0 or ts[-1] != 1.0:
        raise ValueError("need one loss per t, with t from 0 to 1")
    start, end = losses_T[0], losses_T[-1]
    return max(loss - ((1 - t) * start + t * end) for loss, t in zip(losses_T, ts, strict=True))


def angle(one: Model, two: Model, base: Model) -> float:
    """Angle in degrees between the updates ``one - base`` and ``two - base`` over all floating-point tensors.

    Raises:
        ValueError: one of the updates is zero.
    """
    dot = square_one = square_two = 0.0
    for name, start in base.items():
        if start.is_floating_point():
            wide = start.to(torch.float64)
            a, b = one[name].to(torch.float64) - wide, two[name].to(torch.float64) - wide
            dot += float((a * b).sum())
            square_one += float((a * a).sum())
            square_two += float((b * b).sum())
    if square_one == 0.0 or square_two == 0.0:
        raise ValueError("a model that equals the base has no direction")
    return math.degrees(math.acos(max(-1.0, min(1.0, dot / math.sqrt(square_one * square_two)))))


def disagreement(logits_NV: torch.Tensor, delta_NV: torch.Tensor, beta: float = 1.0) -> torch.Tensor:
    """E_n Var_{y ~ softmax(beta logits_n)}[delta_n(y)]: how much two models' logits differ where it matters."""
    p_NV = torch.softmax(beta * logits_NV, dim=-1)
    average_N1 = (p_NV * delta_NV).sum(-1, keepdim=True)
    return (p_NV * (delta_NV - average_N1) ** 2).sum(-1).mean()


def second_difference(loss: Callable[[float], float], t: float, step: float = 0.01) -> float:
    """d^2 L / dt^2 by central differences."""
    return (loss(t + step) - 2 * loss(t) + loss(t - step)) / step**2


def soup_ensemble_gap(t: float, curvature: float, variance: float, beta: float = 1.0) -> float:
    """Approximate L_soup(t) - L_ensemble(t) = t (1 - t) / 2 * (-curvature + beta^2 variance).

    Args:
        t: mixing weight of the second model.
        curvature: second derivative of the soup's loss along the segment, from :func:`second_difference`.
        variance: from :func:`disagreement` at the soup's logits.
        beta: inverse temperature of the loss.
    """
    return t * (1 - t) / 2 * (-curvature + beta**2 * variance)
