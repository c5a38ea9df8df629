"""Policy losses on a 4 x 5 tensor against formulas in float64 numpy, with gradients by finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luthier.functional import policy_gradient as pg

RNG = np.random.default_rng(7)
LP, OLD, REF = (RNG.normal(-1.5, 0.6, (4, 5)) for _ in range(3))
A = np.array([[1.3], [-0.7], [0.0], [-2.1]]) * np.ones((4, 5))
LENGTHS = (5, 3, 4, 1)
MASK = (np.arange(5) < np.array(LENGTHS)[:, None]).astype(float)
THERE = MASK.astype(bool)
SEQUENCE = torch.from_numpy(np.repeat(np.arange(4), LENGTHS))


def flat(values, grad=False):
    return torch.tensor(values[THERE], requires_grad=grad)


def ratios(level, lp=LP):
    gap = lp - OLD
    if level != "token":
        gap = (gap * MASK).sum(1, keepdims=True) / (MASK.sum(1, keepdims=True) if level == "sequence" else 1)
    return np.exp(gap) * np.ones((4, 5))


def ours(kind, lp, level="token"):
    log_w = pg.log_ratio(lp, flat(OLD), SEQUENCE, torch.ones(13, dtype=torch.float64), 4, level)
    w, a = log_w.exp(), flat(A)
    return {
        "clipped": lambda: pg.clipped(w, a, 0.2, 0.28),
        "delta": lambda: pg.clipped(w, a, 0.2, 0.2, 1.5),
        "cispo": lambda: pg.cispo(w, a, lp, 1.4),
        "sapo": lambda: pg.sapo(w, a, 1.0, 1.05),
        "reinforce": lambda: pg.reinforce(a, lp),
        "k1": lambda: pg.divergence(lp, flat(REF), "k1"),
        "k2": lambda: pg.divergence(lp, flat(REF), "k2"),
        "k3": lambda: pg.divergence(lp, flat(REF), "k3"),
        "w k3": lambda: w * pg.divergence(lp, flat(REF)),
    }[kind]()


def by_hand(kind, lp, level="token", frozen=None):
    """The same in numpy; ``frozen`` is where the ratio of cispo is held."""
    w, u = ratios(level, lp), REF - lp
    tau = np.where(A > 0, 1.0, 1.05)
    return {
        "clipped": -np.minimum(w * A, np.clip(w, 0.8, 1.28) * A),
        "delta": -np.minimum(np.minimum(w, 1.5) * A, np.clip(w, 0.8, 1.2) * A),
        "cispo": -np.minimum(w if frozen is None else frozen, 1.4) * A * lp,
        "sapo": -A / (1 + np.exp(-tau * (w - 1))) * 4 / tau,
        "reinforce": -A * lp,
        "k1": -u,
        "k2": u**2 / 2,
        "k3": np.exp(u) - u - 1,
        "w k3": w * (np.exp(u) - u - 1),
    }[kind]


KINDS = ["clipped", "delta", "cispo", "sapo", "reinforce", "k1", "k2", "k3", "w k3"]


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind, level):
    lp = flat(LP, grad=True)
    loss = ours(kind, lp, level)
    np.testing.assert_allclose(loss.detach(), by_hand(kind, LP, level)[THERE], atol=1e-12)
    loss.sum().backward()
    frozen, step, wanted = ratios(level), 1e-6, np.zeros((4, 5))
    for i, t in zip(*np.nonzero(THERE), strict=True):
        move = np.zeros((4, 5))
        move[i, t] = step
        up, down = (by_hand(kind, LP + s * move, level, frozen)[THERE].sum() for s in (1, -1))
        wanted[i, t] = (up - down) / (2 * step)
    np.testing.assert_allclose(lp.grad, wanted[THERE], atol=1e-8)


def test_on_policy_the_gradient_is_that_of_the_advantage():
    lp = flat(LP, grad=True)
    w = (lp - lp.detach()).exp()
    loss = pg.clipped(w, flat(A), 0.2, 0.2)
    np.testing.assert_allclose(loss.detach(), -A[THERE], atol=1e-14)
    loss.sum().backward()
    np.testing.assert_allclose(lp.grad, -A[THERE], atol=1e-14)


def test_large_ratios_stay_finite():
    far = pg.log_ratio(torch.tensor([500.0, -500.0]), torch.zeros(2), torch.tensor([0, 1]), torch.ones(2), 2)
    assert far.tolist() == [20.0, -20.0]
    assert torch.isfinite(pg.divergence(torch.tensor([-900.0]), torch.tensor([0.0]))).all()


def test_estimators_of_the_divergence_of_two_categorical_distributions():
    rng = np.random.default_rng(0)
    p, q = (np.exp(z) / np.exp(z).sum() for z in rng.normal(size=(2, 10)) * 0.7)
    exact = (p * np.log(p / q)).sum()
    drawn = rng.choice(10, size=100_000, p=p)
    lp, lq = torch.from_numpy(np.log(p))[drawn], torch.from_numpy(np.log(q))[drawn]
    for estimator in ("k1", "k3"):
        assert float(pg.divergence(lp, lq, estimator).mean()) == pytest.approx(exact, rel=0.02)
    assert bool((pg.divergence(lp, lq, "k3") >= 0).all())
    for estimator in ("k1", "k2", "k3"):
        assert float(pg.divergence(lp, lp, estimator).abs().max()) == 0


def test_only_the_corrected_k3_has_the_gradient_of_the_divergence():
    """Expectations over all ten outcomes, so that nothing is left to chance."""
    rng = np.random.default_rng(3)
    z = torch.tensor(rng.normal(size=10), requires_grad=True)
    lq = torch.log_softmax(torch.tensor(rng.normal(size=10)), 0)
    lp = torch.log_softmax(z, 0)
    (exact,) = torch.autograd.grad((lp.exp() * (lp - lq)).sum(), z)

    def expected(weight_of):
        lp = torch.log_softmax(z, 0)
        k3 = pg.divergence(lp, lq, "k3")
        return torch.autograd.grad((lp.exp().detach() * weight_of(lp) * k3).sum(), z)[0]

    corrected = expected(lambda lp: (lp - lp.detach()).exp())
    np.testing.assert_allclose(corrected, exact, atol=1e-12)
    assert float((expected(lambda lp: torch.ones_like(lp)) - exact).abs().max()) > 1e-2


def test_rows_and_back():
    rows, mask = pg.as_rows(flat(LP), SEQUENCE, 4)
    np.testing.assert_array_equal(mask, THERE)
    np.testing.assert_array_equal(rows, LP * MASK)
    assert torch.equal(rows[mask], flat(LP))
    np.testing.assert_allclose(pg.sums(flat(LP), SEQUENCE, 4), (LP * MASK).sum(1), atol=1e-12)


def test_off_policy_completions_are_dropped_where_they_were_bad():
    gap = OLD - LP
    mean = (gap * MASK).sum(1) / MASK.sum(1)
    threshold = float(mean[[1, 3]].mean())  # between the two that were bad
    wanted = (~((A[:, 0] < 0) & (mean > threshold))).astype(float)
    assert wanted.sum() == 3
    found = pg.off_policy(flat(A), flat(gap), SEQUENCE, torch.ones(13, dtype=torch.float64), 4, threshold)
    np.testing.assert_array_equal(found, (wanted[:, None] * np.ones((4, 5)))[THERE])


def test_the_most_uncertain_tokens_of_each_completion():
    entropy = torch.tensor([0.1, 0.9, 0.5, 0.7, 0.2, 3.0, 1.0, 2.0, 0.4, 0.4, 0.3, 0.2, 5.0])
    found = pg.most_uncertain(entropy, SEQUENCE, 0.5)
    assert found.tolist() == [0, 1, 1, 1, 0, 1, 0, 1, 1, 1, 0, 0, 1]
    assert pg.most_uncertain(entropy, SEQUENCE, 1.0).tolist() == [1] * 13


def test_clipped_value_loss_by_hand():
    value, old, returns = (
        torch.tensor(v, dtype=torch.float64) for v in ([1.0, 0.5, 2.0], [0.9, 0.0, 0.0], [1.5, 0.4, 3.0])
    )
    # near: 1.0, 0.2, 0.2
    wanted = [0.25 / 2, max(0.01, 0.04) / 2, max(1.0, 7.84) / 2]
    np.testing.assert_allclose(pg.clipped_value_loss(value, old, returns, 0.2), wanted, atol=1e-12)
    np.testing.assert_allclose(pg.clipped_value_loss(value, old, returns, None), [0.125, 0.005, 0.5], atol=1e-12)
