"""``advice.html``: what was measured, what the rules made of it, how the race went, and what is recommended.

One file that loads nothing and runs no script. Everything that comes from data, models or recipes is text to the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.runs import pages, plots
from luthier.runs.report import coloured, duration, short_name
from luthier.runs.verdict import interval, is_share, text

FILE = "advice.html"
_ROLES = ("train", "eval", "third", "fourth")
_WORDS = {"finished": "finished", "stopped": "stopped", "failed": "failed", "waiting": "not reached"}
_KINDS = {"mend": "mend first", "do not fine-tune": "do not fine-tune"}


def write_page(advice: Mapping[str, Any], path: Path) -> Path:
    """Write the page of an advice.

    Args:
        advice: what ``advice.json`` holds.
        path: the file to write.
    """
    return pages.write_page(path, Path(__file__).with_name("page.html.j2"), content(advice))


def content(advice: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows."""
    verdict, race = advice["verdict"], advice.get("race") or {}
    standings = race.get("standings") or []
    return {
        "title": f"{short_name(advice['model'])} on {short_name(advice['data'])}",
        "about": " · ".join(
            [advice["task"], f"budget {duration(advice['budget'])}", f"used {duration(advice['seconds'])}"]
        ),
        "headline": verdict["headline"],
        "sentences": verdict["sentences"],
        "findings": [_finding(f) for f in advice["findings"]],
        "candidates": advice["rules"]["candidates"],
        "remarks": [{**r, "kind": _KINDS[r["kind"]]} for r in advice["rules"]["remarks"]],
        "left_out": advice["rules"]["left_out"],
        "standings": [_standing(s) for s in standings],
        "race_notes": race.get("notes") or [],
        "charts": _charts(standings),
        "comparison": _comparison(advice.get("comparison")),
        "recipe": coloured(advice["recommended"]),
        "version": advice["luthier"],
    }


def _finding(finding: Mapping[str, Any]) -> dict[str, Any]:
    unit = finding["unit"]
    shown, span = "–", ""
    if finding["value"] is not None:
        shown = text(finding["value"], unit) if is_share(unit) else f"{finding['value']:,.4g}"
        if finding["low"] is not None and finding["low"] != finding["high"]:
            ends = [finding["low"], finding["high"]]
            span = " to ".join(text(end, unit) if is_share(unit) else f"{end:,.4g}" for end in ends)
    return {
        "name": finding["name"].replace("_", " "),
        "value": shown,
        "span": span,
        "n": f"{finding['n']:,}" if finding["n"] else "–",
        "unit": unit,
        "sentence": finding["sentence"],
        "follows": finding["follows"],
    }


def _standing(standing: Mapping[str, Any]) -> dict[str, Any]:
    scores = standing["scores"]
    dynamics = standing["dynamics"]

    def shown(name: str) -> str:
        return f"{dynamics[name]:.4g}" if name in dynamics else "–"

    return {
        "entry": standing["entry"],
        "status": _WORDS[standing["status"]],
        "reason": standing["reason"],
        "reached": f"{standing['step']:,} of {standing['total']:,}",
        "scores": ", ".join(f"{_score(v)} at {float(k):.0%}" for k, v in scores.items()) or "–",
        **{name: shown(name) for name in ("G", "Lt", "combined", "loss", "gradnorm")},
    }


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _charts(standings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Scores by share of the training, four entries to a chart."""
    from markupsafe import Markup

    drawn = [
        (s["entry"], [(100 * float(k), v) for k, v in s["scores"].items() if v is not None])
        for s in standings
        if any(v is not None for v in s["scores"].values())
    ]
    charts = []
    for start in range(0, len(drawn), len(_ROLES)):
        part = drawn[start : start + len(_ROLES)]
        series = [plots.Series(n, p, role, dots=True) for (n, p), role in zip(part, _ROLES, strict=False)]
        svg = plots.line_chart(series, title="Held-out score", x_label="per cent of the training")
        # Made by plots.line_chart, which escapes every text it is given.
        charts.append({"title": "Held-out score", "series": series, "svg": Markup(svg)})
    return charts


def _comparison(comparison: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The final comparison by the metric that speaks for each group."""
    if not comparison:
        return None
    metrics = [m for m in comparison["metrics"] if m.get("primary")]
    rows = []
    for entry in comparison["entries"]:
        cells = []
        for metric in metrics:
            unit = metric.get("unit") or ""
            value = (entry.get("values") or {}).get(metric["name"])
            against = (entry.get("vs_sft") or {}).get(metric["name"])
            cells.append(
                {
                    "value": text(value["value"], unit) if value else "–",
                    "change": text(against["value"], unit, signed=True) if against else "",
                    "span": interval(against, unit, signed=True) if against else "",
                    "verdict": against["verdict"] if against else "",
                }
            )
        rows.append({"name": entry["name"], "reason": entry.get("reason") or "", "cells": cells})
    return {
        "metrics": [f"{m['label']} {'↑' if m['direction'] == 'higher' else '↓'}" for m in metrics],
        "rows": rows,
        "seeds": len(comparison["seeds"]),
        "confidence": f"{100 * comparison['confidence']:g} %",
    }
