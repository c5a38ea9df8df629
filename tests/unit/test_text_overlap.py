"""Overlap against sets of Python strings, and the two things it must not count."""

from __future__ import annotations

import numpy as np

from luthier.functional.text_overlap import Overlap


def by_sets(texts, train, n, common):
    def pieces(text):
        return {text[i : i + n] for i in range(len(text) - n + 1)}

    seen = {}
    for text in train:
        for piece in pieces(text):
            seen[piece] = seen.get(piece, 0) + 1
    shares = []
    for text in texts:
        counted = [p for p in pieces(text) if seen.get(p, 0) <= common]
        shares.append(sum(p in seen for p in counted) / len(counted) if counted else np.nan)
    return shares


def test_equals_sets_of_strings_in_any_batches():
    rng = np.random.default_rng(3)
    train = ["".join(rng.choice(list("abcd"), rng.integers(3, 60))) for _ in range(80)]
    texts = [train[5][:30] + "xyz", train[7], "".join(rng.choice(list("abcd"), 50)), "ab", ""]
    for common in (2, 10):
        overlap = Overlap(texts, n=6, common=common)
        overlap.add(train[:33])
        overlap.add(train[33:])
        np.testing.assert_allclose(overlap.shares(), by_sets(texts, train, 6, common))


def test_boilerplate_is_no_leak():
    frame = "Read the question and answer in one word. "
    train = [frame + f"item number {i}" for i in range(30)]
    overlap = Overlap([frame + "something else altogether", train[4], frame], n=10, common=10)
    overlap.add(train)
    fresh, copied, nothing_left = overlap.shares()
    assert fresh < 0.1
    assert copied == 1.0
    assert np.isnan(nothing_left)
