"""Steps, distances and places of temporary additions, as numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from luthier.core.errors import LuthierError, UserError
from luthier.functional.representation_shift import normalised_step, row_distance, with_gradients
from luthier.functional.temporary_additions import Addition, places


def test_the_step_and_the_distance_as_numbers():
    steps, norm_S = normalised_step([torch.tensor([[3.0, 0.0]]), torch.tensor([[4.0]])], [0, 0], torch.tensor([10.0]))
    assert norm_S.tolist() == [5.0]
    assert [s.tolist() for s in steps] == [[[6.0, 0.0]], [[8.0]]]
    steps, norm_S = normalised_step([torch.tensor([[3.0, 0.0]]), torch.tensor([[4.0]])], [0, 1], torch.tensor([10.0]))
    assert norm_S.tolist() == [5.0]
    assert [s.tolist() for s in steps] == [[[10.0, 0.0]], [[10.0]]]
    twins, norm_S = normalised_step([torch.tensor([[3.0, 4.0], [0.0, 0.0]])], [0], torch.tensor([-1.0, -1.0]))
    assert norm_S.tolist() == [5.0, 0.0]
    torch.testing.assert_close(twins[0], torch.tensor([[-0.6, -0.8], [0.0, 0.0]]))
    state, target = torch.tensor([[[1.0, 0.0], [9.0, 9.0]]]), torch.tensor([[[0.0, 2.0], [0.0, 0.0]]])
    mask = torch.tensor([[True, False]])
    assert row_distance(state, target, mask, mean_dim=False).tolist() == [5.0]
    assert row_distance(state, target, mask).tolist() == [2.5]
    assert row_distance(state, target, mask, relative=True).tolist() == [1.25]
    assert row_distance(state, target, mask, distance="cosine").tolist() == [1.0]


def test_formed_gradients_are_scaled_and_used_once():
    x = torch.zeros(2, requires_grad=True)
    value = with_gradients(torch.tensor(7.0), [x], [torch.tensor([1.0, 2.0])])
    (3 * value).backward()
    assert value.item() == 7.0
    assert x.grad.tolist() == [3.0, 6.0]
    value = with_gradients(torch.tensor(7.0), [x], [torch.tensor([1.0, 2.0])])
    value.backward(retain_graph=True)
    with pytest.raises(LuthierError, match="once only"):
        value.backward()


def test_an_addition_is_a_low_rank_product_or_a_vector():
    x, out = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]), torch.zeros(2, 1, 1)
    down, up = torch.tensor([[1.0, 1.0]]), torch.tensor([[[2.0]]])
    assert Addition(0, up, down, 0.5)(x, out).flatten().tolist() == [3.0, 7.0]
    each = torch.tensor([[[2.0]], [[-2.0]]])
    assert Addition(0, each, down, 0.5)(x, out).flatten().tolist() == [3.0, -7.0]
    assert Addition(0, each)(None, out).flatten().tolist() == [2.0, -2.0]


def test_models_without_places():
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=16, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8))
    with pytest.raises(UserError, match="encoder-decoder"):
        places(t5, who="x")
    bare = torch.nn.Linear(2, 2)
    bare.config = SimpleNamespace()
    with pytest.raises(UserError, match="no list of transformer blocks"):
        places(bare, who="x")
