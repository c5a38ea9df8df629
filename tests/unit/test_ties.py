"""TIES against a dense implementation in numpy, on hand numbers, and its two ways of trimming."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import FakeContext, MemorySource

from luthier.methods.weights.ties import Ties, ties

SHAPES = {"a": (6, 5), "b": (40,), "steps": ()}


def model(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    found = {n: torch.randn(s, generator=generator) * scale for n, s in SHAPES.items() if n != "steps"}
    return {**found, "steps": torch.tensor(seed)}


def in_numpy(base, models, density, weights, scale, *, by_tensor):
    """The algorithm box, on whole vectors."""
    names = [n for n in base if n != "steps"]
    taus = [{n: (m[n] - base[n]).double().numpy() for n in names} for m in models]
    trimmed = []
    for tau in taus:
        groups = [[n] for n in names] if by_tensor else [names]
        kept = {}
        for group in groups:
            flat = np.concatenate([tau[n].ravel() for n in group])
            limit = np.sort(np.abs(flat))[::-1][max(int(density * flat.size), 1) - 1]
            kept |= {n: np.where(np.abs(tau[n]) >= limit, tau[n], 0.0) for n in group}
        trimmed.append(kept)
    merged = {}
    for n in names:
        stack = np.stack([w * t[n] for w, t in zip(weights, trimmed, strict=True)])
        sign = np.sign(stack.sum(0))
        agrees = (np.sign(stack) == sign) & (sign != 0)
        divisor = (agrees * np.array(weights).reshape(-1, *[1] * (stack.ndim - 1))).sum(0)
        merged[n] = base[n].double().numpy() + scale * (stack * agrees).sum(0) / np.where(divisor == 0, 1, divisor)
    return merged


@pytest.mark.parametrize("density", [1.0, 0.5, 0.07])
@pytest.mark.parametrize("trim", ["global", "tensor"])
@pytest.mark.parametrize("weights", [None, [1.0, 0.25, 2.0]])
def test_the_merge_is_numpys(density, trim, weights):
    base, models = model(0), [model(s, 1.0 + s) for s in (1, 2, 3)]
    labels = ["tuned", "x", "y"]
    op = Ties(models=labels[1:], density=density, trim=trim, weights=weights, scale=0.7)
    sources = {"base": base, **dict(zip(labels, models, strict=True))}
    op.prepare({k: MemorySource(v) for k, v in sources.items()}, FakeContext())
    expected = in_numpy(base, models, density, weights or [1.0] * 3, 0.7, by_tensor=trim == "tensor")
    for name, wanted in expected.items():
        found = op.tensor(name, {k: v[name] for k, v in sources.items()}, FakeContext())
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6, atol=1e-6)


def test_hand_numbers():
    base = torch.zeros(4)
    models = [torch.tensor([4.0, -1.0, 2.0, 0.1]), torch.tensor([2.0, 3.0, -2.5, 0.2])]
    # trimmed at 2: [4, 0, 2, 0] and [2, 3, -2.5, 0]; signs +, +, -, 0; means 3, 3, -2.5, 0
    assert ties(base, models, [2.0, 2.0], [1.0, 1.0], 1.0).tolist() == [3.0, 3.0, -2.5, 0.0]
    assert ties(base + 1, [m + 1 for m in models], [2.0, 2.0], [1.0, 1.0], 2.0).tolist() == [7.0, 7.0, -4.0, 1.0]


def test_one_model_untrimmed_comes_back():
    base, tuned = model(0), model(1)
    op = Ties(density=1.0)
    op.prepare({"base": MemorySource(base), "tuned": MemorySource(tuned)}, FakeContext())
    found = op.tensor("a", {"base": base["a"], "tuned": tuned["a"]}, FakeContext())
    torch.testing.assert_close(found.float(), tuned["a"], atol=1e-7, rtol=1e-6)
