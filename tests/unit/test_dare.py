"""DARE: what is dropped, what the rest becomes, and that it depends neither on pieces nor on the other models."""

from __future__ import annotations

import pytest
import torch
from fakes import FakeContext, MemorySource

from luthier.functional.task_vectors import PIECE
from luthier.methods.weights.dare import Dare, drop_and_rescale, kept


def test_the_draws_depend_on_the_place_alone():
    whole = kept("w", "tuned", 0, PIECE + 5000, 0.9, 0)
    parts = [(0, 10), (10, 1000), (1000, PIECE - 3), (PIECE - 3, PIECE + 17), (PIECE + 17, PIECE + 5000)]
    cut = [kept("w", "tuned", start, stop - start, 0.9, 0) for start, stop in parts]
    assert torch.equal(torch.cat(cut), whole)
    for other in (("v", "tuned", 0), ("w", "b", 0), ("w", "tuned", 1)):
        assert not torch.equal(kept(other[0], other[1], 0, 1000, 0.5, other[2]), kept("w", "tuned", 0, 1000, 0.5, 0))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9, 0.99])
def test_the_share_and_the_expectation(rate):
    count = 200_000
    mask = kept("w", "tuned", 0, count, rate, 3)
    # five standard deviations of a binomial share, and of the mean of the rescaled ones
    deviation = (rate * (1 - rate) / count) ** 0.5
    assert abs(mask.double().mean().item() - (1 - rate)) < 5 * deviation
    found = drop_and_rescale(torch.ones(count, dtype=torch.float64), mask, rate)
    assert set(found.unique().tolist()) == {0.0, 1 / (1 - rate)}
    assert abs(found.mean().item() - 1.0) < 5 * deviation / (1 - rate)


@pytest.mark.parametrize("rule", ["sum", "ties"])
def test_two_models_by_hand_with_the_masks_drawn(rule):
    generator = torch.Generator().manual_seed(0)
    tensors = {label: torch.randn(4, 50, generator=generator, dtype=torch.float64) for label in ("base", "tuned", "b")}
    op = Dare(models=["b"], drop_rate=0.5, rule=rule, weights=[1.0, 2.0], scale=0.3, seed=7)
    op.prepare({k: MemorySource({"w": t}) for k, t in tensors.items()}, FakeContext())
    found = op.tensor("w", tensors, FakeContext())
    base, change = tensors["base"], {}
    for label in ("tuned", "b"):
        mask = kept("w", label, 0, 200, 0.5, 7).view(4, 50)
        change[label] = (tensors[label] - base) * mask * 2
    summed = change["tuned"] + 2 * change["b"]
    if rule == "ties":
        agree = {k: (v.sign() == summed.sign()) & (summed != 0) for k, v in change.items()}
        divisor = (agree["tuned"].double() + 2 * agree["b"].double()).clamp(min=1.0)
        summed = (change["tuned"] * agree["tuned"] + 2 * change["b"] * agree["b"]) / divisor
    torch.testing.assert_close(found, base + 0.3 * summed, rtol=1e-12, atol=1e-12)


def test_nothing_dropped_is_the_plain_sum():
    base, tuned = torch.zeros(8), torch.arange(8.0)
    op = Dare(drop_rate=0.0)
    op.prepare({"base": MemorySource({"w": base}), "tuned": MemorySource({"w": tuned})}, FakeContext())
    assert op.tensor("w", {"base": base, "tuned": tuned}, FakeContext()).tolist() == tuned.tolist()
