"""The task protocol, and what it hands to the engine: hidden states at the supervised positions, or logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from luthier.core.protocols import Batch

# The further column of prepared rows that says what an example counts in the loss.
ROW_WEIGHT = "row_weight"


@dataclass
class Encoded:
    """A forward pass up to its head: either hidden states and an output embedding, or finished logits.

    Attributes:
        hidden_NH: hidden states at the supervised positions, to be multiplied with ``weight_VH``.
        weight_VH: the output embedding.
        bias_V: its bias, or None.
        scale: a factor on the logits.
        softcap: logits become ``softcap * tanh(logits / softcap)``; None for no cap.
        logits_NV: finished logits where classes are few; the fields above are then unset.
        number_N: predicted numbers, where targets are numbers; all fields above are then unset.
        layers: the hidden states of a layer at the supervised positions, where they were asked for.
        exits: those after block n (1 is the first) as the head takes them, that is after the final norm.
    """

    hidden_NH: torch.Tensor | None = None
    weight_VH: torch.Tensor | None = None
    bias_V: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    logits_NV: torch.Tensor | None = None
    number_N: torch.Tensor | None = None
    layers: Callable[[int], torch.Tensor] | None = None
    exits: Callable[[int], torch.Tensor] | None = None

    def at(self, index_C: torch.Tensor) -> Encoded:
        """The same at some of the N positions (without other layers and exits)."""
        cut = {k: v[index_C] for k in ("hidden_NH", "logits_NV", "number_N") if (v := getattr(self, k)) is not None}
        return replace(self, layers=None, exits=None, **cut)


class Task(Protocol):
    """What a model is used for.

    Attributes:
        name: as in recipes.
        reads: the columns of prepared rows that :meth:`collate` needs.

    A task whose targets are drawn anew in every epoch also has ``vary(batch, ctx) -> Batch``; training calls it after
    :meth:`collate`, which by itself makes the same batch every time.
    """

    name: str
    reads: tuple[str, ...]

    def __init__(self, processor: Any) -> None: ...

    def collate(self, rows: Mapping[str, Sequence[Any]], index_B: Any, columns: Sequence[str] = ()) -> Batch:
        """A micro-batch from columns of prepared rows; ``index_B`` are their numbers in the prepared data."""

    def encode(self, model: torch.nn.Module, batch: Batch, *, hidden: bool = False) -> Encoded:
        """Run the model up to its head. ``hidden``: keep the hidden states of every layer."""


def pad(rows: Sequence[np.ndarray], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded int64 [B, T] and its boolean mask [B, T], without a Python loop over tokens."""
    lengths = np.fromiter((len(r) for r in rows), dtype=np.int64, count=len(rows))
    width = max(int(lengths.max(initial=1)), 1)
    mask = np.arange(width) < lengths[:, None]
    ids = np.full((len(rows), width), value, dtype=np.int64)
    ids[mask] = np.concatenate(rows)
    return torch.from_numpy(ids), torch.from_numpy(mask)


def row_weights(rows: Mapping[str, Sequence[Any]], sequence_N: torch.Tensor) -> torch.Tensor:
    """float32 [N], what the positions of each example count: its column ``row_weight``, and 1 where there is none."""
    given = rows.get(ROW_WEIGHT)
    if given is None:
        return torch.ones(sequence_N.numel())
    return torch.tensor([1.0 if w is None else float(w) for w in given])[sequence_N]


def carried(rows: Mapping[str, Sequence[Any]], columns: Sequence[str]) -> dict[str, Any]:
    """The dataset columns that methods asked for."""
    return {name: rows[name] for name in columns if name in rows}
