"""Duplicates: exact ones, near ones against true Jaccard similarities, and bounded cost."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from datasets import Dataset

from luthier.core.errors import UserError
from luthier.data.layouts import SCHEMA
from luthier.functional.minhash import NearDuplicates, bands_for, shingle_hashes, signatures
from luthier.methods.data.deduplicate import Deduplicate


def rows(*items):
    columns = {name: [item.get(name) for item in items] for name in SCHEMA.names}
    return Dataset.from_dict(columns, features=None).cast_column("row", Dataset.from_dict({"a": [1]}).features["a"])


def pairs(*items):
    return rows(*({"prompt": p, "completion": c} for p, c in items))


def kept(method, data):
    return method.keep(data).tolist()


def test_exact_copies_go_and_the_first_stays():
    data = pairs(("a", "1"), ("b", "2"), ("a", "1"), ("a", "2"), ("b", "2"))
    method = Deduplicate()
    assert kept(method, data) == [0, 1, 3]
    assert method.removed == {"exact": 2, "near": 0}
    out = method.run(data, None)
    assert out["prompt"][:] == ["a", "b", "a"]


def test_rows_without_duplicates_come_back_as_they_are():
    data = pairs(("a", "1"), ("b", "2"))
    assert Deduplicate().run(data, None) is data


def test_text_moved_between_columns_is_another_row():
    assert kept(Deduplicate(), pairs(("ab", "c"), ("a", "bc"), ("abc", ""))) == [0, 1, 2]


def test_labels_and_tags_tell_rows_apart_and_other_columns_do_not():
    data = rows(
        {"text": "good", "label": "1", "id": "x"},
        {"text": "good", "label": "0", "id": "y"},
        {"text": "good", "label": "1", "id": "z"},
    )
    assert kept(Deduplicate(), data) == [0, 1]
    assert kept(Deduplicate(columns=["text"]), data) == [0, 1]
    tagged = rows(
        {"tokens": ["a", "b"], "tags": ["O", "O"]},
        {"tokens": ["a b"], "tags": ["O"]},
        {"tokens": ["a", "b"], "tags": ["O", "O"]},
    )
    assert kept(Deduplicate(), tagged) == [0, 1]


def test_normalisation_is_only_for_the_comparison():
    data = pairs(("What  is 2+2?", "4"), ("what is 2+2?", "4"), ("WHAT\u00a0IS 2+2?", "4"))
    assert kept(Deduplicate(), data) == [0, 1, 2]
    out = Deduplicate(normalise=True).run(data, None)
    assert out["prompt"][:] == ["What  is 2+2?"]


def test_chosen_columns():
    data = pairs(("a", "1"), ("a", "2"))
    assert kept(Deduplicate(columns=["prompt"]), data) == [0]
    with pytest.raises(UserError, match="Did you mean 'prompt'"):
        Deduplicate(columns=["promt"])
    with pytest.raises(UserError, match="compares text"):
        Deduplicate(mode="near", columns=["label"])


def test_images_by_their_bytes():
    data = rows(
        {"image": {"path": "x.png", "bytes": b"1"}, "label": "a"},
        {"image": {"path": "y.png", "bytes": b"1"}, "label": "a"},
        {"image": {"path": "z.png", "bytes": b"2"}, "label": "a"},
    )
    assert kept(Deduplicate(), data) == [0, 2]
    with pytest.raises(UserError, match="these rows have none"):
        kept(Deduplicate(mode="near"), data)


def shingles(text, n=5):
    return {text[i : i + n] for i in range(max(len(text) - n + 1, 1))}


def jaccard(a, b):
    one, two = shingles(a), shingles(b)
    return len(one & two) / len(one | two)


def sentence(rng, words=40):
    return " ".join("".join(rng.choice(list("abcdefghijklmnop"), 5)) for _ in range(words))


def test_signatures_estimate_the_true_similarity():
    rng = np.random.default_rng(0)
    errors = []
    for changes in (0, 2, 5, 10, 20):
        words = sentence(rng).split()
        other = list(words)
        for i in rng.choice(40, changes, replace=False):
            other[i] = "".join(rng.choice(list("qrstuv"), 5))
        one, two = " ".join(words), " ".join(other)
        estimate = (np.equal(*signatures([one, two], permutations=1024))).mean()
        errors.append((estimate - jaccard(one, two)) / np.sqrt(0.25 / 1024))
    assert errors[0] == 0
    assert np.abs(errors).max() < 3.5


def test_shingles_are_as_many_as_there_are_different_pieces():
    assert shingle_hashes("abcabcabc", 3).size == 3
    assert shingle_hashes("ab", 5).size == 1
    assert shingle_hashes("", 5).size == 0
    assert shingle_hashes("h\u00e9\U0001f600", 1).size == 3


def test_signatures_do_not_depend_on_the_batch():
    rng = np.random.default_rng(1)
    texts = [sentence(rng, int(n)) for n in rng.integers(1, 2000, 20)] + [""]
    together = signatures(texts)
    alone = np.concatenate([signatures([t]) for t in texts])
    np.testing.assert_array_equal(together, alone)
    assert (together[-1] == 0xFFFFFFFF).all()


def test_near_duplicates_go_and_merely_similar_rows_stay():
    rng = np.random.default_rng(2)
    base = [sentence(rng) for _ in range(30)]
    near = [t[:-3] + "zzz" for t in base]
    similar = [" ".join(t.split()[:20] + sentence(rng, 20).split()) for t in base]
    assert min(map(jaccard, base, near)) > 0.95
    assert max(map(jaccard, base, similar)) < 0.45
    data = pairs(*((t, "") for t in base + near + similar))
    method = Deduplicate(mode="near", threshold=0.8)
    assert kept(method, data) == [*range(30), *range(60, 90)]
    assert method.removed == {"exact": 0, "near": 30}


def test_near_duplicates_with_other_labels_stay():
    text = sentence(np.random.default_rng(3))
    data = rows({"text": text, "label": "0"}, {"text": text + "!", "label": "1"}, {"text": text + "?", "label": "0"})
    assert kept(Deduplicate(mode="near"), data) == [0, 1]


def test_a_row_resembling_only_a_removed_row_stays():
    near = NearDuplicates(threshold=0.5, permutations=4)
    near.bands, near.rows = 4, 1
    near._buckets = [{} for _ in range(4)]
    a = np.array([1, 2, 3, 4], dtype=np.uint32)
    b = np.array([1, 2, 9, 8], dtype=np.uint32)
    c = np.array([7, 6, 9, 8], dtype=np.uint32)
    assert [near.add(a), near.add(b), near.add(c)] == [True, False, True]


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_bands_find_nearly_everything_above_the_threshold(threshold):
    bands, per_band = bands_for(threshold, 128)
    assert bands * per_band <= 128

    def found(j):
        return 1 - (1 - j**per_band) ** bands

    assert found(min(threshold + 0.1, 1.0)) > 0.95
    assert found(threshold - 0.3) < 0.35


def test_tens_of_thousands_of_rows_in_seconds():
    rng = np.random.default_rng(4)
    words = ["".join(rng.choice(list("abcdefgh"), 6)) for _ in range(500)]
    picks = rng.integers(0, 500, size=(20_000, 12))
    texts = [" ".join(words[i] for i in row) for row in picks]
    data = Dataset.from_dict({"text": texts + texts[:1000]})
    start = time.perf_counter()
    assert len(kept(Deduplicate(), data)) == 20_000
    exact = time.perf_counter() - start
    start = time.perf_counter()
    method = Deduplicate(mode="near", permutations=64)
    found = kept(method, data.select(range(3000)))
    near = time.perf_counter() - start
    assert len(found) == 3000
    assert exact < 10
    assert near < 10


def test_messages_are_compared_as_they_are_stored():
    chat = json.dumps([{"role": "user", "content": "hi"}])
    assert kept(Deduplicate(), rows({"messages": chat}, {"messages": chat}, {"messages": chat + " "})) == [0, 2]
