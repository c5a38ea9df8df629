"""Intruder dimensions: directions of high rank in tuned weights that the base does not have.

    W0 = U0 S0 V0^T      W1 = U1 S1 V1^T      C = |U1^T U0|
    j among the k largest singular values of W1 is an intruder iff max_i C[j, i] < eps      (over ALL i)

Everything is float64 on one matrix [out, in] at a time; R = min(out, in).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from luthier.core.errors import UserError

Side = Literal["left", "right", "both"]
# Modules of GPT-2's kind keep their weights as [in, out].
TRANSPOSED = ("c_attn", "c_fc", "c_proj")


@dataclass(frozen=True)
class Spectrum:
    """A tuned matrix beside its base.

    Attributes:
        u, s, vt: the thin singular value decomposition of the tuned matrix.
        cosine_R: for each tuned direction, the largest absolute cosine with any direction of the base.
    """

    u: torch.Tensor
    s: torch.Tensor
    vt: torch.Tensor
    cosine_R: torch.Tensor


def oriented(weight: torch.Tensor, name: str) -> torch.Tensor:
    """The matrix as [out, in], whatever its module keeps."""
    return weight.T if any(part in TRANSPOSED for part in name.split(".")) else weight


def spectrum(base: torch.Tensor, tuned: torch.Tensor, side: Side = "left", name: str = "") -> Spectrum:
    """The tuned matrix's directions, and how much of each the base has.

    Raises:
        UserError: shapes differ, or a number is not finite.
    """
    if base.shape != tuned.shape:
        raise UserError(f"lora-illusion: '{name}' is {tuple(base.shape)} in the base and {tuple(tuned.shape)} tuned.")
    w0, w1 = base.detach().double(), tuned.detach().double()
    if not bool(torch.isfinite(w0).all() & torch.isfinite(w1).all()):
        raise UserError(f"lora-illusion: '{name}' holds a number that is not finite.")
    u0, _, vt0 = torch.linalg.svd(w0, full_matrices=False)
    u1, s1, vt1 = torch.linalg.svd(w1, full_matrices=False)
    left_RR, right_RR = (u1.T @ u0).abs(), (vt1 @ vt0.T).abs()
    both = {"left": left_RR, "right": right_RR, "both": (left_RR + right_RR) / 2}
    return Spectrum(u1, s1, vt1, both[side].amax(1))


def intruders(found: Spectrum, k: int, eps: float) -> list[int]:
    """Indices among the k largest tuned directions of those that the base has not."""
    return torch.nonzero(found.cosine_R[:k] < eps).flatten().tolist()


def controls(found: Spectrum, k: int, eps: float) -> list[int]:
    """As many directions of the k largest that the base has most of, for a control."""
    order = torch.argsort(found.cosine_R[:k], descending=True, stable=True).tolist()
    known = [i for i in order if found.cosine_R[i] >= eps]
    return sorted(known[: len(intruders(found, k, eps))])


def rescaled(tuned: torch.Tensor, found: Spectrum, which: list[int], factor: float) -> torch.Tensor:
    """W1 + (factor - 1) sum_j s_j u_j v_j^T over some directions of the TUNED matrix, in its own type."""
    if not which or factor == 1:
        return tuned
    part = (found.u[:, which] * found.s[which]) @ found.vt[which]
    return (tuned.double() + (factor - 1) * part).to(tuned.dtype)


def effective_rank(singular_R: torch.Tensor) -> float:
    """Exp of the entropy of the normalised singular values; 0 for a matrix of zeros."""
    total = singular_R.sum()
    if total == 0:
        return 0.0
    p = singular_R / total
    return float(torch.exp(-(p * torch.where(p > 0, p.log(), 0.0)).sum()))


def stable_rank(singular_R: torch.Tensor) -> float:
    """||dW||_F^2 / ||dW||_2^2 from the singular values; 0 for a matrix of zeros."""
    return float((singular_R**2).sum() / singular_R[0] ** 2) if singular_R[0] > 0 else 0.0


def noise_like(base: torch.Tensor, tuned: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The base plus normal noise as large (Frobenius) as the change: what detection finds there is a false alarm."""
    drawn = torch.randn(base.shape, generator=generator, dtype=torch.float64)
    size = (tuned.double() - base.double()).norm()
    return base.double() + drawn * (size / drawn.norm())
