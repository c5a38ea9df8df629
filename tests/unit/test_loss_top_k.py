"""Selection by loss, against means worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import FakeContext, KnownLogp, token_batch

from luthier.functional.per_example import mean_loss
from luthier.methods.selection.loss_top_k import LossTopK, highest


def test_mean_loss_is_the_weighted_mean_of_each_example():
    logp_N = torch.tensor([-1.0, -3.0, -2.0, -4.0, -9.0], dtype=torch.float64)
    weight_N = torch.tensor([1.0, 3.0, 1.0, 1.0, 0.0])
    found = mean_loss(logp_N, weight_N, torch.tensor([0, 0, 2, 2, 1]), 4)
    np.testing.assert_allclose(found.numpy(), [(1 + 9) / 4, -np.inf, 3.0, -np.inf])


@pytest.mark.parametrize(
    ("keep", "expected"), [(0.25, [2]), (0.5, [0, 2]), (0.51, [0, 2, 3]), (1.0, [0, 1, 2, 3]), (0.01, [2])]
)
def test_the_highest_losses_in_the_order_of_the_batch(keep, expected):
    assert highest(torch.tensor([5.0, 1.0, 7.0, 2.0]), keep).tolist() == expected


def test_ties_go_to_the_earlier_example_and_rounding_adds_none():
    assert highest(torch.tensor([1.0, 1.0, 1.0, 1.0]), 0.5).tolist() == [0, 1]
    assert highest(torch.arange(30.0), 0.1).numel() == 3


def batch_of_four():
    return token_batch([([1, 5, 6, 7], 2), ([1, 5, 6], 2), ([1, 5, 6, 7, 8], 2), ([1, 9], 1)])


def test_select_scores_without_gradient_and_keeps_the_hardest():
    batch = batch_of_four()
    loss_B = torch.tensor([0.5, 3.0, 2.0, 1.0])
    ctx = FakeContext(forward=lambda b, model: KnownLogp(-loss_B[b.sequence_N], b.sequence_N))
    index_b, weight_b = LossTopK(keep=0.5).select(batch, ctx)
    assert index_b.tolist() == [1, 2]
    assert weight_b.tolist() == [1.0, 1.0]
    assert ctx.passes == 1
    assert ctx.logged == {"selected_loss": 2.5, "offered_loss": 1.625}
    chosen = batch.take(index_b, weight_b)
    assert chosen.row_B.tolist() == [1, 2]
    assert chosen.target_N.tolist() == [6, 6, 7, 8]


def test_keeping_everything_is_the_identity_and_costs_no_pass():
    batch, ctx = batch_of_four(), FakeContext()
    method = LossTopK(keep=1.0, oversample=1)
    index_b, weight_b = method.select(batch, ctx)
    same = batch.take(index_b, weight_b)
    assert ctx.passes == 0
    assert method.oversample == 1
    for name in ("position_N", "target_N", "weight_N", "sequence_N", "row_B"):
        assert torch.equal(getattr(same, name), getattr(batch, name)), name
    assert torch.equal(same.inputs["input_ids"], batch.inputs["input_ids"])
