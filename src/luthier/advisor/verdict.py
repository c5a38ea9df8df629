"""What a finished advice comes to, in plain sentences; above all whether anything beat plain SFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from luthier.advisor.rules import Rule
from luthier.runs.verdict import interval, text

SFT, BASE = "sft", "base"
LOSS = {"name": "target/loss"}
# A base that scores this much has little left to learn.
ENOUGH = 0.9


@dataclass(frozen=True)
class Verdict:
    """The end of an advice.

    Attributes:
        entry: what is recommended: an entry of the comparison, or ``base`` for not training at all.
        recipe_of: the entry whose recipe is written; plain SFT where none is to be trained.
        headline: one sentence.
        sentences: what it rests on.
        beats_sft: whether the recommended entry was measured to be better than plain SFT.
    """

    entry: str
    recipe_of: str
    headline: str
    sentences: tuple[str, ...]
    beats_sft: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def conclude(comparison: Mapping[str, Any], remarks: Sequence[Rule] = ()) -> Verdict:
    """The verdict of a final comparison.

    A method is recommended when the interval of its difference from plain SFT on the target excludes zero, or when it
    is level there and clearly better on what should be kept. Training is recommended at all only where the winner is
    clearly better than the base; below a score of 0.9 a loss that clearly fell counts as well, since the score may
    follow with more training. Lines held to equal tokens are controls: they are told and never recommended.

    Args:
        comparison: what ``comparison.json`` holds.
        remarks: rules that hold; a reason not to fine-tune is repeated where the numbers do not contradict it.
    """
    metrics = {m["group"]: m for m in comparison["metrics"] if m.get("primary")}
    target, keep = metrics["target"], metrics.get("keep")
    entries = {e["name"]: e for e in comparison["entries"] if e["status"] == "done"}
    if SFT not in entries:
        return Verdict(BASE, SFT, "Nothing can be recommended: plain SFT did not finish.", ())
    methods = [e for e in entries.values() if e["kind"] == "method"]
    own = [e for e in methods if e.get("held_to") != "tokens"]
    better = [e for e in own if _verdict(e, "vs_sft", target) == "better"]
    gentler = [
        e for e in own if keep and _verdict(e, "vs_sft", target) == "same" and _verdict(e, "vs_sft", keep) == "better"
    ]
    sign = 1.0 if target["direction"] == "higher" else -1.0
    sentences = [_sentence(e, target, keep) for e in methods]
    if better:
        chosen = max(better, key=lambda e: sign * _value(e, target))
        headline = f"{chosen['name']} beat plain SFT: {_change(chosen, 'vs_sft', target)}."
    elif gentler:
        assert keep is not None
        chosen = max(gentler, key=lambda e: _gain(e, keep))
        headline = (
            f"Nothing beat plain SFT on the target; {chosen['name']} is level there and keeps more: "
            f"{_change(chosen, 'vs_sft', keep)}."
        )
    else:
        chosen = entries[SFT]
        headline = (
            "Nothing beat plain SFT: no method's difference from it excludes zero to the good. Use plain SFT."
            if methods
            else "No method reached the final comparison beside plain SFT. Use plain SFT."
        )
    against_base = _verdict(chosen, "vs_base", target)
    if against_base == "same" and _learns(chosen, entries.get(BASE), target):
        sentences.append(
            f"The score has not clearly left that of the base ({_change(chosen, 'vs_base', target)}), but the loss "
            "fell: train longer before judging by it."
        )
    elif against_base in ("same", "worse"):
        sentences.insert(0, headline)
        word = "did not help clearly" if against_base == "same" else "hurt"
        headline = f"Do not fine-tune: training {word} ({_change(chosen, 'vs_base', target)} against the base)."
        sentences += [r.why for r in remarks if r.kind == "do not fine-tune"]
        return Verdict(BASE, chosen["name"], headline, tuple(sentences))
    return Verdict(chosen["name"], chosen["name"], headline, tuple(sentences), beats_sft=bool(better))


def _learns(entry: Mapping[str, Any], base: Mapping[str, Any] | None, target: Mapping[str, Any]) -> bool:
    """Whether the loss clearly fell where the base's score leaves room."""
    if base is None or target["name"] == LOSS["name"]:
        return False
    full = target["direction"] == "higher" and _value(base, target) >= ENOUGH
    return not full and _verdict(entry, "vs_base", LOSS) == "better"


def unraced(first: str | None, remarks: Sequence[Rule]) -> Verdict:
    """The verdict where nothing was raced: what the rules alone say."""
    reasons = [r.why for r in remarks if r.kind == "do not fine-tune"]
    if reasons:
        return Verdict(
            BASE, first or SFT, "The measurements speak against fine-tuning. Nothing was raced.", (*reasons,)
        )
    if first is None:
        return Verdict(SFT, SFT, "The rules propose nothing beyond plain SFT. Nothing was raced.", ())
    return Verdict(first, first, f"By the rules alone, try {first} first. Nothing was raced, so nothing is shown.", ())


def _verdict(entry: Mapping[str, Any], against: str, metric: Mapping[str, Any]) -> str:
    return str(((entry.get(against) or {}).get(metric["name"]) or {}).get("verdict", "unknown"))


def _value(entry: Mapping[str, Any], metric: Mapping[str, Any]) -> float:
    return float(entry["values"][metric["name"]]["value"])


def _gain(entry: Mapping[str, Any], metric: Mapping[str, Any]) -> float:
    value = float(entry["vs_sft"][metric["name"]]["value"])
    return value if metric["direction"] == "higher" else -value


def _change(entry: Mapping[str, Any], against: str, metric: Mapping[str, Any]) -> str:
    found, unit = entry[against][metric["name"]], metric.get("unit") or ""
    span = interval(found, unit, signed=True)
    label = metric["label"]
    return f"{label[:1].lower()}{label[1:]} {text(found['value'], unit, signed=True)}{f' ({span})' if span else ''}"


def _sentence(entry: Mapping[str, Any], target: Mapping[str, Any], keep: Mapping[str, Any] | None) -> str:
    parts = [_change(entry, "vs_sft", m) for m in (target, keep) if m and m["name"] in (entry.get("vs_sft") or {})]
    return f"{entry['name']} against plain SFT: {'; '.join(parts) or 'not compared'}."
