"""MinHash: estimate the Jaccard similarity of texts, and find near-duplicates without comparing all pairs.

The signature of a text is, for each of P random hash functions, the smallest hash of its character n-grams; the share
of equal entries of two signatures estimates the Jaccard similarity J of their n-gram sets, with standard deviation
sqrt(J (1 - J) / P). Signatures are cut into bands of r entries; texts sharing a whole band are compared.

Source: "On the resemblance and containment of documents", Broder, 1997.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np

_MIX = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(32)
# Elements hashed at once: enough to keep numpy busy, small enough for the cache.
_BLOCK = 1 << 15


def shingle_hashes(text: str, n: int) -> np.ndarray:
    """Hashes (uint64, unique) of the character n-grams of a text; a shorter text is one piece."""
    code = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    if code.size == 0:
        return np.zeros(0, dtype=np.uint64)
    width = min(n, code.size)
    value = np.zeros(code.size - width + 1, dtype=np.uint64)
    for offset in range(width):
        value = (value ^ code[offset : offset + value.size]) * _MIX
        value ^= value >> _SHIFT
    return np.unique(value)


@cache
def _functions(permutations: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    odd = rng.integers(0, 1 << 63, size=permutations, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    return odd, rng.integers(0, 1 << 63, size=permutations, dtype=np.uint64)


def signatures(texts: Sequence[str], *, n: int = 5, permutations: int = 128, seed: int = 0) -> np.ndarray:
    """MinHash signatures (uint32 [texts, permutations]); an empty text has the largest value everywhere."""
    multiply, add = _functions(permutations, seed)
    found = np.full((len(texts), permutations), 0xFFFFFFFF, dtype=np.uint32)
    pieces: list[np.ndarray] = []
    owners: list[int] = []
    size = 0

    def flush() -> None:
        nonlocal size
        if pieces:
            flat = np.concatenate(pieces)
            starts = np.cumsum([0, *(p.size for p in pieces[:-1])])
            for k in range(permutations):
                # The high half of a multiply-and-add modulo 2^64 is a universal hash.
                found[owners, k] = np.minimum.reduceat((flat * multiply[k] + add[k]) >> _SHIFT, starts)
        pieces.clear()
        owners.clear()
        size = 0

    for index, text in enumerate(texts):
        hashes = shingle_hashes(text, n)
        if hashes.size:
            pieces.append(hashes)
            owners.append(index)
            size += hashes.size
        if size >= _BLOCK:
            flush()
    flush()
    return found


@cache
def bands_for(threshold: float, permutations: int) -> tuple[int, int]:
    """(bands, rows per band) with the smallest sum of missed and needless comparisons around the threshold."""
    grid = (np.arange(200) + 0.5) / 200
    best, least = (1, permutations), math.inf
    for rows in range(1, permutations + 1):
        bands = permutations // rows
        compared = 1 - (1 - grid**rows) ** bands
        # Missing a duplicate is worse than one needless comparison, which costs only time.
        error = 4 * (1 - compared)[grid >= threshold].sum() + compared[grid < threshold].sum()
        if error < least:
            best, least = (bands, rows), error
    return best


class NearDuplicates:
    """Greedy search in row order: a row is dropped when it resembles a row kept before it.

    Args:
        threshold: smallest estimated Jaccard similarity that counts as a duplicate.
        permutations: length of the signatures.

    Memory: 4 bytes per entry of the signatures of kept rows, and one dictionary entry per band.
    """

    def __init__(self, threshold: float, permutations: int) -> None:
        self.threshold, self.permutations = threshold, permutations
        self.bands, self.rows = bands_for(threshold, permutations)
        self._buckets: list[dict[bytes, list[int]]] = [{} for _ in range(self.bands)]
        self._kept = np.zeros((1024, permutations), dtype=np.uint32)
        self._count = 0

    def add(self, signature_P: np.ndarray, group: bytes = b"") -> bool:
        """Whether the row is new; then it is remembered. Only rows of the same ``group`` are compared."""
        keys = [signature_P[b * self.rows : (b + 1) * self.rows].tobytes() + group for b in range(self.bands)]
        candidates = {i for bucket, key in zip(self._buckets, keys, strict=True) for i in bucket.get(key, ())}
        if candidates:
            same = (self._kept[sorted(candidates)] == signature_P).mean(axis=1)
            if float(same.max()) >= self.threshold:
                return False
        number = self._count
        if number == len(self._kept):
            self._kept = np.concatenate([self._kept, np.zeros_like(self._kept)])
        self._kept[number] = signature_P
        self._count += 1
        for bucket, key in zip(self._buckets, keys, strict=True):
            bucket.setdefault(key, []).append(number)
        return True
