"""Values of a comparison as a reader sees them: with interval, difference and verdict in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.runs import verdict as judging
from luthier.runs.report import duration

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


def measured(entry: Mapping[str, Any], metric: Mapping[str, Any], against: str) -> dict[str, Any]:
    """A value with its interval, and its difference with interval and verdict where there is one."""
    unit = str(metric.get("unit") or "")
    value = (entry.get("values") or {}).get(metric["name"]) or {}
    cell: dict[str, Any] = {
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
