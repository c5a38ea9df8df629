"""Tied embeddings: one tensor that is the input embedding and the output matrix at once."""

from __future__ import annotations

from typing import Any

import torch


def is_tied(model: Any) -> bool:
    """Whether input and output embedding of a model are one tensor."""
    if not hasattr(model, "get_output_embeddings"):
        return False
    pair = (model.get_input_embeddings(), model.get_output_embeddings())
    return all(getattr(m, "weight", None) is not None for m in pair) and pair[0].weight is pair[1].weight


def untie(model: Any) -> bool:
    """Give the output embedding a copy of its own, in place; False where the two are two already."""
    if not is_tied(model):
        return False
    output = model.get_output_embeddings()
    output.weight = torch.nn.Parameter(output.weight.detach().clone(), requires_grad=output.weight.requires_grad)
    if hasattr(model.config, "get_text_config"):
        model.config.get_text_config().tie_word_embeddings = False
    model.config.tie_word_embeddings = False
    return True
