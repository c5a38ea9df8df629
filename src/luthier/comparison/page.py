"""``comparison.html``: one self-contained page on which method helped, what it cost, and how sure that is.

Made from ``comparison.json`` alone. Everything that comes from data, models or recipes is text to the page: the template
escapes it, the script sets it as text, and the page's content security policy runs that one script and fetches nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.comparison import page_plots as plots
from luthier.comparison.page_items import wins_and_losses
from luthier.runs import pages
from luthier.runs import verdict as judging
from luthier.runs.report import coloured, duration, short_name

FILE = "comparison.html"
GROUPS = {
    "target": "Target",
    "keep": "Kept ability (forgetting)",
    "calibration": "Calibration",
    "drift": "Drift from the base",
}
_VERDICTS = {
    "better": ("▲", "better"),
    "worse": ("▼", "worse"),
    "same": ("=", "no clear difference"),
    "unknown": ("?", "not compared"),
}
_BUDGETS = {"rows": "rows", "tokens": "supervised tokens", "flops": "FLOPs", "seconds": "seconds"}
# The first of these that was counted is the cost of the trade-off.
_PLOTTED_COSTS = ("flops", "seconds", "supervised_tokens")


def write_page(comparison: Mapping[str, Any], path: str | Path) -> Path:
    """Write the page of a comparison.

    Args:
        comparison: what ``comparison.json`` holds; parts that are absent are left out, values that are None or not
            finite are shown as unknown.
        path: the file to write.

    Returns:
        The page.
    """
    return pages.write_page(Path(path), Path(__file__).with_name("page.html.j2"), content(comparison))


def content(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows."""
    from markupsafe import Markup

    here = Path(__file__)
    script = here.with_name("page.js").read_text(encoding="utf-8")
    entries = [dict(e) for e in comparison.get("entries") or []]
    looks = plots.looks([str(e["name"]) for e in entries], [str(e.get("kind")) for e in entries])
    metrics = list(comparison.get("metrics") or [])
    costs = list(comparison.get("costs") or [])
    primary = primaries(metrics)
    findings = [str(f) for f in comparison.get("findings") or []]
    items = wins_and_losses(comparison.get("items") or [], entries)
    return {
        "title": str(comparison.get("title") or "Comparison"),
        "about": _about(comparison),
        "headline": findings[0] if findings else "Nothing has been found yet: no trial has finished.",
        "findings": findings[1:],
        "groups": _groups(metrics, costs, primary),
        "rows": [_row(e, look, metrics, costs) for e, look in zip(entries, looks, strict=True)],
        "primary": {m["name"] for m in primary.values()},
        "confidence": f"{100 * float(comparison.get('confidence') or 0.95):g} %",
        "seeds": len(comparison.get("seeds") or []),
        "differences": _differences(entries, looks, primary),
        "trade_offs": _trade_offs(comparison, entries, looks, primary, costs),
        "curves": _curves(entries, looks),
        "reliability": _reliability(entries, looks),
        "items": items,
        "payload": Markup(embedded(items)) if items else "",
        "details": [_details(e, look, metrics, primary) for e, look in zip(entries, looks, strict=True)],
        "recipe": coloured(str(comparison.get("recipe") or "")),
        "notes": [str(n) for n in comparison.get("notes") or []],
        "cost_note": str(comparison.get("cost_note") or ""),
        "version": str(comparison.get("luthier") or ""),
        "own_style": Markup(here.with_name("page.css").read_text(encoding="utf-8")),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }


def embedded(value: Any) -> str:
    """JSON for a script element: nothing in it can end the element or begin another."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def primaries(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The one metric that speaks for each group: the marked one, else the first."""
    found = {}
    for group in GROUPS:
        own = [m for m in metrics if m.get("group") == group]
        if own:
            found[group] = next((m for m in own if m.get("primary")), own[0])
    return found


def cost_text(name: str, value: Any) -> str:
    """A cost for readers: ``3 min 20 s``, ``1.2 TFLOP``, ``480 MiB``, ``12.5 %``, ``20,000``."""
    x = judging.number(value)
    if x is None:
        return "–"
    if name == "seconds":
        return duration(x)
    if name.endswith("_share"):
        return f"{100 * x:.3g}\N{NO-BREAK SPACE}%"
    if name.endswith("_bytes"):
        return _scaled(x, 1024, ("bytes", "KiB", "MiB", "GiB", "TiB"))
    if name == "flops":
        return _scaled(x, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP"))
    return f"{x:,.0f}" if x == round(x) else f"{x:,.4g}"


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    power = 0
    while abs(value) >= base and power < len(units) - 1:
        value, power = value / base, power + 1
    return f"{value:.3g}\N{NO-BREAK SPACE}{units[power]}"


def _about(comparison: Mapping[str, Any]) -> str:
    seeds = comparison.get("seeds") or []
    budget = comparison.get("budget") or {}
    kind, amount = _BUDGETS.get(str(budget.get("kind")), str(budget.get("kind"))), judging.number(budget.get("amount"))
    model = comparison.get("model")
    parts = [
        short_name(str(model)) if model else None,
        comparison.get("task"),
        ("1 seed" if len(seeds) == 1 else f"{len(seeds)} seeds") if seeds else None,
        f"budget {amount:,.0f} {kind}" if amount is not None and amount < 1e7 else None,
        f"budget {amount:.3g} {kind}" if amount is not None and amount >= 1e7 else None,
        f"same {kind} for all" if budget and amount is None else None,
        str(comparison.get("created") or "")[:10],
    ]
    return " · ".join(str(p) for p in parts if p)


def _groups(
    metrics: Sequence[Mapping[str, Any]], costs: Sequence[Mapping[str, Any]], primary: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Column groups of the table; ``few`` columns of each are shown before the reader asks for all."""
    groups = []
    for group, title in GROUPS.items():
        columns = [
            {
                "name": str(m["name"]),
                "label": str(m.get("label") or m["name"]),
                "unit": "" if judging.is_share(str(m.get("unit") or "")) else str(m.get("unit") or ""),
                "direction": m.get("direction"),
                "main": m is primary.get(group),
            }
            for m in metrics
            if m.get("group") == group
        ]
        if columns:
            groups.append({"title": title, "columns": columns, "few": 1})
    columns = [
        {
            "name": str(c["name"]),
            "label": str(c.get("label") or c["name"]),
            "unit": "",
            "direction": c.get("direction", "lower"),
            "main": c["name"] in ("seconds", "flops", "peak_memory_bytes", "trainable_share"),
        }
        for c in costs
    ]
    if columns:
        few = sum(bool(c["main"]) for c in columns)
        if not few:
            columns[0]["main"], few = True, 1
        groups.append({"title": "Cost", "columns": columns, "few": few})
    return groups


def _row(
    entry: Mapping[str, Any],
    look: plots.Look,
    metrics: Sequence[Mapping[str, Any]],
    costs: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    return {
        "look": look,
        "kind": entry.get("kind"),
        "held_to": _BUDGETS.get(str(entry.get("held_to")), entry.get("held_to")),
        "status": str(entry.get("status") or "done"),
        "reasons": _reasons(entry),
        "metrics": {m["name"]: _cell(entry, m, "vs_sft") for m in metrics},
        "costs": {c["name"]: _cost_cell(str(c["name"]), (entry.get("cost") or {}).get(c["name"])) for c in costs},
    }


def _cost_cell(name: str, value: Any) -> dict[str, Any]:
    return {"sort": judging.number(value), "text": cost_text(name, value), "interval": "", "difference": None}


def _reasons(entry: Mapping[str, Any]) -> list[str]:
    """Why an entry, or some of its trials, did not finish."""
    failed = [t for t in entry.get("trials") or [] if t.get("status") == "failed"]
    by_reason: dict[str, list[str]] = {}
    for trial in failed:
        by_reason.setdefault(str(trial.get("reason") or "no reason was recorded"), []).append(str(trial.get("seed")))
    told = [f"seed {', '.join(seeds)}: {reason}" for reason, seeds in by_reason.items()]
    own = entry.get("reason")
    return told if told or not own else [str(own)]


def _cell(entry: Mapping[str, Any], metric: Mapping[str, Any], against: str) -> dict[str, Any]:
    """A value with its interval, and its difference with interval and verdict where there is one."""
    unit = str(metric.get("unit") or "")
    value = (entry.get("values") or {}).get(metric["name"]) or {}
    cell = {
        "sort": judging.number(value.get("value")),
        "text": judging.text(value.get("value"), unit),
        "interval": judging.interval(value, unit),
        "n": judging.number(value.get("n")),
        "difference": None,
    }
    difference = (entry.get(against) or {}).get(metric["name"])
    if difference and judging.number(difference.get("value")) is not None:
        verdict = difference.get("verdict") if difference.get("verdict") in _VERDICTS else "unknown"
        mark, word = _VERDICTS[str(verdict)]
        cell["difference"] = {
            "text": judging.text(difference["value"], unit, signed=True),
            "interval": judging.interval(difference, unit, signed=True),
            "verdict": verdict,
            "mark": mark,
            "word": word,
            "p": _probability(difference),
        }
    return cell


def _probability(difference: Mapping[str, Any]) -> str:
    plain, holm = judging.number(difference.get("p")), judging.number(difference.get("p_holm"))
    if plain is None and holm is None:
        return ""
    told = [f"{name} {value:.3f}" if value >= 0.001 else f"{name} < 0.001"
            for name, value in (("p", plain), ("Holm", holm)) if value is not None]  # fmt: skip
    return ", ".join(told)


def _differences(
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
                cell = _cell(entry, metric, "vs_sft")["difference"]
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


def _trade_offs(
    comparison: Mapping[str, Any],
    entries: Sequence[Mapping[str, Any]],
    looks: Sequence[plots.Look],
    primary: Mapping[str, Mapping[str, Any]],
    costs: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Gain against forgetting, and gain against cost; a trade-off without its two measures is left out."""
    if "target" not in primary:
        return []
    target, fronts, drawn = primary["target"], comparison.get("pareto") or {}, []
    gains = [_from_base(entries, e, target, good=True) for e in entries]
    unit = _axis_unit(str(target.get("unit") or ""))[1]
    y_label = ", ".join(p for p in (f"gain over base: {target.get('label') or target['name']}", unit) if p)
    if "keep" in primary:
        keep = primary["keep"]
        losses = [_from_base(entries, e, keep, good=False) for e in entries]
        unit = _axis_unit(str(keep.get("unit") or ""))[1]
        label = ", ".join(p for p in (f"forgetting since base: {keep.get('label') or keep['name']}", unit) if p)
        front = fronts.get("gain_forgetting") or []
        drawn.append(("Gain against forgetting", label, losses, front, [x and x[2] for x in losses]))
    cost = _plotted_cost(fronts, entries, costs)
    if cost is not None:
        amounts = [
            0.0 if e.get("kind") == "base" else judging.number((e.get("cost") or {}).get(cost["name"])) for e in entries
        ]
        largest = max((a for a in amounts if a is not None), default=0.0)
        factor, unit = _cost_scale(str(cost["name"]), largest, str(cost.get("unit") or ""))
        label = ", ".join(p for p in (str(cost.get("label") or cost["name"]), unit) if p)
        points = [None if a is None else (a * factor, None, cost_text(str(cost["name"]), a)) for a in amounts]
        drawn.append(("Gain against cost", label, points, fronts.get("gain_cost") or [], [p and p[2] for p in points]))
    found = []
    for title, x_label, across, front, words in drawn:
        spots = [
            plots.Spot(
                look, x[0], up[0], x[1], up[1], look.name in front,
                f"{look.name}: gain {up[2]}, {'forgetting' if 'forgetting' in title else 'cost'} {told}"
                + (", on the front" if look.name in front else ""),
            )
            for look, x, up, told in zip(looks, across, gains, words, strict=True)
            if x is not None and up is not None
        ]  # fmt: skip
        svg = plots.trade_off(spots, title=title, x_label=x_label, y_label=y_label)
        if svg and len(spots) > 1:
            on = [s.look.name for s in spots if s.front]
            found.append({"title": title, "svg": _markup(svg), "front": on})
    return found


def _from_base(
    entries: Sequence[Mapping[str, Any]], entry: Mapping[str, Any], metric: Mapping[str, Any], *, good: bool
) -> tuple[float, tuple[float, float] | None, str] | None:
    """(change since the base, its interval, in words), counted so that more is better (``good``) or worse."""
    base = next((e for e in entries if e.get("kind") == "base"), {})
    before, after = (
        judging.number(((e.get("values") or {}).get(metric["name"]) or {}).get("value")) for e in (base, entry)
    )
    if before is None or after is None:
        return None
    unit = str(metric.get("unit") or "")
    sign = 1.0 if (metric.get("direction") == "higher") == good else -1.0
    factor = sign * _axis_unit(unit)[0]
    paired = (entry.get("vs_base") or {}).get(metric["name"]) or {}
    return (after - before) * factor, _span(paired, factor), judging.text(sign * (after - before), unit, signed=True)


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


def _curves(entries: Sequence[Mapping[str, Any]], looks: Sequence[plots.Look]) -> dict[str, Any] | None:
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


def _reliability(entries: Sequence[Mapping[str, Any]], looks: Sequence[plots.Look]) -> list[dict[str, Any]]:
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


def _details(
    entry: Mapping[str, Any],
    look: plots.Look,
    metrics: Sequence[Mapping[str, Any]],
    primary: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """What an entry is and everything that was measured on it."""
    rows = []
    for metric in metrics:
        cell, base = _cell(entry, metric, "vs_sft"), _cell(entry, metric, "vs_base")["difference"]
        if cell["sort"] is not None:
            wish = {"higher": "higher is better", "lower": "lower is better"}.get(str(metric.get("direction")), "")
            rows.append({"label": metric.get("label") or metric["name"], "wish": wish, "cell": cell, "base": base})
    return {
        "look": look,
        "description": str(entry.get("description") or ""),
        "sections": coloured(_as_yaml(entry.get("sections") or {})),
        "rows": rows,
        "trials": [
            {
                "seed": t.get("seed"),
                "status": t.get("status"),
                "reason": t.get("reason") or "",
                "folder": t.get("folder") or "",
                "steps": cost_text("steps", t.get("steps")),
                "alone": {True: "alone", False: "beside others"}.get(t.get("alone"), "–"),  # type: ignore[call-overload]
            }
            for t in entry.get("trials") or []
        ],
    }


def _as_yaml(value: Any) -> str:
    """Recipe sections as the YAML a recipe would hold."""
    from io import StringIO

    from ruamel.yaml import YAML

    if not value:
        return ""
    yaml, out = YAML(), StringIO()
    yaml.default_flow_style = False
    yaml.dump(value, out)
    return out.getvalue()
