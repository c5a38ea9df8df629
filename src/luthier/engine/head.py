"""The log-probability head: from hidden states at the supervised positions to statistics, without N x V logits.

Logits exist for a chunk of C positions at a time, in one buffer that every chunk reuses. Three ways through it:

- ``positionwise``: the loss is a sum over positions, so each chunk's gradient is formed in the buffer while its logits
  are there. Three matrix products: logits, d hidden, d weight.
- ``outputs`` with a graph: the loss may join positions. The buffer is kept for the backward pass where it is small
  (three products) and computed again where it is not (four).
- ``outputs`` without a graph: one product.

Let ``p = softmax(z)`` be the prediction for one position, ``y`` its target and ``g = d loss / d logp``. Then
``d loss / d z = -g (p - onehot(y))``. The factor is applied to the rows of the narrow operands, ``d hidden = -g (p -
onehot) W`` and ``d W = (p - onehot)^T (-g h)``, which saves a pass over the wide buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from luthier.core.errors import LuthierError
from luthier.core.protocols import Batch, Loss, Outputs
from luthier.functional.logit_rows import STATISTICS, choose
from luthier.tasks.outputs import LogitsOutputs, OverVocabulary, Statistics, layer_of

__all__ = ["Head", "HeadOutputs", "LogitsOutputs"]

# One buffer's size: large enough for full speed of the products, small beside a model. On an accelerator more rows are
# needed to fill it.
_BUFFER_BYTES = {"cpu": 64 << 20}
_BUFFER_BYTES_ELSEWHERE = 512 << 20
# Up to here the buffers of all chunks are kept for the backward pass instead of being computed again.
_KEEP_BYTES = {"cpu": 256 << 20}
_KEEP_BYTES_ELSEWHERE = 2 << 30


class Head:
    """The last linear layer, its options, and how it is walked.

    Args:
        weight_VH: the output embedding (it may be tied, or itself the result of a computation with a graph).
        bias_V: its bias, if there is one.
        scale: the logits are multiplied by it (Cohere, Granite).
        softcap: the logits become ``softcap * tanh(logits / softcap)`` after the scale (Gemma 2).
        chunk: most positions per chunk; by default as many as fill the buffer.
        backend: ``auto``, ``torch``, ``liger`` or ``triton``.

    The products run in the type autocast asks for, else in the lower of the types of hidden states and weight.
    """

    def __init__(
        self,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None = None,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        chunk: int | None = None,
        backend: str = "auto",
    ) -> None:
        self.weight_VH, self.bias_V = weight_VH, bias_V
        self.scale, self.softcap, self.chunk = float(scale), softcap, chunk
        self.normalise = choose(backend, weight_VH.device)

    def outputs(
        self,
        hidden_NH: torch.Tensor,
        target_N: torch.Tensor,
        sequence_N: torch.Tensor,
        *,
        statistics: Sequence[str] = ("logp",),
        layers: Callable[[int], torch.Tensor] | None = None,
    ) -> HeadOutputs:
        """Lazy outputs at N positions.

        Args:
            hidden_NH: hidden states after the final norm, at the supervised positions.
            target_N: int64 target of each.
            sequence_N: int64, which example of the batch each belongs to.
            statistics: computed together at the first use of any; others cost a pass of their own.
            layers: ``layers(l) -> [N, H]`` for hidden states of other layers.
        """
        return HeadOutputs(self, hidden_NH, target_N, sequence_N, tuple(statistics), layers)

    def positionwise(
        self,
        hidden_NH: torch.Tensor,
        batch: Batch,
        objective_loss: Callable[[Outputs, Batch], Loss],
        *,
        statistics: Sequence[str] = ("logp",),
    ) -> Loss:
        """The loss of an objective that is a sum over positions, its gradient formed in the same pass.

        Args:
            hidden_NH: hidden states after the final norm, at the batch's supervised positions.
            batch: the micro-batch; the objective sees it cut to each chunk's positions.
            objective_loss: called once per chunk (once with no positions when N = 0); its sum, weight and metrics
                are added. It may depend on trained tensors only through its ``Outputs``.
            statistics: what it reads.

        Returns:
            The loss, whose sum has a graph to the hidden states and the weight where these require gradients.

        Raises:
            LuthierError: the loss has a graph to something else, so a gradient would be lost.
        """
        trained = (hidden_NH, self.weight_VH, self.bias_V)
        walk = _Walk(self, *trained, _wanted(*trained))
        total: Loss | None = None
        with torch.no_grad(), torch.autocast(hidden_NH.device.type, enabled=False):
            buffer = walk.buffer(walk.size)
            for part in walk.parts():
                rows = part.stop - part.start
                whole = rows == walk.rows
                cut = batch if whole else batch.positions(torch.arange(part.start, part.stop, device=hidden_NH.device))
                chunk = _ChunkOutputs(walk, part, cut, buffer[:rows], tuple(statistics))
                with torch.set_grad_enabled(walk.wanted):
                    loss = objective_loss(chunk, cut)
                if loss.sum.requires_grad:
                    _refuse_other_leaves(loss.sum, chunk.leaves())
                    chunk.backward(loss.sum)
                total = _added(total, loss)
        assert total is not None
        if walk.wanted:
            total.sum = _Attach.apply(*trained, total.sum, *walk.gradients())
        return total


class HeadOutputs(Statistics):
    """Outputs over a head, computed on use; implements ``core.protocols.Outputs``."""

    def __init__(
        self,
        head: Head,
        hidden_NH: torch.Tensor,
        target_N: torch.Tensor,
        sequence_N: torch.Tensor,
        statistics: tuple[str, ...],
        layers: Callable[[int], torch.Tensor] | None,
    ) -> None:
        self.head, self.hidden_NH, self.target_N, self.sequence_N = head, hidden_NH, target_N, sequence_N
        self._declared, self._layers = statistics, layers
        self._trained = (hidden_NH, head.weight_VH, head.bias_V)
        # Settled here, because a statistic may be read where the gradient mode is another.
        self._needs = _wanted(*self._trained)
        self._found: dict[str, torch.Tensor] = {}

    def statistic(self, name: str) -> torch.Tensor:
        """[N], together with the declared ones that are not there yet."""
        if name not in self._found:
            names = tuple(n for n in STATISTICS if n not in self._found and (n == name or n in self._declared))
            needs = self._needs if "logp" in names else (False, False, False)
            with torch.set_grad_enabled(any(needs)):
                values = _Normalised.apply(*self._trained, self.target_N, self.head, names, needs)
            self._found.update(zip(names, values, strict=True))
        return self._found[name]

    def hidden(self, layer: int = -1) -> torch.Tensor:
        """[N, H] hidden states; -1 is the last layer, after the final norm."""
        return self.hidden_NH if layer == -1 else layer_of(self._layers, layer)

    def over_vocabulary(self, fn: OverVocabulary) -> torch.Tensor:
        """``fn(logits_CV, index_C)`` chunk by chunk, joined to N; logits are float32.

        In the backward pass they are computed again, unless those of all chunks are small.
        """
        head, hidden_NH = self.head, self.hidden_NH
        walk = _Walk(head, *self._trained, self._needs)
        graph = walk.wanted and torch.is_grad_enabled()

        def of_chunk(hidden_CH: torch.Tensor, index_C: torch.Tensor) -> torch.Tensor:
            # The weight is cast within, so that its gradient is gathered over the chunks in its own type.
            bias = None if head.bias_V is None else head.bias_V.to(walk.kind)
            logits = torch.nn.functional.linear(walk.narrow(hidden_CH), head.weight_VH.to(walk.kind), bias).to(
                walk.wide
            )
            return fn(logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap), index_C)

        pieces = []
        with torch.set_grad_enabled(graph), torch.autocast(hidden_NH.device.type, enabled=False):
            for part in walk.parts():
                index_C = torch.arange(part.start, part.stop, device=hidden_NH.device)
                if graph and not walk.keep:
                    pieces.append(checkpoint(of_chunk, hidden_NH[part], index_C, use_reentrant=False))
                else:
                    pieces.append(of_chunk(hidden_NH[part], index_C))
        return torch.cat(pieces)


def _added(total: Loss | None, loss: Loss) -> Loss:
    """The sum of two losses without their graphs."""
    weight = loss.weight.detach() if isinstance(loss.weight, torch.Tensor) else loss.weight
    if total is None:
        return Loss(loss.sum.detach(), weight, loss.unit, dict(loss.metrics))
    metrics = dict(total.metrics)
    for name, (value, count) in loss.metrics.items():
        before = metrics.get(name, (0.0, 0.0))
        metrics[name] = (before[0] + value, before[1] + count)
    return Loss(total.sum + loss.sum.detach(), total.weight + weight, loss.unit, metrics)


def _refuse_other_leaves(value: torch.Tensor, leaves: Sequence[torch.Tensor]) -> None:
    """Raise where the graph of ``value`` ends in a tensor that is not one of ``leaves``."""
    seen: set[Any] = set()
    open_nodes = [value.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and not any(variable is leaf for leaf in leaves):
            raise LuthierError(
                "an objective that declares positionwise=True may depend on trained tensors only through the Outputs "
                f"it is given, but its loss has a graph to a tensor of shape {tuple(variable.shape)}: declare "
                "positionwise=False, or detach it"
            )
        open_nodes.extend(parent for parent, _ in node.next_functions)


def _wanted(*tensors: torch.Tensor | None) -> tuple[bool, ...]:
    """Which of hidden states, weight and bias need a gradient."""
    return tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors)


def _product_type(hidden_NH: torch.Tensor, weight_VH: torch.Tensor) -> torch.dtype:
    device = hidden_NH.device.type
    kinds = {hidden_NH.dtype, weight_VH.dtype}
    if torch.is_autocast_enabled(device) and torch.float64 not in kinds:
        return torch.get_autocast_dtype(device)
    low = kinds & {torch.bfloat16, torch.float16}
    return low.pop() if low else torch.promote_types(hidden_NH.dtype, weight_VH.dtype)


class _Walk:
    """One pass over N positions: the buffer, the products, and the gradients gathered so far.

    Args:
        head: the options.
        hidden_NH: hidden states; cast and scaled once.
        weight_VH, bias_V: of the head; cast once.
        needs: which gradients to gather, of hidden states, weight and bias.
        kind: the type of the products; by default as the types and autocast say.
    """

    def __init__(
        self,
        head: Head,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        needs: Sequence[bool],
        kind: torch.dtype | None = None,
    ) -> None:
        device = hidden_NH.device
        self.kind = kind or _product_type(hidden_NH, weight_VH)
        # The type gradients are gathered in.
        self.wide = torch.float64 if self.kind == torch.float64 else torch.float32
        self.head, self.rows = head, hidden_NH.shape[0]
        self.hidden_NH, self.weight_VH, self.bias_V = hidden_NH.detach(), weight_VH.detach(), bias_V
        self.needs, self.wanted = tuple(needs), any(needs)
        self.w = self.weight_VH.to(self.kind)
        self.b = None if bias_V is None else bias_V.detach().to(self.kind)
        self.x = self.narrow(self.hidden_NH)
        row_bytes = self.w.shape[0] * self.kind.itemsize
        limit = head.chunk or max(1, _BUFFER_BYTES.get(device.type, _BUFFER_BYTES_ELSEWHERE) // row_bytes)
        # Chunks of one size, rather than full ones and a short rest that the products handle badly.
        self.size = -(-self.rows // -(-self.rows // limit)) if self.rows else 0
        self.keep = self.rows * row_bytes <= _KEEP_BYTES.get(device.type, _KEEP_BYTES_ELSEWHERE)
        self.d_hidden: torch.Tensor | None = None
        self.d_weight: torch.Tensor | None = None
        self.d_bias: torch.Tensor | None = None
        self.slope: torch.Tensor | None = None

    def narrow(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states as the product takes them."""
        return (hidden if self.head.scale == 1.0 else hidden * self.head.scale).to(self.kind)

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
        if self.head.softcap is not None:
            out.div_(self.head.softcap).tanh_()
            if self.wanted:
                self.slope = (1 - out.to(self.wide).square()).to(self.kind)
            out.mul_(self.head.softcap)
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
            self.add_hidden(part, d_hidden.mul_(self.head.scale))

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


class _ChunkOutputs(Statistics):
    """Outputs of one chunk of a positionwise walk; what the objective takes from it are leaves of a small graph."""

    def __init__(self, walk: _Walk, part: slice, batch: Batch, buffer_CV: torch.Tensor, names: Sequence[str]) -> None:
        self.target_N, self.sequence_N = batch.target_N, batch.sequence_N
        self._walk, self._part, self._buffer, self._declared = walk, part, buffer_CV, names
        self._holds = ""
        self._found: dict[str, torch.Tensor] = {}
        self._logits: torch.Tensor | None = None
        self._hidden: torch.Tensor | None = None

    def _raw(self) -> torch.Tensor:
        """The logits: in the buffer, or beside it once the buffer holds the gradient."""
        if self._holds == "logits":
            return self._buffer
        out = self._walk.buffer(len(self._buffer)) if self._holds else self._buffer
        self._holds = self._holds or "logits"
        return self._walk.logits(self._walk.x[self._part], out)

    @torch.no_grad()
    def statistic(self, name: str) -> torch.Tensor:
        if name not in self._found:
            walk = self._walk
            names = [n for n in STATISTICS if n not in self._found and (n == name or n in self._declared)]
            form = walk.wanted and "logp" in names
            self._found.update(walk.head.normalise(self._raw(), self.target_N, names, form))
            if form:
                walk.capped_(self._buffer)
                self._holds = "gradient"
                self._found["logp"].requires_grad_()
        return self._found[name]

    def hidden(self, layer: int = -1) -> torch.Tensor:
        if layer != -1:
            raise LuthierError(f"a positionwise objective cannot read layer {layer}: declare positionwise=False")
        if self._hidden is None:
            self._hidden = self._walk.hidden_NH[self._part].clone().requires_grad_(self._walk.needs[0])
        return self._hidden

    def over_vocabulary(self, fn: OverVocabulary) -> torch.Tensor:
        if self._logits is None:
            with torch.no_grad():
                self._logits = self._raw().to(self._walk.wide, copy=True)
            self._logits.requires_grad_(self._walk.wanted)
        return fn(self._logits, torch.arange(len(self._logits), device=self._logits.device))

    def leaves(self) -> list[torch.Tensor]:
        candidates = (self._found.get("logp"), self._logits, self._hidden)
        return [t for t in candidates if t is not None and t.requires_grad]

    def backward(self, value: torch.Tensor) -> None:
        """Form the gradients of a scalar made from this chunk's outputs and give them to the walk."""
        leaves = self.leaves()
        found = dict(zip(map(id, leaves), torch.autograd.grad(value, leaves, allow_unused=True), strict=True))
        d_logp, d_logits, d_hidden = (found.get(id(t)) for t in (self._found.get("logp"), self._logits, self._hidden))
        walk, buffer = self._walk, self._buffer
        if d_hidden is not None:
            walk.add_hidden(self._part, d_hidden)
        if d_logits is not None:
            direct = walk.capped_(d_logits.to(walk.kind, copy=True))
            if d_logp is not None:
                direct.add_(buffer.mul_(-d_logp[:, None]))
            walk.add(self._part, direct, None)
        elif d_logp is not None:
            walk.add(self._part, buffer, -d_logp)


class _Attach(torch.autograd.Function):
    """A value whose gradients were formed together with it."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, value: torch.Tensor, *gradients: Any) -> torch.Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        if ctx.gradients is None:
            raise LuthierError("the gradient of a positionwise loss was formed with it and can be used once only")
        (value,), gradients, ctx.gradients = upstream, ctx.gradients, None
        if value.device.type != "cpu" or value != 1:  # elsewhere the comparison would wait for the device
            gradients = [None if g is None else g.mul_(value) for g in gradients]
        return (*gradients, None, None, None, None)


class _Normalised(torch.autograd.Function):
    """Statistics over all N positions, of which logp has a gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Any, weight: Any, bias: Any, target_N: Any, head: Head, names: Any, needs: Any
    ) -> tuple[torch.Tensor, ...]:
        walk = _Walk(head, hidden, weight, bias, needs)
        keep = walk.wanted and walk.keep
        buffer = walk.buffer(walk.rows if keep else walk.size)
        found = []
        for part in walk.parts():
            logits = walk.logits(walk.x[part], buffer[part] if keep else buffer[: part.stop - part.start])
            found.append(head.normalise(logits, target_N[part], names, keep))
            if keep:
                walk.capped_(logits)
        ctx.head, ctx.names, ctx.kind = head, names, walk.kind
        ctx.save_for_backward(hidden, weight, bias, target_N, buffer if keep else None)
        values = tuple(torch.cat([f[n] for f in found]) for n in names)
        ctx.mark_non_differentiable(*(v for n, v in zip(names, values, strict=True) if n != "logp"))
        return values

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        hidden, weight, bias, target_N, kept = ctx.saved_tensors
        walk = _Walk(ctx.head, hidden, weight, bias, ctx.needs_input_grad[:3], ctx.kind)
        buffer = walk.buffer(0 if kept is not None else walk.size)
        factor_N = -upstream[ctx.names.index("logp")]
        for part in walk.parts():
            if kept is not None:
                d_CV = kept[part]
            else:
                d_CV = walk.logits(walk.x[part], buffer[: part.stop - part.start])
                ctx.head.normalise(d_CV, target_N[part], (), True)
                walk.capped_(d_CV)
            walk.add(part, d_CV, factor_N[part])
        return (*walk.gradients(), None, None, None, None)
