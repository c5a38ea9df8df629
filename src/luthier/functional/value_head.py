"""A critic on the policy's own trunk: one linear map from a hidden state to a number, zero at the start.

It lives on the model as ``value_head`` during training and is taken away before the model is saved.
"""

from __future__ import annotations

from typing import Any

import torch

from luthier.core.errors import UserError
from luthier.core.protocols import Outputs

NAME = "value_head"


def add(model: Any) -> None:
    """Put a head of zeros on the model."""
    weight = model.get_output_embeddings().weight
    head = torch.nn.Linear(weight.shape[1], 1, device=weight.device, dtype=torch.float32)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    model.add_module(NAME, head)


def remove(model: Any) -> None:
    """Take it away, from beneath adapters too."""
    for part in (model, getattr(model, "get_base_model", lambda: model)()):
        if NAME in dict(part.named_children()):
            delattr(part, NAME)


def of(model: Any) -> torch.nn.Module:
    """The head of a model.

    Raises:
        UserError: it has none.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = getattr(base, NAME, None)
    if head is None:
        raise UserError("rollouts with advantages: gae needs a critic, which the objective 'ppo' brings. Use it.")
    return head


def values(model: Any, out: Outputs, *, frozen: bool = False) -> torch.Tensor:
    """V [N], at the positions that predict the tokens; ``frozen``: no gradient to the hidden states."""
    hidden_NH = out.hidden(-1)
    hidden_NH = hidden_NH.detach() if frozen else hidden_NH
    with torch.autocast(hidden_NH.device.type, enabled=False):
        return of(model)(hidden_NH.float()).squeeze(-1)
