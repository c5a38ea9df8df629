"""Choosing among several responses to one instruction: grouping, ranking, and what is equal.

Everything is an array over the N candidates, so a million of them need a few numbers each.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from typing import Any

import numpy as np


def normalised(text: str) -> str:
    """NFKC, runs of blanks as one, without blanks around it."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def instruction_of(row: Mapping[str, Any]) -> str:
    """Everything before the final answer, as text that is equal for equal instructions."""
    if row["kind"] == "pair":
        turns: list[Any] = [["user", normalised(row["prompt"]), None]]
    else:
        messages = json.loads(row["messages"])[:-1]
        turns = [[m["role"], normalised(m.get("content") or ""), m.get("tool_calls")] for m in messages]
    return json.dumps([normalised(row.get("system") or ""), turns, row.get("tools")], ensure_ascii=False)


def digest(*texts: str) -> bytes:
    """16 bytes that stand for some texts."""
    made = hashlib.blake2b(digest_size=16)
    for text in texts:
        made.update(len(text).to_bytes(8, "big") + text.encode())
    return made.digest()


def numbered(digests: bytes | bytearray) -> np.ndarray:
    """int64 [N]: which group each of N digests belongs to, numbered from 0 in the order in which they first appear."""
    held = np.frombuffer(digests, dtype="V16")
    _, first_G, group_N = np.unique(held, return_index=True, return_inverse=True)
    rank_G = np.empty(len(first_G), np.int64)
    rank_G[np.argsort(first_G)] = np.arange(len(first_G))
    return rank_G[group_N]


def first_of(group_N: np.ndarray) -> np.ndarray:
    """Bool [N]: the first of each group."""
    mask_N = np.zeros(len(group_N), bool)
    mask_N[np.unique(group_N, return_index=True)[1]] = True
    return mask_N


def distinct_ratio(text: str, n: int = 4) -> float:
    """Different n-grams of words over all; 1 for a text of fewer words."""
    words = text.split()
    count = len(words) - n + 1
    return len({tuple(words[i : i + n]) for i in range(count)}) / count if count > 0 else 1.0


def ranked(score_N: np.ndarray, group_N: np.ndarray) -> np.ndarray:
    """int64 [N]: place of each candidate within its group, 0 the highest score; ties by index, NaN nowhere (-1)."""
    rank_N = np.full(len(score_N), -1, np.int64)
    there = np.flatnonzero(~np.isnan(score_N))
    order = there[np.lexsort((there, -score_N[there], group_N[there]))]
    sizes = np.bincount(group_N[order], minlength=1)
    starts = np.concatenate([[0], np.cumsum(sizes)])[:-1]
    rank_N[order] = np.arange(len(order)) - starts[group_N[order]]
    return rank_N


def gaps(score_N: np.ndarray, group_N: np.ndarray) -> np.ndarray:
    """Score of the best minus that of the second, of each group that has two."""
    rank_N, count = ranked(score_N, group_N), int(group_N.max(initial=-1)) + 1
    best_G, second_G = np.full(count, np.nan), np.full(count, np.nan)
    best_G[group_N[rank_N == 0]] = score_N[rank_N == 0]
    second_G[group_N[rank_N == 1]] = score_N[rank_N == 1]
    found = best_G - second_G
    return found[np.isfinite(found)]
