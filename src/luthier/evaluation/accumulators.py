"""Metrics as streaming sums: memory does not grow with the data and no logits are kept.

Each accumulator takes :class:`Observed`, the per-position statistics of one batch, and gives
``{metric: {value, n, low, high, unit, direction}}``. Means over positions have intervals clustered by sequence;
calibration error and F1, which are no means, have delete-a-group jackknife intervals over at most 50 groups of
sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from luthier.functional import calibration
from luthier.functional.statistics import ClusteredMean, Estimate, group_jackknife

Metric = dict[str, Any]
Array = NDArray[np.float64]
Index = NDArray[np.int64]
GROUPS = 50


def as_metric(estimate: Estimate, unit: str, direction: Literal["higher", "lower"]) -> Metric:
    """The JSON-able form of a metric; what is not known, or beyond the range of a float, is None."""
    value, low, high = (float(x) if math.isfinite(x) else None for x in (estimate.value, estimate.low, estimate.high))
    return {
        "value": value,
        "n": estimate.n,
        "low": low,
        "high": high,
        "unit": unit,
        "direction": direction,
    }


@dataclass(frozen=True)
class Observed:
    """What the head said about the N supervised positions of a batch, in numpy.

    Attributes:
        logp_N: log-probability of the target, nats.
        top1_N: most likely token or class.
        top1_logp_N: its log-probability.
        collision_N: sum of squared probabilities.
        target_N: the true token or class.
        sequence_N: which example of the batch.
        examples: B.
        first: examples seen before this batch.
    """

    logp_N: Array
    top1_N: Index
    top1_logp_N: Array
    collision_N: Array
    target_N: Index
    sequence_N: Index
    examples: int
    first: int

    @property
    def correct_N(self) -> NDArray[np.bool_]:
        """Whether the most likely token or class is the target."""
        return self.top1_N == self.target_N

    @property
    def group_N(self) -> Index:
        """Jackknife group of each position: its example's running number modulo the number of groups."""
        return (self.first + self.sequence_N) % GROUPS


class Accumulator(Protocol):
    """Takes batches, gives metrics."""

    def add(self, seen: Observed) -> None:
        """Take one batch."""

    def metrics(self, confidence: float) -> dict[str, Metric]:
        """The metrics of all batches taken, with intervals of this confidence."""


@dataclass(frozen=True)
class MeanOf:
    """A metric that is a mean over positions.

    Attributes:
        values: the value of each position.
        unit: of the reported value.
        direction: whether more is better.
        within: smallest and largest possible value.
        report: an increasing function applied to the mean and to its interval.
    """

    values: Callable[[Observed], Any]
    unit: str
    direction: Literal["higher", "lower"]
    within: tuple[float, float] = (0.0, math.inf)
    report: Callable[[float], float] | None = None


class Means:
    """Means over positions with intervals clustered by sequence."""

    def __init__(self, definitions: dict[str, MeanOf]) -> None:
        self.definitions = definitions
        self._means = {name: ClusteredMean() for name in definitions}

    def add(self, seen: Observed) -> None:
        """Take one batch."""
        count_B = np.bincount(seen.sequence_N, minlength=seen.examples)
        for name, definition in self.definitions.items():
            values_N = np.asarray(definition.values(seen), np.float64)
            self._means[name].add(np.bincount(seen.sequence_N, values_N, minlength=seen.examples), count_B)

    def metrics(self, confidence: float) -> dict[str, Metric]:
        """One entry per definition."""
        found = {}
        for name, definition in self.definitions.items():
            estimate = self._means[name].estimate(confidence).clipped(*definition.within)
            if definition.report is not None:
                estimate = estimate.mapped(definition.report)
            found[name] = as_metric(estimate, definition.unit, definition.direction)
        return found


class Kept:
    """Every position as it is, for comparisons of two models row by row: 28 bytes a position."""

    def __init__(self) -> None:
        self._parts: list[dict[str, NDArray[Any]]] = []

    def add(self, seen: Observed) -> None:
        """Take one batch."""
        self._parts.append(
            {
                "row": (seen.first + seen.sequence_N).astype(np.int32),
                "target": seen.target_N.astype(np.int32),
                "top1": seen.top1_N.astype(np.int32),
                "logp": seen.logp_N,
                "top1_logp": seen.top1_logp_N.astype(np.float32),
                "collision": seen.collision_N.astype(np.float32),
            }
        )

    def metrics(self, confidence: float) -> dict[str, Metric]:
        """None: what was taken is :meth:`arrays`."""
        return {}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """[N] each: ``row`` (the running number of the example), ``target``, ``top1`` and the statistics."""
        return {name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}


def _filled(sums_GX: Array, count_GX: Array) -> Array:
    """The groups that hold anything."""
    return sums_GX[count_GX.reshape(GROUPS, -1).sum(axis=1) > 0]


class Calibration:
    """Expected calibration error with equal-mass and equal-width bins, Brier score and negative log-likelihood.

    Equal-width bins are exact. Equal-mass bins are cut from a histogram of 4096 cells in log-odds of the confidence
    (see :func:`luthier.functional.calibration.confidence_cell` for what that costs). Memory: 5 MB.
    """

    def __init__(self, bins: int = calibration.BINS) -> None:
        self.bins = bins
        self._width = np.zeros((GROUPS, bins, 3))
        self._cells = np.zeros((GROUPS, calibration.CELLS, 3))
        self._means = Means(
            {
                "brier": MeanOf(
                    lambda o: calibration.brier(np.exp(o.logp_N), o.collision_N), "score", "lower", (0.0, 2.0)
                ),
                "nll": MeanOf(lambda o: calibration.negative_log_likelihood(o.logp_N), "nats", "lower"),
            }
        )

    def add(self, seen: Observed) -> None:
        """Take one batch."""
        confidence_N = np.exp(seen.top1_logp_N)
        value_N3 = np.stack([np.ones_like(confidence_N), confidence_N, seen.correct_N], axis=1)
        np.add.at(self._width, (seen.group_N, calibration.width_bin(confidence_N, self.bins)), value_N3)
        np.add.at(self._cells, (seen.group_N, calibration.confidence_cell(seen.top1_logp_N)), value_N3)
        self._means.add(seen)

    def metrics(self, confidence: float) -> dict[str, Metric]:
        """``ece_equal_mass``, ``ece_equal_width``, ``brier`` and ``nll``."""
        n = int(self._width[..., 0].sum())

        def equal_width(sums_B3: Array) -> float:
            return calibration.binned_error(*sums_B3.T)

        def equal_mass(sums_C3: Array) -> float:
            count_C, confidence_C, correct_C = sums_C3.T
            return calibration.binned_error(*calibration.equal_mass_bins(count_C, confidence_C, correct_C, self.bins))

        found = {}
        for name, statistic, sums in (
            ("ece_equal_mass", equal_mass, self._cells),
            ("ece_equal_width", equal_width, self._width),
        ):
            estimate = group_jackknife(statistic, _filled(sums, sums[..., 0]), n, confidence).clipped(0.0, 1.0)
            found[name] = as_metric(estimate, f"share, {self.bins} bins", "lower")
        return {**found, **self._means.metrics(confidence)}


def f1_scores(sums_K3: Array) -> Array:
    """F1 of each class from its true positives, predictions and true members [K, 3]; NaN for a class never met."""
    true_positive_K, predicted_K, actual_K = sums_K3.T
    met_K = predicted_K + actual_K
    return np.divide(2 * true_positive_K, met_K, out=np.full(met_K.shape, np.nan), where=met_K > 0)


def macro_f1(sums_K3: Array) -> float:
    """Mean F1 over the classes that are predicted or true at least once."""
    scores = f1_scores(sums_K3)
    return float(np.nanmean(scores)) if np.isfinite(scores).any() else math.nan


def micro_f1(sums_K3: Array) -> float:
    """F1 of the counts summed over classes."""
    return float(f1_scores(sums_K3.sum(axis=0, keepdims=True))[0])


def matthews(sums_K3: Array) -> float:
    """Matthews' correlation of predicted and true classes (Gorodkin's for several); 0 where one side is constant."""
    right, predicted_K, true_K = sums_K3[:, 0].sum(), sums_K3[:, 1], sums_K3[:, 2]
    n = true_K.sum()
    scale = (n * n - predicted_K @ predicted_K) * (n * n - true_K @ true_K)
    return float((right * n - predicted_K @ true_K) / math.sqrt(scale)) if scale > 0 else 0.0


class ClassF1:
    """F1 over classes and Matthews' correlation; for one label per position micro F1 equals accuracy."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = list(labels)
        self._sums = np.zeros((GROUPS, len(self.labels), 3))
        self._n = 0

    def add(self, seen: Observed) -> None:
        """Take one batch."""
        self._n += seen.target_N.size
        group_N = seen.group_N
        np.add.at(self._sums[..., 0], (group_N[seen.correct_N], seen.target_N[seen.correct_N]), 1)
        np.add.at(self._sums[..., 1], (group_N, seen.top1_N), 1)
        np.add.at(self._sums[..., 2], (group_N, seen.target_N), 1)

    def metrics(self, confidence: float) -> dict[str, Metric]:
        """``f1_macro``, ``f1_micro`` and ``matthews``."""
        sums = _filled(self._sums, self._sums)
        found = {
            name: as_metric(group_jackknife(fn, sums, self._n, confidence).clipped(0.0, 1.0), "share", "higher")
            for name, fn in (("f1_macro", macro_f1), ("f1_micro", micro_f1))
        }
        correlation = group_jackknife(matthews, sums, self._n, confidence).clipped(-1.0, 1.0)
        return found | {"matthews": as_metric(correlation, "correlation", "higher")}


def is_entity_scheme(labels: Sequence[str]) -> bool:
    """Whether the tags are BIO or BIOES: ``O`` and types with a prefix ``B-``, ``I-``, ``E-`` or ``S-``."""
    typed = [tag for tag in labels if tag != "O"]
    return bool(typed) and all(tag[:2] in ("B-", "I-", "E-", "S-") for tag in typed)


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The entities ``(type, first, last)`` of one sequence of BIO or BIOES tags.

    As in the CoNLL evaluation, an ``I-`` (or ``E-``) that continues nothing opens an entity of its own.
    """
    found: set[tuple[str, int, int]] = set()
    start: int | None = None
    previous, kind = "O", ""
    for index, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        continues = prefix in ("I", "E") and start is not None and name == kind and previous not in ("E", "S")
        if start is not None and not continues:
            found.add((kind, start, index - 1))
            start = None
        if tag != "O" and not continues:
            start, kind = index, name
        previous = prefix
    return found


class EntityF1:
    """Precision, recall and F1 of whole entities: type and both borders must be right."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = list(labels)
        self._sums = np.zeros((GROUPS, 1, 3))
        self._groups_seen = np.zeros(GROUPS, bool)
        self._entities = 0

    def add(self, seen: Observed) -> None:
        """Take one batch; the positions of a sequence stand in their order."""
        order = np.argsort(seen.sequence_N, kind="stable")
        borders = np.flatnonzero(np.diff(seen.sequence_N[order])) + 1
        for part in np.split(order, borders):
            if part.size:
                predicted = entities([self.labels[i] for i in seen.top1_N[part]])
                actual = entities([self.labels[i] for i in seen.target_N[part]])
                group = seen.group_N[part[0]]
                self._sums[group, 0] += (len(predicted & actual), len(predicted), len(actual))
                self._groups_seen[group] = True
                self._entities += len(actual)

    def metrics(self, confidence: float) -> dict[str, Metric]:
        """``entity_f1``, ``entity_precision`` and ``entity_recall``; ``n`` counts true entities."""

        def share(column: int) -> Callable[[Array], float]:
            return lambda s: float(s[0, 0] / s[0, column]) if s[0, column] else math.nan

        sums = self._sums[self._groups_seen]
        statistics = {"entity_f1": micro_f1, "entity_precision": share(1), "entity_recall": share(2)}
        return {
            name: as_metric(group_jackknife(fn, sums, self._entities, confidence).clipped(0.0, 1.0), "share", "higher")
            for name, fn in statistics.items()
        }
