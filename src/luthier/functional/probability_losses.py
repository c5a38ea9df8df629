"""Token losses that are decreasing functions f(p) of the target's probability, with f(1) = 0.

Each member is the negative log-likelihood with a detached weight w(p) = -f'(p) p, because
grad f(p) = f'(p) p grad log p. Members and weights, p = exp(lp), indicator I of the threshold set::

    nll            -lp                  1
    p              1 - p                p
    general(a)     (1 - p^a) / a        p^a          a = 0 is nll, a = 1 is p
    top_p(q)       (1 - p) I[p >= q]    p I
    bottom_p(q)    (1 - p) I[p <= q]    p I
    top_logp(q)    -lp I[p >= q]        I
    bottom_logp(q) -lp I[p <= q]        I

Source: "Beyond Log Likelihood: Probability-Based Objectives for Supervised Fine-Tuning across the Model Capability
Continuum", 2025, arXiv 2510.00526.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

NAMES = ("nll", "p", "general", "top_p", "bottom_p", "top_logp", "bottom_logp")
THRESHOLDS = ("top_p", "bottom_p", "top_logp", "bottom_logp")
# exp overflows float32 near 88; with a negative alpha the exponent alpha * lp is positive.
LARGEST_EXPONENT = 80.0

# The names used by the released code, beside ours.
_OFFICIAL = {
    "original": "nll",
    "logp": "nll",
    "generalfamily": "general",
    "onlytopp": "top_p",
    "onlybottomp": "bottom_p",
    "onlytoplogp": "top_logp",
    "onlybottomlogp": "bottom_logp",
    "top_p_only": "top_p",
    "bottom_p_only": "bottom_p",
    "top_logp_only": "top_logp",
    "bottom_logp_only": "bottom_logp",
}


@dataclass(frozen=True)
class Member:
    """One member of the family.

    Attributes:
        name: one of :data:`NAMES`.
        alpha: exponent of ``general``; None for the others.
        q: threshold of the members in :data:`THRESHOLDS`; None for the others.

    Raises:
        ValueError: an option is missing, out of bounds or given to a member that has none.
    """

    name: str
    alpha: float | None = None
    q: float | None = None

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"unknown member '{self.name}'; accepted: {', '.join(NAMES)}")
        if self.name == "general":
            if self.alpha is None or not math.isfinite(self.alpha):
                raise ValueError(f"'general' needs a finite alpha, got {self.alpha}")
        elif self.alpha is not None:
            raise ValueError(f"'{self.name}' has no alpha (only 'general' has); remove it")
        if self.name in THRESHOLDS:
            top = self.name.startswith("top")
            bounds = "0 <= q < 1" if top else "0 < q <= 1"
            if self.q is None or not (0 <= self.q < 1 if top else 0 < self.q <= 1):
                raise ValueError(f"'{self.name}' needs a threshold q with {bounds}, got {self.q}")
        elif self.q is not None:
            raise ValueError(f"'{self.name}' has no threshold q (only {', '.join(THRESHOLDS)} have); remove it")

    def __str__(self) -> str:
        option = self.alpha if self.alpha is not None else self.q
        return self.name if option is None else f"{self.name}-{option:g}"

    @property
    def thresholded(self) -> bool:
        """Whether only part of the positions is kept, depending on the model."""
        return self.name in THRESHOLDS

    @property
    def prior_leaning(self) -> bool:
        """Whether the weight w(p) grows with p: what the model already finds plausible counts more."""
        if self.name == "general":
            return (self.alpha or 0.0) > 0
        return self.name in ("p", "top_p", "top_logp")


def parse(text: str, *, alpha: float | None = None, q: float | None = None) -> Member:
    """A member from its name or compact form (``general-2``, ``top_p-0.3``, ``OnlyTopP-0.3``).

    Args:
        text: a name, or ``name-value``; the value may be negative (``general--1``).
        alpha: exponent, where the name carries none; ``general`` alone means alpha 1.
        q: threshold, where the name carries none.

    Raises:
        ValueError: unknown name, malformed value, or a value given twice.
    """
    match = re.fullmatch(r"([A-Za-z_]+)(?:-(-?[0-9.]+(?:[eE][-+]?[0-9]+)?))?", text.strip())
    if match is None:
        raise ValueError(f"cannot read '{text}'; write a name such as 'p', or name-value such as 'general-2'")
    name = _OFFICIAL.get(match[1].lower(), match[1].lower())
    if match[2] is not None:
        value = float(match[2])
        if alpha is not None or q is not None:
            raise ValueError(f"'{text}' already carries its value; remove alpha and q")
        if name == "general":
            alpha = value
        elif name in THRESHOLDS:
            q = value
        else:
            raise ValueError(f"'{name}' takes no value, got '{text}'")
    elif name == "general" and alpha is None:
        alpha = 1.0
    return Member(name, alpha, q)


def kept(member: Member, logp_N: torch.Tensor) -> torch.Tensor:
    """Which positions lie inside the member's threshold set: bool [N], all true for members without one."""
    p_N = logp_N.detach().clamp(max=0.0).exp()
    if member.q is not None:
        return p_N >= member.q if member.name.startswith("top") else p_N <= member.q
    return torch.ones_like(p_N, dtype=torch.bool)


def _power(logp_N: torch.Tensor, alpha: float) -> torch.Tensor:
    """(1 - p^alpha) / alpha, exact in value near p = 1 and in gradient near p = 0."""
    if alpha < 0:
        logp_N = logp_N.clamp(min=-LARGEST_EXPONENT / -alpha)
    exponent_N = alpha * logp_N
    value_N = -torch.expm1(exponent_N.detach()) / alpha
    # expm1's own backward forms (p^alpha - 1) + 1 and so loses small p^alpha; exp's keeps them. The added
    # difference is exactly zero.
    graph_N = -torch.exp(exponent_N) / alpha
    return value_N + (graph_N - graph_N.detach())


def token_loss(member: Member, logp_N: torch.Tensor) -> torch.Tensor:
    """f(p) [N] with gradient, thresholds not applied (see :func:`kept`). ``logp_N`` is float32 or wider."""
    if member.name == "general" and member.alpha:
        return _power(logp_N, member.alpha)
    if member.name in ("p", "top_p", "bottom_p"):
        return _power(logp_N, 1.0)
    return -logp_N


def token_weight(member: Member, logp_N: torch.Tensor) -> torch.Tensor:
    """w(p) = -f'(p) p [N], no gradient, thresholds applied: the member is NLL weighted by it."""
    logp_N = logp_N.detach()
    if member.name == "general":
        alpha = member.alpha or 0.0
        weight_N = torch.exp((alpha * logp_N).clamp(max=LARGEST_EXPONENT))
        if alpha < 0:  # where the loss is clamped its gradient is zero
            weight_N = torch.where(alpha * logp_N > LARGEST_EXPONENT, torch.zeros_like(weight_N), weight_N)
    elif member.name in ("p", "top_p", "bottom_p"):
        weight_N = logp_N.exp()
    else:
        weight_N = torch.ones_like(logp_N)
    return weight_N * kept(member, logp_N)


def detached_weight(
    member: Member,
    logp_N: torch.Tensor,
    *,
    floor: float | None = None,
    cap: float | None = None,
    sequence_N: torch.Tensor | None = None,
    counted_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """w(p) [N] of a member, no gradient, clipped to [floor, cap].

    Args:
        member: whose weight.
        logp_N: log-probabilities of the targets.
        floor: smallest weight; None for none.
        cap: largest weight; None for none.
        sequence_N: where given, p is the geometric mean over the positions of the same example.
        counted_N: bool, which positions enter that mean; all by default.
    """
    logp_N = logp_N.detach()
    if sequence_N is not None and logp_N.numel():
        counted = torch.ones_like(logp_N) if counted_N is None else counted_N.to(logp_N.dtype)
        sums_B, counts_B = (logp_N.new_zeros(int(sequence_N.max()) + 1) for _ in range(2))
        sums_B.index_add_(0, sequence_N, logp_N * counted)
        counts_B.index_add_(0, sequence_N, counted)
        logp_N = (sums_B / counts_B.clamp(min=1))[sequence_N]
    weight_N = token_weight(member, logp_N)
    return weight_N if floor is None and cap is None else weight_N.clamp(min=floor, max=cap)


def weight_report(logp_N: torch.Tensor, weight_N: torch.Tensor, counted_N: torch.Tensor) -> dict[str, tuple]:
    """Mean weight, and the shares of targets with p < 0.01 and p > 0.9, as (sum, count) of the counted positions."""
    p_N, count = logp_N.detach().exp(), counted_N.sum()
    return {
        "weight": ((weight_N * counted_N).sum(), count),
        "share_below_0.01": (((p_N < 0.01) * counted_N).sum(), count),
        "share_above_0.9": (((p_N > 0.9) * counted_N).sum(), count),
    }


def weight_histogram(weight_N: torch.Tensor, counted_N: torch.Tensor) -> dict[str, tuple]:
    """The share of weights in each tenth of [0, 1], as (sum, count); 1 and more belong to the last."""
    bin_N = (weight_N * 10).long().clamp(0, 9)
    sums = counted_N.new_zeros(10).index_add_(0, bin_N, counted_N)
    return {f"weight_from_{i / 10}": (sums[i], counted_N.sum()) for i in range(10)}
