"""How much of held-out texts stands in training texts, by character n-grams.

    overlap(t) = |G(t) & train| / |G(t)|,   G(t) = n-grams of t that are not boilerplate

An n-gram that more than ``common`` training texts contain is a template's, not a leak, and counts on neither side. Only
the n-grams of the held-out texts are kept in memory; the training texts stream by.

Source of the two ideas: "Language Models are Few-Shot Learners", 2020, arXiv 2005.14165, appendix C (frequent n-grams
do not count); "PaLM: Scaling Language Modeling with Pathways", 2022, arXiv 2204.02311, section 8 (a share of a row's
n-grams decides).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from luthier.functional.minhash import shingle_hashes


class Overlap:
    """Counts how often the n-grams of held-out texts occur in training texts.

    Args:
        texts: the held-out texts; one shorter than ``n`` has no n-gram and an overlap of NaN.
        n: characters of an n-gram.
        common: training texts from which an n-gram counts as boilerplate.
    """

    def __init__(self, texts: Sequence[str], *, n: int = 40, common: int = 10) -> None:
        self.n, self.common = n, common
        pieces = [shingle_hashes(t, n) if len(t) >= n else np.zeros(0, np.uint64) for t in texts]
        self.rows = len(pieces)
        self._row = np.repeat(np.arange(self.rows), [p.size for p in pieces])
        flat = np.concatenate(pieces) if pieces else np.zeros(0, np.uint64)
        self._known, self._at = np.unique(flat, return_inverse=True)
        self._seen = np.zeros(self._known.size, dtype=np.int64)

    def add(self, texts: Iterable[str]) -> None:
        """Training texts."""
        if not self._known.size:
            return
        pieces = [shingle_hashes(t, self.n) for t in texts if len(t) >= self.n]
        if pieces:
            # Unique within each text, so that every count is a number of texts.
            flat = np.concatenate(pieces)
            place = np.searchsorted(self._known, flat).clip(max=self._known.size - 1)
            self._seen += np.bincount(place[self._known[place] == flat], minlength=self._known.size)

    def shares(self) -> np.ndarray:
        """Overlap of each held-out text, float64; NaN where nothing but boilerplate is left."""
        counted = self._seen[self._at] <= self.common
        total = np.bincount(self._row, weights=counted, minlength=self.rows)
        found = np.bincount(self._row, weights=counted & (self._seen[self._at] > 0), minlength=self.rows)
        return np.divide(found, total, out=np.full(self.rows, np.nan), where=total > 0)
