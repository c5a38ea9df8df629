"""Files of scores: one JSON line per example, matched by a stable id and the hash of the text, never by order.

    {"id": "...", "text": "<hash>", "scores": {"<model>": {"logp": -12.25, "tokens": 7}, "<other>": null},
     "models": {"<model>": "<hash>", "<other>": "<hash>"}}

``logp`` is the sum over the counted tokens in nats; null stands for an example that could not be scored. ``models``
says which state of each model gave its score.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.core.errors import UserError

# (sum of log-probabilities, number of tokens), or None where there is nothing to score or it is not a number.
Raw = tuple[float, int] | None


@dataclass
class Line:
    """What is known of one example."""

    text: str
    scores: dict[str, Raw] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)


def parse(texts: Iterable[str], where: str) -> dict[str, Line]:
    """The lines of a score file by id.

    Args:
        texts: the lines of the file.
        where: its name, for errors.

    Raises:
        UserError: a line that cannot be understood, or an id that is there twice; with the number of the line.
    """
    found: dict[str, Line] = {}
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        place = f"{where}, line {number}"
        try:
            held = json.loads(text)
            name = _text(held["id"])
            scores = {str(k): _raw(v) for k, v in held["scores"].items()}
            line = Line(_text(held["text"]), scores, {str(k): _text(held["models"][k]) for k in scores})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                'not a line of scores; expected {"id", "text", "models", "scores": {model: {"logp", "tokens"} or '
                "null}}. Remove the file and let the data stage write it anew.",
                where=place,
            ) from error
        if name in found:
            raise UserError(f"the id '{name}' is there twice, and scores are matched by it. Keep one.", where=place)
        found[name] = line
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError("not a text")
    return value


def _raw(value: Any) -> Raw:
    if value is None:
        return None
    total, count = float(value["logp"]), int(value["tokens"])
    return (total, count) if math.isfinite(total) and count > 0 else None


def written(lines: Mapping[str, Line]) -> str:
    """The text of a score file."""
    found = (
        {
            "id": name,
            "text": line.text,
            "scores": {k: as_json(v) for k, v in line.scores.items()},
            "models": line.models,
        }
        for name, line in lines.items()
    )
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found)


def as_json(raw: Raw) -> dict[str, float] | None:
    """A score as it stands in a file."""
    return None if raw is None else {"logp": raw[0], "tokens": raw[1]}


def models(lines: Mapping[str, Line]) -> list[str]:
    """The models of a file, in the order in which they appear."""
    return list(dict.fromkeys(name for line in lines.values() for name in line.scores))


def known(lines: Mapping[str, Line], ids: Sequence[str], hashes: Sequence[str], where: str) -> list[Line | None]:
    """The line of each example, None where the file has none.

    Raises:
        UserError: an example has another hash than the one that was scored.
    """
    found = [lines.get(name) for name in ids]
    for name, line, text in zip(ids, found, hashes, strict=True):
        if line is not None and line.text != text:
            raise UserError(
                f"the row with id '{name}' has another text than the one that was scored, or was scored with other "
                "options. Remove the file to score anew, or name another score_file.",
                where=where,
            )
    return found
