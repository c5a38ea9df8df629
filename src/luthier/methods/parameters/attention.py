"""Attention-only training: the query, key, value and output projections of every block, and nothing else.

    theta <- theta - step(M * grad L(theta)),   M = 1 on the attention projections, 0 elsewhere

Embeddings, feed-forward layers, norms and the language-model head stay bit-identical; a projection's bias goes with its
matrix, and a new classification head is trained too. Projections are known by their place in the block, not by their
last name (GPT-2 calls the output of its feed-forward layer ``c_proj`` as well); a fused query-key-value matrix is one
projection. A matrix that holds attention and feed-forward weights in one is refused.

Meant for learning a language that the base has met: neurons that belong to one language concentrate in attention. For a
language it has hardly met, train everything.

Source: the parameters of "Cross-Lingual Optimization for Language Transfer in Large Language Models", ACL 2025, arXiv
2505.14297.

Example::

    parameters: [attention]
"""

from __future__ import annotations

import re
from typing import Any

import torch

from luthier.core.errors import UserError
from luthier.core.protocols import Context
from luthier.core.registry import parameters
from luthier.functional.adapters import heads, linear_modules
from luthier.functional.tensor_selection import Unit, block_units

_FEED_FORWARD = re.compile(r"mlp|ffn?(_|\d|$)|feed_?forward|gate|up_proj", re.IGNORECASE)
_ATTENDS = re.compile(r"attn|attention|qkv|(^|_)[qkv](_|$)", re.IGNORECASE)


@parameters(
    "attention",
    conflicts={
        "parameters:full": "full trains every tensor; name one of the two",
        "parameters:half-ft": "both claim attention matrices; name one of the two",
        "parameters:lora": "lora freezes the base; for an adapter on attention alone give lora target_modules",
    },
    paper="Cross-Lingual Optimization for Language Transfer in Large Language Models, ACL 2025, arXiv 2505.14297",
)
class AttentionOnly:
    """Attention-only training: the query, key, value and output projections of every block, all else frozen."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._share = 0.0

    def apply(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Open the projections, and a new classification head.

        Raises:
            UserError: the model has no recognisable attention, or attention and feed-forward weights in one matrix.
        """
        chosen = set(projections(model))
        if str(getattr(ctx.task, "name", ctx.task)) != "causal-lm":
            chosen |= {name for name, _ in model.named_parameters() if name.split(".")[0] in heads(model)}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        self._names = sorted(chosen)
        self._share = sum(p.numel() for p in model.parameters() if p.requires_grad) / sum(
            p.numel() for p in model.parameters()
        )
        return model

    def groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """One group of what was opened."""
        return [{"params": [p for p in model.parameters() if p.requires_grad]}]

    def on_grad(self, model: torch.nn.Module, ctx: Context) -> None:
        """Nothing to do."""

    def on_step(self, model: torch.nn.Module, ctx: Context) -> None:
        """Log the trained share."""
        ctx.log(trainable_share=self._share)

    def state(self) -> dict[str, Any]:
        """No state beside the weights."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def export(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model itself."""
        return model

    def record(self) -> dict[str, Any]:
        """For the run's ``methods.json``: the tensors that are trained, and their share of all elements."""
        return {"tensors": self._names, "trainable_share": self._share}


def projections(model: torch.nn.Module) -> list[str]:
    """Names of the weights and biases of the attention projections of all blocks.

    Raises:
        UserError: there are none, or a matrix holds attention and feed-forward weights.
    """
    units = block_units({name: tuple(p.shape) for name, p in model.named_parameters()})
    # Tables of position biases lie in attention modules too, and are no projections.
    maps = set(linear_modules(model))
    packed = [path for path, module in model.named_modules() if isinstance(module, torch.nn.MultiheadAttention)]
    attention = [u for u in units if u.category == "attention" and (u.name in maps or _inside(u.name, packed))]
    if not attention:
        raise UserError(
            f"attention: found no attention projections in transformer blocks of {type(model).__name__}. Use 'full'."
        )
    for unit in units:
        if unit.category in ("attention", "ffn"):
            last = unit.name.rpartition(".")[2]
            if _FEED_FORWARD.search(last) and _ATTENDS.search(last):
                _refuse(unit)
    with_own = {unit.layer for unit in units if unit.category == "ffn"}
    for unit in attention:
        if unit.layer not in with_own:
            _refuse(unit)
    found = [name for unit in attention for name in unit.tensors]
    # The packed matrix of torch's own attention is a tensor of the module and not of a linear map in it.
    found += [n for n, _ in model.named_parameters() if _inside(n, packed) and n.rpartition(".")[2] == "in_proj_bias"]
    return sorted(set(found))


def _inside(name: str, modules: list[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in modules)


def _refuse(unit: Unit) -> None:
    raise UserError(
        f"attention: in its block, '{unit.name}' holds attention and feed-forward weights in one matrix, so attention "
        "alone cannot be trained. Use 'full' or 'lora'."
    )
