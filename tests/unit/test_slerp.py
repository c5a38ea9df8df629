"""Slerp on known angles, against numpy, at its ends and where it becomes a line."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from fakes import FakeContext, MemorySource

from luthier.core.errors import UserError
from luthier.methods.weights.slerp import Slerp, slerp_factors


def cook(a, b, t, labels=("tuned", "b")):
    sources = {label: MemorySource({"w": tensor}) for label, tensor in zip(labels, (a, b), strict=True)}
    op = Slerp(t=t)
    op.prepare(sources, FakeContext())
    return op.tensor("w", dict(zip(labels, (a, b), strict=True)), FakeContext())


def test_a_quarter_turn():
    found = cook(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 1 / 3)
    assert found.tolist() == pytest.approx([math.cos(math.pi / 6), math.sin(math.pi / 6)], rel=1e-12)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 1.0])
def test_random_vectors_as_numpy_has_them(t):
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(30, 4, generator=generator), torch.randn(30, 4, generator=generator) * 3
    x, y = a.double().numpy(), b.double().numpy()
    omega = np.arccos((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
    expected = (np.sin((1 - t) * omega) * x + np.sin(t * omega) * y) / np.sin(omega)
    np.testing.assert_allclose(cook(a, b, t).numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dot", "a", "b"), [(1.0, 1.0, 1.0), (-1.0, 1.0, 1.0), (0.0, 0.0, 4.0), (0.9996, 1.0, 1.0)])
def test_where_there_is_no_arc_it_is_a_line(dot, a, b):
    assert slerp_factors(dot, a, b, 0.25) == (0.75, 0.25)


def test_two_models_or_one_and_its_base():
    base, tuned = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    assert cook(base, tuned, 0.0, ("base", "tuned")).tolist() == [1.0, 0.0]
    assert cook(base, tuned, 1.0, ("base", "tuned")).tolist() == pytest.approx([0.0, 2.0])
    with pytest.raises(UserError, match="two models, or one and its base"):
        Slerp().prepare({"tuned": MemorySource({"w": base})}, FakeContext())
