"""Rows set aside for the race, so that the test rows decide nothing before the final comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from luthier.core.errors import UserError
from luthier.core.rng import derive_seed
from luthier.core.store import atomic_folder, content_hash

HELD_OUT = 256
LARGEST_SHARE = 0.1
# The smallest set by which candidates can be ranked at all.
FEWEST = 20
BUCKETS = 10_000


def hold_out(data: str, folder: Path, *, parts: int, seed: int) -> list[Path]:
    """Cut the rows of a source into ``train.jsonl`` and ``parts`` held-out files of up to 256 rows each.

    Rows of equal content go to the same side, wherever they stand in the source. A folder that is there is used as it
    is.

    Args:
        data: the source, as a recipe names it.
        folder: where to write.
        parts: 1 (``select.jsonl``) or 2 (``test.jsonl`` as well).
        seed: of the choice.

    Raises:
        UserError: there are too few rows, or they are pictures.
    """
    names = ["train.jsonl", "select.jsonl", "test.jsonl"][: parts + 1]
    if not folder.exists():
        with atomic_folder(folder) as aside:
            _write([aside / name for name in names], data, parts, seed)
    return [folder / name for name in names]


def _write(files: list[Path], data: str, parts: int, seed: int) -> None:
    from luthier.data.sources import open_source

    source = open_source(data)
    total = sum(len(block.rows) for block in source.batches())
    share = min(LARGEST_SHARE, HELD_OUT / max(total, 1))
    counts = np.zeros(len(files), dtype=int)
    handles = [file.open("w", encoding="utf-8") for file in files]
    try:
        for block in source.batches():
            rows = block.rows if isinstance(block.rows, list) else block.rows.to_pylist()
            for row in rows:
                if any(isinstance(value, bytes) or hasattr(value, "tobytes") for value in row.values()):
                    raise UserError("holds pictures; the race needs rows of text. Use --no-race.", where=data)
                side = _side(row, share, parts, seed)
                counts[side] += 1
                handles[side].write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    finally:
        for handle in handles:
            handle.close()
    if counts.min() < FEWEST:
        raise UserError(
            f"has {total:,} rows, of which {int(counts[1:].min()):,} could be held out for ranking candidates; "
            f"{FEWEST} are needed. Give more rows, or use --no-race.",
            where=data,
        )


def _side(row: dict[str, Any], share: float, parts: int, seed: int) -> int:
    """0 for training, 1.. for the held-out parts, by the row's content."""
    place = derive_seed(seed, "advise", content_hash(row)) % BUCKETS / BUCKETS
    return int(place / share) + 1 if place < share * parts else 0
