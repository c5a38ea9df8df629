"""Half reset: every tensor is the tuned or the base one, and half of the blocks' is the base's."""

from __future__ import annotations

import pytest
import torch
from fakes import FakeContext, MemorySource

from helpers import tiny_llama
from luthier.core.errors import LuthierError, UserError
from luthier.methods.weights.half_reset import HalfReset, half_reset

BASE = {n: p.detach() for n, p in tiny_llama(0).named_parameters()}
TUNED = {n: p.detach() + 1.0 for n, p in tiny_llama(0).named_parameters()}


@pytest.mark.parametrize("level", ["category", "layer", "model"])
def test_every_tensor_is_one_or_the_other(level):
    found = half_reset(TUNED, BASE, 0.5, seed=1, level=level)
    assert found.keys() == BASE.keys()
    back = {n for n, t in found.items() if torch.equal(t, BASE[n])}
    assert {n for n, t in found.items() if torch.equal(t, TUNED[n])} == BASE.keys() - back
    assert all(".layers." in n for n in back)
    size = sum(BASE[n].numel() for n in back) / sum(t.numel() for n, t in BASE.items() if ".layers." in n)
    assert size == pytest.approx(0.5, abs=0.06)


def test_category_counts_and_seeds():
    back = {n for n, t in half_reset(TUNED, BASE, seed=0).items() if torch.equal(t, BASE[n])}
    assert len([n for n in back if "self_attn" in n]) == 4
    assert len([n for n in back if "mlp" in n]) == 3
    assert len([n for n in back if "norm" in n]) == 2
    again = {n for n, t in half_reset(TUNED, BASE, seed=0).items() if torch.equal(t, BASE[n])}
    other = {n for n, t in half_reset(TUNED, BASE, seed=1).items() if torch.equal(t, BASE[n])}
    assert back == again != other


def test_the_ends():
    nothing, everything = half_reset(TUNED, BASE, 0.0), half_reset(TUNED, BASE, 1.0)
    assert all(torch.equal(t, TUNED[n]) for n, t in nothing.items())
    assert all(torch.equal(t, BASE[n]) == (".layers." in n) for n, t in everything.items())


def test_the_operation_over_sources_is_the_function():
    method, ctx = HalfReset(seed=4), FakeContext()
    with pytest.raises(LuthierError, match="prepare must run"):
        method.tensor("x", {}, ctx)
    method.prepare({"base": MemorySource(BASE), "tuned": MemorySource(TUNED)}, ctx)
    expected = half_reset(TUNED, BASE, seed=4)
    for name in BASE:
        assert torch.equal(method.tensor(name, {"base": BASE[name], "tuned": TUNED[name]}, ctx), expected[name])


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UserError, match="no transformer blocks"):
        half_reset({"a.weight": torch.zeros(2, 2)}, {"a.weight": torch.ones(2, 2)})
