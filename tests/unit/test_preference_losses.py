"""The DPO family against float64 numpy and against trl's own loss."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from luthier.functional import preference_losses as pref
from luthier.functional.policy_gradient import sums

RNG = np.random.default_rng(11)
CHOSEN, REJECTED = RNG.normal(0, 4, 6), RNG.normal(-1, 4, 6)
BETA, E = 0.3, 0.15


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


def by_hand(kind, chosen=CHOSEN, rejected=REJECTED, flipped=E):
    h = BETA * (chosen - rejected)
    return {
        "sigmoid": -(1 - flipped) * log_sigmoid(h) - flipped * log_sigmoid(-h),
        "hinge": np.maximum(0, 1 - h),
        "ipo": (chosen - rejected - 1 / (2 * BETA)) ** 2,
        "robust": (-(1 - flipped) * log_sigmoid(h) + flipped * log_sigmoid(-h)) / (1 - 2 * flipped),
    }[kind]


@pytest.mark.parametrize("flipped", [0.0, E])
@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo", "robust"])
def test_values_and_gradients(kind, flipped):
    chosen = torch.tensor(CHOSEN, requires_grad=True)
    loss = pref.preference_loss(chosen, torch.tensor(REJECTED), BETA, kind, flipped)
    np.testing.assert_allclose(loss.detach(), by_hand(kind, flipped=flipped), atol=1e-12)
    loss.sum().backward()
    step = 1e-6
    numeric = (by_hand(kind, CHOSEN + step, flipped=flipped) - by_hand(kind, CHOSEN - step, flipped=flipped)) / (
        2 * step
    )
    np.testing.assert_allclose(chosen.grad, numeric, atol=1e-8)


def test_far_margins_stay_finite():
    far = torch.tensor([1e4, -1e4], dtype=torch.float64)
    assert torch.isfinite(pref.preference_loss(far, -far, 1.0)).all()


def test_tokens_behind_the_shorter_answer_count_less():
    sequence = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])
    found = pref.tail_weights(sequence, torch.tensor([4, 2, 3]), torch.tensor([2, 2, 3]), 0.25)
    assert found.tolist() == [1, 1, 0.25, 0.25, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("alpha", [None, 0.5])
@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo", "robust"])
def test_the_losses_are_those_of_trl(kind, alpha):
    trainer = pytest.importorskip("trl").DPOTrainer
    rows, width = 3, 6
    lengths = np.array([5, 3, 4, 2, 5, 4])  # chosen, then rejected
    mask = torch.tensor((np.arange(width) < lengths[:, None]).astype(int))
    # The first token is the prompt's, so that log-probabilities stand at the width - 1 others.
    completion_mask = torch.cat([torch.zeros(2 * rows, 1, dtype=torch.long), mask], 1)
    nothing = torch.zeros(2 * rows, width)
    seen = {"entropy": nothing, "mean_logits": nothing, "is_top1": nothing.bool()}  # what it only logs
    policy, reference = (torch.tensor(RNG.normal(-1.0, 0.5, (2 * rows, width))) * mask for _ in range(2))
    models = [MagicMock(return_value=SimpleNamespace(log_probs=lp, **seen)) for lp in (policy, reference)]
    self = MagicMock(
        beta=BETA, label_smoothing=E, ld_alpha=alpha, precompute_ref_logps=False, f_divergence_type="reverse_kl",
        loss_types=[kind], loss_weights=[1.0], use_weighting=False, aux_loss_enabled=False, ref_model=models[1],
    )  # fmt: skip
    self.accelerator.device = torch.device("cpu")
    self._tp_size, self._total_train_tokens = 1, 0
    self.accelerator.gather_for_metrics.side_effect = lambda x: x
    self.accelerator.gather.side_effect = lambda x: x
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
    }
    wanted = trainer._compute_loss(self, models[0], inputs, False)

    there = mask.bool()
    sequence = torch.repeat_interleave(torch.arange(2 * rows), torch.tensor(lengths))
    count = torch.tensor(lengths)
    shared = torch.minimum(count[:rows], count[rows:]).repeat(2)
    weight = 1.0 if alpha is None else pref.tail_weights(sequence, count, shared, alpha)
    rho = sums((policy - reference)[there] * weight, sequence, 2 * rows)
    rho = rho / count if kind == "ipo" else rho
    smoothing = E if kind == "robust" else 0.0
    found = pref.preference_loss(rho[:rows], rho[rows:], BETA, kind, smoothing).mean()
    assert float(found) == pytest.approx(float(wanted), abs=1e-9)
