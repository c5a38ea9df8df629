"""Confident disagreement on tables worked out by hand, and a probe that finds planted labels."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.functional.confident_learning import confident_disagreement, contradicted, cross_validated


def test_thresholds_are_the_mean_own_probability_of_each_class():
    # Class 0: rows 0, 1, 2 with own probabilities 0.9, 0.8, 0.1 -> t_0 = 0.6. Class 1: 0.7, 0.3 -> t_1 = 0.5.
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.3, 0.7], [0.7, 0.3]])
    label = np.array([0, 0, 0, 1, 1])
    # Row 2: p_1 = 0.9 >= 0.5, against its label. Row 4: p_0 = 0.7 >= 0.6, against its label. The others agree.
    assert confident_disagreement(p, label).tolist() == [False, False, True, False, True]


def test_nothing_is_confident_below_every_threshold_and_an_empty_class_never_is():
    p = np.array([[0.5, 0.3, 0.2], [0.9, 0.05, 0.05], [0.3, 0.5, 0.2], [0.2, 0.0, 0.8]])
    label = np.array([0, 0, 1, 1])
    # t_0 = 0.7, t_1 = 0.25; class 2 has no row. Row 0: only p_1 = 0.3 >= 0.25 -> against. Row 3: p_2 = 0.8 counts for
    # nothing, and neither p_0 = 0.2 nor p_1 = 0 reaches its threshold.
    assert confident_disagreement(p, label).tolist() == [True, False, False, False]


def test_a_row_is_judged_at_its_first_other_token():
    top1 = np.array([5, 6, 5, 9, 5, 9, 8])
    target = np.array([5, 6, 5, 7, 4, 7, 8])
    row = np.array([0, 0, 1, 1, 2, 2, 3])
    probability = np.array([0.9, 0.9, 0.9, 0.8, 0.5, 0.99, 0.1])
    agreed, against = contradicted(top1, np.log(probability), target, row, confidence=0.8)
    assert agreed.tolist() == [True, False, False, True]
    # Row 1 goes another way at 0.8, which is enough; row 2 first at 0.5, and what follows is not asked.
    assert against.tolist() == [False, True, False, False]


def test_the_probe_finds_planted_labels_and_is_reproducible():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 300)
    features = rng.normal(0, 0.3, (300, 6))
    features[np.arange(300), truth] += 3.0
    planted = np.sort(rng.choice(300, 45, replace=False))
    label = truth.copy()
    label[planted] = (label[planted] + 1) % 3
    p = cross_validated(features, label, 3, seed=1)
    np.testing.assert_allclose(p.sum(axis=1), 1.0, atol=1e-9)
    found = set(np.flatnonzero(confident_disagreement(p, label)).tolist())
    # Every suspect is a planted one; some may be missed, as wrong neighbours pull the boundary.
    assert found <= set(planted.tolist())
    assert len(found) >= 40
    np.testing.assert_array_equal(p, cross_validated(features, label, 3, seed=1))


def test_no_row_is_predicted_with_its_own_label():
    # One-hot features: only the row itself could teach its label, and the others hold more of the other label.
    label = np.array([0, 1] * 5)
    p = cross_validated(np.eye(10), label, 2, folds=5, seed=0)
    assert (p[np.arange(10), label] <= 0.5 + 1e-9).all()


def test_too_few_rows_for_the_folds():
    with pytest.raises(ValueError, match="3 rows cannot be cut into 5 folds"):
        cross_validated(np.zeros((3, 2)), np.array([0, 1, 0]), 2)
