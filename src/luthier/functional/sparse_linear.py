"""A frozen linear map with trained additions to some entries of its weight; memory is that of the entries.

    y = x (W + scatter(value_K, index_K))^T + bias
    dL/dvalue_K = (dL/dy^T x)[index_K]

The dense gradient of one layer lives only while its backward pass runs; ``watch`` sees it then. A weight in the
precision of the computation gets the additions for the length of a product and then its own entries back, bit for bit,
so no copy of it is made. Other weights are converted first: half precision, and quantised ones (4 and 8 bit), which are
never changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F

from luthier.core.errors import UserError


def weight_shape(module: Any) -> tuple[int, int]:
    """Shape of a linear map's weight as it is stored when dense; packed 4-bit tensors do not tell."""
    if type(module).__name__ == "Conv1D":
        return tuple(module.weight.shape)
    return int(module.out_features), int(module.in_features)


def is_quantised(module: Any) -> bool:
    """Whether a linear map keeps its weight in integers."""
    return not module.weight.is_floating_point()


def dense_weight(module: Any) -> torch.Tensor:
    """The weight of a linear map as floating point: itself, or a dequantised copy.

    Raises:
        UserError: a kind of quantisation that is not known here.
    """
    weight = module.weight
    if weight.is_floating_point():
        return weight
    if callable(getattr(module, "dequantize", None)):
        return module.dequantize()
    if (state := getattr(weight, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, state)
    if (scale_O := getattr(weight, "SCB", None)) is not None:
        return weight.data.float() * scale_O.float()[:, None] / 127
    raise UserError(f"the quantised weight of a {type(module).__name__} cannot be read; open the base in float32.")


class SparseLinear(torch.nn.Module):
    """A linear map with sparse additions.

    Args:
        base_layer: ``nn.Linear`` or ``Conv1D``, also a quantised one; frozen.
        index_K: int64 flat positions in the stored weight.
        dtype: of the values.
    """

    index: torch.Tensor

    def __init__(self, base_layer: torch.nn.Module, index_K: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.shape = weight_shape(base_layer)
        self.transposed = type(base_layer).__name__ == "Conv1D"
        device: Any = self.base_layer.weight.device
        small = self.shape[0] * self.shape[1] < 2**31
        kept = index_K.to(device=device, dtype=torch.int32 if small else torch.int64)
        self.register_buffer("index", kept, persistent=False)
        self.values = torch.nn.Parameter(torch.zeros(index_K.numel(), dtype=dtype, device=device))
        self.watch: Callable[[torch.Tensor], None] | None = None

    @property
    def index_K(self) -> torch.Tensor:
        """The positions, int64."""
        return self.index.long()

    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight; some models look at it."""
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The frozen bias."""
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The map with the additions."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        weight = self.base_layer.weight if not is_quantised(self.base_layer) else None
        return _Product.apply(x, self.values, weight, self.base_layer.bias, self, dtype)

    @contextmanager
    def effective(
        self, weight: torch.Tensor | None, values_K: torch.Tensor, dtype: torch.dtype
    ) -> Iterator[torch.Tensor]:
        """The weight with the additions, in ``dtype``; the given weight is as it was afterwards."""
        dense = (dense_weight(self.base_layer) if weight is None else weight).detach()
        own = weight is None or dense.dtype != dtype
        dense = dense.to(dtype) if own else dense
        flat, index_K = dense.view(-1), self.index_K
        before_K = flat[index_K]
        try:
            flat[index_K] = (before_K.float() + values_K.float()).to(dtype)
            yield dense
        finally:
            if not own:
                flat[index_K] = before_K

    def merged(self) -> torch.nn.Module:
        """A plain linear map with the additions in its weight; a quantised one comes back in floating point."""
        if is_quantised(self.base_layer):
            weight_OI = dense_weight(self.base_layer)
            rows, columns = self.shape
            plain: Any = torch.nn.Linear(columns, rows, bias=self.bias is not None, dtype=weight_OI.dtype)
            plain.weight.data = weight_OI.detach().clone()
            if self.bias is not None:
                plain.bias.data = self.bias.detach().to(weight_OI.dtype)
        else:
            plain = self.base_layer
        flat, index_K = plain.weight.data.view(-1), self.index_K
        flat[index_K] = (flat[index_K].float() + self.values.detach().float()).to(flat.dtype)
        return plain


class _Product(torch.autograd.Function):
    """The product with the effective weight, which is made again in the backward pass instead of kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        values_K: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        layer: SparseLinear,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.layer, ctx.dtype, ctx.weight, ctx.index = layer, dtype, weight, layer.index_K
        ctx.save_for_backward(x, values_K)
        with torch.autocast(x.device.type, enabled=False), layer.effective(weight, values_K, dtype) as dense:
            bias = None if bias is None else bias.to(dtype)
            return F.linear(x.to(dtype), dense.t() if layer.transposed else dense, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, values_K = ctx.saved_tensors
        layer = ctx.layer
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            with layer.effective(ctx.weight, values_K, ctx.dtype) as dense:
                grad_x = (grad @ (dense.t() if layer.transposed else dense)).to(x.dtype)
        grad_NO, x_NI = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]).to(ctx.dtype)
        grad_weight = x_NI.t() @ grad_NO if layer.transposed else grad_NO.t() @ x_NI
        if layer.watch is not None:
            layer.watch(grad_weight)
        if ctx.needs_input_grad[3]:
            grad_bias = grad_NO.sum(0)
        grad_K = grad_weight.reshape(-1)[ctx.index].to(values_K.dtype)
        return grad_x, grad_K, grad_weight if ctx.needs_input_grad[2] else None, grad_bias, None, None


def wrap(model: torch.nn.Module, path: str, index_K: torch.Tensor, dtype: torch.dtype = torch.float32) -> SparseLinear:
    """Put a :class:`SparseLinear` around a linear map of a model, in place."""
    parent, _, name = path.rpartition(".")
    layer = SparseLinear(model.get_submodule(path), index_K, dtype)
    setattr(model.get_submodule(parent), name, layer)
    return layer


def wrapped(model: torch.nn.Module) -> dict[str, SparseLinear]:
    """The sparse layers of a model by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, SparseLinear)}


def merged(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a model in which sparse layers are plain ones with the additions in their weights."""
    watches = {path: layer.watch for path, layer in wrapped(model).items()}
    for layer in wrapped(model).values():
        layer.watch = None  # what watches must not be copied along
    made = copy.deepcopy(model)
    for path, layer in wrapped(model).items():
        layer.watch = watches[path]
    for path, layer in wrapped(made).items():
        parent, _, name = path.rpartition(".")
        setattr(made.get_submodule(parent), name, layer.merged())
    return made
