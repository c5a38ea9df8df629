"""The comparison in the terminal: a table that updates while trials run, and the final one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from luthier.comparison.trial import Trial
from luthier.runs.verdict import text

MARKS = {"better": ("▲", "green"), "worse": ("▼", "red"), "same": ("≈", "dim"), "unknown": ("?", "dim")}
_SHOWN_COSTS = ("seconds", "flops", "peak_memory_bytes", "trainable_share")


def table(made: Mapping[str, Any]) -> Table:
    """Entries as rows: the metric that speaks for each group with its verdict against plain SFT, and the cost."""
    chosen = [m for m in made["metrics"] if m["primary"]]
    shown = Table(title=escape(made["title"]), header_style="bold", box=None, pad_edge=False)
    shown.add_column("")
    for metric in chosen:
        arrow = "↑" if metric["direction"] == "higher" else "↓"
        shown.add_column(f"{escape(metric['label'])} {arrow}", justify="right")
    costs = [c for c in made["costs"] if c["name"] in _SHOWN_COSTS]
    for cost in costs:
        shown.add_column(escape(cost["label"]), justify="right")
    for entry in made["entries"]:
        cells = [_value(entry, metric) for metric in chosen]
        if entry["status"] in ("failed", "waiting") and not entry["values"]:
            shown.add_row(
                _name(entry), Text(entry["reason"] or entry["status"], style="red" if entry["reason"] else "dim")
            )
            continue
        shown.add_row(_name(entry), *cells, *(_cost(entry, c) for c in costs))
    return shown


def _name(entry: Mapping[str, Any]) -> Text:
    return Text(entry["name"], style="bold" if entry["kind"] != "method" else "")


def _value(entry: Mapping[str, Any], metric: Mapping[str, Any]) -> Text:
    found = entry["values"].get(metric["name"]) or {}
    if found.get("value") is None:
        return Text("-", style="dim")
    unit = metric["unit"]
    shown = Text(text(found["value"], unit).replace("\N{NO-BREAK SPACE}nats", ""))
    if d := entry.get("vs_sft", {}).get(metric["name"]):
        mark, style = MARKS[d["verdict"]]
        half = (d["high"] - d["low"]) / 2 if d["high"] is not None else None
        change = text(d["value"], unit, signed=True).partition("\N{NO-BREAK SPACE}")[0]
        around = f" ±{text(half, unit).partition(chr(160))[0]}" if half is not None else ""
        shown.append(f"  {mark} {change}{around}", style=style)
    return shown


def _cost(entry: Mapping[str, Any], cost: Mapping[str, Any]) -> Text:
    value = entry["cost"].get(cost["name"])
    return Text("-" if value is None else quantity(value, cost["unit"]), style="dim" if value is None else "")


def quantity(value: float, unit: str) -> str:
    """A cost for readers: bytes and operations with prefixes, shares in per cent."""
    if unit == "share":
        return f"{100 * value:.1f}%"
    if unit in ("bytes", "FLOP"):
        name = "B" if unit == "bytes" else unit
        for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if value >= factor:
                return f"{value / factor:.3g} {prefix}{name}"
        return f"{value:.0f} {name}"
    return f"{value:,.1f} s" if unit == "s" else f"{value:,.0f}"


def legend(made: Mapping[str, Any]) -> list[str]:
    """What the marks mean."""
    level = f"{100 * made['confidence']:.0f}%"
    return [
        f"▲ better, ▼ worse than plain SFT: the {level} interval (±) over items and {len(made['seeds'])} seeds "
        "excludes zero, after Holm's correction; ≈ no difference can be told.",
        made["cost_note"],
    ]


class Watch:
    """What a person sees while trials run.

    Args:
        comparison: the comparison about to run.
        quiet: show nothing.
    """

    def __init__(self, comparison: Any, *, quiet: bool = False) -> None:
        self.comparison = comparison
        self.console = Console(stderr=True, quiet=quiet)
        self.states: dict[str, tuple[Trial, str, str | None]] = {}
        self._made: Mapping[str, Any] | None = None
        self._live = Live(console=self.console, get_renderable=self._view, refresh_per_second=1, transient=True)
        # Without a terminal the table would be printed over and over: one line per finished trial is enough.
        self._lines = not self.console.is_terminal
        self.live = not self._lines and not self.console.quiet

    def __enter__(self) -> Watch:
        if self.live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def observe(self, trial: Trial, state: str, reason: str | None) -> None:
        """A trial changed its state."""
        before = self.states.get(trial.key)
        self.states[trial.key] = (trial, state, reason)
        if self._lines and (before is None or before[1] != state) and state in ("done", "failed"):
            held = f", held to {trial.held_to}" if trial.held_to == "tokens" else ""
            said = f"{trial.entry}, seed {trial.seed}{held} ({trial.kind}): {state}"
            self.console.print(
                f"{said}{f' - {reason}' if reason else ''}", markup=False, highlight=False, soft_wrap=True
            )

    def update(self, made: Mapping[str, Any]) -> None:
        """The comparison as it stands."""
        self._made = made

    def _view(self) -> Group:
        running = [t for t, state, _ in self.states.values() if state == "running"]
        done = sum(state in ("done", "failed") for _, state, _ in self.states.values())
        parts: list[Any] = [table(self._made)] if self._made else []
        parts += [Text(f"{t.entry}, seed {t.seed}: {_progress(t.folder(self.comparison.root))}") for t in running]
        parts.append(Text(f"{done} trials done", style="dim"))
        return Group(*parts)


def _progress(folder: Path) -> str:
    """Where a running trial stands, from the last line it logged."""
    file = folder / "run" / "metrics.jsonl"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        record = json.loads(lines[-1])
        return f"step {record['step']:,}, loss {record['loss']:.4f}"
    except (OSError, ValueError, IndexError, KeyError):
        return "getting ready"
