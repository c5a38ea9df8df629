"""Matrices of logits against numpy in float64: norms by SVD, sketches by full FFTs, the memory by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from logit_references import fft_sketch, svd_norm

from luthier.functional import logit_matrices as lm


def test_nuclear_norm_of_a_matrix_by_hand_and_by_svd():
    # Two orthogonal rows of lengths 5 and 13, and a zero row: singular values 13, 5, 0.
    z = torch.tensor([[3.0, 4.0, 0, 0], [0, 0, 5, 12.0], [0, 0, 0, 0]])
    assert float(lm.nuclear_norm_of(z)) == pytest.approx(18.0, abs=1e-6)
    z = torch.tensor([[1.0, 2, -1, 0.5], [0.3, -4, 2, 1], [2, 2, 0, -3.0]])
    for matrix in (z, z.t()):
        assert float(lm.nuclear_norm_of(matrix)) == pytest.approx(svd_norm(matrix), rel=1e-7)


@pytest.mark.parametrize("length", [1, 4, 9, 30])
@pytest.mark.parametrize("bias", [False, True])
def test_norm_and_columns_of_a_product_without_forming_it(length, bias):
    torch.manual_seed(length)
    hidden, weight = torch.randn(length, 8), torch.randn(50, 8)
    bias_V = torch.randn(50) if bias else None
    z = 0.5 * hidden.double() @ weight.double().t() + (0 if bias_V is None else bias_V.double())
    cosine_RV = lm.cosine_rows(lm.random_signs(50, torch.Generator().manual_seed(1)), torch.tensor([0, 7, 7, 49]))
    map_ = lm.output_map(weight, bias_V, cosine_RV, gram=True)
    x = lm.widened(hidden, 0.5, bias)
    assert float(map_.nuclear_norm(x)) == pytest.approx(svd_norm(z), rel=1e-6)
    torch.testing.assert_close(map_.columns(x).double(), z @ cosine_RV.double().t(), rtol=1e-4, atol=1e-4)


def test_a_long_vocabulary_is_walked_in_parts(monkeypatch):
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 4), torch.randn(23, 4)
    monkeypatch.setattr(lm, "_ROWS", 7)
    map_ = lm.output_map(weight, None, None, gram=True)
    assert float(map_.nuclear_norm(hidden)) == pytest.approx(svd_norm(hidden.double() @ weight.double().t()), rel=1e-6)


def test_a_trained_embedding_of_lower_rank_than_its_width():
    torch.manual_seed(0)
    hidden, weight = torch.randn(12, 8), torch.randn(20, 3) @ torch.randn(3, 8)
    map_ = lm.output_map(weight, None, None, gram=True)
    assert float(map_.nuclear_norm(hidden)) == pytest.approx(svd_norm(hidden @ weight.t()), rel=1e-3)


def sketch(z, drawn):
    columns = (
        torch.as_tensor(z, dtype=torch.float32)
        @ lm.cosine_rows(drawn["vocabulary_signs"], drawn["vocabulary_frequencies"]).t()
    )
    return (lm.cosine_rows(drawn["time_signs"], drawn["time_frequencies"])[:, : len(columns)] @ columns).flatten()


def drawn_for(vocabulary, time, columns, rows, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "vocabulary_signs": lm.random_signs(vocabulary, g),
        "time_signs": lm.random_signs(time, g),
        "vocabulary_frequencies": torch.randint(vocabulary, (columns,), generator=g),
        "time_frequencies": torch.randint(time, (rows,), generator=g),
    }


def test_sketch_by_cosines_is_the_sketch_by_ffts():
    drawn = drawn_for(101, 20, 16, 4)
    z = np.random.default_rng(0).normal(size=(13, 101))
    wanted = fft_sketch(z, drawn)
    assert np.abs(sketch(z, drawn).numpy() - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_sketch_is_linear():
    drawn = drawn_for(31, 10, 8, 4)
    torch.manual_seed(0)
    a, b = torch.randn(7, 31), torch.randn(7, 31)
    torch.testing.assert_close(
        sketch(2.0 * a - 0.5 * b, drawn), 2.0 * sketch(a, drawn) - 0.5 * sketch(b, drawn), rtol=1e-4, atol=1e-3
    )


def test_given_signs_and_frequencies_reproduce_values_worked_out_by_hand():
    # V = 4, T = 2. With +1 signs, frequency 0 sums and frequency 2 alternates; sqrt(4/2) and sqrt(2/1) scale.
    drawn = {
        "vocabulary_signs": torch.tensor([1, 1, -1, 1], dtype=torch.int8),
        "time_signs": torch.tensor([1, -1], dtype=torch.int8),
        "vocabulary_frequencies": torch.tensor([0, 2]),
        "time_frequencies": torch.tensor([1]),
    }
    z = [[1.0, 2, 3, 4], [0, 1, 0, 1]]
    # over the vocabulary: row 0: 1 + 2 - 3 + 4 = 4 and 1 - 2 - 3 - 4 = -8; row 1: 2 and -2; each times sqrt(2)
    # over time with signs (1, -1) and frequency 1 (1, -1): row 0 + row 1, times sqrt(2)
    np.testing.assert_allclose(sketch(z, drawn).numpy(), [2 * (4 + 2), 2 * (-8 - 2)], rtol=1e-6)


def test_signs_are_signs_and_angles_stay_exact_over_a_large_vocabulary():
    sign = lm.random_signs(1000, torch.Generator().manual_seed(0))
    assert set(sign.tolist()) == {-1, 1}
    assert abs(int(sign.sum())) < 150
    n, k = 200_003, 199_999
    row = lm.cosine_rows(torch.ones(n, dtype=torch.int8), torch.tensor([k]))[0]
    j = n - 5
    exact = np.cos(2 * np.pi * ((j * k) % n) / n) * np.sqrt(n)
    assert float(row[j]) == pytest.approx(exact, abs=1e-3)


def test_memory_is_first_in_first_out_and_wraps():
    memory = torch.zeros(4, 1)
    assert float(lm.mean_distance(torch.ones(1, 1), memory[:0])) == 0.0
    pointer, count = lm.push(memory, 0, 0, torch.tensor([[1.0], [2], [3]]))
    assert (pointer, count) == (3, 3)
    pointer, count = lm.push(memory, pointer, count, torch.tensor([[4.0], [5], [6]]))
    assert (pointer, count) == (2, 4)
    assert memory.flatten().tolist() == [5, 6, 3, 4]
    assert float(lm.mean_distance(torch.tensor([[10.0]]), memory)) == pytest.approx((5 + 4 + 7 + 6) / 4)
    assert lm.push(memory, 2, 4, torch.arange(7.0)[:, None]) == (1, 4)
    assert memory.flatten().tolist() == [6, 3, 4, 5]  # slots 2, 3, 0, 1, 2, 3, 0: the last four of seven stay


def test_gradient_norm_without_the_gradient():
    torch.manual_seed(0)
    error, x = torch.randn(5, 11), torch.randn(5, 3)
    wanted = np.linalg.norm(error.double().numpy().T @ x.double().numpy())
    assert float(lm.last_layer_gradient_norm(error, x)) == pytest.approx(wanted, rel=1e-9)
