"""Advantages against numpy in float64, and against sums worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luthier.functional import advantages as adv

REWARD = np.array([[1.0, 0.0, 0.5, 0.0], [2.0, 2.0, 2.0, 2.0], [-1.0, 3.0, 0.25, 0.5]])
T = torch.tensor


def test_the_four_forms_of_a_group():
    r, mean, std = REWARD, REWARD.mean(1, keepdims=True), REWARD.std(1, ddof=1, keepdims=True)
    np.testing.assert_allclose(adv.centred(T(r)), r - mean, atol=1e-12)
    np.testing.assert_allclose(adv.normalised(T(r)), (r - mean) / (std + 1e-4), atol=1e-12)
    others = (r.sum(1, keepdims=True) - r) / 3
    np.testing.assert_allclose(adv.leave_one_out(T(r)), r - others, atol=1e-12)
    np.testing.assert_allclose(adv.leave_one_out(T(r)), 4 / 3 * (r - mean), atol=1e-12)
    assert (adv.normalised(T(r))[1] == 0).all()


def test_a_group_of_two_by_hand():
    pair = T([[3.0, 1.0]], dtype=torch.float64)
    assert adv.centred(pair).tolist() == [[1.0, -1.0]]
    assert adv.leave_one_out(pair).tolist() == [[2.0, -2.0]]
    # std with Bessel's correction is sqrt(2)
    np.testing.assert_allclose(adv.normalised(pair), [[1 / (2**0.5 + 1e-4), -1 / (2**0.5 + 1e-4)]], atol=1e-12)


@pytest.mark.parametrize("form", [adv.centred, adv.normalised, adv.leave_one_out])
def test_a_constant_changes_nothing_and_a_factor_what_it_should(form):
    base = form(T(REWARD))
    np.testing.assert_allclose(form(T(REWARD + 7.0)), base, atol=1e-12)
    scaled = form(T(REWARD * 5.0))
    np.testing.assert_allclose(scaled, base if form is adv.normalised else 5 * base, atol=2e-3)


def test_rewards_that_do_not_apply_are_left_out_of_the_group():
    nan = np.nan
    r = np.array([[1.0, nan, 0.0, 0.5], [nan, 2.0, nan, nan], [nan] * 4])
    found = adv.normalised(T(r)).numpy()
    kept = np.array([1.0, 0.0, 0.5])
    np.testing.assert_allclose(found[0, [0, 2, 3]], (kept - 0.5) / (kept.std(ddof=1) + 1e-4), atol=1e-12)
    assert found[0, 1] == 0
    assert (found[1:] == 0).all()
    np.testing.assert_allclose(adv.leave_one_out(T(r))[0], [0.75, 0.0, -0.75, 0.0], atol=1e-12)
    assert (adv.leave_one_out(T(r))[1:] == 0).all()


def test_combined_rewards_and_their_weights():
    nan = np.nan
    r = T(np.array([[1.0, nan, nan, 0.5], [2.0, 3.0, nan, -1.0]]))
    found = adv.combined(r, T([1.0, 0.5], dtype=torch.float64)).numpy()
    np.testing.assert_allclose(found, [2.0, 1.5, nan, 0.0])


def test_spread_over_a_batch_from_sums_of_its_parts():
    values, weight = np.random.default_rng(0).normal(2.0, 3.0, 40), np.ones(40)
    weight[5] = 0
    parts = [adv.moments(T(values[a:b]), T(weight[a:b])) for a, b in ((0, 11), (11, 30), (30, 40))]
    count, total, square = (sum(p[i] for p in parts) for i in range(3))
    kept = values[weight > 0]
    for centre in (False, True):
        found = adv.standardised(T(values), count, total, square, centre=centre)
        np.testing.assert_allclose(found, (values - centre * kept.mean()) / (kept.std(ddof=1) + 1e-4), atol=1e-12)
    white = adv.standardised(T(values), count, total, square, centre=True, whiten=True)
    np.testing.assert_allclose(white, (values - kept.mean()) / np.sqrt(kept.var(ddof=1) + 1e-8), atol=1e-12)
    assert float(adv.standardised(T([3.0]), 1.0, 3.0, 9.0, centre=True)[0]) == 0


def test_each_reward_normalised_before_they_are_summed():
    r = np.random.default_rng(1).normal(size=(2, 3, 4))
    z = (r - r.mean(2, keepdims=True)) / (r.std(2, ddof=1, keepdims=True) + 1e-4)
    found = adv.normalised_then_summed(T(r), T([1.0, 0.3], dtype=torch.float64))
    np.testing.assert_allclose(found, z[0] + 0.3 * z[1], atol=1e-12)


# Log-probabilities of the example in the specification of self-rewarding PPO.
SFT = np.array([-0.5, -1.2, -0.3, -2.0, -0.1])
PRETRAINED = np.array([-1.5, -1.0, -0.9, -2.5, -3.0])


def gae_by_hand(reward, value, gamma, lambda_):
    """The sum of discounted one-step errors, written out instead of recursed."""
    n = len(reward)
    after = np.append(value[1:], 0.0)
    delta = reward + gamma * after - value
    advantage = np.array([sum((gamma * lambda_) ** k * delta[t + k] for k in range(n - t)) for t in range(n)])
    return advantage, advantage + value


@pytest.mark.parametrize(("gamma", "lambda_"), [(1.0, 0.95), (1.0, 1.0), (0.9, 0.0), (0.99, 0.5)])
def test_generalised_advantages_of_unequal_lengths(gamma, lambda_):
    rng = np.random.default_rng(2)
    lengths, width = (5, 2, 1), 6
    reward, value = rng.normal(size=(3, width)), rng.normal(size=(3, width))
    mask = np.arange(width) < np.array(lengths)[:, None]
    found = adv.generalised(T(reward), T(value), T(mask), gamma=gamma, lambda_=lambda_)
    for row, n in enumerate(lengths):
        wanted = gae_by_hand(reward[row, :n], value[row, :n], gamma, lambda_)
        for got, want in zip(found, wanted, strict=True):
            np.testing.assert_allclose(got[row, :n], want, atol=1e-12)
            assert (got[row, n:] == 0).all()
    wider = [np.pad(a, ((0, 0), (0, 3)), constant_values=9.0) for a in (reward, value)]
    again = adv.generalised(*map(T, wider), T(np.pad(mask, ((0, 0), (0, 3)))), gamma=gamma, lambda_=lambda_)
    np.testing.assert_allclose(again[0][:, :width], found[0], atol=0)


def test_the_reward_stands_at_the_last_real_token():
    mask = T([[True, True, True, False], [True, False, False, False], [False] * 4])
    assert adv.at_last_token(T([4.8, -1.0, 3.0]), mask).tolist() == [
        [0, 0, pytest.approx(4.8), 0],
        [-1, 0, 0, 0],
        [0] * 4,
    ]


def test_rewards_of_tokens_with_the_divergence_of_each():
    score = float((SFT - PRETRAINED).sum())
    assert score == pytest.approx(4.8)
    mask = torch.ones(1, 5, dtype=torch.bool)
    old, reference = T(SFT)[None], T(PRETRAINED)[None]
    at_end = adv.at_last_token(T([score]), mask)
    rho = adv.token_rewards(at_end, old, reference, mask, 0.1).numpy()[0]
    np.testing.assert_allclose(rho, -0.1 * (SFT - PRETRAINED) + np.array([0, 0, 0, 0, 4.8]), atol=1e-12)
    # Undiscounted returns with lambda 1 and no critic do not depend on where the score is put.
    zero = torch.zeros(1, 5, dtype=torch.float64)
    dense = adv.generalised(T(SFT - PRETRAINED)[None], zero, mask, gamma=1.0, lambda_=1.0)[1]
    late = adv.generalised(at_end, zero, mask, gamma=1.0, lambda_=1.0)[1]
    assert float(dense[0, 0]) == pytest.approx(float(late[0, 0])) == pytest.approx(4.8)


def test_overlong_penalty_of_dapo():
    lengths = T([0, 80, 90, 95, 100, 130])
    found = adv.overlong_penalty(lengths, 100, 20).tolist()
    assert found == pytest.approx([0.0, 0.0, -0.5, -0.75, -1.0, -1.0])
