"""What a run gained and what it lost, from its evaluation: changes with intervals, and the sentences that say so.

An evaluation is ``{"before": groups, "after": groups, "change": groups}`` with the groups ``target``, ``keep`` and
``calibration``, each ``{metric: {value, n, low, high, unit, direction}}`` or one level deeper by source. ``before`` and
``change`` (paired differences, where they were computed) may be absent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["better", "worse", "same", "unknown"]
GROUPS = ("target", "keep", "calibration")
# The metric of a verifier's judgements.
SCORE = "score"
MIXED = "mixed"
_NAMES = {
    "loss": "Loss",
    "perplexity": "Perplexity",
    "token_accuracy": "Token accuracy",
    "accuracy": "Accuracy",
    "mean_probability": "Mean probability of the target",
    "score": "Answers judged right",
    "exact": "Exact match",
    "exact_match": "Exact match",
    "numeric": "Numeric match",
    "judged": "Answers judged",
    "finished": "Answers that ended by themselves",
    "tokens": "Answer length",
    "f1_macro": "F1, macro",
    "f1_micro": "F1, micro",
    "matthews": "Matthews' correlation",
    "pearson": "Pearson's correlation",
    "spearman": "Spearman's rank correlation",
    "entity_f1": "Entity F1",
    "entity_precision": "Entity precision",
    "entity_recall": "Entity recall",
    "ece_equal_mass": "Calibration error, equal-mass bins",
    "ece_equal_width": "Calibration error, equal-width bins",
    "brier": "Brier score",
    "nll": "Negative log-likelihood",
}
# Neither more nor less of these is better by itself.
_NEUTRAL = {"tokens", "judged"}
# Which metric speaks for a group when no verifier's score is there.
_SPEAKERS = ("accuracy", "entity_f1", "f1_macro", "loss", "perplexity", "token_accuracy")
_SECONDARY = {*_SPEAKERS, *_NEUTRAL, "finished", "mean_probability", "f1_micro", "entity_precision", "entity_recall"}


@dataclass(frozen=True)
class Change:
    """One metric before and after.

    Attributes:
        name: the metric's key, with its source in front (``stories: loss``) where there are several.
        before, after: ``{value, n, low, high, unit, direction}``; before is None where it was not measured.
        value, low, high: after minus before with its interval; None where unknown.
        paired: whether the interval is of paired differences.
        status: whether the interval excludes zero, and on which side.
    """

    name: str
    before: Mapping[str, Any] | None
    after: Mapping[str, Any]
    value: float | None = None
    low: float | None = None
    high: float | None = None
    paired: bool = False
    status: Status = "unknown"

    @property
    def key(self) -> str:
        """The metric's key without its source."""
        return self.name.rpartition(": ")[2]

    @property
    def label(self) -> str:
        """The metric's name for readers."""
        source, _, key = self.name.rpartition(": ")
        name = _NAMES.get(key) or (key.replace("_", " ")[:1].upper() + key.replace("_", " ")[1:])
        return f"{name}, {source}" if source else name

    @property
    def unit(self) -> str:
        """The metric's unit."""
        return str(self.after.get("unit") or "")


@dataclass(frozen=True)
class Card:
    """What one group says in the verdict.

    Attributes:
        title: the group.
        status: of the metric that speaks for it.
        chip: the status in words.
        change: that metric; None where nothing was measured.
        note: what it is and by how much it changed, to stand under the two values.
        sentence: the same with the two values in it.
    """

    title: str
    status: Status
    chip: str
    change: Change | None
    note: str
    sentence: str


@dataclass(frozen=True)
class Verdict:
    """The headline and one card per group."""

    headline: str
    cards: list[Card] = field(default_factory=list)


def flatten(group: Mapping[str, Any], prefix: str = "") -> dict[str, Mapping[str, Any]]:
    """Metrics by name, those of a source named ``source: metric``; entries that are no metrics are left out."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, value in group.items():
        if isinstance(value, Mapping):
            if "value" in value:
                found[f"{prefix}{name}"] = value
            else:
                found |= flatten(value, f"{prefix}{name}: ")
    return found


def number(value: Any) -> float | None:
    """A finite float, or None."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def is_share(unit: str) -> bool:
    """Whether values are shown in per cent."""
    return unit.startswith(("share", "proportion", "fraction"))


def text(value: Any, unit: str = "", *, signed: bool = False) -> str:
    """A value for readers: per cent for shares (percentage points for signed ones), else three decimals and the unit.

    Numbers and units are joined by no-break spaces.
    """
    x = number(value)
    if x is None:
        return "∞" if isinstance(value, float) and math.isinf(value) else "–"
    if is_share(unit):
        shown, suffix = f"{100 * x:.1f}", "points" if signed else "%"
    else:
        size = abs(x)
        decimals = 3 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0
        shown = f"{x:,.{decimals}f}" if size >= 0.001 or x == 0 else f"{x:.2g}"
        suffix = unit if unit in ("nats", "tokens", "bits") else ""
    if shown.strip("-0.") == "":
        shown = shown.removeprefix("-")
    elif signed and x > 0:
        shown = "+" + shown
    shown = shown.replace("-", "−", 1) if shown.startswith("-") else shown
    return f"{shown}\N{NO-BREAK SPACE}{suffix}" if suffix else shown


def bare(shown: str) -> str:
    """A text of :func:`text` without its unit."""
    return shown.partition("\N{NO-BREAK SPACE}")[0]


def interval(metric: Mapping[str, Any] | Change, unit: str, *, signed: bool = False) -> str:
    """``low to high`` without units, or an empty string where it is not known."""
    low, high = (metric.low, metric.high) if isinstance(metric, Change) else (metric.get("low"), metric.get("high"))
    if number(low) is None or number(high) is None:
        return ""
    return " to ".join(bare(text(end, unit, signed=signed)) for end in (low, high))


def compare(name: str, before: Mapping[str, Any] | None, after: Mapping[str, Any], paired: Any = None) -> Change:
    """The change of one metric.

    Without a paired interval the two intervals are combined as those of independent estimates (R. G. Newcombe, 1998,
    method 10): for estimates on the same items, which are positively correlated, that is too wide rather than too
    narrow.
    """
    old, new = number((before or {}).get("value")), number(after.get("value"))
    if before is None or old is None or new is None:
        return Change(name, before, after)
    value, low, high = new - old, None, None
    if paired:
        low, high = number(paired.get("low")), number(paired.get("high"))
        value = number(paired.get("value")) or value
    else:
        ends = [number(m.get(k)) for m in (before, after) for k in ("low", "high")]
        if None not in ends:
            old_low, old_high, new_low, new_high = (float(e) for e in ends if e is not None)
            low = value - math.hypot(new - new_low, old_high - old)
            high = value + math.hypot(new_high - new, old - old_low)
    status: Status = "unknown"
    if low is not None and high is not None and name.rpartition(": ")[2] not in _NEUTRAL:
        up = after.get("direction") == "higher"
        status = "same" if low <= 0 <= high else "better" if (value > 0) == up else "worse"
    return Change(name, before, after, value, low, high, bool(paired), status)


def with_paired_changes(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluation with ``change`` computed from the judged items, where both sides have them for the same rows."""
    from luthier.evaluation.suite import compare_items

    before, after = ((evaluation.get(k) or {}).get("items") or {} for k in ("before", "after"))
    change: dict[str, dict[str, Any]] = {}
    for source, new in after.items():
        old = before.get(source) or []
        if new and [i["row"] for i in old] == [i["row"] for i in new]:
            group = "target" if source == "target" else "keep"
            scored = flatten((evaluation["after"]).get(group) or {})
            name = next((n for n in (f"{source}: {SCORE}", SCORE) if n in scored), None)
            if name:
                change.setdefault(group, {})[name] = compare_items(old, new)
    return {**evaluation, "change": {**change, **(evaluation.get("change") or {})}}


def changes(evaluation: Mapping[str, Any], group: str) -> list[Change]:
    """Every metric of a group, before against after."""
    before, after, paired = (flatten((evaluation.get(k) or {}).get(group) or {}) for k in ("before", "after", "change"))
    return [compare(name, before.get(name), metric, paired.get(name)) for name, metric in after.items()]


def speaker(found: list[Change]) -> Change | None:
    """The metric that speaks for the target: a verifier's score, else accuracy, F1 or loss."""
    scores = [c for c in found if is_share(c.unit) and c.after.get("direction") == "higher" and c.key not in _SECONDARY]
    ranked = [c for key in _SPEAKERS for c in found if c.key == key]
    return next(iter([*scores, *ranked, *found]), None)


def _described(change: Change) -> tuple[str, str]:
    """(note, sentence) of a card."""
    unit = change.unit
    after = text(change.after.get("value"), unit)
    if change.before is None or change.value is None:
        span = interval(change.after, unit)
        known = f" (interval {span})" if span else ""
        return f"{change.label}{known}; not measured before training.", f"{change.label}: {after}{known}."
    before, span = text(change.before["value"], unit), interval(change, unit, signed=True)
    difference = text(change.value, unit, signed=True) + (f" (interval {span})" if span else "")
    verb = (
        f"did not change clearly: {before} → {after}" if change.status == "same" else f"went from {before} to {after}"
    )
    return f"{change.label}: {difference}.", f"{change.label} {verb}, {difference}."


def verdict(evaluation: Mapping[str, Any]) -> Verdict:
    """The headline and the three cards: gained on the target, kept elsewhere, calibration."""
    if not evaluation.get("after"):
        return Verdict("No evaluation was made: nothing can be said about what was gained or lost.")
    chips: dict[str, dict[Status, str]] = {
        "target": {"better": "clear gain", "same": "no clear change", "worse": "clear loss", "unknown": "not compared"},
        "keep": {"better": "improved", "same": "kept", "worse": "forgotten in part", "unknown": "not compared"},
        "calibration": {"better": "improved", "same": "unchanged", "worse": "worse", "unknown": "not compared"},
    }
    titles = {"target": "Target", "keep": "General ability", "calibration": "Calibration"}
    absent = {
        "target": "No test data was given, so the gain on the target is not known.",
        "keep": "Forgetting was not measured (data.keep is empty).",
        "calibration": "Calibration was not measured.",
    }
    cards = []
    for group in GROUPS:
        found = changes(evaluation, group)
        change = _spokesman(group, found)
        status: Status = change.status if change else "unknown"
        chip = chips[group][status]
        if group == "keep" and status == "worse" and any(c.status == "better" for c in _kept(found)):
            chip = MIXED
        note, sentence = _described(change) if change else (absent[group], absent[group])
        cards.append(Card(titles[group], status, chip, change, note, sentence))
    loss_fell = any(c.key == "loss" and c.status == "better" for c in changes(evaluation, "target"))
    headline = _headline(cards[0].status, cards[1].status, mixed=cards[1].chip == MIXED, loss_fell=loss_fell)
    return Verdict(headline, cards)


def _spokesman(group: str, found: list[Change]) -> Change | None:
    if group == "target":
        return speaker(found)
    if group == "calibration":
        return next((c for key in ("ece_equal_mass", "ece_equal_width", "brier") for c in found if c.key == key), None)
    # What was lost most speaks for what was forgotten: the user must not learn of it from the small print.
    order: dict[Status, int] = {"worse": 0, "unknown": 1, "same": 2, "better": 3}

    def harm(change: Change) -> float:
        return (change.value or 0.0) * (-1 if change.after.get("direction") == "lower" else 1)

    return min(_kept(found), key=lambda c: (order[c.status], c.key != "loss", harm(c)), default=None)


def _kept(found: list[Change]) -> list[Change]:
    """The metrics by which forgetting is judged: loss, and scores by verifiers or accuracy of each source."""
    judged = [c for c in found if c.key in ("loss", "accuracy", "token_accuracy", "entity_f1", "f1_macro", SCORE)]
    return judged or found


def _headline(target: Status, keep: Status, *, mixed: bool, loss_fell: bool) -> str:
    first = {
        "better": "A clear gain on the target",
        "same": "No clear gain on the target, though its loss fell" if loss_fell else "No clear gain on the target",
        "worse": "The target got worse",
        "unknown": "The gain on the target is not known",
    }[target]
    good = target == "better"
    second = {
        "better": ", and general ability improved too" if good else ", though general ability improved",
        "same": ", and nothing measurable was forgotten" if good else "; nothing measurable was forgotten",
        "worse": ", paid for with some forgetting" if good else ", and something was forgotten",
        "unknown": "; forgetting was not measured",
    }[keep]
    if mixed:
        second = "; general ability gained in some measures and lost in others"
    return first + second + "."
