"""What the base makes of rows: strong and weak bases by made-up scores, planted noise, answers by a fake decoder."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from helpers import make_session, random_rows, tiny_llama
from luthier.advisor import base
from luthier.advisor.findings import Findings, counted, unmeasured


def scores(probability_N, row_N, top1_N=None, top1_p_N=None):
    n = len(probability_N)
    target = np.zeros(n, dtype=np.int64)
    return base.Scores(
        logp_N=np.log(np.asarray(probability_N)),
        entropy_N=np.full(n, 0.5),
        top1_N=target if top1_N is None else np.asarray(top1_N),
        top1_logp_N=np.log(np.asarray(probability_N if top1_p_N is None else top1_p_N)),
        target_N=target,
        row_N=np.asarray(row_N),
    )


@pytest.mark.parametrize(("p", "zone"), [(0.8, "strong"), (0.5, "intermediate"), (0.2, "weak")])
def test_zone_of_the_continuum(p, zone):
    probability, entropy = base.probabilities(scores([p, p, p, p], [0, 0, 1, 1]))
    assert probability.value == pytest.approx(p)
    assert probability.sentence.endswith(f"{zone}.")
    assert (probability.low, probability.high) == (pytest.approx(p), pytest.approx(p))
    assert entropy.value == pytest.approx(0.5)
    assert entropy.n == 4


def test_planted_noise_is_what_a_strong_base_contradicts():
    rng = np.random.default_rng(0)
    wrong = rng.random(400) < 0.25
    noise, agreement = base.noise_in_text(
        scores(
            np.where(wrong, 0.02, 0.95), np.arange(400), top1_N=wrong.astype(int), top1_p_N=np.where(wrong, 0.9, 0.95)
        )
    )
    assert noise.value == pytest.approx(wrong.mean())
    assert agreement.value == pytest.approx(1 - wrong.mean())
    # Wilson's interval, from its formula.
    p, n, z = wrong.mean(), 400, 1.959963984540054
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert (noise.high - noise.low) / 2 == pytest.approx(half)


def test_an_unsure_base_contradicts_nothing():
    noise, agreement = base.noise_in_text(scores([0.1] * 50, range(50), top1_N=[1] * 50, top1_p_N=[0.3] * 50))
    assert noise.value == 0.0
    assert agreement.value == 0.0


def test_long_answers_are_not_judged_by_contradiction():
    noise, agreement = base.noise_in_text(scores([0.5] * 130, [0] * 65 + [1] * 65))
    assert noise.value is None
    assert agreement.value is None
    assert "more than 64 tokens" in noise.sentence


def test_planted_noise_in_labels():
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 2, 200)
    features = rng.normal(0, 0.2, (200, 4)) + 3.0 * truth[:, None]
    label = truth.copy()
    label[:30] = 1 - label[:30]
    noise, agreement = base.noise_in_labels(features, label, 2, seed=0)
    assert noise.value == pytest.approx(30 / 200)
    assert agreement.value == pytest.approx(170 / 200)
    few, _ = base.noise_in_labels(features[:15], label[:15], 2, seed=0)
    assert few.value is None
    assert "too few" in few.sentence


def test_scores_are_those_of_the_session_whatever_the_batches():
    session, rows = make_session(tiny_llama()), random_rows(20)
    index = np.array([1, 4, 7, 11, 19])
    found = base.score(session, rows, index, 2)
    again = base.score(session, rows, index, 5)
    np.testing.assert_array_equal(found.row_N, again.row_N)
    np.testing.assert_allclose(found.logp_N, again.logp_N, atol=1e-5)
    expected = session.score(rows)
    np.testing.assert_allclose(found.logp_N, np.concatenate([expected[i] for i in index]), atol=1e-5)
    np.testing.assert_array_equal(np.bincount(found.row_N), [len(expected[i]) for i in index])


def shop(completions, scores_of, task="causal-lm"):
    row = {"kind": "pair", "prompt": "p", "completion": "c", "extra": None}
    return SimpleNamespace(
        plan=SimpleNamespace(
            task=task,
            verifier=SimpleNamespace(build=lambda: lambda rows, texts, ctx: [scores_of[t] for t in texts]),
            recipe=SimpleNamespace(evaluation=SimpleNamespace(generate="auto")),
        ),
        data=SimpleNamespace(renderer=SimpleNamespace(prompt_ids=lambda r: [1])),
        decoder=SimpleNamespace(
            generate=lambda model, prompts, ctx: [SimpleNamespace(text=t) for t in completions[: len(prompts)]]
        ),
    ), SimpleNamespace(prepared=SimpleNamespace(canonical=lambda i: row), rows=SimpleNamespace(dataset=[row] * 10))


def test_own_answers_are_those_the_verifier_finds_right():
    made, source = shop(["a", "b", "a", "?"], {"a": 1.0, "b": 0.0, "?": None})
    session = SimpleNamespace(model=SimpleNamespace(eval=lambda: None))
    found = base.own_answers("right_answers", made, session, source, np.arange(4), "training")
    assert (found.value, found.n) == (pytest.approx(2 / 3), 3)
    assert "66.7% of 3 training questions" in found.sentence
    other, _ = shop([], {}, task="sequence-classification")
    assert base.own_answers("right_answers", other, session, source, np.arange(4), "training").value is None


def test_what_was_not_measured_answers_no_to_every_question():
    found = Findings([unmeasured("x", "why."), counted("y", 0.5, 10, "share", "s")])
    assert not found.above("x", 0.0)
    assert not found.below("x", 1.0)
    assert not found.above("absent", 0.0)
    assert found.above("y", 0.5, surely=True)
    assert found.below("y", 0.5, surely=True)
    assert Findings.from_list(found.to_list()).to_list() == found.to_list()
