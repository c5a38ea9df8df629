"""Which items a method wins and loses against SFT, with the texts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from luthier.runs import verdict as judging
from luthier.runs.report import words

# Items a method's list may hold of each outcome; the counts are of all.
MOST = 100


def majority(answers: Sequence[Mapping[str, Any]]) -> float | None:
    """The score of most seeds: the lower median of those that were judged, None where none was.

    With right and wrong as 1 and 0 it is 1 only when more than half of the seeds are right.
    """
    scores = [s for a in answers if (s := score(a)) is not None]
    return statistics.median_low(scores) if scores else None


def score(answer: Mapping[str, Any]) -> float | None:
    """An answer's score; True and False are 1 and 0."""
    value = answer.get("score")
    return float(value) if isinstance(value, bool) else judging.number(value)


def wins_and_losses(items: Sequence[Mapping[str, Any]], entries: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What the page's script lists: per method its counts and items, and the texts of these items.

    An item is won by a method when the score of most of its seeds is above that of most of SFT's seeds, and lost when
    it is below.

    Returns:
        ``methods``, each ``{entry, name, won, lost, same, unjudged, shown: [[item, "won" | "lost"], ...]}``; ``items``,
        each ``{row, prompt, reference, answers: {entry: [{seeds, score, text}]}}``; ``names`` of the entries; and which
        are ``base`` and ``sft``. An entry is its position in the comparison, an item its position in ``items``. None
        where no item was judged on both sides.
    """
    kinds = {str(e["name"]): (i, e.get("kind")) for i, e in enumerate(entries)}
    sft = next((str(e["name"]) for e in entries if e.get("kind") == "sft"), None)
    base = next((str(e["name"]) for e in entries if e.get("kind") == "base"), None)
    methods, texts = [], _Texts(items)
    for name, (index, kind) in kinds.items():
        if kind != "method" or sft is None:
            continue
        outcomes: dict[str, list[int]] = {"won": [], "lost": [], "same": [], "unjudged": []}
        for position, item in enumerate(items):
            answers = item.get("answers") or {}
            if name in answers:
                ours, theirs = majority(answers[name]), majority(answers.get(sft) or [])
                outcomes[_outcome(ours, theirs)].append(position)
        if not any(outcomes[k] for k in ("won", "lost", "same")):
            continue
        shown = sorted((position, outcome) for outcome in ("won", "lost") for position in outcomes[outcome][:MOST])
        for position, _ in shown:
            for shown_name in (base, sft, name):
                if shown_name is not None:
                    texts.add(position, kinds[shown_name][0], shown_name)
        methods.append(
            {
                "entry": index,
                "name": name,
                **{outcome: len(found) for outcome, found in outcomes.items()},
                "shown": [[texts.place(position), outcome] for position, outcome in shown],
            }
        )
    if not methods:
        return None
    return {
        "methods": methods,
        "items": texts.found,
        "names": {index: name for name, (index, _) in kinds.items()},
        "base": None if base is None else kinds[base][0],
        "sft": kinds[sft][0] if sft is not None else None,
    }


def _outcome(ours: float | None, theirs: float | None) -> str:
    if ours is None or theirs is None:
        return "unjudged"
    return "won" if ours > theirs else "lost" if ours < theirs else "same"


class _Texts:
    """The items that are shown, each once, with the answers that are shown of it."""

    def __init__(self, items: Sequence[Mapping[str, Any]]) -> None:
        self._items = items
        self._places: dict[int, int] = {}
        self.found: list[dict[str, Any]] = []

    def place(self, position: int) -> int:
        """Where the item stands in ``found``."""
        if position not in self._places:
            item = self._items[position]
            self._places[position] = len(self.found)
            reference = item.get("reference")
            self.found.append(
                {
                    "row": item.get("row"),
                    "prompt": words(item.get("prompt") or ""),
                    "reference": None if reference is None else words(reference),
                    "answers": {},
                }
            )
        return self._places[position]

    def add(self, position: int, entry: int, name: str) -> None:
        """Add an entry's answers; equal ones of several seeds are one."""
        answers = (self._items[position].get("answers") or {}).get(name) or []
        told: dict[tuple[str, float | None], list[Any]] = {}
        for answer in answers:
            told.setdefault((words(answer.get("completion") or ""), score(answer)), []).append(answer.get("seed"))
        self.found[self.place(position)]["answers"][str(entry)] = [
            {"seeds": seeds, "score": value, "text": text} for (text, value), seeds in told.items()
        ]
