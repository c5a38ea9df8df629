"""RLOO against trl's own loss."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from fakes import FakeContext, KnownLogp
from sampled import ADVANTAGE, LP, MASK, OLD, THERE, flat, part, sampled

from luthier.core.errors import UserError
from luthier.methods.objectives.rloo import ReinforceLeaveOneOut

# Sums of log-ratios are large on the hand-made tensor, so the policy is moved near to the old one.
NEAR = OLD + 0.15 * (LP - OLD)


def of_trl(low, high):
    trainer = pytest.importorskip("trl").RLOOTrainer
    lp, mask = torch.tensor(NEAR, requires_grad=True), torch.tensor(MASK)
    self = MagicMock(epsilon_low=low, epsilon_high=high, aux_loss_enabled=False)
    self.model.training = True
    self.accelerator.gather.side_effect = lambda x: x
    self.accelerator.reduce.side_effect = lambda x, reduction: x
    self._get_per_token_logps_and_entropies.return_value = (lp, torch.zeros_like(lp), None)
    ids = torch.zeros(4, 5, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids, "completion_mask": mask,
        "advantages": torch.tensor(ADVANTAGE), "old_logps": torch.tensor((OLD * MASK).sum(1)),
    }  # fmt: skip
    loss = trainer._compute_loss(self, self.model, inputs)
    loss.backward()
    return float(loss.detach()), lp.grad.numpy()[THERE]


def measured(method, rows=(0, 1, 2, 3)):
    lp = part(NEAR, rows, grad=True)
    loss = method.loss(KnownLogp(lp), sampled(rows), FakeContext())
    return loss, torch.autograd.grad(loss.sum, lp)[0]


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.02, 0.05)])
def test_loss_and_gradient_are_those_of_trl(low, high):
    loss, gradient = measured(ReinforceLeaveOneOut(clip_low=low, clip_high=high))
    value, wanted = of_trl(low, high)
    assert float(loss.sum.detach() / loss.weight) == pytest.approx(value, abs=1e-9)
    np.testing.assert_allclose(gradient / 4, wanted, atol=1e-9)
    assert (wanted == 0).any()


def test_how_a_step_is_cut_changes_nothing():
    method = ReinforceLeaveOneOut()
    whole, gradient = measured(method)
    pieces = [measured(method, rows) for rows in ((0,), (1, 2), (3,))]
    assert sum(float(p.sum.detach()) for p, _ in pieces) == pytest.approx(float(whole.sum.detach()), abs=1e-12)
    assert sum(float(p.weight) for p, _ in pieces) == pytest.approx(float(whole.weight))
    np.testing.assert_allclose(torch.cat([g for _, g in pieces]), gradient, atol=1e-14)


def test_on_policy_it_is_reinforce_on_the_completion():
    batch = sampled()
    del batch.columns["old_logp_N"]
    lp = flat(LP, grad=True)
    ReinforceLeaveOneOut().loss(KnownLogp(lp), batch, FakeContext()).sum.backward()
    np.testing.assert_allclose(lp.grad, -(ADVANTAGE[:, None] * MASK)[THERE], atol=1e-12)


def test_without_rollouts():
    batch = sampled()
    batch.columns = {}
    with pytest.raises(UserError, match="rloo: the batch has no advantages"):
        ReinforceLeaveOneOut().loss(KnownLogp(flat(LP)), batch, SimpleNamespace(totals={}))
