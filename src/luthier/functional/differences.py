"""The difference of a tensor to its base in the form that suits it: sparse, a block, dense or of low rank.

Every form says which entries it touches, so that it can be added in float32, taken back bit for bit, scaled and summed
without knowing the others.

    sparse     flat indices (first dimension slowest) and values
    block      slices along one dimension
    dense      all of it
    low rank   scale * left @ right
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

_INT32 = 2**31


@dataclass(frozen=True)
class Sparse:
    """Some entries.

    Attributes:
        shape: of the tensor.
        index_K: int64 flat indices, ascending, no repeats.
        value_K: what is added there.
    """

    shape: tuple[int, ...]
    index_K: torch.Tensor
    value_K: torch.Tensor

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """The entries it touches, [K]."""
        return tensor.view(-1)[self.index_K.to(tensor.device)]

    def write(self, tensor: torch.Tensor, entries: torch.Tensor) -> None:
        """Replace the entries it touches."""
        tensor.view(-1)[self.index_K.to(tensor.device)] = entries.to(tensor)

    def amount(self) -> torch.Tensor:
        """What is added to the entries of :meth:`read`."""
        return self.value_K

    def scaled(self, factor: float) -> Sparse:
        """The same, multiplied."""
        return replace(self, value_K=self.value_K * factor)


@dataclass(frozen=True)
class Block:
    """Whole slices along one dimension.

    Attributes:
        shape: of the tensor.
        dim: the dimension.
        index_R: int64 indices along it, ascending, no repeats.
        value: what is added to ``tensor.index_select(dim, index_R)``.
    """

    shape: tuple[int, ...]
    dim: int
    index_R: torch.Tensor
    value: torch.Tensor

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """The slices it touches."""
        return tensor.index_select(self.dim, self.index_R.to(tensor.device))

    def write(self, tensor: torch.Tensor, entries: torch.Tensor) -> None:
        """Replace the slices it touches."""
        tensor.index_copy_(self.dim, self.index_R.to(tensor.device), entries.to(tensor))

    def amount(self) -> torch.Tensor:
        """What is added to the slices of :meth:`read`."""
        return self.value

    def scaled(self, factor: float) -> Block:
        """The same, multiplied."""
        return replace(self, value=self.value * factor)


@dataclass(frozen=True)
class Dense:
    """Every entry.

    Attributes:
        value: what is added.
    """

    value: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(self.value.shape)

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """All of it."""
        return tensor.clone()

    def write(self, tensor: torch.Tensor, entries: torch.Tensor) -> None:
        """Replace all of it."""
        tensor.copy_(entries)

    def amount(self) -> torch.Tensor:
        """What is added."""
        return self.value

    def scaled(self, factor: float) -> Dense:
        """The same, multiplied."""
        return Dense(self.value * factor)


@dataclass(frozen=True)
class LowRank:
    """``scale * left @ right``.

    Attributes:
        left: [out, rank].
        right: [rank, in].
        scale: a factor.
    """

    left: torch.Tensor
    right: torch.Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return (self.left.shape[0], self.right.shape[1])

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """All of it."""
        return tensor.clone()

    def write(self, tensor: torch.Tensor, entries: torch.Tensor) -> None:
        """Replace all of it."""
        tensor.copy_(entries)

    def amount(self) -> torch.Tensor:
        """The product."""
        return self.scale * (self.left.float() @ self.right.float())

    def scaled(self, factor: float) -> LowRank:
        """The same, multiplied."""
        return replace(self, scale=self.scale * factor)


Difference = Sparse | Block | Dense | LowRank
KINDS: dict[str, type[Any]] = {"sparse": Sparse, "block": Block, "dense": Dense, "low-rank": LowRank}


def kind_of(difference: Difference) -> str:
    """Its name in files."""
    return next(name for name, kind in KINDS.items() if isinstance(difference, kind))


def add_to(tensor: torch.Tensor, difference: Difference, factor: float = 1.0) -> torch.Tensor:
    """Add a difference to a tensor in place, in float32; returns the entries as they were, for :meth:`write`."""
    before = difference.read(tensor).clone()
    added = before.float() + factor * difference.amount().to(before.device).float()
    difference.write(tensor, added.to(tensor.dtype))
    return before


def dense(difference: Difference) -> torch.Tensor:
    """The whole difference as a float32 tensor."""
    whole = torch.zeros(difference.shape)
    difference.write(whole, difference.amount().float())
    return whole


def add(first: Difference, second: Difference) -> Difference:
    """The sum of two differences of one tensor: sparse where both are, dense otherwise.

    Raises:
        ValueError: they are of tensors of different shapes.
    """
    if first.shape != second.shape:
        raise ValueError(f"shapes {tuple(first.shape)} and {tuple(second.shape)} differ")
    if isinstance(first, Sparse) and isinstance(second, Sparse):
        index_K, place = torch.unique(torch.cat([first.index_K, second.index_K]), return_inverse=True)
        values = torch.cat([first.value_K.float(), second.value_K.float()])
        return Sparse(first.shape, index_K, torch.zeros(index_K.numel()).index_add_(0, place, values))
    return Dense(dense(first) + dense(second))


def difference(tuned: torch.Tensor, base: torch.Tensor, *, tolerance: float = 0.0) -> Difference | None:
    """``tuned - base`` in float32: None where nothing differs, sparse where at most half of the entries do.

    Args:
        tuned: the new tensor.
        base: the old one.
        tolerance: entries that differ by no more than this are left out.
    """
    change = tuned.detach().float().cpu() - base.detach().float().cpu()
    index_K = torch.nonzero(change.view(-1).abs() > tolerance).squeeze(1)
    if index_K.numel() == 0:
        return None
    if 2 * index_K.numel() > change.numel():
        return Dense(change)
    return Sparse(tuple(change.shape), index_K, change.view(-1)[index_K])


def pack(difference: Difference) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(JSON, tensors) of a difference; indices are int32 where that holds them."""
    about: dict[str, Any] = {"kind": kind_of(difference), "shape": list(difference.shape)}
    small = torch.Size(difference.shape).numel() < _INT32
    if isinstance(difference, Sparse):
        index = difference.index_K.to(torch.int32 if small else torch.int64)
        return about, {"index": index, "value": difference.value_K}
    if isinstance(difference, Block):
        return about | {"dim": difference.dim}, {"index": difference.index_R, "value": difference.value}
    if isinstance(difference, Dense):
        return about, {"value": difference.value}
    return about | {"scale": difference.scale}, {"left": difference.left, "right": difference.right}


def unpack(about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Difference:
    """The inverse of :func:`pack`."""
    shape = tuple(about["shape"])
    if about["kind"] == "sparse":
        return Sparse(shape, tensors["index"].long(), tensors["value"])
    if about["kind"] == "block":
        return Block(shape, int(about["dim"]), tensors["index"].long(), tensors["value"])
    if about["kind"] == "dense":
        return Dense(tensors["value"])
    return LowRank(tensors["left"], tensors["right"], float(about["scale"]))


def from_published(entry: Mapping[str, Any]) -> Sparse:
    """A difference as the released code of composable sparse fine-tuning keeps it.

    Args:
        entry: ``size``, ``index_steps`` (steps between flat indices whose FIRST dimension runs fastest) and ``values``.
    """
    shape = tuple(int(n) for n in entry["size"])
    fast_first = torch.cumsum(torch.as_tensor(entry["index_steps"], dtype=torch.int64), 0)
    values, index_K, stride = torch.as_tensor(entry["values"]), torch.zeros_like(fast_first), 1
    strides = torch.empty(shape, device="meta").stride()
    for size, step in zip(shape, strides, strict=True):
        index_K += fast_first // stride % size * step
        stride *= size
    order = torch.argsort(index_K)
    return Sparse(shape, index_K[order], values[order])
