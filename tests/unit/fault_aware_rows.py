"""Prepared rows with flags and wrong answers, for tests of fault-aware fine-tuning."""

from __future__ import annotations

import numpy as np

from helpers import MemoryRows, random_rows
from luthier.functional.error_sensitive import SENSITIVE, WRONG, checksum


def flagged_rows(count: int = 24, *, seed: int = 0, most: int = 2, bare: int = 3) -> MemoryRows:
    """Rows of which every ``bare``-th has no pair; the others have up to ``most`` wrong answers of their own length.

    Of each side two tokens are flagged by their line, and one of them by itself too.
    """
    rows, rng = random_rows(count, seed=seed), np.random.default_rng([seed, 2])
    rows.columns = {SENSITIVE: [], WRONG: []}
    for b in range(count):
        ids, (start, end) = rows.ids[b].tolist(), rows.spans[b].tolist()
        flags = {"check": checksum(ids), "line": [], "token": []}
        variants = []
        for _ in range(int(rng.integers(1, most + 1)) if b % bare else 0):
            at = int(rng.integers(start, end - 1))
            other = [*ids[:at], ids[at] % 60 + 3, *ids[at + 1 :]]
            side = {"line": [at, at + 1], "token": [at]}
            flags["line"].append(side["line"])
            flags["token"].append(side["token"])
            variants.append({"text": "", "ids": other, "response": [start, end], "diverges": at, **side})
        rows.columns[SENSITIVE].append(flags)
        rows.columns[WRONG].append(variants)
    return rows
