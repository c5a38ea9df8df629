"""Masked optimisation: held entries do not move under any optimiser, and the choice of k entries is exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luthier.functional.masked_update import MaskedUpdate, forget, top_k_mask


def layer():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 4)


MASK = {"weight": torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1]]).bool()}


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_held_entries_stay_and_the_others_follow_plain_adamw(kind, known):
    free, held = layer(), layer()
    start = held.weight.detach().clone()
    make = lambda m: (  # noqa: E731
        torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.5)
        if kind == "adamw"
        else torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    )
    masked = MaskedUpdate(MASK, {"weight": start} if known else None)
    optimizers = make(free), make(held)
    for step in range(4):
        for module, optimizer in zip((free, held), optimizers, strict=True):
            generator = torch.Generator().manual_seed(step)
            for p in module.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            if module is held:
                masked.on_grad(module)
                assert bool((module.weight.grad[~MASK["weight"]] == 0).all())
            optimizer.step()
        masked.on_step(held)
    mask = MASK["weight"]
    assert torch.equal(held.weight[~mask], start[~mask])
    assert torch.equal(held.weight[mask], free.weight[mask])
    assert torch.equal(held.bias, free.bias)


def test_forgetting_clears_the_moments_of_entries_outside_the_mask():
    module = layer()
    optimizer = torch.optim.AdamW(module.parameters())
    module.weight.grad, module.bias.grad = torch.ones(4, 3), torch.ones(4)
    optimizer.step()
    before = optimizer.state[module.weight]["step"].clone()
    forget(optimizer, module.weight, MASK["weight"])
    state = optimizer.state[module.weight]
    np.testing.assert_allclose(state["exp_avg"], 0.1 * MASK["weight"].float(), rtol=1e-6)
    np.testing.assert_allclose(state["exp_avg_sq"], 1e-3 * MASK["weight"].float(), rtol=1e-5)
    assert torch.equal(state["step"], before)


CHANGE = {"a": torch.tensor([[5.0, 1.0], [3.0, 3.0]]), "b": torch.tensor([4.0, 3.0, 0.0])}


@pytest.mark.parametrize(
    ("k", "a", "b"),
    [
        (0, [[0, 0], [0, 0]], [0, 0, 0]),
        (2, [[1, 0], [0, 0]], [1, 0, 0]),
        (3, [[1, 0], [1, 0]], [1, 0, 0]),
        (4, [[1, 0], [1, 1]], [1, 0, 0]),
        (5, [[1, 0], [1, 1]], [1, 1, 0]),
        (7, [[1, 1], [1, 1]], [1, 1, 1]),
    ],
)
def test_exactly_k_with_ties_to_the_first(k, a, b):
    masks = top_k_mask(CHANGE, k)
    assert masks["a"].int().tolist() == a
    assert masks["b"].int().tolist() == b


def test_growing_a_mask_adds_others():
    first = top_k_mask(CHANGE, 2)
    second = top_k_mask(CHANGE, 3, first)
    assert sum(int(m.sum()) for m in second.values()) == 5
    assert all(bool((second[n] >= first[n]).all()) for n in first)


def test_random_masks_against_a_full_sort():
    rng = np.random.default_rng(0)
    for trial in range(50):
        change = {n: torch.tensor(rng.integers(0, 6, size=s).astype(float)) for n, s in (("x", (4, 5)), ("y", (7,)))}
        k = int(rng.integers(0, 28))
        flat = np.concatenate([v.numpy().ravel() for v in change.values()])
        wanted = np.zeros(27, bool)
        wanted[np.argsort(-flat, kind="stable")[:k]] = True
        found = np.concatenate([m.numpy().ravel() for m in top_k_mask(change, k).values()])
        assert (found == wanted).all(), trial


def test_what_cannot_be_chosen_is_refused():
    with pytest.raises(ValueError, match="8 entries cannot be chosen from 7"):
        top_k_mask(CHANGE, 8)
    with pytest.raises(ValueError, match="'a' holds values that are not numbers"):
        top_k_mask({"a": torch.tensor([float("nan"), 1.0])}, 1)
