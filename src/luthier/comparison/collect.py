"""From finished trials to ``comparison.json``: values, differences with verdicts, costs, curves, fronts, findings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from luthier import __version__
from luthier.comparison import measures
from luthier.comparison.entries import BASE, SFT, Entry
from luthier.comparison.measures import Measured, Metric
from luthier.comparison.trial import Trial
from luthier.functional.paired_trials import PairedDifference, holm
from luthier.runs.verdict import text

COSTS = (
    ("seconds", "Training seconds", "s", "lower"),
    ("flops", "Operations", "FLOP", "lower"),
    ("peak_memory_bytes", "Peak memory", "bytes", "lower"),
    ("trainable_share", "Trained share", "share", "lower"),
    ("artefact_bytes", "Size of the result", "bytes", "lower"),
    ("supervised_tokens", "Supervised tokens", "tokens", "lower"),
    ("rows", "Rows", "rows", "lower"),
    ("steps", "Steps", "steps", "lower"),
)
ITEMS = 200


@dataclass
class Line:
    """An entry with its trials.

    Attributes:
        entry: what was asked for.
        kind: base, sft or method.
        held_to: rows or tokens.
        trials: one per seed.
        sections: the recipe sections that make it.
        failed: key -> reason.
    """

    entry: Entry
    kind: str
    trials: list[Trial]
    held_to: str | None = None
    sections: Mapping[str, Any] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name in tables; what holds it to plain SFT's tokens is said behind it."""
        return f"{self.entry.name} (equal tokens)" if self.held_to == "tokens" else self.entry.name

    def states(self, root: Path) -> list[dict[str, Any]]:
        """One record per trial."""
        found = []
        for trial in self.trials:
            result = trial.result(root)
            status = "done" if result else "failed" if trial.key in self.failed else "waiting"
            found.append(
                {
                    "seed": trial.seed,
                    "status": status,
                    "reason": self.failed.get(trial.key),
                    "folder": str(trial.folder(root).relative_to(root)),
                    "alone": bool(result and result.get("alone")),
                    "steps": (result or {}).get("cost", {}).get("steps"),
                }
            )
        return found


def collect(
    lines: Sequence[Line],
    root: Path,
    *,
    title: str,
    recipe: str,
    model: str,
    task: str,
    labels: Sequence[str],
    keep: Sequence[str],
    seeds: Sequence[int],
    budget: Mapping[str, Any],
    jobs: int,
    confidence: float,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The whole comparison as JSON values; entries whose trials are missing are there with their reason."""
    measured = {
        line.name: {
            trial.seed: Measured(trial.folder(root), task, labels) for trial in line.trials if trial.result(root)
        }
        for line in lines
    }
    base_line = next(line for line in lines if line.kind == "base")
    base = measured[base_line.name]
    if not base:
        raise ValueError("the base was not measured")
    # A base of a language model does not depend on the seed and is measured once.
    one_base = next(iter(base.values()))
    metrics = measures.metrics_of(one_base, keep)
    entries = []
    for line in lines:
        mine = measured[line.name]
        states = line.states(root)
        done = [s["seed"] for s in states if s["status"] == "done"]
        reasons = list(dict.fromkeys(s["reason"] for s in states if s["reason"]))
        status = "done" if len(done) == len(states) else "partly" if done else "failed" if reasons else "waiting"
        entry: dict[str, Any] = {
            "name": line.name,
            "kind": line.kind,
            "held_to": line.held_to,
            "description": line.entry.description(),
            "sections": dict(line.sections),
            "status": status,
            "reason": "; ".join(reasons) or None,
            "values": {},
            "cost": {},
            "curve": [],
            "reliability": [],
            "trials": states,
        }
        if mine:
            trials = [mine[seed] for seed in sorted(mine)]
            entry["values"] = {m.name: measures.absolute(m, trials, confidence=confidence) for m in metrics}
            entry["cost"] = _cost(line, root)
            entry["curve"] = [{"seed": seed, "points": _curve(mine[seed].folder)} for seed in sorted(mine)]
            if "target" in trials[0].positions:
                entry["reliability"] = measures.reliability(trials[0].positions["target"])
        entries.append(entry)
    _differences(entries, lines, measured, metrics, SFT, "vs_sft", confidence)
    _differences(entries, lines, measured, metrics, BASE, "vs_base", confidence)
    made = {
        "luthier": __version__,
        "title": title,
        "recipe": recipe,
        "model": model,
        "task": task,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "confidence": confidence,
        "seeds": list(seeds),
        "budget": dict(budget),
        "jobs": jobs,
        "cost_note": _cost_note(entries, jobs),
        "metrics": [m.to_dict() for m in metrics],
        "costs": [dict(zip(("name", "label", "unit", "direction"), c, strict=True)) for c in COSTS],
        "entries": entries,
        "items": _items(lines, measured, root),
        "pareto": _fronts(entries, metrics),
        "findings": [],
        "notes": list(notes),
    }
    made["findings"] = findings(made)
    return _plain(made)


def _plain(value: Any) -> Any:
    """JSON values: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


def _cost(line: Line, root: Path) -> dict[str, Any]:
    """Of the trials that ran alone, their mean; counts are of all trials."""
    results = [r for t in line.trials if (r := t.result(root)) and r.get("cost")]
    alone = [r["cost"] for r in results if r.get("alone")] or [r["cost"] for r in results]
    timed = {"seconds", "peak_memory_bytes"}

    def mean(name: str) -> float | None:
        found = [c[name] for c in (alone if name in timed else [r["cost"] for r in results]) if c.get(name) is not None]
        return sum(found) / len(found) if found else None

    return {name: mean(name) for name, *_ in COSTS} if results else {}


def _cost_note(entries: Sequence[Mapping[str, Any]], jobs: int) -> str:
    if jobs == 1:
        return "Every trial ran alone on the machine; seconds and memory are means over the seeds."
    return (
        "Seconds and memory come from the first seed of each entry, which ran alone; the other seeds ran "
        f"{jobs} at a time."
    )


def _curve(folder: Path) -> list[dict[str, Any]]:
    """Logged losses over the supervised tokens seen so far."""
    file = folder / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    points, supervised = [], 0
    for record in records:
        if record.get("split") == "train":
            supervised += record["supervised"]
            point = {"step": record["step"], "supervised": supervised}
            points.append({**point, "loss": record.get("loss"), "nll": record.get("nll")})
    return points


def _differences(
    entries: list[dict[str, Any]],
    lines: Sequence[Line],
    measured: Mapping[str, Mapping[int, Measured]],
    metrics: Sequence[Metric],
    reference: str,
    key: str,
    confidence: float,
) -> None:
    """Fill ``entries[...][key]``: against the reference on the seeds both have, Holm's correction over the methods."""
    other = measured.get(reference)
    if not other:
        return
    for metric in metrics:
        found: list[tuple[dict[str, Any], PairedDifference, int]] = []
        for entry, line in zip(entries, lines, strict=True):
            mine = measured[line.name]
            if line.name == reference or line.kind == "base" or not mine:
                continue
            both = sorted(set(mine) & set(other)) if reference != BASE or len(other) > 1 else sorted(mine)
            if not both:
                continue
            against = [other[s] if s in other else next(iter(other.values())) for s in both]
            result = measures.compare(metric, [mine[s] for s in both], against, confidence=confidence)
            if result is not None:
                found.append((entry, result, len(both)))
        methods = [f for f in found if f[0]["kind"] == "method"]
        adjusted = dict(zip((f[0]["name"] for f in methods), holm([f[1].p_value for f in methods]), strict=True))
        for entry, result, seeds in found:
            p_holm = adjusted.get(entry["name"], result.p_value)
            entry.setdefault(key, {})[metric.name] = {
                "value": result.value,
                "low": result.low,
                "high": result.high,
                "p": result.p_value,
                "p_holm": p_holm,
                "verdict": verdict(result, p_holm, metric.direction, confidence),
                "per_seed": list(result.per_seed),
                "items": result.items,
                "seeds": seeds,
            }


def verdict(found: PairedDifference, p_holm: float, direction: str, confidence: float) -> str:
    """``better``, ``worse``, ``same`` (no difference that can be told) or ``unknown``.

    A difference is called one only when its interval excludes zero and its p-value, corrected for the number of
    methods, is below one minus the confidence.
    """
    if math.isnan(found.p_value):
        return "unknown"
    if not found.excludes_zero or not p_holm < 1 - confidence:
        return "same"
    return "better" if (found.value > 0) == (direction == "higher") else "worse"


def _items(lines: Sequence[Line], measured: Mapping[str, Mapping[int, Measured]], root: Path) -> list[dict[str, Any]]:
    """Answers of every entry to the target's prompts; nothing where the task does not write."""
    base = next(line for line in lines if line.kind == "base")
    file = base.trials[0].folder(root) / "texts.json"
    answered = {
        line.name: {seed: {i["row"]: i for i in m.items("target")} for seed, m in measured[line.name].items()}
        for line in lines
    }
    if not file.is_file() or not any(rows for seeds in answered.values() for rows in seeds.values()):
        return []
    found = []
    for row in json.loads(file.read_text(encoding="utf-8"))[:ITEMS]:
        answers = {
            name: [
                {"seed": seed, "completion": rows[row["row"]]["completion"], "score": rows[row["row"]]["score"]}
                for seed, rows in sorted(seeds.items())
                if row["row"] in rows
            ]
            for name, seeds in answered.items()
        }
        if any(answers.values()):
            found.append({**row, "answers": answers})
    return found


def _fronts(entries: Sequence[Mapping[str, Any]], metrics: Sequence[Metric]) -> dict[str, list[str]]:
    """Entries that no other beats on both sides: gain against forgetting, and gain against operations."""
    primary = {m.group: m for m in metrics if m.primary}

    def good(entry: Mapping[str, Any], group: str) -> float | None:
        metric = primary.get(group)
        found = entry["values"].get(metric.name, {}).get("value") if metric else None
        return None if found is None or math.isnan(found) else found if metric.direction == "higher" else -found  # type: ignore[union-attr]

    def cheap(entry: Mapping[str, Any]) -> float | None:
        flops = entry["cost"].get("flops")
        return -flops if flops is not None and math.isfinite(flops) else 0.0 if entry["kind"] == "base" else None

    gain = {e["name"]: good(e, "target") for e in entries}
    return {
        "gain_forgetting": front(gain, {e["name"]: good(e, "keep") for e in entries}),
        "gain_cost": front(gain, {e["name"]: cheap(e) for e in entries}),
    }


def front(first: Mapping[str, float | None], second: Mapping[str, float | None]) -> list[str]:
    """Names whose pair of values (more is better) no other pair reaches on both sides and passes on one."""
    points = {n: (first[n], second[n]) for n in first if first[n] is not None and second.get(n) is not None}

    def beaten(point: Any) -> bool:
        return any(o != point and o[0] >= point[0] and o[1] >= point[1] for o in points.values())

    return [name for name, point in points.items() if not beaten(point)]


def findings(made: Mapping[str, Any]) -> list[str]:
    """Sentences that say what came out, the most important first."""
    primary = {m["group"]: m for m in made["metrics"] if m["primary"]}
    said: list[str] = []
    target, keep = primary.get("target"), primary.get("keep")
    methods = [e for e in made["entries"] if e["kind"] == "method"]
    for group, metric in (("target", target), ("keep", keep), ("calibration", primary.get("calibration"))):
        if metric is None:
            continue
        for word in ("better", "worse"):
            named = [
                (abs(d["value"]), e["name"], d)
                for e in methods
                if (d := e.get("vs_sft", {}).get(metric["name"])) and d["verdict"] == word
            ]
            for _, name, d in sorted(named, key=lambda n: -n[0]):
                said.append(f"{name} is {_said(word, group, metric, d)}.")
    unclear = [
        e["name"]
        for e in methods
        if target and (d := e.get("vs_sft", {}).get(target["name"])) and d["verdict"] == "same"
    ]
    if (
        target
        and methods
        and not any(e.get("vs_sft", {}).get(target["name"], {}).get("verdict") == "better" for e in methods)
    ):
        said.insert(0, "No method beats plain SFT on the target by a difference that can be told from chance.")
    if unclear:
        said.append(f"On the target no difference from plain SFT can be told for: {', '.join(unclear)}.")
    said += [f"{e['name']} failed: {e['reason']}" for e in made["entries"] if e["status"] == "failed"]
    return said


def _said(word: str, group: str, metric: Mapping[str, Any], d: Mapping[str, Any]) -> str:
    unit = metric["unit"]
    ends = " to ".join(text(d[end], unit, signed=True) for end in ("low", "high"))
    where = {"target": "on the target", "keep": "at what should be kept", "calibration": "calibrated"}[group]
    label = metric["label"][:1].lower() + metric["label"][1:]
    return f"{word} {where} than plain SFT: {label} {text(d['value'], unit, signed=True)} (interval {ends})"
