"""The matrix Z of an example's logits [L positions, V vocabulary]: nuclear norm, sketch, distances of sketches.

A language model's logits are a product, ``Z = X W'^T`` with ``X = [factor * hidden, 1]`` [L, H'] and ``W' = [W, bias]``
[V, H']. Both quantities need of W' only two small matrices, so Z is never formed:

    nuclear norm   Z Z^T = X (W'^T W') X^T
    sketch         C1 Z C2 = C1 (X (W'^T C2))

The sketch is a two-sided sub-sampled cosine transform: the real part of an un-normalised FFT of a real signal with
random signs, over the vocabulary and then over the positions, of which a few random outputs are kept. With signs d and
kept frequencies k over an axis of n, ``C[j, c] = cos(2 pi j k_c / n) d_j sqrt(n / number of k)``.

Source of the sketch: "Utility-Diversity Aware Online Batch Selection for LLM Supervised Fine-tuning", 2025, arXiv
2510.16882.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

# Rows of the output embedding per product: small copies, and sums of long columns gathered in float64.
_ROWS = 8192


def random_signs(count: int, generator: torch.Generator) -> torch.Tensor:
    """int8 [count] of -1 and +1."""
    return (2 * torch.randint(2, (count,), generator=generator) - 1).to(torch.int8)


def cosine_rows(sign_n: torch.Tensor, frequency_c: torch.Tensor) -> torch.Tensor:
    """The transposed cosine matrix C^T of one axis, [c, n] in float32.

    Args:
        sign_n: signs of the axis.
        frequency_c: int64, the kept outputs of the transform, from 0 to n - 1.
    """
    n = sign_n.numel()
    j_n = torch.arange(n, device=sign_n.device)
    # The angle is reduced in integers: in floating point j * k would lose it over a large vocabulary.
    wave_n = torch.cos(j_n.double() * (2 * math.pi / n)) * math.sqrt(n / frequency_c.numel())
    rows = torch.empty(frequency_c.numel(), n, device=sign_n.device)
    for row, frequency in zip(rows, frequency_c.tolist(), strict=True):
        row.copy_(wave_n[j_n * frequency % n] * sign_n)
    return rows


def nuclear_norm(gram: torch.Tensor) -> torch.Tensor:
    """The sum of singular values of Z, a scalar, from ``Z Z^T`` or ``Z^T Z`` (float64: a root halves the digits)."""
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()


def nuclear_norm_of(logits_LV: torch.Tensor) -> torch.Tensor:
    """The nuclear norm of finished logits, through the Gram matrix of the shorter side."""
    z = logits_LV.double()
    return nuclear_norm(z @ z.t() if z.shape[0] <= z.shape[1] else z.t() @ z)


@dataclass(frozen=True)
class OutputMap:
    """What scoring needs of the map from X to the logits.

    Attributes:
        gram_HH: ``W'^T W'`` in float64, or None where no norm is wanted.
        sketch_RH: ``C2^T W'`` in float32, or None where no sketch is wanted.
    """

    gram_HH: torch.Tensor | None
    sketch_RH: torch.Tensor | None

    @cached_property
    def root_HH(self) -> torch.Tensor:
        """A symmetric root of ``gram_HH``."""
        assert self.gram_HH is not None
        value_H, vector_HH = torch.linalg.eigh(self.gram_HH)
        return (vector_HH * value_H.clamp(min=0).sqrt()) @ vector_HH.t()

    def nuclear_norm(self, x_LH: torch.Tensor) -> torch.Tensor:
        """The nuclear norm of ``X W'^T``, a scalar in float64."""
        assert self.gram_HH is not None
        x = x_LH.double()
        if x.shape[0] <= x.shape[1]:
            return nuclear_norm(x @ self.gram_HH @ x.t())
        return nuclear_norm(self.root_HH @ (x.t() @ x) @ self.root_HH)

    def columns(self, x_NH: torch.Tensor) -> torch.Tensor:
        """``Z C2`` [N, R] in float32."""
        assert self.sketch_RH is not None
        return x_NH.float() @ self.sketch_RH.t()


def output_map(
    weight_VH: torch.Tensor, bias_V: torch.Tensor | None, cosine_RV: torch.Tensor | None, *, gram: bool
) -> OutputMap:
    """The map of an output embedding.

    Args:
        weight_VH: the embedding.
        bias_V: its bias, or None; a bias adds one column to W'.
        cosine_RV: ``C2^T``, or None for no sketch.
        gram: whether the nuclear norm is wanted.
    """
    width = weight_VH.shape[1] + (bias_V is not None)
    gram_HH = torch.zeros(width, width, dtype=torch.float64, device=weight_VH.device) if gram else None
    sketch_RH = None if cosine_RV is None else torch.zeros(cosine_RV.shape[0], width, device=weight_VH.device)
    for start in range(0, weight_VH.shape[0], _ROWS):
        part = slice(start, start + _ROWS)
        w = weight_VH[part].float()
        if bias_V is not None:
            w = torch.cat([w, bias_V[part, None].float()], dim=1)
        if gram_HH is not None:
            gram_HH += (w.t() @ w).double()
        if sketch_RH is not None and cosine_RV is not None:
            sketch_RH += cosine_RV[:, part] @ w
    return OutputMap(gram_HH, sketch_RH)


def widened(hidden_NH: torch.Tensor, factor: float, bias: bool) -> torch.Tensor:
    """X [N, H'] of hidden states, in float32: scaled, with a column of ones where there is a bias."""
    x = hidden_NH.float() * factor
    return torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1) if bias else x


def last_layer_gradient_norm(error_LV: torch.Tensor, x_LH: torch.Tensor) -> torch.Tensor:
    """The Frobenius norm of ``sum_l error_l x_l^T``, a scalar, without the [V, H] matrix.

    Args:
        error_LV: derivative of an example's loss by its logits, position by position.
        x_LH: what these logits are linear in (with a column of ones where there is a bias).
    """
    error, x = error_LV.double(), x_LH.double()
    return ((error @ error.t()) * (x @ x.t())).sum().clamp(min=0).sqrt()


def mean_distance(sketch_BD: torch.Tensor, memory_MD: torch.Tensor) -> torch.Tensor:
    """Mean Euclidean distance of each sketch to the remembered ones, [B]; exactly 0 where nothing is remembered."""
    if memory_MD.shape[0] == 0:
        return sketch_BD.new_zeros(sketch_BD.shape[0])
    # The product form of cdist loses small distances between long vectors.
    return torch.cdist(sketch_BD, memory_MD, compute_mode="donot_use_mm_for_euclid_dist").mean(dim=1)


def push(memory_MD: torch.Tensor, pointer: int, count: int, sketch_KD: torch.Tensor) -> tuple[int, int]:
    """Write sketches into a first-in-first-out memory, in place; returns the new (pointer, count).

    Args:
        memory_MD: M slots.
        pointer: the slot to write next.
        count: filled slots.
        sketch_KD: in the order in which they arrive.
    """
    slots, arriving = memory_MD.shape[0], sketch_KD.shape[0]
    slot_K = (pointer + torch.arange(arriving, device=memory_MD.device)) % slots
    # Of more arrivals than slots the first ones would be overwritten at once.
    memory_MD[slot_K[-slots:]] = sketch_KD[-slots:].to(memory_MD)
    return (pointer + arriving) % slots, min(count + arriving, slots)
