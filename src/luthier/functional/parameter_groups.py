"""Optimiser groups shared by parameter spaces."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def decay_groups(named: Iterable[tuple[str, torch.nn.Parameter]], lr_scale: float = 1.0) -> list[dict[str, Any]]:
    """Two groups of the trainable tensors: matrices with weight decay; biases, norms and other vectors without.

    Args:
        named: names and tensors of a model; those without ``requires_grad`` are left out.
        lr_scale: factor on the learning rate of both.

    Returns:
        Non-empty groups with ``params`` and ``lr_scale``; the second has ``weight_decay`` 0.
    """
    trained = [p for _, p in named if p.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2]
    vectors = [p for p in trained if p.dim() < 2]
    groups: list[dict[str, Any]] = []
    if matrices:
        groups.append({"params": matrices, "lr_scale": lr_scale})
    if vectors:
        groups.append({"params": vectors, "lr_scale": lr_scale, "weight_decay": 0.0})
    return groups
