"""The rows of logits in one Triton kernel: all statistics in one read, the gradient in a second pass in place.

One program per row, the online form of log-sum-exp: with running maximum m, ``d = sum e^(x-m)``,
``a = sum e^(x-m) x`` and ``q = sum e^(2(x-m))``: ``lse = m + log d``, entropy ``lse - a/d``, collision ``q/d^2``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

_LARGEST_BLOCK = 8192


@triton.jit
def _rows_kernel(
    logits,
    row_stride,
    target,
    logp,
    entropy,
    top1,
    top1_logp,
    collision,
    width,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * row_stride
    y = tl.load(target + row)
    chosen = tl.load(start + y).to(tl.float32)
    m = float("-inf")
    d = 0.0
    a = 0.0
    q = 0.0
    best = 0
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < width
        x = tl.load(start + column, mask=inside, other=float("-inf")).to(tl.float32)
        highest = tl.max(x, axis=0)
        best = tl.where(highest > m, first + tl.argmax(x, axis=0), best)
        new = tl.maximum(m, highest)
        shrink = tl.exp(m - new)
        e = tl.exp(x - new)
        d = d * shrink + tl.sum(e, axis=0)
        a = a * shrink + tl.sum(tl.where(inside, e * x, 0.0), axis=0)
        q = q * shrink * shrink + tl.sum(e * e, axis=0)
        m = new
    lse = m + tl.log(d)
    tl.store(logp + row, chosen - lse)
    tl.store(entropy + row, lse - a / d)
    tl.store(top1 + row, best)
    tl.store(top1_logp + row, m - lse)
    tl.store(collision + row, q / (d * d))
    if GRADIENT:
        for first in range(0, width, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < width
            x = tl.load(start + column, mask=inside, other=float("-inf")).to(tl.float32)
            p = tl.exp(x - lse)
            tl.store(start + column, tl.where(column == y, p - 1.0, p), mask=inside)


def normalise_triton(
    logits_CV: torch.Tensor, target_C: torch.Tensor, names: Sequence[str], gradient: bool
) -> dict[str, torch.Tensor]:
    """As ``logit_rows.normalise_torch``, always in float32; the last dimension must be contiguous."""
    rows, width = logits_CV.shape
    found = {
        name: logits_CV.new_empty(rows, dtype=torch.int64 if name == "top1" else torch.float32)
        for name in ("logp", "entropy", "top1", "top1_logp", "collision")
    }
    if rows:
        block = min(_LARGEST_BLOCK, triton.next_power_of_2(width))
        _rows_kernel[(rows,)](
            logits_CV,
            logits_CV.stride(0),
            target_C.contiguous(),
            *found.values(),
            width,
            GRADIENT=gradient,
            BLOCK=block,
        )
    return {name: found[name] for name in names}
