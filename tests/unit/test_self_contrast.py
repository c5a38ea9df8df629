"""Self-contrast: the pool of the specification's case, what is selected, and the stage with scripted answers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, Features, Value

from luthier.core.errors import UserError
from luthier.core.protocols import Completion
from luthier.functional.self_contrast import cosine, pool, ranks
from luthier.methods.data.self_contrast import SelfContrast

SIMILARITY = np.array([0.91, 0.40, 0.75, 0.40, 0.22, 0.63, 0.10, 0.88])
TEXTS = ["r0", "r1", "r2", "r1", "r4", "r5", "  ", "r7"]


def test_ranks_and_pools_of_the_fixed_case():
    assert ranks(SIMILARITY).tolist() == [7, 2, 5, 2, 1, 4, 0, 6]
    for share, wanted in ((0.25, [4]), (0.5, [1, 4, 5]), (0.75, [1, 2, 4, 5, 7])):
        assert pool(TEXTS, SIMILARITY, share, "lastdedup", "gold") == wanted


def test_other_modes():
    assert pool(TEXTS, SIMILARITY, 0.5, "alldedup", "gold") == [0, 1, 2, 4, 5, 7]
    assert pool(TEXTS, SIMILARITY, 0.5, "all", "gold") == [0, 1, 2, 3, 4, 5, 7]
    # sorted ranks 0 1 2 2 4 5 6 7; the one at 4 is 4
    assert pool(TEXTS, SIMILARITY, 0.5, "last", "gold") == [1, 3, 4]
    assert pool(TEXTS, SIMILARITY, 0.5, "alldedup", " r2 ") == [0, 1, 4, 5, 7]
    assert pool([], np.zeros(0), 0.5, "lastdedup", "gold") == []
    assert pool(["a"], np.zeros(1), 1.0, "lastdedup", "gold") == []


@pytest.mark.parametrize("share", [0.2, 0.5, 0.75])
def test_what_is_selected_is_less_similar_than_what_is_discarded(share):
    rng = np.random.default_rng(0)
    for _ in range(50):
        texts = [str(rng.integers(12)) for _ in range(16)]
        value = {t: float(rng.uniform()) for t in texts}
        similarity = np.array([value[t] for t in texts])
        chosen = {texts[i] for i in pool(texts, similarity, share, "lastdedup", "gold")}
        rest = set(texts) - chosen
        if chosen:
            assert max(value[t] for t in chosen) <= min(value[t] for t in rest)


def test_cosine_by_hand():
    found = cosine(np.array([[3.0, 4.0], [0.0, 0.0], [-4.0, 3.0]]), np.array([3.0, 4.0]))
    np.testing.assert_allclose(found, [1.0, 0.0, 0.0], atol=1e-12)


FEATURES = Features(
    {n: Value("string") for n in ("prompt", "completion", "kind", "extra", "messages", "source")}
    | {"row": Value("int64")}
)
ANSWERS = {
    "a": ["abcd", "abce", "xyzw", "qqqq", "abcd ", "zzzz"],
    "b": ["same", "same", "same", "same", "same", "same"],
}


def contrasted(answers=None, seed=0, **options):
    answers = answers or ANSWERS
    rows = [
        {"prompt": p, "completion": " abcd", "kind": "pair", "extra": None, "messages": None, "source": "s", "row": i}
        for i, p in enumerate(answers)
    ]
    reports, asked = [], []

    def generate(rows, **sampling):
        asked.append(sampling)
        return [[Completion(f" {t}", (), t != "zzzz") for t in answers[r["prompt"]]] for r in rows]

    loaded = SimpleNamespace(model=None)
    ctx = SimpleNamespace(
        generate=generate, report=reports.append, seed=seed, processor=None, shop=SimpleNamespace(loaded=loaded)
    )
    stage = SelfContrast(**{"samples": 6, "negatives": 2, **options})
    return [dict(r) for r in stage.run(Dataset.from_list(rows, features=FEATURES), ctx)], reports[0], asked[0]


def test_unlike_answers_become_negatives_and_poor_prompts_go():
    rows, report, asked = contrasted(share=0.5)
    assert [r["prompt"] for r in rows] == ["a"]
    negatives = json.loads(rows[0]["extra"])["negatives"]
    # Of abcd, abce, xyzw, qqqq and zzzz (abcd with a space is another text) half of six are the least similar.
    assert len(negatives) == 2
    assert set(negatives) <= {" xyzw", " qqqq", " zzzz"}
    assert (report["prompts"], report["dropped"]) == (2, 1)
    assert report["similarity_of_pool"] < report["similarity_of_rest"]
    assert (asked["samples"], asked["decoding"], asked["temperature"]) == (6, "sample", 1.0)


def test_the_draw_follows_the_seed_and_unfinished_answers_may_go():
    many = {"a": [f"w{i}" for i in range(12)]}
    first, again, other = (
        json.loads(contrasted(many, seed=s, samples=12, negatives=3, mode="alldedup")[0][0]["extra"])["negatives"]
        for s in (0, 0, 1)
    )
    assert first == again != other
    rows, _, _ = contrasted(share=0.5, negatives=1, drop_unfinished=True)
    assert "zzzz" not in str(rows)


def test_the_model_s_own_states_as_encoder():
    from test_decoding import tiny

    class Tokenizer:
        def __call__(self, text, add_special_tokens):
            return {"input_ids": [ord(c) % 24 for c in text]}

    stage, model = SelfContrast(encoder="model"), tiny()
    found = stage.encode(["ab", "abcd", "ab"], model, Tokenizer())
    states = model.model(input_ids=__import__("torch").tensor([[ord(c) % 24 for c in "abcd"]])).last_hidden_state[0]
    np.testing.assert_allclose(found[1], states.mean(0).detach().double(), atol=1e-5)
    np.testing.assert_allclose(found[0], found[2], atol=1e-6)


def test_refusals():
    with pytest.raises(UserError, match="9 negatives cannot be drawn from 8 samples"):
        SelfContrast(samples=8, negatives=9)
    with pytest.raises(UserError, match="no prompt has 2 answers in its pool"):
        contrasted({"b": ANSWERS["b"]})
