"""``comparison.html``: one self-contained page on which method helped, what it cost, and how sure that is.

Made from ``comparison.json`` alone. Everything that comes from data, models or recipes is text to the page: the
template escapes it, the script sets it as text, and the page's content security policy runs that one script and
fetches nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.comparison import page_charts as charts
from luthier.comparison import page_plots as plots
from luthier.comparison.page_items import wins_and_losses
from luthier.comparison.page_values import GROUPS, cost_text, measured
from luthier.runs import pages
from luthier.runs import verdict as judging
from luthier.runs.report import coloured, short_name

FILE = "comparison.html"
_BUDGETS = {"rows": "rows", "tokens": "supervised tokens", "flops": "FLOPs", "seconds": "seconds"}


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
        "confidence": f"{100 * (judging.number(comparison.get('confidence')) or 0.95):g} %",
        "seeds": len(comparison.get("seeds") or []),
        "differences": charts.differences(entries, looks, primary),
        "trade_offs": charts.trade_offs(comparison, entries, looks, primary, costs),
        "curves": charts.curves(entries, looks),
        "reliability": charts.reliability(entries, looks),
        "items": items,
        "payload": Markup(embedded(items)) if items else "",
        "details": [_details(e, look, metrics) for e, look in zip(entries, looks, strict=True)],
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


def titles(metrics: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The groups in the order of the page with their titles; those that the page has no title for come last."""
    return GROUPS | {g: g for m in metrics if (g := str(m.get("group"))) not in GROUPS}


def primaries(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The one metric that speaks for each group: the marked one, else the first."""
    found: dict[str, Mapping[str, Any]] = {}
    for group in titles(metrics):
        own = [m for m in metrics if str(m.get("group")) == group]
        if own:
            found[group] = next((m for m in own if m.get("primary")), own[0])
    return found


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
    for group, title in titles(metrics).items():
        columns = [
            {
                "name": str(m["name"]),
                "label": str(m.get("label") or m["name"]),
                "unit": "" if judging.is_share(str(m.get("unit") or "")) else str(m.get("unit") or ""),
                "direction": m.get("direction"),
                "main": m is primary.get(group),
            }
            for m in metrics
            if str(m.get("group")) == group
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
        "metrics": {m["name"]: measured(entry, m, "vs_sft") for m in metrics},
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


def _details(entry: Mapping[str, Any], look: plots.Look, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What an entry is and everything that was measured on it."""
    rows = []
    for metric in metrics:
        cell, base = measured(entry, metric, "vs_sft"), measured(entry, metric, "vs_base")["difference"]
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
                "alone": {True: "alone", False: "beside others"}.get(t.get("alone"), "–"),
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
    yaml.default_flow_style, yaml.width = False, 10_000
    yaml.dump(value, out)
    return out.getvalue()
