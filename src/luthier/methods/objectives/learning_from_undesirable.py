"""Learning from the undesirable: stay close to a twin of the model that took one step towards a worse loss.

    phi    = alpha * g / ||g||_2,   g = gradient of L(theta + phi) at phi = 0              a step of gradient ascent
    L_cons = 1/(T K) sum_t sum_l || sg(h_lt) - h'_lt ||^2                                  mean over the rows
    loss   = L(theta) + consistency_weight * L_cons

``theta`` are the trained weights. ``phi`` is a temporary addition to the model, new at each step and never saved:
``lora`` adds ``B_l A_l`` to the linear maps of every block (A random, B zero, so only B moves), ``steer`` a vector
``d_l`` [H] to the output of every block. ``h_lt`` [H] is the hidden state of token t behind block l of K, before the
final norm, ``h'_lt`` that of the twin theta + phi with phi constant; T counts the tokens of a row, prompt and response,
without padding. ``sg`` stops the gradient: the twin's states are pulled to the model's, never the reverse. ``L`` is
plain SFT or any other objective (``base_objective``).

Both passes see the same dropout. With ``twin_per: batch`` each micro-batch (and each rank) has its own twin, as in the
paper, so accumulation changes the numbers; with ``twin_per: example`` each row has its own and it does not.
``fused`` takes g from the same backward pass as the gradient of L; otherwise g has a backward pass of its own.

Paper: "Learning from the Undesirable: Robust Adaptation of Language Models without Forgetting", AAAI 2026, arXiv
2511.13052. Step length and weight are not known from the paper; the defaults here are this library's.

Example::

    objective:
      learning-from-undesirable: {aux: lora, alpha: 0.1, consistency_weight: 0.1}
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core import registry
from luthier.core.errors import LuthierError, UserError, did_you_mean
from luthier.core.protocols import Batch, Context, Loss, Needs, Outputs
from luthier.core.registry import objective
from luthier.functional.representation_shift import normalised_step, row_distance, row_mean, with_gradients

SLUG = "learning-from-undesirable"
HOOKS = ("prepare_model", "prepare", "finish_model", "state", "load")


@dataclass(frozen=True)
class Places:
    """Where a model takes additions: its blocks, and the linear maps in each with the number of their block."""

    blocks: tuple[torch.nn.Module, ...]
    maps: tuple[tuple[int, torch.nn.Module], ...]


def places(model: Any, targets: Sequence[str] | None = None) -> Places:
    """The blocks of a model, beneath adapters, and their linear maps (an adapted map counts as one).

    Raises:
        UserError: an encoder-decoder, a model without a list of blocks, or a target that no linear map is called.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(base).__name__
    if getattr(base.config, "is_encoder_decoder", False):
        raise UserError(f"{SLUG}: {name} is an encoder-decoder, which it does not cover; use a decoder or an encoder.")
    lists = [(n.count("."), -len(m), n) for n, m in base.named_modules() if isinstance(m, torch.nn.ModuleList)]
    if not lists:
        raise UserError(f"{SLUG}: {name} has no list of transformer blocks; use another objective for this model.")
    # The outermost list: experts and the like lie inside the blocks.
    blocks = tuple(base.get_submodule(min(lists)[2]))
    found = [(number, path, m) for number, block in enumerate(blocks) for path, m in _linear_maps(block)]
    known = sorted({path.rpartition(".")[2] for _, path, _ in found})
    for target in targets or ():
        if not any(f".{path}".endswith(f".{target}") for _, path, _ in found):
            raise UserError(
                f"{SLUG}: aux_targets: no linear map of the blocks is called '{target}'.{did_you_mean(target, known)} "
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

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The output with the addition."""
        if self.down is None:
            return out + self.up.to(out.dtype)
        low = torch.nn.functional.linear(x.to(self.down.dtype), self.down)
        if len(self.up) == 1:
            added = torch.nn.functional.linear(low, self.up[0])
        else:
            added = low @ self.up.transpose(1, 2)
        return out + (self.scale * added).to(out.dtype)


@dataclass
class Seen:
    """A forward pass of the model with additions of zero.

    Attributes:
        inputs: the tensors the model was given.
        dropout: state of the random generators at its start, on the CPU and on the model's device.
        noise: the random stream of A.
        states: hidden states [B, T, H] behind each block.
        additions: by module.
    """

    inputs: list[torch.Tensor]
    dropout: tuple[torch.Tensor, torch.Tensor | None]
    noise: torch.Generator
    states: list[torch.Tensor] = field(default_factory=list)
    additions: dict[int, Addition] = field(default_factory=dict)


@contextmanager
def hooked(
    where: Places, add: Callable[[int, int, bool, Any, Any], Any] | None, see: Callable[[torch.Tensor], None]
) -> Iterator[None]:
    """Within the block, additions are on and hidden states are seen; the hooks go even if a pass fails.

    Args:
        where: blocks and linear maps.
        add: ``add(key, block, is_block, x, out)`` gives the changed output of a place.
        see: receives what leaves each block.
    """

    def on_block(number: int, module: Any, inputs: Any, out: Any) -> Any:
        state = out[0] if isinstance(out, tuple) else out
        if add is not None:
            state = add(id(module), number, True, None, state)
        see(state)
        return (state, *out[1:]) if isinstance(out, tuple) else state

    def on_map(number: int, module: Any, inputs: Any, out: Any) -> Any:
        assert add is not None
        return add(id(module), number, False, inputs[0], out)

    with ExitStack() as stack:
        for number, block in enumerate(where.blocks):
            stack.callback(block.register_forward_hook(partial(on_block, number)).remove)
        for number, linear in where.maps:
            stack.callback(linear.register_forward_hook(partial(on_map, number)).remove)
        yield
