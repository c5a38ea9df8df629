"""Corrupted inputs: which tokens, at which rate, with what, and what that does to the predictions behind them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch


def linear_rate(step: int, total_steps: int, rate_max: float, warmup: float) -> float:
    """Corruption rate of a step, warmed up over ``warmup`` (a fraction) of all steps."""
    return min(rate_max, rate_max * step / (total_steps * warmup + 1))


def corrupt(
    ids_BT: torch.Tensor,
    candidates_BT: torch.Tensor,
    uniform_BT: torch.Tensor,
    rate: float,
    replacement_BT: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """New token ids [B, T], replaced where a candidate's number is below ``rate``, and where that was (bool)."""
    corrupted_BT = candidates_BT & (uniform_BT < rate)
    return torch.where(corrupted_BT, replacement_BT, ids_BT), corrupted_BT


def last_occurrence(ids: Sequence[int], patterns: Sequence[Sequence[int]]) -> int:
    """Start of the last occurrence of any of the patterns in a row of ids; its length where there is none."""
    for start in range(len(ids) - 1, -1, -1):
        if any(pattern and list(ids[start : start + len(pattern)]) == list(pattern) for pattern in patterns):
            return start
    return len(ids)


def embedding_noise(count: int, length: int, width: int, alpha: float, generator: torch.Generator) -> torch.Tensor:
    """Uniform noise for the embeddings of some tokens of a row, [count, width], as in NEFTune.

    Each number lies between plus and minus ``alpha / sqrt(length * width)``.

    Args:
        count: tokens that get noise.
        length: tokens of the row, without padding.
        width: size of an embedding.
        alpha: scale; noise on every token of the row would have a norm of about ``alpha / sqrt(3)``.
        generator: of the random numbers.
    """
    uniform = torch.rand(count, width, generator=generator)
    return (2 * uniform - 1) * (alpha / math.sqrt(length * width))


class EmbeddingChanges:
    """Changes what a model's embedding gives for certain input tensors, and for no others.

    The changes are found by the identity of the ids a batch holds, so every model whose embedding is watched sees the
    same change of the same batch, and any other input is looked up as ever. They go with their batches.

    Attributes:
        unused: batches whose change has not been applied by any model yet.
    """

    def __init__(self) -> None:
        from torch.utils.weak import WeakTensorKeyDictionary

        self._changes: Any = WeakTensorKeyDictionary()
        self._watched: list[Any] = []
        self.unused = 0

    @property
    def watching(self) -> bool:
        """Whether some embedding is watched."""
        return bool(self._watched)

    def watch(self, layer: torch.nn.Module) -> None:
        """Watch an embedding, and every copy that is made of it from now on."""

        # A function and not a method: a copied module keeps it as it is, with these changes and not copies of them.
        def change(module: Any, inputs: Any, out: torch.Tensor) -> torch.Tensor:
            found = self._changes.get(inputs[0])
            if found is None:
                return out
            if not found[1]:
                found[1].append(True)
                self.unused -= 1
            return found[0](out, module)

        self._watched.append(layer.register_forward_hook(change))

    def of(self, ids_BT: torch.Tensor, change: Callable[[torch.Tensor, torch.nn.Module], torch.Tensor]) -> None:
        """Let ``change(embedded_BTH, layer)`` give the embedding of this very tensor of ids."""
        self._changes[ids_BT] = (change, [])
        self.unused += 1

    def close(self) -> None:
        """Watch no longer."""
        for handle in self._watched:
            handle.remove()
        self._watched = []


def distances(position_N: torch.Tensor, sequence_N: torch.Tensor, place_B: torch.Tensor, width: int) -> torch.Tensor:
    """How many tokens each target stands behind one place of its row, [N]; 0 or less for those not behind it.

    Args:
        position_N: rows of the flattened [B * width] hidden states that predict the targets, the token before each.
        sequence_N: the example of each.
        place_B: token number of the place in each row.
        width: T.
    """
    return position_N - sequence_N * width + 1 - place_B[sequence_N]
