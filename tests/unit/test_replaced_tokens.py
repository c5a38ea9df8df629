"""Replaced-token detection in numbers worked out by hand or with numpy, in float64."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from luthier.functional.replaced_tokens import DisentangledEmbedding, detection_loss, draw_masked, put, sample_tokens


def test_a_share_of_the_tokens_is_masked_and_one_at_least():
    for count, share, wanted in ((20, 0.15, 3), (3, 0.15, 1), (1, 0.15, 1), (10, 1.0, 10), (0, 0.15, 0)):
        chosen = draw_masked(count, share, torch.Generator().manual_seed(1))
        assert len(chosen) == wanted
        assert chosen.tolist() == sorted(set(chosen.tolist()))
        assert all(0 <= i < count for i in chosen.tolist())


def test_every_token_is_masked_equally_often():
    rng = torch.Generator().manual_seed(2)
    counts = np.bincount(torch.cat([draw_masked(10, 0.3, rng) for _ in range(4000)]).numpy(), minlength=10)
    # 1200 expected for each, with a standard deviation of sqrt(4000 * 0.3 * 0.7) = 29.
    assert np.abs(counts - 1200).max() < 5 * 29


def test_samples_follow_the_cumulative_probabilities_and_carry_no_gradient():
    p = np.array([0.1, 0.2, 0.3, 0.4])
    logits = torch.tensor(np.log(p))[None].repeat(6, 1).requires_grad_()
    uniform = torch.tensor([0.0, 0.09, 0.11, 0.29, 0.31, 0.999], dtype=torch.float64)
    found = sample_tokens(logits, uniform)
    assert found.tolist() == [0, 0, 1, 1, 2, 3]
    assert not found.requires_grad
    assert found.dtype == torch.int64


def test_samples_have_the_generators_distribution():
    p = np.array([0.5, 0.25, 0.125, 0.125])
    uniform = torch.rand(40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = sample_tokens(torch.tensor(np.log(p)).expand(40_000, 4), uniform)
    assert np.abs(np.bincount(found.numpy(), minlength=4) / 40_000 - p).max() < 5 * 0.5 / math.sqrt(40_000)


def test_a_sample_that_is_the_original_counts_as_original():
    original = torch.tensor([[1, 5, 6, 7], [1, 8, 9, 0]])
    position, sample = torch.tensor([1, 3, 6]), torch.tensor([5, 4, 3])  # the first sample is the token itself
    mixed = put(original, position, sample)
    assert mixed.tolist() == [[1, 5, 6, 4], [1, 8, 3, 0]]
    assert (mixed != original).tolist() == [[False, False, False, True], [False, False, True, False]]
    assert original.tolist() == [[1, 5, 6, 7], [1, 8, 9, 0]]


def test_detection_loss_is_the_closed_form():
    logit = torch.tensor([[0.5, -1.0, 2.0], [0.0, 3.0, -2.0]], dtype=torch.float64, requires_grad=True)
    replaced = torch.tensor([[False, True, True], [False, False, True]])
    weight = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    loss = detection_loss(logit, replaced, weight)
    # log(1 + e^-z) for a replaced token, log(1 + e^z) for an original one; the first and the last do not count.
    wanted = math.log1p(math.exp(1)) + math.log1p(math.exp(-2)) + math.log(2) + math.log1p(math.exp(3))
    assert loss.item() == pytest.approx(wanted, abs=1e-13)
    (slope,) = torch.autograd.grad(loss, logit)
    sigmoid = 1 / (1 + np.exp(-logit.detach().numpy()))
    np.testing.assert_allclose(slope.numpy(), (sigmoid - replaced.numpy()) * weight.numpy(), atol=1e-13)


def shared_pair():
    torch.manual_seed(0)
    table = torch.nn.Embedding(7, 3, padding_idx=0, dtype=torch.float64)
    return table, DisentangledEmbedding(table)


def test_the_difference_starts_at_zero_and_takes_all_of_the_gradient():
    table, own = shared_pair()
    ids = torch.tensor([[1, 2, 2], [6, 0, 0]])
    assert torch.equal(own(ids), table(ids))
    slope = torch.randn(2, 3, 3, dtype=torch.float64)
    (own(ids) * slope).sum().backward()
    assert table.weight.grad is None
    wanted = np.zeros((7, 3))
    np.add.at(wanted, [1, 2, 2, 6], slope.numpy().reshape(6, 3)[:4])  # padding learns nothing
    np.testing.assert_allclose(own.delta.grad.numpy(), wanted, atol=1e-15)
    assert [name for name, _ in own.named_parameters()] == ["delta"]


def test_the_shared_table_moves_the_discriminator_too():
    table, own = shared_pair()
    with torch.no_grad():
        own.delta += 1.0
        table.weight[2] = torch.tensor([1.0, 2.0, 3.0])
    assert own(torch.tensor([2])).tolist() == [[2.0, 3.0, 4.0]]
    assert own.weight[2].tolist() == [2.0, 3.0, 4.0]


def test_the_export_is_the_shared_computation_bit_for_bit():
    table, own = shared_pair()
    with torch.no_grad():
        own.delta.normal_()
    ids = torch.arange(7)
    plain = own.export()
    assert type(plain) is torch.nn.Embedding
    assert plain.padding_idx == 0
    assert torch.equal(plain(ids), own(ids))
    np.testing.assert_array_equal(plain.weight.detach().numpy(), (table.weight + own.delta).detach().numpy())
    with torch.no_grad():  # and does not follow the generator any more
        table.weight.zero_()
    assert torch.equal(plain(ids), plain.weight)
    assert not torch.equal(plain(ids), own(ids))


def test_a_copy_of_both_shares_the_copied_table():
    both = torch.nn.ModuleList(shared_pair())
    table, own = copy.deepcopy(both)
    assert own._shared[0] is table


def test_an_embedding_that_scales_its_rows_is_refused():
    class Scaled(torch.nn.Embedding):
        pass

    with pytest.raises(ValueError, match="Scaled does more than look up"):
        DisentangledEmbedding(Scaled(4, 2))
