"""Full fine-tuning: every tensor of the model is trained.

    theta <- theta - step(grad L(theta))   for all of theta

The reference every other parameter space is compared with.

Example::

    parameters: [full]
"""

from __future__ import annotations

from typing import Any

import torch

from luthier.core.protocols import Context
from luthier.core.registry import parameters


@parameters("full", identity={})
class Full:
    """Full fine-tuning: every tensor of the model is trained."""

    def apply(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Open every floating-point tensor."""
        for parameter in model.parameters():
            # Quantised and integer weights cannot carry a gradient.
            parameter.requires_grad_(parameter.is_floating_point())
        return model

    def groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """One group of everything that was opened."""
        return [{"params": [p for p in model.parameters() if p.requires_grad]}]

    def on_grad(self, model: torch.nn.Module, ctx: Context) -> None:
        """Nothing to do."""

    def on_step(self, model: torch.nn.Module, ctx: Context) -> None:
        """Nothing to do."""

    def state(self) -> dict[str, Any]:
        """No state beside the weights."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def export(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model itself."""
        return model
