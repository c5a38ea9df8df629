"""Full fine-tuning: everything is opened, nothing is changed or remembered."""

from __future__ import annotations

import torch
from fakes import FakeContext

from helpers import tiny_llama
from luthier.methods.parameters.full import Full


def test_every_tensor_is_opened_once():
    for tied in (False, True):
        model = tiny_llama(tied=tied).requires_grad_(False)
        method = Full()
        assert method.apply(model, FakeContext()) is model
        assert all(p.requires_grad for p in model.parameters())
        (group,) = method.groups(model)
        assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
        assert method.export(model) is model
        assert method.state() == {}


def test_tensors_that_cannot_carry_a_gradient_stay_closed():
    model = torch.nn.Linear(2, 2)
    model.counts = torch.nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    Full().apply(model, FakeContext())
    assert model.weight.requires_grad
    assert not model.counts.requires_grad
