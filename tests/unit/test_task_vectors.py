"""Differences in pieces: the threshold of a sort, the trim, the elected mean by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import MemorySource

from luthier.core.errors import UserError
from luthier.functional.task_vectors import (
    difference,
    elected_mean,
    factors,
    magnitude_thresholds,
    pieces,
    rounded_difference,
    trim,
    weighted_sum,
)


def drawn(count, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [1, 2, 17, 500, 999, 1000])
def test_the_threshold_is_that_of_a_sort(count):
    values, other = drawn(1000) * torch.logspace(-30, 30, 1000), drawn(1000, 1)
    values[:40] = 0.0
    expected = [float(np.sort(np.abs(v.numpy()))[::-1][count - 1]) for v in (values, other)]
    pairs = list(zip(values.split(128), other.split(128), strict=True))
    assert magnitude_thresholds(lambda: pairs, [count, count]) == expected
    assert magnitude_thresholds(lambda: [[values.reshape(10, 100)]], [count]) == expected[:1]


def test_equal_values_at_the_limit_all_stay():
    values = torch.tensor([0.5, -0.5, 0.5, 0.25])
    assert magnitude_thresholds(lambda: [[values]], [2]) == [0.5]
    assert trim(values, 0.5).tolist() == [0.5, -0.5, 0.5, 0.0]
    assert trim(values, 0.0).tolist() == values.tolist()


def test_a_rounded_difference_is_rounded_once():
    a, b = drawn(1000).bfloat16(), (drawn(1000, 1) * 1e-3).bfloat16()
    assert torch.equal(rounded_difference(a, b), (a.double() - b.double()).float())


def test_a_difference_is_wide_and_leaves_the_models_alone():
    tuned, base = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), torch.tensor([0.5, 0.5])
    assert difference(tuned, base).tolist() == [0.5, 1.5, 3.0]
    assert difference(tuned, tuned).tolist() == [0.0, 0.0, 0.0]
    assert tuned.tolist() == [1.0, 2.0, 3.0]
    small = difference(torch.tensor([256.0], dtype=torch.bfloat16), torch.tensor([255.0], dtype=torch.bfloat16))
    assert small.dtype is torch.float64
    assert small.item() == 1.0


def test_the_elected_mean_by_hand():
    taus = [torch.tensor(v, dtype=torch.float64) for v in ([1.0, 0.0, 2.0, -1.0, 0.0], [3.0, -1.0, -3.0, 1.0, 0.0])]
    taus.append(torch.tensor([-2.0, 0.0, 4.0, 0.0, 0.0], dtype=torch.float64))
    # sums 2, -1, 3, 0, 0: signs +, -, +, none, none; zeros belong to no sign
    assert elected_mean(taus, [1.0] * 3).tolist() == [2.0, -1.0, 3.0, 0.0, 0.0]
    # weighted sums 1 + 6 - 2 = 5, -2, 2 - 6 + 4 = 0
    assert elected_mean(taus, [1.0, 2.0, 1.0])[:3].tolist() == [(1 + 2 * 3) / 3, -1.0, 0.0]
    assert weighted_sum(taus, [1.0, 2.0, 0.5])[:3].tolist() == [6.0, -2.0, -2.0]


def test_pieces_cover_a_tensor_once():
    tensor = drawn(10).reshape(2, 5)
    found = list(pieces({"x": MemorySource({"t": tensor}), "y": MemorySource({"t": tensor[:1]})}, "t", 4))
    assert [start for start, _ in found] == [0, 4, 8]
    assert torch.equal(torch.cat([piece["x"] for _, piece in found]), tensor.flatten())
    assert torch.equal(torch.cat([piece["y"] for _, piece in found]), tensor[0])


def test_one_factor_per_model():
    assert factors(["a", "b"], None, "ties") == [1.0, 1.0]
    with pytest.raises(UserError, match=r"ties: 1 weights for 2 models \(a, b\)"):
        factors(["a", "b"], [0.5], "ties")
