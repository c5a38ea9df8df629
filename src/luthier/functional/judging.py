"""Rewards that a method names in its options: building them, and checking what they give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from luthier.core import registry
from luthier.core.errors import UserError

RewardSpec = str | dict[str, Any]


def built(spec: RewardSpec, who: str) -> tuple[str, Any]:
    """Name and callable of a reward that was given by name, or as ``{name: options}``.

    Raises:
        UserError: there is no such reward, or its options are wrong.
    """
    if isinstance(spec, Mapping) and len(spec) != 1:
        raise UserError(f"{who}: a reward is {{name: options}} with one name, not {dict(spec)!r}.")
    slug, options = (spec, {}) if isinstance(spec, str) else next(iter(spec.items()))
    try:
        return slug, registry.get("reward", slug).build(options or {})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{who}: reward {slug}: {place}: {first['msg']}.") from None


def checked(slug: str, scores: Any, rows: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """The scores of a reward as numbers [B], NaN where it does not apply.

    Raises:
        UserError: one is missing or too many, or is not a number.
    """
    values = list(scores)
    if len(values) != len(rows):
        raise UserError(
            f"the reward '{slug}' gave {len(values)} scores for {len(rows)} completions; it must give one for each."
        )
    numbers = [None if v is None else float(v) for v in values]
    for number, row in zip(numbers, rows, strict=True):
        if number is not None and not np.isfinite(number):
            raise UserError(
                f"the reward '{slug}' gave {number} for a completion. Return a number, or None where it cannot judge.",
                where=f"{row.get('source') or 'data.train'}, row {row.get('row', '?')}",
            )
    return torch.tensor([np.nan if n is None else n for n in numbers], dtype=torch.float64)
