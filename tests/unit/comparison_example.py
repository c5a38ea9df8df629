"""A made-up comparison of the shape of ``comparison.json``: eight entries, three seeds, one failure, wins and losses."""

from __future__ import annotations

import math
import random
from typing import Any

METRICS = [
    ("target/score", "target", "Answers judged right", "share", "higher", True),
    ("target/loss", "target", "Loss", "nats", "lower", False),
    ("keep/stories: loss", "keep", "Loss, stories", "nats", "lower", True),
    ("keep/plays: loss", "keep", "Loss, plays", "nats", "lower", False),
    ("calibration/ece_equal_mass", "calibration", "Calibration error, equal-mass bins", "share", "lower", True),
    ("calibration/brier", "calibration", "Brier score", "", "lower", False),
    ("drift/kl", "drift", "KL divergence from the base", "nats", "lower", True),
    ("drift/weights", "drift", "Relative weight change", "share", "lower", False),
]
COSTS = [
    ("seconds", "Training seconds", "s"),
    ("flops", "Training compute", "FLOP"),
    ("peak_memory_bytes", "Peak memory", "bytes"),
    ("trainable_share", "Weights trained", "share"),
    ("artefact_bytes", "Size on disk", "bytes"),
    ("supervised_tokens", "Supervised tokens", "tokens"),
    ("rows", "Rows", ""),
    ("steps", "Steps", ""),
]
# name, kind, held to, sections, score, loss, keep, ece, kl, seconds, trainable, verdicts of target and keep
ENTRIES: list[tuple[Any, ...]] = [
    ("base", "base", None, {}, 0.31, 2.31, 1.42, 0.084, 0.0, None, None, "worse", "better"),
    ("sft", "sft", None, {"objective": "sft"}, 0.648, 1.21, 1.71, 0.061, 0.42, 41.0, 1.0, "", ""),
    ("anchored-sft(anchor_weight=0.1)+half-ft", "method", None,
     {"objective": {"anchored-sft": {"anchor_weight": 0.1}}, "parameters": ["half-ft"]},
     0.671, 1.18, 1.49, 0.049, 0.11, 55.2, 0.5, "same", "better"),
    ("lora(rank=8)", "method", None, {"parameters": [{"lora": {"rank": 8}}]},
     0.622, 1.27, 1.52, 0.058, 0.14, 37.9, 0.021, "same", "better"),
    ("clear-curation", "method", "tokens", {"data": {"stages": ["clear-curation"]}},
     0.713, 1.11, 1.66, 0.043, 0.35, 48.1, 1.0, "better", "same"),
    ("clear-curation, rows", "method", "rows", {"data": {"stages": ["clear-curation"]}},
     0.702, 1.13, 1.65, 0.044, 0.33, 33.0, 1.0, "better", "same"),
    ("uds", "method", "tokens", {"selection": "uds"}, 0.655, 1.2, 1.70, 0.072, 0.41, 88.4, 1.0, "same", "same"),
    ("beyond-log-likelihood", "method", None, {"objective": {"beyond-log-likelihood": {"power": 4.0}}},
     0.583, 1.46, 1.69, 0.121, 0.47, 42.0, 1.0, "worse", "same"),
]  # fmt: skip


def comparison(seeds: int = 3, items: int = 60) -> dict[str, Any]:
    """The comparison of 60 test items; its numbers are drawn, the same in every call."""
    draw = random.Random(7)
    entries = [_entry(row, seeds, draw) for row in ENTRIES]
    entries.append(_failed(seeds))
    entries[6] |= {"status": "partly", "reason": None}
    entries[6]["trials"][-1] |= {"status": "failed", "reason": "the loss is not finite at step 312 (rows 17, 41)"}
    return {
        "luthier": "0.1.0",
        "title": "lab:nano on additions",
        "recipe": "luthier: 1\nmodel: lab:nano\ndata:\n  train: lab:addition\n# the same for all\ntraining: {epochs: 2}\nseed: 0\n",
        "model": "lab:nano",
        "task": "causal-lm",
        "created": "2026-11-28T10:00:00Z",
        "confidence": 0.95,
        "seeds": list(range(seeds)),
        "budget": {"kind": "tokens", "amount": 240000},
        "jobs": 2,
        "cost_note": "The cost columns come from runs that had the machine to themselves, one of each entry (seed 0).",
        "metrics": [
            dict(zip(("name", "group", "label", "unit", "direction", "primary"), m, strict=True)) for m in METRICS
        ],
        "costs": [dict(zip(("name", "label", "unit"), c, strict=True), direction="lower") for c in COSTS],
        "entries": entries,
        "items": _items(entries, seeds, items, draw),
        "pareto": {
            "gain_forgetting": ["base", "anchored-sft(anchor_weight=0.1)+half-ft", "clear-curation", "clear-curation, rows"],
            "gain_cost": ["base", "clear-curation", "clear-curation, rows"],
        },
        "findings": [
            "clear-curation answers 6.5 points more than plain SFT (interval +2.9 to +10.2) at the same supervised tokens.",
            "anchored-sft(anchor_weight=0.1)+half-ft forgets 0.220 nats less than SFT and is not clearly better or worse on the target.",
            "beyond-log-likelihood is worse than SFT on the target by 6.5 points.",
            "unfair-luck failed in all three seeds; its row has the reason.",
        ],
        "notes": ["The drift of the base from itself is zero by definition.", "lora was trained at ten times SFT's learning rate."],
    }  # fmt: skip


def _entry(row: tuple[Any, ...], seeds: int, draw: random.Random) -> dict[str, Any]:
    name, kind, held_to, sections, score, loss, keep, ece, kl, seconds, share, target, kept = row
    numbers = [score, loss, keep, 1.4 * keep, ece, 3 * ece, kl, kl / 9]
    widths = [0.03, 0.04, 0.02, 0.03, 0.012, 0.02, 0.01, 0.001]
    reference = dict(
        zip((m[0] for m in METRICS), [0.648, 1.21, 1.71, 1.4 * 1.71, 0.061, 0.183, 0.42, 0.42 / 9], strict=True)
    )
    start = dict(zip((m[0] for m in METRICS), [0.31, 2.31, 1.42, 1.4 * 1.42, 0.084, 0.252, 0.0, 0.0], strict=True))
    values, vs_sft, vs_base = {}, {}, {}
    for (metric, group, *_, primary), value, width in zip(METRICS, numbers, widths, strict=True):
        values[metric] = {"value": value, "n": 200, "low": value - width, "high": value + width,
                          "per_seed": [value + draw.gauss(0, width / 3) for _ in range(seeds)]}  # fmt: skip
        verdict = {"target": target, "keep": kept}.get(group, "same") if primary else "same"
        vs_sft[metric] = _difference(value - reference[metric], width, verdict, seeds)
        vs_base[metric] = _difference(
            value - start[metric], 1.2 * width, "better" if group == "target" else "worse", seeds
        )
    curve = []
    for seed in range(seeds if kind != "base" else 0):
        points = []
        for step in range(1, 201):
            nll = loss + (2.6 - loss) * math.exp(-step / 30) + draw.gauss(0, 0.06)
            points.append({"step": step, "supervised": 600 * step, "loss": nll, "nll": nll})
        curve.append({"seed": seed, "points": points})
    return {
        "name": name, "kind": kind, "held_to": held_to,
        "description": {"base": "The model as it came.", "sft": "Plain supervised fine-tuning."}.get(kind, f"SFT with {name}."),
        "sections": sections, "status": "done", "reason": None, "values": values,
        **({} if kind == "sft" else {"vs_sft": vs_sft}), **({} if kind == "base" else {"vs_base": vs_base}),
        "cost": {} if kind == "base" else {
            "seconds": seconds, "flops": 2.9e10 * seconds, "peak_memory_bytes": 4.1e8 + 2e8 * share, "trainable_share": share,
            "artefact_bytes": 1.04e6 * share, "supervised_tokens": 240000 if held_to != "rows" else 161000, "rows": 2000, "steps": 400,
        },
        "curve": curve,
        "reliability": [{"confidence": c, "accuracy": min(1.0, max(0.0, c - ece * (1 + draw.gauss(0, 0.4)))), "n": 40}
                        for c in (0.28, 0.46, 0.63, 0.81, 0.97)],
        "trials": [] if kind == "base" else [
            {"seed": s, "status": "done", "reason": None, "folder": f"trials/{_number(name):04x}{s}", "alone": s == 0, "steps": 400}
            for s in range(seeds)
        ],
    }  # fmt: skip


def _number(name: str) -> int:
    """A number of a name that is the same in every process."""
    return sum(ord(c) * 31**i for i, c in enumerate(name)) % 65536


def _difference(value: float, width: float, verdict: str, seeds: int) -> dict[str, Any]:
    half = {"same": abs(value) + width, "": width}.get(verdict, min(0.55 * abs(value), 1.4 * width))
    return {"value": value, "low": value - half, "high": value + half, "p": 0.2 if verdict == "same" else 0.0004,
            "p_holm": 0.6 if verdict == "same" else 0.0028, "verdict": verdict or "unknown", "per_seed": [value] * seeds,
            "items": 200, "seeds": seeds}  # fmt: skip


def _failed(seeds: int) -> dict[str, Any]:
    reason = "selection: oversample 64 times the batch needs 41 GiB; give selection.oversample a smaller number"
    return {
        "name": "unfair-luck", "kind": "method", "held_to": None, "description": "A method that did not run.",
        "sections": {"selection": {"unfair-luck": {"oversample": 64}}}, "status": "failed", "reason": reason, "values": {},
        "vs_sft": {}, "vs_base": {}, "cost": {}, "curve": [], "reliability": [],
        "trials": [{"seed": s, "status": "failed", "reason": reason, "folder": f"trials/dead{s}", "alone": True, "steps": 0} for s in range(seeds)],
    }  # fmt: skip


def _items(entries: list[dict[str, Any]], seeds: int, count: int, draw: random.Random) -> list[dict[str, Any]]:
    items = []
    for row in range(count):
        a, b = draw.randrange(100), draw.randrange(100)
        answers = {}
        for entry in entries:
            if "target/score" not in entry["values"]:
                continue
            share = entry["values"]["target/score"]["value"]
            told = []
            for seed in range(seeds):
                right = draw.random() < share
                steps = (
                    ""
                    if row % 9
                    else "\n".join(f"Carry {i}: write down the digit and go on." for i in range(14)) + "\n"
                )
                told.append(
                    {
                        "seed": seed,
                        "completion": f"{steps}The answer is {a + b if right else a + b + 10}.",
                        "score": float(right),
                    }
                )
            answers[entry["name"]] = told
        items.append({"row": row, "prompt": f"What is {a} + {b}?", "reference": str(a + b), "answers": answers})
    return items  # fmt: skip
