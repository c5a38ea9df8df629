"""Tables of scores: a line of JSON per example with every metric, the decision and its reason; and their controls.

Written line by line, so a million rows need no memory but a number each.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

NAME = "scores.jsonl"


def blocks(dataset: Any, size: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """(number of the first row, rows) of consecutive blocks of canonical rows."""
    start = 0
    for table in dataset.with_format("arrow").iter(size):
        rows = table.to_pylist()
        yield start, rows
        start += len(rows)


def name_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a line begins with: which example it is."""
    return {"id": row["id"], "source": row["source"], "row": row["row"]}


def write(path: Path, lines: Iterable[Mapping[str, Any]], order: np.ndarray | None = None) -> None:
    """Write lines one by one; with ``order`` (indices of the lines) in that order, read again from the file."""
    aside = path if order is None else path.with_name(f".{path.name}.unsorted")
    places = []
    with aside.open("wb") as out:
        for line in lines:
            places.append(out.tell())
            out.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    if order is None:
        return
    with aside.open("rb") as held, path.open("wb") as out:
        for index in order:
            held.seek(places[index])
            out.write(held.readline())
    aside.unlink()


def finite(value: float) -> float | None:
    """A number for JSON; None where it is none."""
    return float(value) if np.isfinite(value) else None


def arms(chosen: Mapping[str, np.ndarray], **metrics: np.ndarray) -> dict[str, dict[str, float | None]]:
    """Number of rows and mean of each metric by arm, for the choice that was made and its controls.

    Args:
        chosen: arm -> bool [N].
        metrics: name -> [N]; values that are not finite do not count.
    """
    found: dict[str, dict[str, float | None]] = {}
    for arm, mask_N in chosen.items():
        found[arm] = {"rows": int(mask_N.sum())}
        for name, value_N in metrics.items():
            there = value_N[mask_N & np.isfinite(value_N)]
            found[arm][name] = float(there.mean()) if len(there) else None
    return found


def random_of(count: int, total: int, rng: np.random.Generator) -> np.ndarray:
    """Bool [total], ``count`` of them true."""
    mask_N = np.zeros(total, bool)
    mask_N[rng.permutation(total)[:count]] = True
    return mask_N


def told(slug: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """The arms as a small table."""
    names = list(dict.fromkeys(name for arm in found.values() for name in arm))
    lines = [f"{slug}: what is chosen, beside its controls", f"  {'arm':<28}" + "".join(f"{n:>16}" for n in names)]
    for arm, values in found.items():
        shown: Sequence[Any] = [values.get(name) for name in names]
        cells = (f"{v:>16,}" if isinstance(v, int) else f"{'-' if v is None else format(v, '.4g'):>16}" for v in shown)
        lines.append(f"  {arm:<28}" + "".join(cells))
    return "\n".join(lines)
