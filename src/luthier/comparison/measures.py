"""From what trials left on disk to values and paired differences, metric by metric.

Everything is computed again from the positions that each trial kept, so that two methods are compared on the same rows;
verifiers' scores come from the judged items. A metric is named ``<group>/<metric>``, with the source in between where a
group has several.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from luthier.core.registry import TOKEN_TASKS
from luthier.evaluation.accumulators import GROUPS, entities, is_entity_scheme, macro_f1
from luthier.functional import calibration
from luthier.functional.paired_trials import (
    PairedDifference,
    Ratio,
    compare_ratios,
    difference,
    group_variance,
    ratio,
)

Arrays = Mapping[str, NDArray[Any]]
SCORE = "score"


@dataclass(frozen=True)
class Metric:
    """A column of the comparison.

    Attributes:
        name: ``target/loss``, ``keep/stories/loss``, ``calibration/brier``.
        group: target, keep, calibration or drift.
        label: for readers.
        unit: of the value.
        direction: which way is better.
        primary: whether it speaks for its group.
    """

    name: str
    group: str
    label: str
    unit: str
    direction: str
    primary: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        return dict(vars(self))


@dataclass
class Measured:
    """What one trial measured, read when it is asked for.

    Attributes:
        folder: of the trial.
        task: of the recipe.
        labels: class names.
    """

    folder: Path
    task: str
    labels: Sequence[str] = ()
    _sums: dict[str, Ratio] = field(default_factory=dict)

    @cached_property
    def positions(self) -> dict[str, dict[str, NDArray[Any]]]:
        """Source -> arrays over its measured positions."""
        found: dict[str, dict[str, NDArray[Any]]] = {}
        for name, array in load_file(self.folder / "rows.safetensors").items():
            source, _, column = name.rpartition("/")
            found.setdefault(source, {})[column] = array
        return found

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """``evaluation.json``, the numbers after training."""
        return json.loads((self.folder / "evaluation.json").read_text(encoding="utf-8"))["after"]

    @cached_property
    def drift(self) -> dict[str, float]:
        """``kl`` (nats, tuned from base, held-out rows) and ``weights`` (relative change), where they were measured."""
        file = self.folder / "analysis.json"
        if not file.is_file():
            return {}
        rows = [row for table in json.loads(file.read_text(encoding="utf-8")) for row in table["rows"]]
        wanted = {("KL(tuned|base)", "held-out rows"): "kl", ("relative weight change", "all"): "weights"}
        return {wanted[row[1], row[2]]: row[3] for row in rows if (row[1], row[2]) in wanted and row[3] is not None}

    def items(self, source: str) -> list[Mapping[str, Any]]:
        """Judged answers of a source."""
        return self.evaluation.get("items", {}).get(source) or []

    def sums(self, source: str, metric: str) -> Ratio:
        """Per row, numerator and denominator of a metric that is a ratio of sums."""
        key = f"{source}/{metric}"
        if key not in self._sums:
            self._sums[key] = self._ratio(source, metric)
        return self._sums[key]

    def _ratio(self, source: str, metric: str) -> Ratio:
        if metric == SCORE:
            scores = [item["score"] for item in self.items(source)]
            known = np.array([s is not None for s in scores], np.float64)
            return np.array([s or 0.0 for s in scores], np.float64), known
        arrays = self.positions[source]
        rows = int(arrays["row"].max()) + 1
        if metric == "entity_f1":
            return self._entity_sums(arrays, rows)
        value_N = VALUES[metric](arrays)
        return _summed(arrays["row"], value_N, rows), _summed(arrays["row"], np.ones_like(value_N), rows)

    def _entity_sums(self, arrays: Arrays, rows: int) -> Ratio:
        twice_right, predicted_and_true = np.zeros(rows), np.zeros(rows)
        borders = np.flatnonzero(np.diff(arrays["row"])) + 1
        for part in np.split(np.arange(arrays["row"].size), borders):
            guess = entities([self.labels[i] for i in arrays["top1"][part]])
            truth = entities([self.labels[i] for i in arrays["target"][part]])
            row = arrays["row"][part[0]]
            twice_right[row] += 2 * len(guess & truth)
            predicted_and_true[row] += len(guess) + len(truth)
        return twice_right, predicted_and_true


def _summed(index_N: NDArray[Any], value_N: NDArray[Any], size: int) -> NDArray[np.float64]:
    """[size] sums of the values by index."""
    return np.bincount(index_N, value_N, minlength=size).astype(np.float64)


def _correct(arrays: Arrays) -> NDArray[np.float64]:
    return (arrays["top1"] == arrays["target"]).astype(np.float64)


# Metrics that are means over positions.
VALUES: dict[str, Callable[[Arrays], NDArray[np.float64]]] = {
    "loss": lambda a: -a["logp"].astype(np.float64),
    "accuracy": _correct,
    "token_accuracy": _correct,
    "mean_probability": lambda a: np.exp(a["logp"].astype(np.float64)),
    "brier": lambda a: calibration.brier(np.exp(a["logp"].astype(np.float64)), a["collision"]),
    "nll": lambda a: -a["logp"].astype(np.float64),
}
BINS = calibration.BINS


def calibration_error(arrays: Arrays, keep_N: NDArray[np.bool_] | slice = slice(None)) -> float:
    """ECE with bins of equal mass over the positions that are kept."""
    log_confidence = arrays["top1_logp"][keep_N].astype(np.float64)
    cell_N = calibration.confidence_cell(log_confidence)
    count_C, confidence_C, correct_C = (
        _summed(cell_N, value_N, calibration.CELLS)
        for value_N in (np.ones_like(log_confidence), np.exp(log_confidence), _correct(arrays)[keep_N])
    )
    return calibration.binned_error(*calibration.equal_mass_bins(count_C, confidence_C, correct_C, BINS))


def reliability(arrays: Arrays) -> list[dict[str, float]]:
    """Bins of equal mass: mean confidence, share that is right, and how many."""
    log_confidence = arrays["top1_logp"].astype(np.float64)
    order = np.argsort(log_confidence, kind="stable")
    correct, confidence = _correct(arrays)[order], np.exp(log_confidence[order])
    return [
        {"confidence": float(confidence[p].mean()), "accuracy": float(correct[p].mean()), "n": int(p.size)}
        for p in np.array_split(np.arange(order.size), BINS)
        if p.size
    ]


def f1_macro(arrays: Arrays, keep_N: NDArray[np.bool_] | slice = slice(None), classes: int = 0) -> float:
    """Mean F1 over classes met among the positions that are kept."""
    top1, target = arrays["top1"][keep_N], arrays["target"][keep_N]
    hit = top1[top1 == target]
    return macro_f1(np.stack([np.bincount(x, minlength=classes).astype(float) for x in (hit, top1, target)], axis=1))


def metrics_of(base: Measured, keep: Sequence[str]) -> list[Metric]:
    """The columns that a comparison has, from what its base measured."""
    names = {
        "loss": ("Loss", "nats", "lower"),
        "accuracy": ("Accuracy", "share", "higher"),
        "token_accuracy": ("Token accuracy", "share", "higher"),
        "score": ("Answers judged right", "share", "higher"),
        "entity_f1": ("Entity F1", "share", "higher"),
        "f1_macro": ("F1, macro", "share", "higher"),
    }
    right = "token_accuracy" if base.task in TOKEN_TASKS else "accuracy"

    def of_source(source: str) -> list[str]:
        judged = [SCORE] if any(item["score"] is not None for item in base.items(source)) else []
        if base.task in TOKEN_TASKS:
            return [*judged, "loss", right]
        tags = ["entity_f1"] if base.task == "token-classification" and is_entity_scheme(base.labels) else []
        return [*tags, right, "f1_macro", "loss"]

    found: list[Metric] = []
    if "target" in base.positions:
        found += [Metric(f"target/{n}", "target", *names[n], primary=i == 0) for i, n in enumerate(of_source("target"))]
    for number, source in enumerate(keep):
        where = f", {source}" if len(keep) > 1 else ""
        for name in of_source(source):
            label, unit, direction = names[name]
            primary = number == 0 and name == "loss"
            found.append(Metric(f"keep/{source}/{name}", "keep", label + where, unit, direction, primary))
    if "target" in base.positions:
        found += [
            Metric("calibration/ece", "calibration", "Calibration error", "share", "lower", True),
            Metric("calibration/brier", "calibration", "Brier score", "score", "lower"),
        ]
    return [
        *found,
        Metric("drift/kl", "drift", "Divergence from the base", "nats", "lower", True),
        Metric("drift/weights", "drift", "Change of the weights", "share of their norm", "lower"),
    ]


def _place(metric: Metric) -> tuple[str, str]:
    """(source, name) of a metric."""
    _, _, rest = metric.name.partition("/")
    source, _, name = rest.rpartition("/")
    return source or "target", name


def value(metric: Metric, trial: Measured) -> float:
    """The value of one trial; NaN where it was not measured."""
    source, name = _place(metric)
    if metric.group == "drift":
        return float(trial.drift.get(name, math.nan))
    if name == "ece":
        return calibration_error(trial.positions[source])
    if name == "f1_macro":
        return f1_macro(trial.positions[source], classes=len(trial.labels))
    return ratio(trial.sums(source, name))


def compare(
    metric: Metric, method: Sequence[Measured], reference: Sequence[Measured], *, confidence: float
) -> PairedDifference | None:
    """``method - reference`` over the same seeds; None where it says nothing (the base has no drift)."""
    source, name = _place(metric)
    values = [(value(metric, a), value(metric, b)) for a, b in zip(method, reference, strict=True)]
    per_seed = [a - b for a, b in values]
    if any(math.isnan(d) for d in per_seed):
        return None
    if metric.group == "drift":  # one number per trial: seeds alone
        if len(per_seed) == 1:
            return difference(per_seed, 0.0 if per_seed[0] == 0 else math.nan, 1, confidence=confidence)
        return difference(per_seed, 0.0, 1, confidence=confidence)
    if name not in ("ece", "f1_macro"):
        sums = [[trial.sums(source, name) for trial in side] for side in (method, reference)]
        return compare_ratios(*sums, confidence=confidence)
    arms = [trial.positions[source] for trial in (*method, *reference)]
    group_N = arms[0]["row"] % GROUPS
    groups = np.unique(group_N)

    def without(arm: int, group: int) -> float:
        keep_N = group_N != groups[group]
        return (
            calibration_error(arms[arm], keep_N)
            if name == "ece"
            else f1_macro(arms[arm], keep_N, len(method[0].labels))
        )

    same = all(
        np.array_equal(a[k], b[k]) for a, b in zip(arms[: len(method)], arms[len(method) :], strict=True) for k in a
    )
    v_items = 0.0 if same else group_variance(without, len(arms), groups.size)
    rows = int(np.unique(arms[0]["row"]).size)
    return difference(per_seed, v_items, rows, degrees=groups.size - 1, confidence=confidence)


def absolute(metric: Metric, trials: Sequence[Measured], *, confidence: float) -> dict[str, Any]:
    """Mean over seeds with its interval, and the value of each seed."""
    source, name = _place(metric)
    per_seed = [value(metric, trial) for trial in trials]
    made: dict[str, Any] = {
        "value": float(np.mean(per_seed)),
        "per_seed": per_seed,
        "n": None,
        "low": None,
        "high": None,
    }
    if math.isnan(made["value"]) or metric.group == "drift":
        return made
    if name not in ("ece", "f1_macro"):
        sums = [trial.sums(source, name) for trial in trials]
        # A ratio against the constant nothing: the variance of the value itself.
        nothing = [(np.zeros_like(a), np.ones_like(b)) for a, b in sums]
        found = compare_ratios(sums, nothing, confidence=confidence)
        made |= {"n": int(sum(float(b.sum()) for _, b in sums[:1])), "low": found.low, "high": found.high}
    else:
        made["n"] = int(trials[0].positions[source]["row"].size)
    return made
