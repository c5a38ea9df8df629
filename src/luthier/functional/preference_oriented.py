"""Preference of a model over fixed scores of other models, by the example: the loss, its weight, and the scores.

Shapes: B examples. Likelihoods and scores are mean log-probabilities of an answer, in nats per token or per character.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from luthier.core.errors import UserError, did_you_mean
from luthier.core.store import content_hash
from luthier.functional.discriminative import place

COLUMN = "ref_score"
# What of a canonical row decides the text that is learnt and scored.
ROW = ("kind", "prompt", "separator", "completion", "system", "messages", "tools")
RULES = ("mean", "max", "min")
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def preference_loss(l_B: torch.Tensor, s_B: torch.Tensor, beta: float, gamma: float) -> torch.Tensor:
    """-log sigmoid(beta (l - S) + gamma) [B], finite for any margin."""
    return -torch.nn.functional.logsigmoid(beta * (l_B - s_B) + gamma)


def quality_weight(l_B: torch.Tensor, s_B: torch.Tensor, beta: float, gamma: float) -> torch.Tensor:
    """The weight c = sigmoid(beta (S - l) - gamma) [B]; the gradient of :func:`preference_loss` by l is -beta c."""
    return torch.sigmoid(beta * (s_B - l_B) - gamma)


def answer_likelihood(
    logp_N: torch.Tensor, weight_N: torch.Tensor, sequence_N: torch.Tensor, examples: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(l_B, weight_B, count_B)``: mean log-probability of each example, its weight, and its number of positions.

    Args:
        logp_N: log-probability of each target.
        weight_N: position weights; those of an example are relative to each other in l, their mean is its weight.
        sequence_N: int64, which example each position belongs to.
        examples: B.

    An example without positions, or whose positions all weigh nothing, has l = 0 and weight 0.
    """
    weight_N = weight_N.to(logp_N.dtype)
    sums = [torch.zeros(examples, dtype=logp_N.dtype, device=logp_N.device) for _ in range(2)]
    total_B, mass_B = (s.index_add(0, sequence_N, x) for s, x in zip(sums, (logp_N * weight_N, weight_N), strict=True))
    count_B = torch.bincount(sequence_N, minlength=examples)
    one = torch.ones_like(mass_B)
    l_B = total_B / torch.where(mass_B > 0, mass_B, one)
    return l_B, mass_B / torch.where(count_B > 0, count_B.to(mass_B.dtype), one), count_B


# -- scores of rows


@dataclass(frozen=True)
class Score:
    """The score S of a row.

    Attributes:
        value: nats.
        per: ``token`` or ``char``.
        text: hash of the row as it was scored; None for a score without one.
    """

    value: float
    per: str = "token"
    text: str | None = None

    def to_json(self) -> dict[str, Any]:
        """What stands in the column."""
        return {"value": self.value, "per": self.per, "text": self.text}


def score_of(row: Mapping[str, Any]) -> Score:
    """The score that a row carries: a number, or what the data stage wrote.

    Raises:
        UserError: there is none, or it is not one.
    """
    held = row.get(COLUMN)
    if held is None:
        raise UserError(
            "preference-oriented-sft: the row has no score: put the data stage 'preference-oriented-sft' into "
            f"data.stages, or give the rows a column '{COLUMN}' (a mean log-probability per token).",
            where=place(row),
        )
    found = held if isinstance(held, Mapping) else {"value": held}
    value = found.get("value")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"the column '{COLUMN}' must hold a number, not {value!r}.", where=place(row))
    return Score(float(value), found.get("per", "token"), found.get("text"))


def text_hash(row: Mapping[str, Any]) -> str:
    """A hash of the conversation, or of prompt and answer, of a canonical row."""
    return content_hash([row.get(name) for name in ROW])


def characters(row: Mapping[str, Any]) -> int:
    """Characters of the answers of a row that are learnt.

    Raises:
        UserError: the row is neither a pair nor a conversation.
    """
    if row["kind"] == "pair":
        return len(row["completion"])
    if row["kind"] == "chat":
        said = [m for m in json.loads(row["messages"]) if m["role"] == "assistant" and m.get("weight", 1)]
        return sum(len(m.get("content") or "") for m in said)
    raise UserError(f"a row of kind '{row['kind']}' has no answer whose characters can be counted.", where=place(row))


def merge_weights(rule: str | Sequence[float], names: Sequence[str]) -> list[float] | str:
    """A merge rule as ``max``, ``min``, or the weight of each model (summing to 1).

    Args:
        rule: ``mean``, ``max``, ``min``, one model (as given, or the last part of its path), or weights.
        names: the models.

    Raises:
        UserError: there is no such rule or model, or the weights do not fit.
    """
    if rule in ("max", "min"):
        return str(rule)
    if rule == "mean":
        return [1 / len(names)] * len(names)
    if isinstance(rule, str):
        chosen = [rule in (name, name.rstrip("/").rpartition("/")[2]) for name in names]
        if sum(chosen) != 1:
            accepted = [*RULES, *names]
            raise UserError(
                f"merge: '{rule}' names {sum(chosen) or 'none'} of the models.{did_you_mean(rule, accepted)} Accepted: "
                f"{', '.join(accepted)}, or a list of weights."
            )
        return [float(c) for c in chosen]
    if len(rule) != len(names):
        raise UserError(f"merge: {len(rule)} weights for {len(names)} models ({', '.join(names)}).")
    if min(rule) < 0 or not sum(rule) > 0:
        raise UserError("merge: weights must not be negative, and one must be above 0.")
    return [w / sum(rule) for w in rule]


def merged(values: Sequence[float | None], rule: list[float] | str) -> float | None:
    """The score of one row from those of the models; None where one is missing.

    Args:
        values: one score per model.
        rule: from :func:`merge_weights`.
    """
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return None
    if isinstance(rule, str):
        return max(known) if rule == "max" else min(known)
    return math.fsum(w * v for w, v in zip(rule, known, strict=True))


def quantiles(values: Iterable[float], sources: Iterable[str]) -> dict[str, dict[str, float]]:
    """Rows, and quantiles of the scores, by source."""
    by: dict[str, list[float]] = {}
    for value, source in zip(values, sources, strict=True):
        by.setdefault(source, []).append(value)
    return {
        source: {"rows": len(some), **{f"q{q:g}": float(v) for q, v in zip(QUANTILES, _at(some), strict=True)}}
        for source, some in sorted(by.items())
    }


def _at(values: list[float]) -> np.ndarray:
    return np.quantile(np.asarray(values, dtype=np.float64), QUANTILES)


class Correlation:
    """Pearson's correlation of two quantities that come in pieces; its state is six numbers."""

    def __init__(self, sums: Sequence[float] = (0.0,) * 6) -> None:
        self.sums = [float(s) for s in sums]

    def add(self, x: Sequence[float], y: Sequence[float]) -> None:
        """Take further pairs."""
        for a, b in zip(x, y, strict=True):
            for i, value in enumerate((1.0, a, b, a * a, b * b, a * b)):
                self.sums[i] += value

    @property
    def value(self) -> float | None:
        """The correlation; None while one of the two has not varied."""
        n, x, y, xx, yy, xy = self.sums
        if n < 2:
            return None
        vx, vy = xx / n - (x / n) ** 2, yy / n - (y / n) ** 2
        return (xy / n - x * y / n**2) / math.sqrt(vx * vy) if min(vx, vy) > 1e-12 else None
