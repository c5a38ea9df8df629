"""What transductive and self-calibrated fine-tuning decide about labels, worked out independently."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from sklearn.linear_model import LogisticRegression

from luthier.functional import calibration
from luthier.functional.label_calibration import calibrated_numbers, calibrated_targets, disagreement, folds
from luthier.functional.pseudo_labels import certain, confident, ramp
from luthier.functional.temperature import LARGEST, SMALLEST, fit_temperature, log_softmax


def test_exactly_the_confident_predictions_are_kept():
    p = [[0.9, 0.1], [0.89, 0.11], [0.05, 0.95], [0.5, 0.5], [0.01, 0.99], [0.97, 0.03], [0.96, 0.04]]
    assert confident(p, 0.9).tolist() == [0, 2, 4, 5, 6]
    # Class 0 has five predictions, class 1 two: half of them, rounded up, is three and one.
    assert confident(p, 0.9, class_share=0.5).tolist() == [0, 4, 5, 6]
    assert confident(p, 0.9, class_share=0.4).tolist() == [4, 5, 6]
    # The share counts all predictions of a class; the threshold still holds.
    assert confident(p, 0.965, class_share=0.5).tolist() == [4, 5]
    assert confident([[0.9, 0.1]] * 4, 0.5, class_share=0.5).tolist() == [0, 1]


def test_numbers_are_kept_where_the_models_agree():
    # Deviations 0.05 and 0.1 of two predictions that lie 0.1 and 0.2 apart.
    assert certain([[0.5, 0.5, 0.25], [0.625, 0.75, 0.25]], 0.0625).tolist() == [0, 2]
    with pytest.raises(ValueError, match="two models"):
        certain([[0.5]], 0.05)


def test_the_ramp():
    assert [ramp(step, 10, 0.5) for step in (0, 1, 5, 9)] == [0.0, 0.2, 1.0, 1.0]
    assert ramp(0, 10, 0.0) == 1.0


def test_targets_by_hand():
    q, label = [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]], [0, 0, 1]
    assert disagreement(q, label, 0.5).tolist() == pytest.approx([0.0, 0.35, 0.05])
    wanted = [[1, 0, 0], [0.65 + 0.035, 0.28, 0.035], [0.015, 0.95 + 0.015, 0.02]]
    np.testing.assert_allclose(calibrated_targets(q, label, 0.5), wanted)
    np.testing.assert_array_equal(calibrated_targets(q, label, 0.0), np.eye(3)[label])


def test_numbers_by_hand():
    # Errors 3, -3, 0, 0 have standard deviation sqrt(4.5): an error of 3 is 0.4714 of three deviations.
    a = 0.5 * 3 / (3 * math.sqrt(4.5))
    assert calibrated_numbers([4.0, 0.0, 2.0, 5.0], [1.0, 3.0, 2.0, 5.0], 0.5) == pytest.approx(
        [1 + 3 * a, 3 - 3 * a, 2, 5]
    )
    # One error of 10 among 40 rows is more than three deviations: the whole of a_max.
    label = np.zeros(40)
    found = calibrated_numbers(np.eye(40)[0] * 10, label, 0.5)
    assert found[0] == pytest.approx(5.0)
    assert calibrated_numbers(label + 1, label, 0.5).tolist() == label.tolist()


def test_equal_texts_share_a_fold_and_folds_are_equal():
    texts = [f"text {i}" for i in range(40)] + ["Text  3", "TEXT 3", "ｔｅｘｔ 3", "text 7"]
    found = folds(texts, 5, np.random.default_rng(0))
    assert len({found[i] for i in (3, 40, 41, 42)}) == 1
    assert found[7] == found[43]
    counts = np.bincount(found, minlength=5)
    assert counts.max() - counts.min() <= 1
    other = folds(texts, 5, np.random.default_rng(1))
    assert (other != found).any()
    with pytest.raises(ValueError, match="at least 5 different texts, and there are 3"):
        folds(["a", "b", "c", "A"], 5, np.random.default_rng(0))


def test_planted_flips_lose_target_mass_to_the_true_label():
    # Two separable clouds, a fifth of the labels flipped, each row twice: the copy must not be learnt from either.
    rng = np.random.default_rng(0)
    true = rng.integers(0, 2, 200)
    x = rng.normal(size=(200, 2)) + 4 * true[:, None]
    given = np.where(rng.random(200) < 0.2, 1 - true, true)
    texts = [f"row {i % 200}" for i in range(400)]
    x, true, given = np.tile(x, (2, 1)), np.tile(true, 2), np.tile(given, 2)
    fold = folds(texts, 5, rng)
    logits = np.zeros((400, 2))
    for k in range(5):
        inside = fold == k
        assert not {texts[i] for i in np.flatnonzero(inside)} & {texts[i] for i in np.flatnonzero(~inside)}
        model = LogisticRegression().fit(x[~inside], given[~inside])
        logits[inside] = model.predict_log_proba(x[inside])
    q = np.exp(log_softmax(logits, fit_temperature(logits, given)))
    targets = calibrated_targets(q, given, 0.5)
    rows = np.arange(400)
    before, after = (given == true).mean(), targets[rows, true].mean()
    flipped = given != true
    assert 0.1 < flipped.mean() < 0.3
    assert after > before + 0.03
    assert targets[rows, true][flipped].mean() > 0.15
    assert targets[rows, true][~flipped].mean() > 0.97


def test_the_temperature_is_the_minimum_of_the_loss():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(500, 4)) * 6
    p = np.exp(z / 3 - np.logaddexp.reduce(z / 3, axis=-1, keepdims=True))
    label = (p.cumsum(-1) < rng.random((500, 1))).sum(-1)

    def nll(log_t):
        scaled = z / np.exp(log_t)
        return -(scaled[np.arange(500), label] - np.logaddexp.reduce(scaled, axis=-1)).mean()

    wanted = np.exp(minimize_scalar(nll, bounds=(-3, 3), method="bounded", options={"xatol": 1e-10}).x)
    found = fit_temperature(z, label)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert found == pytest.approx(3, rel=0.2)
    # It undoes a factor exactly, and log-probabilities serve as logits.
    assert fit_temperature(5 * z, label) == pytest.approx(5 * found, rel=1e-6)
    assert fit_temperature(log_softmax(z), label) == pytest.approx(found, rel=1e-6)

    def ece(t):
        log_p = log_softmax(z, t)
        return calibration.expected_calibration_error(np.exp(log_p.max(-1)), log_p.argmax(-1) == label)

    assert ece(found) < 0.4 * ece(1.0)


def test_the_temperature_stays_in_its_range():
    z = np.array([[2.0, 0.0], [0.0, 1.0]])
    assert fit_temperature(z, [0, 1]) == SMALLEST
    assert fit_temperature(z, [1, 0]) == LARGEST
    with pytest.raises(ValueError, match="no predictions"):
        fit_temperature(np.zeros((0, 2)), [])
