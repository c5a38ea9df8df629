"""Calibration against definitions written out as loops, and the streaming form against the exact one."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss

from luthier.evaluation.accumulators import Calibration, Observed
from luthier.functional import calibration as c


def predictions(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Confidences crowded near 1, as a language model's are, and over-confident."""
    generator = np.random.default_rng(seed)
    confidence = 1 - generator.beta(0.3, 2.0, n)
    return confidence, generator.random(n) < confidence**2


def by_loop(confidence: np.ndarray, correct: np.ndarray, groups: list[np.ndarray]) -> float:
    n = len(confidence)
    return sum(len(g) / n * abs(correct[g].mean() - confidence[g].mean()) for g in groups if len(g))


def test_equal_width_by_loop() -> None:
    confidence, correct = predictions(997)
    groups = [np.flatnonzero((confidence > b / 15) & (confidence <= (b + 1) / 15)) for b in range(15)]
    found = c.expected_calibration_error(confidence, correct, scheme="equal-width")
    assert found == pytest.approx(by_loop(confidence, correct, groups), abs=1e-12)


def test_equal_mass_by_loop() -> None:
    confidence, correct = predictions(15 * 61)  # divides evenly, so no prediction is cut
    groups = np.array_split(np.argsort(confidence), 15)
    found = c.expected_calibration_error(confidence, correct, scheme="equal-mass")
    assert found == pytest.approx(by_loop(confidence, correct, groups), abs=1e-12)


def test_by_hand() -> None:
    # Two bins: confidences 0.2, 0.4 (one right) and 0.6, 1.0 (both right).
    confidence, correct = [0.2, 0.4, 0.6, 1.0], [0, 1, 1, 1]
    expected = 0.5 * abs(0.5 - 0.3) + 0.5 * abs(1.0 - 0.8)
    for scheme in ("equal-mass", "equal-width"):
        assert c.expected_calibration_error(confidence, correct, bins=2, scheme=scheme) == pytest.approx(expected)


def test_ties_do_not_depend_on_the_order_of_the_data() -> None:
    confidence = np.full(100, 0.7)
    correct = np.arange(100) < 40
    for order in (slice(None), slice(None, None, -1)):
        found = c.expected_calibration_error(confidence[order], correct[order], scheme="equal-mass")
        assert found == pytest.approx(0.3)


def test_a_calibrated_predictor_has_a_small_error_and_nothing_gives_nan() -> None:
    generator = np.random.default_rng(1)
    confidence = generator.random(200_000)
    correct = generator.random(200_000) < confidence
    assert c.expected_calibration_error(confidence, correct) < 0.01
    assert np.isnan(c.expected_calibration_error([], []))


def test_width_bins_are_closed_above() -> None:
    assert c.width_bin([0.0, 1 / 15, 0.5, 1.0, 1.0 + 1e-9]).tolist() == [0, 0, 7, 14, 14]


def test_brier_by_definition_and_by_sklearn() -> None:
    generator = np.random.default_rng(2)
    p = generator.dirichlet(np.ones(4), 50)
    y = generator.integers(0, 4, 50)
    one_hot = np.eye(4)[y]
    found = c.brier(p[np.arange(50), y], (p**2).sum(1))
    np.testing.assert_allclose(found, ((p - one_hot) ** 2).sum(1), rtol=1e-12)
    two = generator.random(30)
    truth = generator.integers(0, 2, 30)
    ours = c.brier(np.where(truth == 1, two, 1 - two), two**2 + (1 - two) ** 2).mean()
    assert ours == pytest.approx(2 * brier_score_loss(truth, two))  # sklearn counts one of the two classes


def test_cells_keep_the_order_and_are_fine() -> None:
    log_confidence = np.sort(np.log(np.random.default_rng(3).random(10_000)))
    cell = c.confidence_cell(log_confidence)
    assert (np.diff(cell) >= 0).all()
    spread = [np.ptp(np.exp(log_confidence[cell == k])) for k in np.unique(cell)]
    assert max(spread) < 0.0015
    assert c.confidence_cell([0.0, 1e-9, -1e-9, -50.0]).tolist() == [c.CELLS - 1] * 3 + [0]


def test_streaming_agrees_with_exact() -> None:
    confidence, correct = predictions(40_000, seed=4)
    streaming = Calibration()
    for start in range(0, 40_000, 5_000):
        part = slice(start, start + 5_000)
        streaming.add(
            Observed(
                logp_N=np.log(confidence[part]),
                top1_N=np.where(correct[part], 1, 0),
                top1_logp_N=np.log(confidence[part]),
                collision_N=confidence[part] ** 2,
                target_N=np.ones(5_000, np.int64),
                sequence_N=np.arange(5_000) // 50,
                examples=100,
                first=start // 50,
            )
        )
    found = streaming.metrics(0.95)
    exact = {
        "ece_equal_mass": c.expected_calibration_error(confidence, correct, scheme="equal-mass"),
        "ece_equal_width": c.expected_calibration_error(confidence, correct, scheme="equal-width"),
    }
    assert found["ece_equal_width"]["value"] == pytest.approx(exact["ece_equal_width"], abs=1e-12)
    assert found["ece_equal_mass"]["value"] == pytest.approx(exact["ece_equal_mass"], abs=2e-4)
    for name, value in exact.items():
        assert found[name]["n"] == 40_000
        assert found[name]["low"] < value < found[name]["high"]
        assert found[name]["high"] - found[name]["low"] < 0.03
    assert found["nll"]["value"] == pytest.approx(-np.log(confidence).mean())
