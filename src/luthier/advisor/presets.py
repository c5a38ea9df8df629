"""Batch, rate and schedule as the study of small language models has them, and the grid that studies them here.

    preset    batch               learning rate        schedule       warm-up
    tulu      128                 2e-5                 linear decay   3 %
    recipe    3,840 (or 7,680)    2e-5, or 1e-6..2e-5  constant       none (25 to 100 steps make no difference)

Larger batch with lower rate; the rate is not scaled up with the batch. Batches count rows per optimiser step over all
processes. ``scale_to`` keeps at least 30 steps per epoch on small data (this library's rule).

Source: "Unveiling the Secret Recipe: A Guide For Supervised Fine-Tuning Small LLMs", 2024, arXiv 2412.13337.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from luthier.core.errors import UserError

STEPS_PER_EPOCH = 30
FEWEST_STEPS = 10


@dataclass(frozen=True)
class Preset:
    """Values for the ``training`` section of a recipe."""

    batch_rows: int
    learning_rate: float
    schedule: str
    warmup: float
    beta2: float = 0.95

    def scale_to(self, dataset_size: int, *, devices: int = 1) -> Preset:
        """The same with a batch that leaves 30 steps per epoch, a multiple of ``devices``.

        Raises:
            UserError: there are too few rows for one row per device and step.
        """
        batch = min(self.batch_rows, dataset_size // STEPS_PER_EPOCH) // devices * devices
        if batch < 1:
            raise UserError(
                f"{dataset_size:,} rows are too few for {STEPS_PER_EPOCH} steps per epoch on {devices} devices: set "
                "training.batch_rows yourself."
            )
        return replace(self, batch_rows=batch)

    def training(self) -> dict[str, Any]:
        """The ``training`` section."""
        return asdict(self)


PRESETS = {
    "tulu": Preset(128, 2e-5, "linear", 0.03),
    "recipe": Preset(3840, 2e-5, "constant", 0.0),
}


def check_steps(rows: int, batch_rows: int, epochs: float) -> int:
    """Optimiser steps of a run.

    Raises:
        UserError: fewer than ten, of which nothing can be learnt and nothing told.
    """
    steps = math.ceil(math.ceil(rows / batch_rows) * epochs)
    if steps < FEWEST_STEPS:
        raise UserError(
            f"{rows:,} rows in batches of {batch_rows:,} make {steps} steps in {epochs:g} epochs; at least "
            f"{FEWEST_STEPS} are needed. Use a smaller training.batch_rows, such as "
            f"{max(1, rows // STEPS_PER_EPOCH):,}, or more epochs."
        )
    return steps


def study(
    rows: int, *, batches: Sequence[int], rates: Sequence[float], epochs: float = 1.0, evaluations: int = 0
) -> list[str]:
    """Entries for ``luthier compare``: plain SFT for every batch and rate, evaluated at equal samples seen.

    Args:
        rows: training rows.
        batches: rows per step; with ``evaluations`` the smallest must divide the others.
        rates: learning rates.
        epochs: of every run.
        evaluations: evaluations per epoch, at the same samples for every batch; 0 is none.

    Raises:
        UserError: a run would have fewer than ten steps, or the batches share no evaluation points.
    """
    entries = []
    for batch in batches:
        check_steps(rows, batch, epochs)
        often = ""
        if evaluations:
            often = f",training.eval_steps={_steps_between(rows, batches, evaluations) // batch}"
        entries += [f"sft[training.learning_rate={rate:g},training.batch_rows={batch}{often}]" for rate in rates]
    return entries


def _steps_between(rows: int, batches: Sequence[int], evaluations: int) -> int:
    """Samples between evaluations: a multiple of every batch, close to what was asked for."""
    common = math.lcm(*batches)
    if common > rows:
        raise UserError(
            f"batches of {', '.join(map(str, batches))} rows meet first after {common:,} samples, and an epoch has "
            f"{rows:,}: choose batches that divide each other."
        )
    return max(1, round(rows / evaluations / common)) * common
