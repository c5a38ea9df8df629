"""Self-rewarding PPO: the score of the specification's example, its placement, and where its optimum lies."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from helpers import PROCESSOR, OpenAll, make_session, random_rows, tiny_llama
from luthier.core.errors import UserError
from luthier.engine.session import Session
from luthier.engine.stack import Stack
from luthier.functional import policy_gradient as pg
from luthier.functional.policy_gradient import sums
from luthier.methods.objectives.grpo import GroupRelativePolicyOptimization as GRPO
from luthier.methods.procedures.self_rewarding_ppo import unchanged
from luthier.methods.rewards.self_rewarding_ppo import LogRatioReward, placed
from luthier.methods.transforms.rollouts import Rollouts
from luthier.tasks.causal_lm import CausalLM

SFT = np.array([-0.5, -1.2, -0.3, -2.0, -0.1])
PRETRAINED = np.array([-1.5, -1.0, -0.9, -2.5, -3.0])
RATIO = SFT - PRETRAINED
PLAIN = {"scale": 1.0, "clip": None, "per_length": False}


def test_the_score_of_the_example_at_the_end_and_spread():
    ratio, sequence = torch.tensor(RATIO), torch.zeros(5, dtype=torch.long)
    late = placed(ratio, sequence, 1, **PLAIN, at_end=True)
    assert late.tolist() == pytest.approx([0, 0, 0, 0, 4.8])
    np.testing.assert_allclose(placed(ratio, sequence, 1, **PLAIN, at_end=False), RATIO, atol=1e-12)


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize(
    ("options", "score"),
    [({"clip": 3.0}, 3.0), ({"per_length": True}, 0.96), ({"scale": 2.0, "clip": 4.0}, 8.0)],
)
def test_changed_scores_are_the_sum_of_the_token_rewards(options, score, at_end):
    ratio = torch.tensor(np.concatenate([RATIO, [-9.0, 1.0]]))
    sequence = torch.tensor([0] * 5 + [2] * 2)  # the middle completion is empty
    found = placed(ratio, sequence, 3, **{**PLAIN, **options}, at_end=at_end)
    total = sums(found, sequence, 3).tolist()
    assert total[0] == pytest.approx(score)
    assert total[1] == 0
    if at_end:
        assert (found[:4] == 0).all()
        assert float(found[5]) == 0


def session_with(pretrained, made, objective=None):
    stack = Stack(objective=objective or GRPO(beta=0.0), transforms=[made], parameters=[OpenAll()])
    stack.named = {"objective": stack.objective, "transform:rollouts": made, "parameters": stack.parameters[0]}
    model = tiny_llama(1)
    return Session(
        model=OpenAll().apply(model, None), task=CausalLM(PROCESSOR), processor=PROCESSOR, stack=stack,
        models={"pretrained": pretrained},
    )  # fmt: skip


def rollouts(**options):
    return Rollouts(
        **{"reward": "self-rewarding-ppo", "samples": 4, "max_new_tokens": 6, "advantages": "none", **options}
    )


def batch_of(session, rows, count=3):
    return session.task.collate(rows.fetch(range(count)), range(count), session.stack.needs.columns)


def test_rewards_are_log_ratios_of_whole_completions_whatever_the_padding():
    made = rollouts()
    session = session_with(tiny_llama(2), made)
    rows = random_rows()
    batch = made(batch_of(session, rows), session)
    sft, pretrained = tiny_llama(1).eval(), tiny_llama(2).eval()
    starts = [int(rows.spans[row][0]) for row in batch.row_B.tolist()]
    for b in range(12):
        ids = batch.inputs["input_ids"][b][batch.inputs["attention_mask"][b].bool()]
        with torch.no_grad():
            both = [m(ids[None]).logits[0].double().log_softmax(-1) for m in (sft, pretrained)]
        wanted = sum(float(both[0][t - 1, ids[t]] - both[1][t - 1, ids[t]]) for t in range(starts[b], len(ids)))
        assert float(batch.columns["reward"][b]) == pytest.approx(wanted, abs=1e-4)


def test_equal_models_give_no_reward_and_no_gradient():
    made = rollouts()
    session = session_with(tiny_llama(1), made)
    batch = made(batch_of(session, random_rows()), session)
    assert float(batch.columns["reward"].abs().max()) < 1e-5
    session.loss(batch).sum.backward()
    assert max(float(p.grad.abs().max()) for p in session.model.parameters() if p.grad is not None) < 1e-5


def test_the_end_token_may_be_left_out():
    made = rollouts(max_new_tokens=12)
    session = session_with(tiny_llama(2), made)
    batch = made(batch_of(session, random_rows(), 8), session)
    whole, without = (LogRatioReward(placement="token", exclude_end=e).per_token(batch, session) for e in (False, True))
    last = torch.bincount(batch.sequence_N).cumsum(0) - 1
    ended = last[batch.columns["finished"] > 0]
    assert len(ended) > 0
    assert (without[ended] == 0).all()
    others = torch.ones_like(whole, dtype=torch.bool)
    others[ended] = False
    assert torch.equal(whole[others], without[others])


@pytest.mark.parametrize(("ratio", "power"), [(1.0, 1.0), (2.0, 2.0)])
def test_the_optimum_of_a_bandit(ratio, power):
    """One token of six, a tabular softmax policy, exact expectations: scale r - kl KL(pi || p_pt) leads to the theory's."""
    rng = np.random.default_rng(0)
    pretrained, sft = (torch.log_softmax(torch.tensor(z), 0) for z in rng.normal(size=(2, 6)))
    kl, scale = 0.5, 0.5 * ratio
    score = placed(sft - pretrained, torch.arange(6), 6, scale=scale, clip=None, per_length=False, at_end=True)
    z = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([z], lr=0.05)
    for _ in range(1500):
        logp = torch.log_softmax(z, 0)
        reward = score - kl * (logp.detach() - pretrained)
        advantage = reward - (logp.exp() * reward).sum().detach()
        w = (logp - logp.detach()).exp()
        loss = (logp.exp().detach() * pg.clipped(w, advantage, 0.2, 0.2)).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    wanted = torch.softmax(pretrained + power * (sft - pretrained), 0)
    assert 0.5 * float((torch.softmax(z.detach(), 0) - wanted).abs().sum()) < 0.02
    if power == 1.0:
        assert 0.5 * float((wanted - sft.exp()).abs().sum()) < 1e-12


def test_refusals():
    with pytest.raises(UserError, match="use it in the transform rollouts"):
        LogRatioReward()([{}], ["x"], None)
    model = tiny_llama()
    assert unchanged(model, copy.deepcopy(model))
    assert not unchanged(model, tiny_llama(1))
    with pytest.raises(UserError, match="a method needs the model 'pretrained'"):
        make_session(objective=GRPO(beta=0.0), transforms=[rollouts()])
