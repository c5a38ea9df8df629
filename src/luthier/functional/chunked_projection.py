"""The arithmetic of the log-probability head: products over a large vocabulary, chunk by chunk in one buffer.

Let ``p = softmax(z)`` be the prediction for one position, ``y`` its target and ``g = d loss / d logp``. Then
``d loss / d z = -g (p - onehot(y))``. The factor is applied to the rows of the narrow operands, ``d hidden = -g (p -
onehot) W`` and ``d W = (p - onehot)^T (-g h)``, which saves a pass over the wide buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from luthier.core.errors import LuthierError
from luthier.functional.logit_rows import Normalise

# One buffer's size: large enough for full speed of the products, small beside a model. On an accelerator more rows are
# needed to fill it.
_BUFFER_BYTES = {"cpu": 64 << 20}
_BUFFER_BYTES_ELSEWHERE = 512 << 20
# Up to here the buffers of all chunks are kept for the backward pass instead of being computed again.
_KEEP_BYTES = {"cpu": 256 << 20}
_KEEP_BYTES_ELSEWHERE = 2 << 30


class Projection(Protocol):
    """The options of a head: see ``engine.head.Head``."""

    scale: float
    softcap: float | None
    chunk: int | None
    normalise: Normalise


def wanted(*tensors: torch.Tensor | None) -> tuple[bool, ...]:
    """Which of hidden states, weight and bias need a gradient."""
    return tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors)


def product_type(hidden_NH: torch.Tensor, weight_VH: torch.Tensor) -> torch.dtype:
    """The type of the products: what autocast asks for, else the lower of the two types."""
    device = hidden_NH.device.type
    kinds = {hidden_NH.dtype, weight_VH.dtype}
    if torch.is_autocast_enabled(device) and torch.float64 not in kinds:
        return torch.get_autocast_dtype(device)
    low = kinds & {torch.bfloat16, torch.float16}
    return low.pop() if low else torch.promote_types(hidden_NH.dtype, weight_VH.dtype)


class Walk:
    """One pass over N positions: the buffer, the products, and the gradients gathered so far.

    Args:
        options: of the head.
        hidden_NH: hidden states; cast and scaled once.
        weight_VH: of the head; cast once.
        bias_V: of the head, or None.
        needs: which gradients to gather, of hidden states, weight and bias.
        kind: the type of the products; by default as the types and autocast say.
    """

    def __init__(
        self,
        options: Projection,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        needs: Sequence[bool],
        kind: torch.dtype | None = None,
    ) -> None:
        device = hidden_NH.device
        self.kind = kind or product_type(hidden_NH, weight_VH)
        # The type gradients are gathered in.
        self.wide = torch.float64 if self.kind == torch.float64 else torch.float32
        self.options, self.rows = options, hidden_NH.shape[0]
        self.hidden_NH, self.weight_VH, self.bias_V = hidden_NH.detach(), weight_VH.detach(), bias_V
        self.needs, self.wanted = tuple(needs), any(needs)
        self.w = self.weight_VH.to(self.kind)
        self.b = None if bias_V is None else bias_V.detach().to(self.kind)
        self.x = self.narrow(self.hidden_NH)
        row_bytes = self.w.shape[0] * self.kind.itemsize
        limit = options.chunk or max(1, _BUFFER_BYTES.get(device.type, _BUFFER_BYTES_ELSEWHERE) // row_bytes)
        # Chunks of one size, rather than full ones and a short rest that the products handle badly.
        self.size = -(-self.rows // -(-self.rows // limit)) if self.rows else 0
        self.keep = self.rows * row_bytes <= _KEEP_BYTES.get(device.type, _KEEP_BYTES_ELSEWHERE)
        self.d_hidden: torch.Tensor | None = None
        self.d_weight: torch.Tensor | None = None
        self.d_bias: torch.Tensor | None = None
        self.slope: torch.Tensor | None = None

    def narrow(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states as the product takes them."""
        return (hidden if self.options.scale == 1.0 else hidden * self.options.scale).to(self.kind)

    def parts(self) -> list[slice]:
        """The chunks; one empty chunk when there are no positions."""
        return [slice(i, min(i + self.size, self.rows)) for i in range(0, self.rows, self.size or 1)] or [slice(0, 0)]

    def buffer(self, rows: int) -> torch.Tensor:
        """[rows, V], uninitialised."""
        return self.x.new_empty((rows, self.w.shape[0]))

    def logits(self, x_CH: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Logits of prepared hidden states, written to ``out``; with a soft cap its slope is left in ``slope``."""
        if self.b is None:
            torch.mm(x_CH, self.w.t(), out=out)
        else:
            torch.addmm(self.b, x_CH, self.w.t(), out=out)
        if self.options.softcap is not None:
            out.div_(self.options.softcap).tanh_()
            if self.wanted:
                self.slope = (1 - out.to(self.wide).square()).to(self.kind)
            out.mul_(self.options.softcap)
        return out

    def capped_(self, d_CV: torch.Tensor) -> torch.Tensor:
        """The gradient through the soft cap of the last logits, in place."""
        return d_CV if self.slope is None else d_CV.mul_(self.slope)

    def add(self, part: slice, d_CV: torch.Tensor, factor_C: torch.Tensor | None) -> None:
        """Gather the gradients that follow from those of a chunk's logits, ``factor_C * d_CV``."""
        if self.needs[1]:
            right = self.x[part]
            if factor_C is not None:
                right = (right.to(self.wide) * factor_C[:, None]).to(self.kind)
            if self.d_weight is None:
                self.d_weight = torch.mm(d_CV.t(), right).to(self.wide)
            elif self.kind == self.wide:
                self.d_weight.addmm_(d_CV.t(), right)
            else:
                self.d_weight.add_(torch.mm(d_CV.t(), right))
        if self.needs[2]:
            d_bias = d_CV.to(self.wide).sum(0) if factor_C is None else factor_C @ d_CV.to(self.wide)
            self.d_bias = d_bias if self.d_bias is None else self.d_bias.add_(d_bias)
        if self.needs[0]:
            d_hidden = torch.mm(d_CV, self.w).to(self.wide)
            if factor_C is not None:
                d_hidden.mul_(factor_C[:, None])
            self.add_hidden(part, d_hidden.mul_(self.options.scale))

    def add_hidden(self, part: slice, d_hidden_CH: torch.Tensor) -> None:
        """Add to the gradient of some hidden states."""
        if self.d_hidden is None:
            self.d_hidden = torch.zeros_like(self.hidden_NH, dtype=self.wide)
        self.d_hidden[part] += d_hidden_CH

    def gradients(self) -> tuple[torch.Tensor | None, ...]:
        """Of hidden states, weight and bias, in their types; zeros where wanted and nothing was added."""
        sources = (self.hidden_NH, self.weight_VH, self.bias_V)
        found = (self.d_hidden, self.d_weight, self.d_bias)
        self.d_hidden = self.d_weight = self.d_bias = None
        return tuple(
            None if not needed or source is None else torch.zeros_like(source) if d is None else d.to(source.dtype)
            for needed, source, d in zip(self.needs, sources, found, strict=True)
        )


class Attach(torch.autograd.Function):
    """A value whose gradients were formed together with it."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, value: torch.Tensor, *gradients: Any) -> torch.Tensor:
        """The value; ``gradients`` are those of hidden states, weight and bias."""
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        """The formed gradients times the upstream one, in place."""
        if ctx.gradients is None:
            raise LuthierError("the gradient of a positionwise loss was formed with it and can be used once only")
        (value,), gradients, ctx.gradients = upstream, ctx.gradients, None
        if value.device.type != "cpu" or value != 1:  # elsewhere the comparison would wait for the device
            gradients = [None if g is None else g.mul_(value) for g in gradients]
        return (*gradients, None, None, None, None)


def share_head_gradients(value: torch.Tensor, holder: torch.Tensor) -> None:
    """Let ``holder`` carry the gradients of weight and bias that were formed with both values, so that one copy lives.

    Both come from :class:`Attach` over the same head and are to be added up; a value without formed gradients is left.
    """
    mine, theirs = (getattr(v.grad_fn, "gradients", None) for v in (value, holder))
    if mine is None or theirs is None:
        return
    for gradient, sum_ in zip(mine[1:], theirs[1:], strict=True):
        if gradient is not None:
            sum_.add_(gradient)
    value.grad_fn.gradients = (mine[0], None, None)  # type: ignore[union-attr]


class Normalised(torch.autograd.Function):
    """Statistics over all N positions, of which logp has a gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Any, weight: Any, bias: Any, target_N: Any, options: Projection, names: Any, needs: Any
    ) -> tuple[torch.Tensor, ...]:
        """The statistics in the order of ``names``."""
        walk = Walk(options, hidden, weight, bias, needs)
        keep = walk.wanted and walk.keep
        buffer = walk.buffer(walk.rows if keep else walk.size)
        found = []
        for part in walk.parts():
            logits = walk.logits(walk.x[part], buffer[part] if keep else buffer[: part.stop - part.start])
            found.append(options.normalise(logits, target_N[part], names, keep))
            if keep:
                walk.capped_(logits)
        ctx.options, ctx.names, ctx.kind = options, names, walk.kind
        ctx.save_for_backward(hidden, weight, bias, target_N, buffer if keep else None)
        values = tuple(torch.cat([f[n] for f in found]) for n in names)
        ctx.mark_non_differentiable(*(v for n, v in zip(names, values, strict=True) if n != "logp"))
        return values

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        """From the kept buffer, or with the logits computed again."""
        hidden, weight, bias, target_N, kept = ctx.saved_tensors
        walk = Walk(ctx.options, hidden, weight, bias, ctx.needs_input_grad[:3], ctx.kind)
        buffer = walk.buffer(0 if kept is not None else walk.size)
        factor_N = -upstream[ctx.names.index("logp")]
        for part in walk.parts():
            if kept is not None:
                d_CV = kept[part]
            else:
                d_CV = walk.logits(walk.x[part], buffer[: part.stop - part.start])
                ctx.options.normalise(d_CV, target_N[part], (), True)
                walk.capped_(d_CV)
            walk.add(part, d_CV, factor_N[part])
        return (*walk.gradients(), None, None, None, None)
