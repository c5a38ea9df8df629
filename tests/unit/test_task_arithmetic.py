"""Task arithmetic against numpy, its ends, and its options."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import FakeContext, MemorySource

from luthier.core.errors import UserError
from luthier.methods.weights.task_arithmetic import TaskArithmetic, task_arithmetic

BASE, ONE, TWO = (torch.randn(7, 3, generator=torch.Generator().manual_seed(s)) for s in range(3))


def test_the_sum_of_scaled_changes_is_numpys():
    base, one, two = (t.double().numpy() for t in (BASE, ONE, TWO))
    found = task_arithmetic(BASE, [ONE, TWO], [1.0, -2.0], 0.4)
    np.testing.assert_allclose(found.numpy(), base + 0.4 * ((one - base) - 2 * (two - base)), rtol=1e-15, atol=1e-15)


def test_the_ends():
    assert torch.equal(task_arithmetic(BASE, [ONE, TWO], [1.0, 1.0], 0.0).float(), BASE)
    torch.testing.assert_close(task_arithmetic(BASE, [ONE], [1.0], 1.0).float(), ONE, atol=1e-7, rtol=1e-7)


def test_the_operation_takes_every_model_but_the_base():
    sources = {name: MemorySource({"w": t}) for name, t in (("base", BASE), ("tuned", ONE), ("b", TWO))}
    op = TaskArithmetic(models=["b"], weights=[1.0, 3.0], scale=0.5)
    assert op.sources == {"b": "b"}
    op.prepare(sources, FakeContext())
    found = op.tensor("w", {"base": BASE, "tuned": ONE, "b": TWO}, FakeContext())
    assert torch.equal(found, task_arithmetic(BASE, [ONE, TWO], [1.0, 3.0], 0.5))
    assert op.recipe == {"weights": {"tuned": 1.0, "b": 3.0}, "scale": 0.5}
    with pytest.raises(UserError, match="3 weights for 2 models"):
        TaskArithmetic(weights=[1.0, 1.0, 1.0]).prepare(sources, FakeContext())
