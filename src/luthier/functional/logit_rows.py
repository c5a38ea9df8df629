"""What is done to the rows of logits once they stand in the buffer: statistics, and the gradient in place.

A back-end is one function, ``normalise(logits_CV, target_C, names, gradient) -> {name: [C]}``. With ``gradient`` it
leaves ``softmax(logits) - onehot(target)`` in ``logits_CV``: the derivative of ``-logp`` by the logits. Statistics are
float32 (float64 for float64 logits) whatever the type of the logits.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence

import torch

from luthier.core.errors import UserError, did_you_mean, missing_extra

BACKENDS = ("auto", "torch", "liger", "triton")
STATISTICS = ("logp", "entropy", "top1", "top1_logp", "collision")
Normalise = Callable[[torch.Tensor, torch.Tensor, Sequence[str], bool], dict[str, torch.Tensor]]

# Rows are worked on in blocks of about this many bytes on a CPU, so that only the first read and the last write of a
# block go to main memory.
_BLOCK_BYTES = 4 << 20


def _row_dot(a_CV: torch.Tensor, b_CV: torch.Tensor) -> torch.Tensor:
    """Sum over V of the products, without a [C, V] temporary."""
    return torch.linalg.vecdot(a_CV, b_CV)


def normalise_torch(
    logits_CV: torch.Tensor, target_C: torch.Tensor, names: Sequence[str], gradient: bool
) -> dict[str, torch.Tensor]:
    """The default back-end, for every device and every statistic."""
    rows, width = logits_CV.shape
    kind = torch.float64 if logits_CV.dtype == torch.float64 else torch.float32
    in_place = logits_CV.dtype == kind and gradient
    block = rows if logits_CV.is_cuda else max(1, _BLOCK_BYTES // (width * kind.itemsize))
    scratch = None if in_place else logits_CV.new_empty((min(block, rows), width), dtype=kind)
    found = {n: logits_CV.new_empty(rows, dtype=torch.int64 if n == "top1" else kind) for n in names}
    probabilities = gradient or "entropy" in names or "collision" in names
    for start in range(0, rows, max(1, block)):
        part = slice(start, min(start + block, rows))
        x = logits_CV[part]
        if scratch is not None:
            x = scratch[: x.shape[0]].copy_(x)
        target = target_C[part, None]
        # One pass for the logarithms, one for their exponentials; a row's largest is sought only where it is asked for.
        logp = torch.log_softmax(x, -1, out=x)
        if "logp" in names:
            found["logp"][part] = logp.gather(1, target).squeeze(1)
        if "top1_logp" in names:
            found["top1_logp"][part] = logp.amax(-1)
        if "top1" in names:
            found["top1"][part] = logp.argmax(-1)
        if not probabilities:
            continue
        p = logp.exp() if "entropy" in names else logp.exp_()
        if "entropy" in names:
            found["entropy"][part] = _row_dot(p, logp).neg_()
        if "collision" in names:
            found["collision"][part] = _row_dot(p, p)
        if gradient:
            # Written through p, so that the subtraction is done before any rounding to the type of the logits.
            p.scatter_add_(1, target, p.new_full((1, 1), -1.0).expand(target.shape))
            if p.data_ptr() != logits_CV[part].data_ptr():
                logits_CV[part] = p
    return found


def normalise_liger(
    logits_CV: torch.Tensor, target_C: torch.Tensor, names: Sequence[str], gradient: bool
) -> dict[str, torch.Tensor]:
    """Liger's cross-entropy kernel: the log-probability of the target and its gradient, nothing else.

    Raises:
        UserError: another statistic is asked for.
    """
    from liger_kernel.ops.cross_entropy import cross_entropy_forward

    if unserved := [n for n in names if n != "logp"]:
        raise UserError(
            f"training.head: the back-end 'liger' computes logp only, and {', '.join(unserved)} is needed here. "
            "Use training.head: auto, torch or triton."
        )
    if not len(logits_CV):
        return {n: logits_CV.new_empty(0, dtype=torch.float32) for n in names}
    # The kernel returns losses in the type of the logits, and forms the gradient in place where they "require" it.
    x_CV = logits_CV.float().detach().requires_grad_(gradient)
    loss_C = cross_entropy_forward(x_CV, target_C, None, -100, 0.0, 0.0, "none", None, False)[0]
    if gradient and x_CV.data_ptr() != logits_CV.data_ptr():
        logits_CV.copy_(x_CV.detach())
    return {n: -loss_C.detach() for n in names}


def choose(backend: str, device: torch.device) -> Normalise:
    """The back-end of that name.

    ``auto`` is ``torch``: the others are taken only when they are asked for by name.

    Raises:
        UserError: no such back-end, its package is missing, or it cannot run on this device.
    """
    if backend in ("auto", "torch"):
        return normalise_torch
    if backend not in BACKENDS:
        hint = did_you_mean(backend, BACKENDS)
        raise UserError(f"training.head: no back-end '{backend}'.{hint} Accepted: {', '.join(BACKENDS)}.")
    package = "triton" if backend == "triton" else "liger_kernel"
    if importlib.util.find_spec(package) is None:
        raise missing_extra(package, f"training.head: {backend}", "luthier[liger]" if backend == "liger" else "triton")
    # Triton's interpreter runs the kernels on a CPU, slowly: for tests.
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(f"training.head: the back-end '{backend}' needs an accelerator. Use auto or torch on a CPU.")
    if backend == "liger":
        return normalise_liger
    from luthier.functional.logit_rows_triton import normalise_triton

    return normalise_triton
