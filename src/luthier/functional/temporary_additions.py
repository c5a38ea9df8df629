"""Temporary additions to the blocks of a transformer, by hooks: nothing is added to the module tree.

An addition is a vector on what leaves a block, or a low-rank product beside a linear map. It lives for one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from luthier.core.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Places:
    """Where a model takes additions: its blocks, and the linear maps in each with the number of their block."""

    blocks: tuple[torch.nn.Module, ...]
    maps: tuple[tuple[int, torch.nn.Module], ...]


def places(model: Any, targets: Sequence[str] | None = None, *, who: str) -> Places:
    """The blocks of a model, beneath adapters, and their linear maps (an adapted map counts as one).

    Args:
        model: a transformers model, or one with adapters around it.
        targets: ends of the names of the linear maps wanted; all when absent.
        who: the method that asks, for its errors.

    Raises:
        UserError: an encoder-decoder, a model without a list of blocks, or a target that no linear map is called.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(base).__name__
    if getattr(base.config, "is_encoder_decoder", False):
        raise UserError(
            f"{who}: {name} is an encoder-decoder, and additions cover one stack only; use a decoder or an encoder."
        )
    lists = [(n.count("."), -len(m), n) for n, m in base.named_modules() if isinstance(m, torch.nn.ModuleList)]
    if not lists:
        raise UserError(f"{who}: {name} has no list of transformer blocks; use another method for this model.")
    # The outermost list: experts and the like lie inside the blocks.
    blocks = tuple(base.get_submodule(min(lists)[2]))
    found = [(number, path, m) for number, block in enumerate(blocks) for path, m in _linear_maps(block)]
    known = sorted({path.rpartition(".")[2] for _, path, _ in found})
    for target in targets or ():
        if not any(f".{path}".endswith(f".{target}") for _, path, _ in found):
            raise UserError(
                f"{who}: no linear map of the blocks is called '{target}'.{did_you_mean(target, known)} "
                f"This model has: {', '.join(known)}."
            )
    wanted = [
        (number, module)
        for number, path, module in found
        if targets is None or any(f".{path}".endswith(f".{t}") for t in targets)
    ]
    return Places(blocks, tuple(wanted))


def _linear_maps(module: torch.nn.Module, path: str = "") -> Iterator[tuple[str, torch.nn.Module]]:
    for name, child in module.named_children():
        inside = f"{path}.{name}" if path else name
        # peft keeps the map it wraps as `base_layer`; the wrapper is the map that counts.
        if isinstance(child, torch.nn.Linear) or type(child).__name__ == "Conv1D" or hasattr(child, "base_layer"):
            yield inside, child
        else:
            yield from _linear_maps(child, inside)


@dataclass
class Addition:
    """What is added at one place: ``up`` [S, 1, H] to a block's output, or ``scale * up @ down`` to a linear map.

    Attributes:
        block: the number of its block.
        up: the part that moves: a vector, or B [S, out, r]; S = 1, or one for each row of the batch.
        down: A [r, in], or None for a vector.
        scale: factor on the low-rank product.
    """

    block: int
    up: torch.Tensor
    down: torch.Tensor | None = None
    scale: float = 1.0

    def __call__(self, x: Any, out: torch.Tensor) -> torch.Tensor:
        """The output with the addition."""
        if self.down is None:
            return out + self.up.to(out.dtype)
        low = torch.nn.functional.linear(x.to(self.down.dtype), self.down)
        if len(self.up) == 1:
            added = torch.nn.functional.linear(low, self.up[0])
        else:
            added = low @ self.up.transpose(1, 2)
        return torch.add(out, added.to(out.dtype), alpha=self.scale)

    def probe(self, x: Any, out: torch.Tensor) -> torch.Tensor:
        """The output as it is, with the gradient of ``up`` that an addition with ``up = 0`` has there.

        A low-rank product of zeros is not computed: it would take several tensors of the size of ``out``.
        """
        if self.down is None or not self.up.requires_grad or out._is_view():
            return self(x, out)
        with torch.no_grad():
            low = torch.nn.functional.linear(x.to(self.down.dtype), self.down)
        probed: torch.Tensor = _probe().apply(out, self.up, low, self.scale)
        return probed


@cache
def _probe() -> Any:
    # Made on first use: as a class of the module it would load torch as soon as a method of the registry is looked at.
    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, out: torch.Tensor, up: torch.Tensor, low: torch.Tensor, scale: float) -> torch.Tensor:
            ctx.save_for_backward(low)
            ctx.twins, ctx.scale = len(up), scale
            ctx.mark_dirty(out)  # returned as it is and not as a view, so that the model may change it in place
            return out

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            (d_out,), (low,) = upstream, ctx.saved_tensors
            d_wide = d_out.to(low.dtype) if ctx.scale == 1 else d_out.to(low.dtype) * ctx.scale
            if ctx.twins == 1:
                d_up = (d_wide.flatten(0, -2).t() @ low.flatten(0, -2))[None]
            else:
                d_up = d_wide.transpose(1, 2) @ low
            return d_out, d_up, None, None

    return Probe


@contextmanager
def hooked(
    where: Places, add: Callable[[int, int, Any, torch.Tensor], torch.Tensor], see: Callable[[torch.Tensor], None]
) -> Iterator[None]:
    """While it is open additions are on and hidden states are seen; the hooks go even if a pass fails.

    Args:
        where: blocks and linear maps.
        add: ``add(key, block, x, out)`` gives the output of a place with its addition; x is None for a whole block.
        see: receives what leaves each block, with the addition.
    """

    def on_block(number: int, module: Any, inputs: Any, out: Any) -> Any:
        state = add(id(module), number, None, out[0] if isinstance(out, tuple) else out)
        see(state)
        return (state, *out[1:]) if isinstance(out, tuple) else state

    def on_map(number: int, module: Any, inputs: Any, out: Any) -> Any:
        return add(id(module), number, inputs[0], out)

    with ExitStack() as stack:
        for number, block in enumerate(where.blocks):
            stack.callback(block.register_forward_hook(partial(on_block, number)).remove)
        for number, linear in where.maps:
            stack.callback(linear.register_forward_hook(partial(on_map, number)).remove)
        yield
