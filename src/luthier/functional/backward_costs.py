"""What a backward pass costs when only some tensors are trained, and the best set of tensors within a budget.

Tensors k = 1..N in forward order. t_dw[k]: cost of the gradient of the weight; t_dy[k]: cost of passing the gradient of
the activations through the operation it belongs to. With f the selected tensor closest to the input,

    T_bp(m) = sum_k m[k] t_dw[k] + sum_{k >= f} t_dy[k]

Costs are multiply-adds of real tokens (padding left out), counted by hooks on one pass over the rows:

    linear in -> out   weight: t_dy = t_dw = n in out;  bias: t_dw = n out;  forward n in out
    attention map      4 n^2 D to the t_dy of the value projection;  forward 2 n^2 D
    norm               weight: t_dy = t_dw = n D;  bias: nothing
    embedding          t_dw = n D; tied to the output p V D + V D more, and p V D to the t_dy of the last tensor
    output matrix      a linear map at the p supervised positions

Source: "Towards Green AI in Fine-tuning Large Language Models via Adaptive Backpropagation", ICLR 2024, arXiv
2309.13192. The selection is the exact form of its dynamic program.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from luthier.functional.parameter_selector import Site, is_linear

_VALUE = re.compile(r"(^|[._])(v|value|v_proj|v_lin)$|c_attn|qkv|Wqkv|query_key_value|W_pack", re.IGNORECASE)


@dataclass(frozen=True)
class Costs:
    """Costs of every tensor, in forward order.

    Attributes:
        names: the tensors.
        dy: [N] passing gradients through the operation of each.
        dw: [N] the gradient of each.
        forward: the forward pass.
    """

    names: tuple[str, ...]
    dy: np.ndarray
    dw: np.ndarray
    forward: float

    @property
    def backward(self) -> float:
        """The backward pass of full fine-tuning."""
        return float(self.dy.sum() + self.dw.sum())

    def of(self, chosen: Sequence[bool] | np.ndarray) -> float:
        """T_bp of a set of tensors; 0 for the empty one."""
        mask_N = np.asarray(chosen, bool)
        if not mask_N.any():
            return 0.0
        first = int(np.flatnonzero(mask_N)[0])
        return float(self.dw[mask_N].sum() + self.dy[first:].sum())

    def share(self, chosen: Sequence[bool] | np.ndarray) -> float:
        """Forward and backward of a set, as a share of full fine-tuning."""
        return (self.forward + self.of(chosen)) / (self.forward + self.backward)

    def backward_share(self, share: float) -> float:
        """The share of the backward pass that a share of the whole step leaves; at or below 0 where it leaves none."""
        c = self.forward / self.backward
        return share * (1 + c) - c


class Recorder:
    """Counts the costs of forward passes by hooks.

    Args:
        model: the model.
        every: its tensors (:func:`luthier.functional.parameter_selector.sites`).
        width: of the attention map, heads times their width; 0 where the model has none.
    """

    def __init__(self, model: Any, every: Sequence[Site], width: int) -> None:
        self.model, self.every, self.width = model, every, width
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        self.output = next(
            (s for s in every if output is not None and model.get_parameter(s.name) is output.weight), None
        )
        self.order: list[str] = []
        self.dy: dict[str, float] = {}
        self.dw: dict[str, float] = {}
        self.forward = 0.0
        self._tokens: tuple[int, int, float] = (0, 0, 0.0)

    def __call__(self, batch: Any, run: Callable[[], Any]) -> Any:
        """Run a forward pass of a batch and count it."""
        mask = batch.inputs.get("attention_mask")
        if mask is not None and mask.dim() == 2:
            lengths = mask.sum(1).double()
            self._tokens = (mask.numel(), int(lengths.sum()), float((lengths**2).sum()))
        else:
            self._tokens = (0, 0, 0.0)
        owned: dict[str, list[Site]] = {}
        for site in self.every:
            if site is not self.output or len(site.names) > 1:
                owned.setdefault(site.module, []).append(site)
        handles = []
        for path, sites in owned.items():
            module = self.model.get_submodule(path) if path not in {s.name for s in sites} else None
            if module is not None:
                handles.append(module.register_forward_hook(self._hook(sites)))
        try:
            result = run()
        finally:
            for handle in handles:
                handle.remove()
        if self.output is not None:
            self._output(int(batch.position_N.numel()))
        return result

    def _hook(self, sites: Sequence[Site]) -> Callable[..., None]:
        def count(module: Any, inputs: Any, output: Any) -> None:
            if not inputs or not isinstance(inputs[0], torch.Tensor) or not isinstance(output, torch.Tensor):
                return
            for site in sites:
                self._count(site, module, inputs[0], output)

        return count

    def _count(self, site: Site, module: Any, x: torch.Tensor, y: torch.Tensor) -> None:
        padded, real, squares = self._tokens
        if isinstance(module, torch.nn.Embedding):
            rows = x.numel()
        else:
            channels = 1 if hasattr(module, "kernel_size") and y.dim() > 2 else -1
            rows = y.numel() // y.shape[channels]
        n = real if rows == padded else rows
        dy = dw = forward = 0.0
        if is_linear(module) and len(site.shape) == 2:
            dy = dw = forward = float(n * site.numel)
            if self.width and site.category == "attention" and _VALUE.search(site.module.rpartition(".")[2]):
                own = squares if squares else float(n) ** 2 / max(x.shape[0], 1)
                dy, forward = dy + 4 * own * self.width, forward + 2 * own * self.width
        elif isinstance(module, torch.nn.Embedding):
            dw = float(site.numel if n < rows and "position" in site.name else n * site.shape[-1])
        elif site.name.endswith("bias"):
            dw = 0.0 if site.category in ("norm", "final-norm") else float(n * site.numel)
        else:
            dy = dw = float(n * site.numel)
        self._add(site.name, dy, dw, forward)

    def _output(self, positions: int) -> None:
        assert self.output is not None
        site, cost = self.output, float(positions * self.output.numel)
        if len(site.names) == 1:
            self._add(site.name, cost, cost, cost)
            return
        # Tied: its weight gradient is that of the embedding, and the gradient passes it on the way to the last tensor.
        self._add(site.name, 0.0, cost + site.numel, cost)
        self._add(self.order[-1], cost, 0.0, 0.0)

    def _add(self, name: str, dy: float, dw: float, forward: float) -> None:
        if name not in self.dy:
            self.order.append(name)
        self.dy[name] = self.dy.get(name, 0.0) + dy
        self.dw[name] = self.dw.get(name, 0.0) + dw
        self.forward += forward

    def costs(self) -> Costs:
        """What was counted; tensors that no pass has used are left out."""
        names = tuple(self.order)
        return Costs(names, np.array([self.dy[n] for n in names]), np.array([self.dw[n] for n in names]), self.forward)


def best_set(
    importance: np.ndarray, costs: Costs, share: float, *, levels: int = 1000, rounding: str = "floor"
) -> np.ndarray:
    """[N] bool: the set with the largest summed importance whose backward cost is within a share of the whole.

    One knapsack over t_dw evaluated at every depth, from the output end: the table over the tensors above a depth
    gives the best companions of the tensor at it. Exact on costs quantised to ``levels``; tensors without positive
    importance never enter, unless nothing else fits.

    Args:
        importance: [N] in forward order.
        costs: of the same tensors.
        share: of the backward cost of full fine-tuning.
        levels: steps into which the whole is cut.
        rounding: ``floor`` makes tiny tensors free, ``ceil`` never spends more than the budget.

    Raises:
        ValueError: not even the last tensor fits; the message holds the least share that does.
    """
    cut = np.floor if rounding == "floor" else np.ceil
    scale = levels / max(costs.backward, 1e-300)
    dy_N = cut(costs.dy[::-1] * scale).astype(np.int64)
    dw_N = cut(costs.dw[::-1] * scale).astype(np.int64)
    gain_N = np.asarray(importance, np.float64)[::-1]
    whole = int(dy_N.sum() + dw_N.sum())
    budget = int(np.floor(share * whole + 1e-9))
    depth_N = np.cumsum(dy_N)
    own_N = depth_N + dw_N
    if int(own_N.min()) > budget:
        raise ValueError(f"{int(own_N.min()) / whole:.4f}")
    table = np.zeros(budget + 1)
    took = np.zeros((len(gain_N), budget + 1), bool)
    best: tuple[float, int, int, int] | None = None
    for j, gain in enumerate(gain_N.tolist()):
        if gain <= 0:
            continue
        rest = budget - int(own_N[j])
        if rest >= 0:
            # The least spending that is worth as much, so that of equal sets the cheaper one wins.
            least = int(np.searchsorted(table[: rest + 1], table[rest], side="left"))
            found = (gain + float(table[least]), -(int(own_N[j]) + least), j, least)
            if best is None or found[:2] > best[:2]:
                best = found
        weight = int(dw_N[j])
        if weight <= budget:
            with_j = table[: budget + 1 - weight] + gain
            took[j, weight:] = with_j > table[weight:]
            table[weight:] = np.maximum(table[weight:], with_j)
    chosen_N = np.zeros(len(gain_N), bool)
    if best is None:
        fits = np.flatnonzero(own_N <= budget)
        chosen_N[fits[int(np.argmax(gain_N[fits]))]] = True
        return chosen_N[::-1].copy()
    _, _, deepest, left = best
    chosen_N[deepest] = True
    for j in range(deepest - 1, -1, -1):
        if took[j, left]:
            chosen_N[j] = True
            left -= int(dw_N[j])
    return chosen_N[::-1].copy()


def reachable(costs: Costs, share: float) -> np.ndarray:
    """[N] bool: tensors to which gradients can be passed within a share of the backward cost."""
    return np.cumsum(costs.dy[::-1])[::-1] <= share * costs.backward
