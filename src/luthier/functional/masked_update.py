"""Optimisation of part of the entries of tensors: what is held stays bit-identical under any optimiser.

    grad <- grad * mask                                   before clipping, so that held entries do not shrink the step
    theta <- where(mask, optimiser(theta), theta before)  decoupled weight decay and old momentum move held entries too

Where the mask changes, entries that come in must start with fresh moments: :func:`forget` clears the optimiser's state
of the entries outside the mask. Whole tensors that come and go are opened and closed (``requires_grad``); the engine
then rebuilds the optimiser.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from luthier.core.errors import UserError


class MaskedUpdate:
    """Masks over parameters, by name.

    Args:
        masks: bool tensors that broadcast over their parameter; true where it is trained.
        held: values that held entries have, where they are known; otherwise they are remembered at each step.
        who: the method, for errors.
    """

    def __init__(
        self, masks: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor] | None = None, *, who: str = ""
    ) -> None:
        self.masks, self.who = dict(masks), who
        self._known = dict(held or {})
        self._before: dict[str, torch.Tensor] = {}

    def on_grad(self, model: torch.nn.Module) -> None:
        """Clear the gradient of held entries; call before clipping."""
        for name, parameter in self._named(model):
            if parameter.grad is None:
                continue
            if hasattr(parameter, "device_mesh"):
                raise UserError(
                    f"{self.who}: parts of a tensor cannot be held under training.sharding: fsdp2; use sharding: ddp."
                )
            parameter.grad.mul_(self.mask(name, parameter))
            if name not in self._known:
                self._before[name] = parameter.detach().clone()

    def on_step(self, model: torch.nn.Module) -> None:
        """Put held entries back after the optimiser's step."""
        with torch.no_grad():
            for name, parameter in self._named(model):
                before = self._known[name] if name in self._known else self._before.pop(name, None)
                if before is not None:
                    parameter.copy_(torch.where(self.mask(name, parameter), parameter, before.to(parameter)))

    def mask(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """The mask of a parameter, on its device."""
        self.masks[name] = self.masks[name].to(parameter.device)
        return self.masks[name]

    def _named(self, model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
        return [(n, p) for n, p in model.named_parameters() if n in self.masks] if self.masks else []


def forget(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, mask: torch.Tensor) -> None:
    """Clear what the optimiser remembers of the entries outside the mask.

    Args:
        optimizer: its state of the parameter may hold tensors of the parameter's shape (moments); others stay.
        parameter: the parameter.
        mask: bool, broadcasting over it; true where it is trained.
    """
    kept: dict[str, Any] = optimizer.state.get(parameter, {})
    for value in kept.values():
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
            value.mul_(mask.to(value.device))


def top_k_mask(
    change: Mapping[str, torch.Tensor], k: int, taken: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Masks of exactly the ``k`` largest entries over all tensors together, beside those already taken.

    Ties go to the first tensor (in the order given) and the lowest flat index, so the result does not depend on how a
    sort treats equal values.

    Args:
        change: name -> non-negative values; NaN is refused.
        k: entries to choose.
        taken: masks of entries that are chosen already and not chosen again.

    Raises:
        ValueError: more than there are, or a value that is not a number.
    """
    masks = {
        n: torch.zeros(t.shape, dtype=torch.bool) if taken is None else taken[n].clone() for n, t in change.items()
    }
    free = sum(int((~m).sum()) for m in masks.values())
    if not 0 <= k <= free:
        raise ValueError(f"{k} entries cannot be chosen from {free}")
    if k == 0:
        return masks
    # Each tensor's own k largest are enough to find the k-th largest of all without joining the tensors.
    best = []
    for name, values in change.items():
        left = values.detach()[~masks[name]]
        if bool(torch.isnan(left).any()):
            raise ValueError(f"'{name}' holds values that are not numbers")
        best.append(torch.topk(left, min(k, left.numel())).values)
    threshold = torch.topk(torch.cat(best), k).values[-1]
    room = k - sum(int((b > threshold).sum()) for b in best)
    for name, values in change.items():
        free_entries = ~masks[name]
        masks[name] |= free_entries & (values > threshold)
        equal = torch.nonzero((free_entries & (values == threshold)).view(-1)).squeeze(1)[:room]
        masks[name].view(-1)[equal] = True
        room -= equal.numel()
    return masks
