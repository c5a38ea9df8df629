"""How far fine-tuning has moved a model: in its weights, by part, and in what it predicts.

    change(part)   = ||theta_tuned - theta_base||_2               relative(part) = change(part) / ||theta_base||_2
    KL(tuned|base) = mean_n sum_v p_tuned(v) (log p_tuned(v) - log p_base(v))        and KL(base|tuned) likewise

theta are the tensors of a part of the model (float64 norms, read one at a time from the shards). n runs over supervised
positions of held-out rows, at most ``positions`` of each batch, evenly spaced; p are the predictions there over the
vocabulary or the classes. KL and the share of positions whose most likely token is still the same have intervals
clustered by row.

Example::

    analysis: [drift]
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from luthier.core.protocols import Batch, Outputs, Table
from luthier.core.registry import analysis
from luthier.functional.statistics import ClusteredMean, Estimate

By = Literal["tensor", "block", "kind"]
COLUMNS = ("run", "quantity", "part", "value", "n", "low", "high", "unit")


def part_of(name: str, by: By) -> str:
    """The part a tensor belongs to.

    ``tensor``: itself. ``block``: the name up to its first number (``model.layers.3``), or its module where it has
    none. ``kind``: its module with numbers as stars (``model.layers.*.mlp.up_proj``).
    """
    module = name.rpartition(".")[0] or name
    if by == "tensor":
        return name
    if by == "kind":
        return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module)
    numbered = re.match(r"(.*?\.\d+)(?:\.|$)", module)
    return numbered[1] if numbered else module


def weight_changes(base: Any, tuned: Any, by: By) -> tuple[dict[str, np.ndarray], list[str]]:
    """Sums over the tensors that two sources (``names()``, ``tensor(name)``) share, by part.

    Returns:
        part -> [elements, sum of squared changes, sum of squared base values, changed elements]; and the names of
        tensors that only one side has, has in another shape, or that hold no floating-point numbers.
    """
    sums: dict[str, np.ndarray] = {}
    known, skipped = set(base.names()), []
    for name in tuned.names():
        after = tuned.tensor(name)
        before = base.tensor(name) if name in known else None
        if before is None or before.shape != after.shape or not after.is_floating_point():
            skipped.append(name)
            continue
        before, after = before.detach().double(), after.detach().double()
        change = after - before
        found = (change.numel(), change.square().sum(), before.square().sum(), change.count_nonzero())
        part = part_of(name, by)
        sums[part] = sums.get(part, np.zeros(4)) + np.array([float(value) for value in found])
    return sums, skipped + sorted(known - set(tuned.names()))


def log_probabilities(out: Outputs, chosen_n: torch.Tensor) -> torch.Tensor:
    """Float64 log-probabilities [n, V] at some positions; no other row of the distribution is kept.

    Args:
        out: outputs of a forward pass without gradient.
        chosen_n: int64, increasing position indices.
    """
    kept: list[torch.Tensor] = []

    def keep(logits_CV: torch.Tensor, index_C: torch.Tensor) -> torch.Tensor:
        rows = logits_CV[torch.isin(index_C, chosen_n)].detach()
        kept.append(rows.double().log_softmax(dim=-1))
        return logits_CV.new_zeros(len(index_C))

    out.over_vocabulary(keep)
    return torch.cat(kept)


def divergence(logp_NV: torch.Tensor, logq_NV: torch.Tensor) -> torch.Tensor:
    """KL(p | q) [N] in nats, from log-probabilities; a class that p rules out adds nothing."""
    p_NV = logp_NV.exp()
    return torch.where(p_NV > 0, p_NV * (logp_NV - logq_NV), 0.0).sum(dim=-1)


class _Predictions:
    """Means over positions of what two models predict."""

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self.kl_tuned, self.kl_base, self.same_top = ClusteredMean(), ClusteredMean(), ClusteredMean()

    def add(self, batch: Batch, base: Outputs, tuned: Outputs) -> None:
        count = len(batch.target_N)
        chosen_n = torch.linspace(0, count - 1, min(count, self.positions), device=batch.target_N.device).long()
        base_nV, tuned_nV = log_probabilities(base, chosen_n), log_probabilities(tuned, chosen_n)
        sequence_n = batch.sequence_N[chosen_n].cpu().numpy()
        size_B = np.bincount(sequence_n, minlength=batch.examples)
        for mean, value_n in (
            (self.kl_tuned, divergence(tuned_nV, base_nV)),
            (self.kl_base, divergence(base_nV, tuned_nV)),
            (self.same_top, (tuned_nV.argmax(-1) == base_nV.argmax(-1)).double()),
        ):
            mean.add(np.bincount(sequence_n, value_n.cpu().numpy(), minlength=batch.examples), size_B)


@analysis("drift", example={"by": "tensor", "positions": 8})
class Drift:
    """How far fine-tuning has moved a model from its base, in weights and in predictions."""

    def __init__(
        self,
        *,
        by: Annotated[By, Field(description="norms for each tensor, each block of layers, or each kind of module")] = (
            "block"
        ),
        positions: Annotated[int, Field(ge=1, description="supervised positions of a batch that are compared")] = 256,
        confidence: Annotated[float, Field(gt=0, lt=1, description="of the intervals")] = 0.95,
    ) -> None:
        self.by, self.positions, self.confidence = by, positions, confidence

    def run(self, runs: Iterable[Any], ctx: Any) -> Table:
        """One table over all runs.

        Args:
            runs: finished runs; each has a ``folder``, whose name stands in the table.
            ctx: gives ``sources(run)``, the weights ``{"base": ..., "tuned": ...}`` with ``names()`` and
                ``tensor(name)``; and ``both(run)``, an iterable of ``(batch, base outputs, tuned outputs)`` over
                held-out rows (empty where the run has none), computed without gradient.
        """
        rows: list[tuple[Any, ...]] = []
        notes: list[str] = []
        for run in runs:
            label = run.folder.name
            sources: Mapping[str, Any] = ctx.sources(run)
            sums, skipped = weight_changes(sources["base"], sources["tuned"], self.by)
            if skipped:
                notes.append(f"{label}: not compared (absent on one side, another shape, or whole numbers): {skipped}")
            if sums:
                sums["all"] = np.sum(list(sums.values()), axis=0)
            for part, (size, change, base, changed) in ((p, v.tolist()) for p, v in sums.items()):
                n = int(size)
                relative = math.sqrt(change / base) if base else None
                rows.append((label, "weight change", part, math.sqrt(change), n, None, None, "norm"))
                rows.append((label, "relative weight change", part, relative, n, None, None, "share of the base norm"))
                rows.append((label, "changed weights", part, changed / size, n, None, None, "share"))
            compared = _Predictions(self.positions)
            with torch.no_grad():
                for batch, base_out, tuned_out in ctx.both(run):
                    compared.add(batch, base_out, tuned_out)
            for quantity, mean, unit, most in (
                ("KL(tuned|base)", compared.kl_tuned, "nats", math.inf),
                ("KL(base|tuned)", compared.kl_base, "nats", math.inf),
                ("same most likely token", compared.same_top, "share", 1.0),
            ):
                if mean.clusters:
                    found = mean.estimate(self.confidence).clipped(0.0, most)
                    rows.append((label, quantity, "held-out rows", *_numbers(found), unit))
        return Table(
            title="Drift from the base model",
            columns=COLUMNS,
            rows=tuple(rows),
            units={"value": "see unit", "n": "weights or positions"},
            notes=tuple(notes),
        )


def _numbers(found: Estimate) -> tuple[float, int, float | None, float | None]:
    low, high = (None if math.isnan(end) else float(end) for end in (found.low, found.high))
    return float(found.value), found.n, low, high
