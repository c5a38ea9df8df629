"""Where the base model and the training rows lie on the model-capability continuum, and which token loss that suggests.

    mean p >= strong_from   strong:        prior-leaning losses (p, general, top thresholds)
    mean p <= weak_up_to    weak:          plain likelihood
    between                 intermediate:  no winner is predicted

p is the base model's probability of each supervised token of a sample of the training rows. The table shows, in 20
bins of p, the share of tokens and the share of each loss's total gradient weight w(p) = -f'(p) p. The two limits are
this library's own; they are options and are printed.

Paper: "Beyond Log Likelihood: Probability-Based Objectives for Supervised Fine-Tuning across the Model Capability
Continuum", 2025, arXiv 2510.00526.

Example::

    analysis: [continuum]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Table
from luthier.core.registry import analysis
from luthier.functional.continuum import BINS, STRONG_FROM, WEAK_UP_TO, diagnose, gradient_mass
from luthier.functional.probability_losses import Member, parse

MEMBERS = ("nll", "p", "general-10", "top_p-0.5")


class _Sample:
    """Evenly spaced rows of prepared data, with the part of its interface that scoring uses."""

    def __init__(self, data: Any, rows: int) -> None:
        self._data = data
        self._index = np.unique(np.linspace(0, len(data) - 1, min(rows, len(data))).astype(np.int64))

    def __len__(self) -> int:
        return len(self._index)

    def fetch(self, indices: Sequence[int]) -> Any:
        """Columns of the sample's rows."""
        return self._data.fetch([int(self._index[i]) for i in indices])


def table(scores: Sequence[Any], members: Sequence[Member], *, strong_from: float, weak_up_to: float) -> Table:
    """The diagnosis of per-row target log-probabilities (arrays or tensors, nats) as a table over bins of p."""
    rows = [np.ravel(np.asarray(s, dtype=np.float64)) for s in scores]
    logp_N = np.concatenate(rows) if rows else np.zeros(0)
    if logp_N.size == 0:
        raise UserError("continuum: the sample has no supervised tokens.")
    row_N = np.repeat(np.arange(len(rows)), [r.size for r in rows])
    found = diagnose(logp_N, row_N, strong_from=strong_from, weak_up_to=weak_up_to)
    mass = gradient_mass(logp_N, members)
    names = tuple(mass)
    low, high = found.mean_p - 1.96 * found.standard_error, found.mean_p + 1.96 * found.standard_error
    return Table(
        title=f"Model-capability continuum: {found.position}",
        columns=("p from", "p to", "tokens", *names),
        rows=tuple(
            (round(i / BINS, 2), round((i + 1) / BINS, 2), found.histogram[i], *(mass[name][i] for name in names))
            for i in range(BINS)
        ),
        units={"tokens": "share of tokens", **dict.fromkeys(names, "share of gradient weight")},
        notes=(
            f"mean p {found.mean_p:.4f} (95% {max(low, 0.0):.4f} to {min(high, 1.0):.4f}, n {found.n} tokens of "
            f"{len(rows)} rows), mean log p {found.mean_logp:.4f}; {100 * found.share_below_01:.1f}% of tokens below "
            f"p 0.1, {100 * found.share_above_09:.1f}% above 0.9",
            f"{found.position}: strong from {strong_from:g}, weak up to {weak_up_to:g} (this library's limits)",
            f"suggested: {found.recommendation}",
        ),
    )


@analysis(
    "continuum",
    example={"rows": 8},
    paper="Beyond Log Likelihood: Probability-Based Objectives for Supervised Fine-Tuning across the Model Capability "
    "Continuum, 2025, arXiv 2510.00526",
)
class ContinuumAnalysis:
    """Where the base model and the data lie on the capability continuum, and which token loss that suggests."""

    def __init__(
        self,
        *,
        rows: Annotated[int, Field(ge=1, description="training rows to score, evenly spaced")] = 512,
        members: Annotated[
            list[str] | None, Field(min_length=1, description="losses whose gradient weight is shown")
        ] = None,
        strong_from: Annotated[
            float, Field(ge=0, le=1, description="mean p from which a model is strong")
        ] = STRONG_FROM,
        weak_up_to: Annotated[float, Field(ge=0, le=1, description="mean p up to which a model is weak")] = WEAK_UP_TO,
    ) -> None:
        if not weak_up_to < strong_from:
            raise UserError("continuum: weak_up_to must be smaller than strong_from.")
        try:
            self.members = [parse(text) for text in members or MEMBERS]
        except ValueError as error:
            raise UserError(f"continuum: members: {error}.") from None
        self.rows, self.strong_from, self.weak_up_to = rows, strong_from, weak_up_to

    def run(self, runs: Iterable[Any], ctx: Any) -> Table:
        """Score a sample of the training rows with the base model; the finished runs themselves are not needed."""
        sample = _Sample(ctx.data.train.prepared, self.rows)
        scores = ctx.score(sample, "base")
        return table(scores, self.members, strong_from=self.strong_from, weak_up_to=self.weak_up_to)
