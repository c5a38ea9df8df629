"""When a module should keep what it computes for the loss: once per training pass, whatever is done for memory."""

from __future__ import annotations

import torch


def recording(module: torch.nn.Module) -> bool:
    """Whether this is a training pass with gradient, and not its repetition under gradient checkpointing.

    A tensor kept inside a (non-reentrant) checkpoint can be differentiated like any other; torch repeats the forward
    pass while it runs the backward pass, and what is computed then must not be kept a second time.
    """
    repeated = torch._C._current_graph_task_id() != -1
    return module.training and torch.is_grad_enabled() and not repeated
