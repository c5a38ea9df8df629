"""The drawings of a comparison's page, from the entries of ``comparison.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from luthier.comparison import page_plots as plots
from luthier.comparison.page_values import GROUPS, cost_text, measured
from luthier.runs import verdict as judging

# The first of these that was counted is the cost of the trade-off.
_PLOTTED_COSTS = ("flops", "seconds", "supervised_tokens")


def differences(
    entries: Sequence[Mapping[str, Any]], looks: Sequence[plots.Look], primary: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Per group a drawing of what each method changes against SFT in its primary metric."""
    drawn = []
    for group in ("target", "keep", "calibration"):
        if group not in primary:
            continue
        metric = primary[group]
        factor, unit = _axis_unit(str(metric.get("unit") or ""))
        spots = []
        for entry, look in zip(entries, looks, strict=True):
            difference = (entry.get("vs_sft") or {}).get(metric["name"]) or {}
            value = judging.number(difference.get("value"))
            if entry.get("kind") == "method" and value is not None:
                cell = measured(entry, metric, "vs_sft")["difference"]
                span = f", interval {cell['interval']}" if cell["interval"] else ""
                spots.append(
                    plots.Spot(
                        look,
                        value * factor,
                        x_span=_span(difference, factor),
                        words=f"{look.name}: {cell['text']}{span}, {cell['word']}",
                        verdict=str(cell["verdict"]),
                    )
                )
        wish = {"higher": "right is better", "lower": "left is better"}.get(str(metric.get("direction")), "")
        label = str(metric.get("label") or metric["name"])
        svg = plots.differences(
            spots,
            title=f"{label}: difference from SFT",
            x_label=", ".join(p for p in ("difference from SFT", unit, wish) if p),
        )
        drawn.append({"group": GROUPS[group], "title": label, "svg": _markup(svg)})
    return [d for d in drawn if d["svg"]]


def _axis_unit(unit: str) -> tuple[float, str]:
    return (100.0, "points") if judging.is_share(unit) else (1.0, unit)


def _span(found: Mapping[str, Any], factor: float) -> tuple[float, float] | None:
    low, high = judging.number(found.get("low")), judging.number(found.get("high"))
    if low is None or high is None:
        return None
    return (min(low * factor, high * factor), max(low * factor, high * factor))


def _markup(svg: str) -> Any:
    """The drawings escape every text they are given."""
    from markupsafe import Markup

    return Markup(svg)


class _Place(NamedTuple):
    """Where an entry stands on one axis, with its interval and in words."""

    value: float
    span: tuple[float, float] | None
    words: str


def trade_offs(
    comparison: Mapping[str, Any],
    entries: Sequence[Mapping[str, Any]],
    looks: Sequence[plots.Look],
    primary: Mapping[str, Mapping[str, Any]],
    costs: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Gain against forgetting, and gain against cost; a trade-off without its two measures is left out."""
    if "target" not in primary:
        return []
    fronts = comparison.get("pareto") or {}
    gains, y_label = _since_base(entries, primary["target"], good=True)
    drawn = []
    if "keep" in primary:
        drawn.append(("forgetting", *_since_base(entries, primary["keep"], good=False), "gain_forgetting"))
    if cost := _plotted_cost(fronts, entries, costs):
        drawn.append(("cost", *_costs(entries, cost), "gain_cost"))
    found = []
    for against, across, x_label, key in drawn:
        front = fronts.get(key) or []
        spots = []
        for look, x, y in zip(looks, across, gains, strict=True):
            if x is not None and y is not None:
                on = look.name in front
                words = f"{look.name}: gain {y.words}, {against} {x.words}" + (", on the front" if on else "")
                spots.append(plots.Spot(look, x.value, y.value, x.span, y.span, on, words))
        if len(spots) > 1:
            title = f"Gain against {against}"
            svg = plots.trade_off(spots, title=title, x_label=x_label, y_label=y_label)
            found.append({"title": title, "svg": _markup(svg), "front": [s.look.name for s in spots if s.front]})
    return found


def _since_base(
    entries: Sequence[Mapping[str, Any]], metric: Mapping[str, Any], *, good: bool
) -> tuple[list[_Place | None], str]:
    """Every entry's change since the base, counted so that more is better (``good``) or worse, and the axis' label."""

    def value(entry: Mapping[str, Any]) -> float | None:
        return judging.number(((entry.get("values") or {}).get(metric["name"]) or {}).get("value"))

    unit = str(metric.get("unit") or "")
    sign = 1.0 if (metric.get("direction") == "higher") == good else -1.0
    factor, shown_unit = _axis_unit(unit)
    before = next((value(e) for e in entries if e.get("kind") == "base"), None)
    places: list[_Place | None] = []
    for entry in entries:
        after = value(entry)
        if before is None or after is None:
            places.append(None)
        else:
            change = sign * (after - before)
            span = _span((entry.get("vs_base") or {}).get(metric["name"]) or {}, sign * factor)
            places.append(_Place(change * factor, span, judging.text(change, unit, signed=True)))
    what = "gain over base" if good else "forgetting since base"
    return places, ", ".join(p for p in (f"{what}: {metric.get('label') or metric['name']}", shown_unit) if p)


def _costs(entries: Sequence[Mapping[str, Any]], cost: Mapping[str, Any]) -> tuple[list[_Place | None], str]:
    """Every entry's cost, none for the base, and the axis' label."""
    name = str(cost["name"])
    amounts = [0.0 if e.get("kind") == "base" else judging.number((e.get("cost") or {}).get(name)) for e in entries]
    factor, unit = _cost_scale(name, max(a for a in amounts if a is not None), str(cost.get("unit") or ""))
    places = [None if a is None else _Place(a * factor, None, cost_text(name, a)) for a in amounts]
    return places, ", ".join(p for p in (str(cost.get("label") or name), unit) if p)


def _plotted_cost(
    fronts: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], costs: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any] | None:
    counted = {
        c["name"]: c
        for c in costs
        if any(judging.number((e.get("cost") or {}).get(c["name"])) is not None for e in entries)
    }
    wanted = (fronts.get("cost"), *_PLOTTED_COSTS, *counted)
    return next((counted[name] for name in wanted if name in counted), None)


def _cost_scale(name: str, largest: float, unit: str) -> tuple[float, str]:
    """(factor, unit) that bring the largest cost near one to a thousand."""
    if name.endswith("_share"):
        return 100.0, "%"
    if name == "seconds":
        return (1.0, "s") if largest < 600 else (1 / 60, "min") if largest < 6 * 3600 else (1 / 3600, "h")
    shown = cost_text(name, largest).partition("\N{NO-BREAK SPACE}")
    if not shown[2]:
        return 1.0, unit
    base, letters = (1024, "KMGT") if name.endswith("_bytes") else (1000, "kMGTPEZ")
    power = letters.find(shown[2][0]) + 1
    return float(base) ** -power, shown[2]


def curves(entries: Sequence[Mapping[str, Any]], looks: Sequence[plots.Look]) -> dict[str, Any] | None:
    """Negative log-likelihood over supervised tokens; over steps or of the loss where those were not recorded."""
    every = [p for e in entries for c in e.get("curve") or [] for p in c.get("points") or []]
    known = {
        k for k in ("nll", "loss", "supervised", "step") if any(judging.number(p.get(k)) is not None for p in every)
    }
    y, x = ("nll" if "nll" in known else "loss"), ("supervised" if "supervised" in known else "step")
    curves = []
    for entry, look in zip(entries, looks, strict=True):
        failed = {t.get("seed") for t in entry.get("trials") or [] if t.get("status") == "failed"}
        for curve in entry.get("curve") or []:
            points = [
                (a, b)
                for p in curve.get("points") or []
                if (a := judging.number(p.get(x))) is not None and (b := judging.number(p.get(y))) is not None
            ]
            if points:
                curves.append(plots.Curve(look, curve.get("seed"), points, curve.get("seed") not in failed))
    label = {"nll": "negative log-likelihood, nats per token", "loss": "training loss"}[y]
    x_label = {"supervised": "supervised tokens", "step": "step"}[x]
    svg = plots.learning_curves(curves, title=f"{label} over {x_label}", x_label=x_label, y_label=label)
    shown = list({c.look.index: c.look for c in curves}.values())
    return {"svg": _markup(svg), "looks": shown, "x": x_label, "y": label} if svg else None


def reliability(entries: Sequence[Mapping[str, Any]], looks: Sequence[plots.Look]) -> list[dict[str, Any]]:
    """A small diagram of every entry that has bins."""
    drawn = []
    for entry, look in zip(entries, looks, strict=True):
        bins = [
            (confidence, accuracy, judging.number(b.get("n")))
            for b in entry.get("reliability") or []
            if (confidence := judging.number(b.get("confidence"))) is not None
            and (accuracy := judging.number(b.get("accuracy"))) is not None
        ]
        if svg := plots.reliability(bins, title=f"Reliability of {look.name}", role=look.role):
            drawn.append({"look": look, "svg": _markup(svg)})
    return drawn
