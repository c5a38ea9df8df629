"""The values that pass between the extension points.

Tensors carry their shape as a suffix: B examples of a batch, T tokens of a row, N supervised positions of a batch,
V vocabulary (or classes), H hidden size, C a chunk of the N positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from luthier.core.errors import LuthierError

Unit = Literal["token", "sequence", "batch"]
# Name -> (sum, weight): plain tensors or floats, no graph.
Metrics = dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class Needs:
    """What a method asks of the engine and of the data; checked before any weight is loaded.

    Attributes:
        statistics: what the head computes per supervised position, the cheapest that serves: any of ``logp``,
            ``entropy``, ``top1``, ``top1_logp``, ``collision`` (the sum of squared probabilities).
        positionwise: the loss is a sum of terms that each depend on one position; the head then forms its
            gradient in the same pass as the loss.
        vocabulary: the method calls ``out.over_vocabulary``.
        hidden: the method calls ``out.hidden``.
        models: further models by name, such as ``reference`` (the base as it was before training).
        columns: dataset columns that must reach the batch.
        generation: the method lets the model write during training.
        tasks: the tasks for which it is defined; empty means all.
        fixed_weight: ``Loss.weight`` is a function of the batch alone (not of the model), so that the method may be
            one term of a weighted sum.
    """

    statistics: tuple[str, ...] = ("logp",)
    positionwise: bool = False
    vocabulary: bool = False
    hidden: bool = False
    models: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    generation: bool = False
    tasks: tuple[str, ...] = ()
    fixed_weight: bool = True


@dataclass
class Batch:
    """One micro-batch. ``target_N`` is made when the batch is collated and no transform of the inputs touches it.

    Attributes:
        inputs: what the model takes (``input_ids`` [B, T], ``attention_mask`` [B, T], ``pixel_values``, ...).
        position_N: int64, which row of the flattened hidden states ([B*T, H] or [B, H]) predicts each target.
        target_N: int64 token ids or class indices; float32 where targets are numbers.
        weight_N: float32 weight of each position; 1 by default.
        sequence_N: int64, which example of the batch a position belongs to.
        row_B: int64, row numbers in the prepared data.
        columns: dataset columns asked for by ``Needs.columns``; lists of length B, or tensors named ``*_N``. Of a
            boolean tensor ``<group>_N`` that a transform adds, the plain loss inside the group is logged.
        keys_B: content hash of each row, under which scores are cached; None once a transform changed the inputs.
        adjustable_BT: bool [B, T], token positions a transform may corrupt (no padding, no special tokens but the
            end token); None where the task has no tokens.
        supervised_BT: bool [B, T], token positions that are targets; None where the task has none.
        part_of: for a batch cut by :meth:`positions`, the batch it was cut from and where its positions stand there.
    """

    inputs: dict[str, torch.Tensor]
    position_N: torch.Tensor
    target_N: torch.Tensor
    weight_N: torch.Tensor
    sequence_N: torch.Tensor
    row_B: torch.Tensor
    columns: dict[str, Any] = field(default_factory=dict)
    keys_B: list[str] | None = None
    adjustable_BT: torch.Tensor | None = None
    supervised_BT: torch.Tensor | None = None
    part_of: tuple[Batch, torch.Tensor] | None = None

    @property
    def examples(self) -> int:
        """B."""
        return int(self.row_B.numel())

    def with_inputs(self, **inputs: torch.Tensor) -> Batch:
        """A copy with some model inputs replaced; cached scores no longer apply to it."""
        return replace(self, inputs={**self.inputs, **inputs}, keys_B=None, part_of=None)

    def with_weights(self, weight_N: torch.Tensor) -> Batch:
        """A copy with other position weights."""
        return replace(self, weight_N=weight_N)

    def positions(self, index_C: torch.Tensor) -> Batch:
        """The same batch restricted to some supervised positions (inputs untouched)."""
        columns = {k: v[index_C] if k.endswith("_N") else v for k, v in self.columns.items()}
        return replace(
            self,
            position_N=self.position_N[index_C],
            target_N=self.target_N[index_C],
            weight_N=self.weight_N[index_C],
            sequence_N=self.sequence_N[index_C],
            columns=columns,
            part_of=(self, index_C) if self.part_of is None else (self.part_of[0], self.part_of[1][index_C]),
        )

    def every_token(self) -> Batch:
        """The same rows with a position at every real token instead of at the targets; padding is left out.

        The hidden state at position n is that of token n itself. ``target_N`` is the next token (the token itself at
        the end of a row) and serves no loss; columns named ``*_N`` are dropped.
        """
        ids_BT, mask_BT = self.inputs["input_ids"], self.inputs["attention_mask"].bool()
        example_N, token_N = torch.nonzero(mask_BT, as_tuple=True)
        width = ids_BT.shape[1]
        last_N = token_N + 1 >= mask_BT.sum(1)[example_N]
        return replace(
            self,
            position_N=example_N * width + token_N,
            target_N=ids_BT[example_N, torch.where(last_N, token_N, (token_N + 1).clamp(max=width - 1))],
            weight_N=torch.ones_like(example_N, dtype=torch.float32),
            sequence_N=example_N,
            columns={k: v for k, v in self.columns.items() if not k.endswith("_N")},
            keys_B=None,
            part_of=None,
        )

    def take(self, index_b: torch.Tensor, weight_b: torch.Tensor | None = None) -> Batch:
        """The batch of some of its examples, in the given order, position weights multiplied by ``weight_b``.

        Args:
            index_b: int64 indices into the B examples, no repeats.
            weight_b: one factor per chosen example; 1 when absent.
        """
        rows = self.row_B.numel()
        # A position's hidden row is example * width + offset, where width is T for tokens and 1 for examples.
        width = next((v.shape[1] for k, v in self.inputs.items() if k == "input_ids" and v.dim() == 2), 1)
        per_token = self.supervised_BT is not None
        device = self.sequence_N.device
        index_b = index_b.to(device)
        new_of_old = torch.full((rows,), -1, dtype=torch.long, device=device)
        new_of_old[index_b] = torch.arange(index_b.numel(), device=device)
        new_N = new_of_old[self.sequence_N]
        kept = torch.nonzero(new_N >= 0).squeeze(1)
        part = self.positions(kept)
        step = width if per_token else 1
        part.position_N = part.position_N + (new_N[kept] - part.sequence_N) * step
        part.sequence_N = new_N[kept]
        if weight_b is not None:
            part.weight_N = part.weight_N * weight_b.to(part.weight_N)[part.sequence_N]
        order = index_b.tolist()
        return replace(
            part,
            part_of=None,
            inputs={k: v[index_b] for k, v in self.inputs.items()},
            row_B=self.row_B[index_b],
            columns={
                k: v if k.endswith("_N") else (v[index_b] if isinstance(v, torch.Tensor) else [v[i] for i in order])
                for k, v in part.columns.items()
            },
            keys_B=None if self.keys_B is None else [self.keys_B[i] for i in order],
            adjustable_BT=None if self.adjustable_BT is None else self.adjustable_BT[index_b],
            supervised_BT=None if self.supervised_BT is None else self.supervised_BT[index_b],
        )


@dataclass
class Loss:
    """An un-normalised loss; the engine divides by the weight of the whole optimiser step over all ranks.

    Attributes:
        sum: scalar tensor with a graph, a sum and never a mean.
        weight: what the sum is divided by in the end: tokens, sequences, or another count.
        unit: what the weight counts.
        metrics: name -> (sum, weight), averaged by the engine over the step; plain tensors or floats, no graph.
    """

    sum: torch.Tensor
    weight: torch.Tensor | float
    unit: Unit = "token"
    metrics: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def plus(self, term: Loss, totals: Mapping[str, float], label: str, factor: float = 1.0) -> Loss:
        """This loss and ``factor`` times another, of which each ends as a mean over its own unit.

        Args:
            term: the loss to add; its metrics come along under ``<label>/``.
            totals: the counts of the whole step by unit (``ctx.totals``); they must have both units.
            label: what the term is called.
            factor: its weight.
        """
        for unit in (self.unit, term.unit):
            if unit not in totals:
                raise LuthierError(f"'{label}' adds to a loss that counts in '{unit}', of which there is no total.")
        scaled = term.sum * (factor * totals[self.unit] / max(totals[term.unit], 1e-12))
        own = {
            f"{label}/loss": (term.sum.detach(), term.weight),
            **{f"{label}/{k}": v for k, v in term.metrics.items()},
        }
        return Loss(self.sum + scaled, self.weight, self.unit, {**self.metrics, **own})


@dataclass(frozen=True)
class Completion:
    """What was written for one prompt.

    Attributes:
        text: without special tokens.
        token_ids: the stop token included; empty where the writer tells no tokens.
        finished: whether it stopped by itself.
        token_logp: log-probability of each token at the temperature it was drawn at, before any truncation; empty where
            the writer tells none. It does not count when completions are compared.
    """

    text: str
    token_ids: tuple[int, ...]
    finished: bool
    token_logp: tuple[float, ...] = field(default=(), compare=False)

    @property
    def logp(self) -> float | None:
        """Log-probability of the whole, where it is known."""
        return sum(self.token_logp) if self.token_logp else None


@dataclass(frozen=True)
class Table:
    """The result of an analysis: rows of JSON-able values, one unit and one direction per column."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    units: Mapping[str, str] = field(default_factory=dict)
    direction: Mapping[str, Literal["higher", "lower"]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Artefact:
    """What a procedure leaves: the live model and what is known about it.

    ``notes`` are sentences that whoever reads the run's numbers must know; they go wherever these are shown.
    """

    model: Any
    metrics: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    notes: tuple[str, ...] = ()
