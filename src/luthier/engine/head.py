"""The log-probability head: from hidden states at the supervised positions to statistics, without N x V logits.

Logits exist for a chunk of C positions at a time, in one buffer that every chunk reuses. Three ways through it:

- ``positionwise``: the loss is a sum over positions, so each chunk's gradient is formed in the buffer while its logits
  are there. Three matrix products: logits, d hidden, d weight.
- ``outputs`` with a graph: the loss may join positions. The buffer is kept for the backward pass where it is small
  (three products) and computed again where it is not (four).
- ``outputs`` without a graph: one product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from luthier.core.errors import LuthierError
from luthier.core.protocols import Batch, Loss, Outputs
from luthier.functional.chunked_projection import Attach, Normalised, Walk, wanted
from luthier.functional.logit_rows import STATISTICS, choose
from luthier.tasks.outputs import LogitsOutputs, OverVocabulary, Statistics, layer_of

__all__ = ["Head", "HeadOutputs", "LogitsOutputs"]


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
        walk = Walk(self, *trained, wanted(*trained))
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
            total.sum = Attach.apply(*trained, total.sum, *walk.gradients())
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
        self._needs = wanted(*self._trained)
        self._found: dict[str, torch.Tensor] = {}

    def statistic(self, name: str) -> torch.Tensor:
        """[N], together with the declared ones that are not there yet."""
        if name not in self._found:
            names = tuple(n for n in STATISTICS if n not in self._found and (n == name or n in self._declared))
            needs = self._needs if "logp" in names else (False, False, False)
            with torch.set_grad_enabled(any(needs)):
                values = Normalised.apply(*self._trained, self.target_N, self.head, names, needs)
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
        walk = Walk(head, *self._trained, self._needs)
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
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


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


class _ChunkOutputs(Statistics):
    """Outputs of one chunk of a positionwise walk; what the objective takes from it are leaves of a small graph."""

    def __init__(self, walk: Walk, part: slice, batch: Batch, buffer_CV: torch.Tensor, names: Sequence[str]) -> None:
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
            self._found.update(walk.options.normalise(self._raw(), self.target_N, names, form))
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
            direct = walk.capped_(d_logits.to(walk.kind, copy=walk.slope is not None))
            if d_logp is not None:  # into the buffer: one pass over it, and nothing of its size is made
                direct = torch.addcmul(direct, buffer, -d_logp[:, None], out=buffer)
            walk.add(self._part, direct, None)
        elif d_logp is not None:
            walk.add(self._part, buffer, -d_logp)
