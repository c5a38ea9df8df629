"""GRPO's losses against trl's own, and against float64 numpy where trl has none."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from fakes import FakeContext, KnownLogp
from sampled import ADVANTAGE, LP, MASK, OLD, REF, ROOM, THERE, flat, part, sampled

from luthier.core.errors import UserError
from luthier.core.protocols import Batch
from luthier.methods.objectives.grpo import GroupRelativePolicyOptimization as GRPO

ENTROPY = np.random.default_rng(4).uniform(0, 2, (4, 5))


def measured(method, rows=(0, 1, 2, 3), **columns):
    """Loss, gradient by the log-probabilities, and what was logged, of some completions as one step."""
    batch = sampled(rows, **columns)
    lp = part(LP, rows, grad=True)
    out = KnownLogp(lp, batch.sequence_N)
    out.entropy_N = part(ENTROPY, rows)
    ctx = FakeContext(forward=lambda b, model: KnownLogp(part(REF, rows)))
    loss = method.loss(out, batch, ctx)
    (gradient,) = torch.autograd.grad(loss.sum, lp)
    return loss, gradient


def of_trl(kind, ratio, options):
    """trl's loss on the same numbers, padded."""
    trainer = pytest.importorskip("trl").GRPOTrainer
    beta = options.get("beta", 0.0)
    lp, mask = torch.tensor(LP, requires_grad=True), torch.tensor(MASK)
    low = options.get("clip_low", 0.2)
    self = MagicMock(
        loss_type=kind, importance_sampling_level=ratio, beta=beta, epsilon_low=low,
        epsilon_high=options.get("clip_high", 5.0 if kind == "cispo" else low), off_policy_mask_threshold=None,
        top_entropy_quantile=1.0, use_vllm=False, aux_loss_enabled=False, _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1, max_completion_length=ROOM,
    )  # fmt: skip
    self.model.training = True
    self.args = SimpleNamespace(
        delta=options.get("delta"), use_bias_correction_kl=options.get("kl_correction", False),
        sapo_temperature_pos=1.0, sapo_temperature_neg=TAU, steps_per_generation=1,
    )  # fmt: skip
    self.accelerator.num_processes = 1
    self.accelerator.gather.side_effect = lambda x: x
    self.accelerator.reduce.side_effect = lambda x, reduction: x
    self._get_per_token_logps_and_entropies.return_value = (lp, torch.zeros_like(lp), None)
    self.get_off_policy_mask, self.get_high_entropy_mask = trainer.get_off_policy_mask, trainer.get_high_entropy_mask
    threshold = options.get("off_policy_threshold")
    self.off_policy_mask_threshold = threshold
    ids = torch.zeros(4, 5, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids, "completion_mask": mask,
        "advantages": torch.tensor(ADVANTAGE), "old_per_token_logps": torch.tensor(OLD),
        "ref_per_token_logps": torch.tensor(REF), "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    loss = trainer._compute_loss(self, self.model, inputs)
    loss.backward()
    return float(loss.detach()), lp.grad.numpy()[THERE]


# Kept in single precision by trl, so one that is exact in it.
TAU = 1.125
KINDS = ["grpo", "bnpo", "dapo", "dr_grpo", "luspo", "cispo", "sapo"]
OPTIONS = [
    {"beta": 0.0},
    {"beta": 0.3},
    {"beta": 0.3, "kl_correction": True},
    {"beta": 0.0, "clip_low": 0.1, "clip_high": 0.5},
    {"beta": 0.1, "off_policy_threshold": 0.05},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_trl(kind, ratio, options):
    loss, gradient = measured(GRPO(loss=kind, ratio=ratio, tau_negative=TAU, **options))
    value, wanted = of_trl(kind, ratio, options)
    assert float(loss.sum.detach() / loss.weight) == pytest.approx(value, abs=1e-9)
    np.testing.assert_allclose(gradient / float(loss.weight), wanted, atol=1e-9)


def test_two_sided_clipping_is_that_of_trl():
    options = {"beta": 0.0, "delta": 1.2}
    loss, gradient = measured(GRPO(**options))
    value, wanted = of_trl("grpo", "token", options)
    assert float(loss.sum.detach() / loss.weight) == pytest.approx(value, abs=1e-9)
    np.testing.assert_allclose(gradient / 4, wanted, atol=1e-9)
    assert not np.allclose(wanted, of_trl("grpo", "token", {"beta": 0.0})[1])


def test_reinforce_and_the_second_estimator_by_hand():
    loss, gradient = measured(GRPO(loss="reinforce", beta=0.5, kl="k2"))
    u = REF - LP
    token = -ADVANTAGE[:, None] * LP + 0.5 * u**2 / 2
    assert float(loss.sum.detach() / loss.weight) == pytest.approx(
        ((token * MASK).sum(1) / MASK.sum(1)).mean(), abs=1e-12
    )
    wanted = (-ADVANTAGE[:, None] - 0.5 * u) / MASK.sum(1, keepdims=True) / 4
    np.testing.assert_allclose(gradient / 4, wanted[THERE], atol=1e-12)


@pytest.mark.parametrize("kind", [*KINDS, "reinforce"])
def test_how_a_step_is_cut_changes_nothing_but_the_loss_that_says_so(kind):
    method = GRPO(loss=kind, beta=0.2)
    whole, gradient = measured(method)
    pieces = [measured(method, rows) for rows in ((0,), (1, 2), (3,))]
    value = sum(float(p.sum) for p, _ in pieces) / sum(float(p.weight) for p, _ in pieces)
    joined = torch.cat([g for _, g in pieces]) / sum(float(p.weight) for p, _ in pieces)
    same = abs(value - float(whole.sum / whole.weight)) < 1e-12
    assert same == (kind != "bnpo")
    if kind != "bnpo":
        np.testing.assert_allclose(joined, gradient / float(whole.weight), atol=1e-14)


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo", "luspo"])
def test_a_part_of_the_positions_gives_a_part_of_the_sum(kind):
    method, batch = GRPO(loss=kind, beta=0.0), sampled()
    assert method.needs.positionwise
    whole = method.loss(KnownLogp(flat(LP)), batch, FakeContext())
    parts = []
    for index in (torch.arange(6), torch.arange(6, 13)):
        cut = batch.positions(index)
        parts.append(method.loss(KnownLogp(flat(LP)[index]), cut, FakeContext()))
    assert float(sum(p.sum for p in parts)) == pytest.approx(float(whole.sum), abs=1e-12)
    assert float(sum(p.weight for p in parts)) == pytest.approx(float(whole.weight), abs=1e-12)


def test_on_policy_the_gradient_is_the_advantage_over_the_divisor():
    batch = sampled()
    del batch.columns["old_logp_N"]
    lp = flat(LP, grad=True)
    loss = GRPO(beta=0.0).loss(KnownLogp(lp), batch, FakeContext())
    assert float(loss.sum.detach() / loss.weight) == pytest.approx(-ADVANTAGE.mean(), abs=1e-12)
    loss.sum.backward()
    wanted = -ADVANTAGE[:, None] * MASK / MASK.sum(1, keepdims=True)
    np.testing.assert_allclose(lp.grad, wanted[THERE], atol=1e-12)


def test_a_masked_completion_counts_in_the_number_of_completions_and_in_nothing_else():
    loss, gradient = measured(GRPO(beta=0.1), masked=(1,))
    others = [measured(GRPO(beta=0.1), (row,))[0] for row in (0, 2, 3)]
    assert float(loss.sum) == pytest.approx(sum(float(o.sum) for o in others), abs=1e-12)
    assert float(loss.weight) == pytest.approx(4)
    assert (gradient[5:8] == 0).all()
    tokens, _ = measured(GRPO(loss="dapo", beta=0.1), masked=(1,))
    assert float(tokens.weight) == 10


def test_only_uncertain_tokens_are_learnt_from():
    _, gradient = measured(GRPO(beta=0.0, uncertain_share=0.4))
    kept = np.zeros((4, 5))
    for row, n in enumerate((5, 3, 4, 1)):
        kept[row, np.argsort(-ENTROPY[row, :n])[: int(np.ceil(0.4 * n))]] = 1
    _, whole = measured(GRPO(beta=0.0))
    np.testing.assert_allclose(gradient, whole * flat(kept), atol=1e-14)
    assert (flat(kept).sum() == 7).all()


def test_what_is_logged():
    loss, _ = measured(GRPO(beta=0.3))
    logged = {k: float(a) / float(n) for k, (a, n) in loss.metrics.items()}
    u, w = REF - LP, np.exp(LP - OLD)
    outside = ((w > 1.2) & (ADVANTAGE[:, None] > 0)) | ((w < 0.8) & (ADVANTAGE[:, None] < 0))
    assert logged["kl"] == pytest.approx(((np.exp(u) - u - 1) * MASK).sum() / 13)
    assert logged["clipped"] == pytest.approx((outside * MASK).sum() / 13)
    assert logged["reward"] == pytest.approx(0.5)
    assert logged["completion_tokens"] == pytest.approx(13 / 4)


def test_refusals():
    plain = Batch(**{**vars(sampled()), "columns": {}})
    with pytest.raises(UserError, match=r"Add transforms: \[rollouts"):
        GRPO().loss(KnownLogp(flat(LP)), plain, FakeContext())
    with pytest.raises(UserError, match="delta bounds a clipped loss"):
        GRPO(loss="cispo", delta=2.0)
