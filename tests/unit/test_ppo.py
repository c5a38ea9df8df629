"""PPO: the loss and the whole way from rewards to advantages, worked out in float64 numpy."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import FakeContext, KnownLogp
from sampled import ADVANTAGE, LENGTHS, LP, MASK, OLD, THERE, flat, sampled

from helpers import make_session, random_rows, settings, weights
from luthier.core.errors import UserError
from luthier.engine.loop import Trainer
from luthier.functional import advantages as adv
from luthier.functional import value_head
from luthier.functional.policy_gradient import clipped, clipped_value_loss
from luthier.functional.rollouts import advantages
from luthier.methods.objectives.ppo import ProximalPolicyOptimization as PPO
from luthier.methods.parameters.lora import LowRankAdaptation
from luthier.methods.transforms.rollouts import Rollouts

RNG = np.random.default_rng(5)
HIDDEN, WEIGHT, BIAS = RNG.normal(size=(13, 3)), RNG.normal(size=3), 0.3
OLD_VALUE, RETURN = RNG.normal(size=13), RNG.normal(size=13)
OPTIONS = {"reward": {"regex": {"pattern": "[0-4]$"}}, "samples": 2, "max_new_tokens": 6, "advantages": "gae"}


def with_head():
    """A context whose model is a value head alone."""
    head = torch.nn.Linear(3, 1).double()
    head.weight.data[:], head.bias.data[:] = torch.tensor(WEIGHT), BIAS
    head.float = lambda: head
    ctx = FakeContext()
    ctx.model = SimpleNamespace(value_head=head)
    return ctx


class Known(KnownLogp):
    """Log-probabilities and hidden states in double precision."""

    def hidden(self, layer=-1):
        value = torch.tensor(HIDDEN, requires_grad=True)
        value.float = lambda: value
        value.detach = lambda: value
        return value


def test_loss_and_gradient_by_hand():
    lp = flat(LP, grad=True)
    batch = sampled(return_N=torch.tensor(RETURN), value_N=torch.tensor(OLD_VALUE))
    loss = PPO(clip=0.2, value_clip=0.3, value_weight=0.4).loss(Known(lp), batch, with_head())
    w, a = np.exp(LP - OLD)[THERE], (ADVANTAGE[:, None] * np.ones((4, 5)))[THERE]
    policy = np.maximum(-a * w, -a * np.clip(w, 0.8, 1.2))
    value = HIDDEN @ WEIGHT + BIAS
    near = np.clip(value, OLD_VALUE - 0.3, OLD_VALUE + 0.3)
    error = 0.5 * np.maximum((value - RETURN) ** 2, (near - RETURN) ** 2)
    assert float(loss.sum.detach() / loss.weight) == pytest.approx((policy + 0.4 * error).mean(), abs=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum, lp)
    moving = np.where(-a * w >= -a * np.clip(w, 0.8, 1.2), -a * w, 0.0)
    np.testing.assert_allclose(gradient, moving, atol=1e-12)


SFT = np.array([-0.5, -1.2, -0.3, -2.0, -0.1])
PRETRAINED = np.array([-1.5, -1.0, -0.9, -2.5, -3.0])
VALUE = np.array([1.0, 1.5, 0.5, 2.0, 3.0])
NEW = SFT + np.array([0.3, -0.1, 0.05, -0.4, 0.0])


def test_the_whole_way_of_one_response():
    """Score 4.8 at the end token: token rewards, advantages, returns, whitening, both losses."""
    mask = torch.ones(1, 5, dtype=torch.bool)
    old, reference, value = (torch.tensor(v)[None] for v in (SFT, PRETRAINED, VALUE))
    score = float((SFT - PRETRAINED).sum())
    rho = adv.token_rewards(
        adv.at_last_token(torch.tensor([score], dtype=torch.float64), mask), old, reference, mask, 0.05
    )
    advantage, returns = adv.generalised(rho, value, mask, gamma=1.0, lambda_=0.95)
    # Written out from the end.
    r = -0.05 * (SFT - PRETRAINED)
    r[4] += 4.8
    delta = r + np.append(VALUE[1:], 0.0) - VALUE
    wanted = np.zeros(5)
    wanted[4] = delta[4]
    for t in (3, 2, 1, 0):
        wanted[t] = delta[t] + 0.95 * wanted[t + 1]
    np.testing.assert_allclose(advantage[0], wanted, atol=1e-12)
    np.testing.assert_allclose(returns[0], wanted + VALUE, atol=1e-12)
    white = adv.standardised(advantage, *adv.moments(advantage, mask.double()), centre=True, whiten=True)[0]
    hand = (wanted - wanted.mean()) / np.sqrt(wanted.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(white, hand, atol=1e-12)
    w = np.exp(NEW - SFT)
    policy = clipped(torch.tensor(w), white, 0.2, 0.2)
    np.testing.assert_allclose(policy, np.maximum(-hand * w, -hand * np.clip(w, 0.8, 1.2)), atol=1e-12)
    moved = VALUE + np.array([0.5, -0.1, 0.0, 0.3, -0.6])
    error = clipped_value_loss(torch.tensor(moved), torch.tensor(VALUE), returns[0], 0.2)
    target, near = wanted + VALUE, VALUE + np.clip(moved - VALUE, -0.2, 0.2)
    np.testing.assert_allclose(error, 0.5 * np.maximum((moved - target) ** 2, (near - target) ** 2), atol=1e-12)


def session_with(parameters=None, **options):
    made = Rollouts(**{**OPTIONS, **options})
    return make_session(objective=PPO(), transforms=[made], parameters=parameters), made


@pytest.mark.parametrize("pieces", [((0, 1, 2, 3),), ((0,), (1, 2), (3,))])
def test_advantages_in_the_engine_are_those_of_the_definition(pieces):
    session, made = session_with(kl_in_reward=0.1, gamma=0.9, gae_lambda=0.8)
    head = value_head.of(session.model)
    torch.manual_seed(1)
    torch.nn.init.normal_(head.weight)
    for parameter in session.model.parameters():
        parameter.data.mul_(1.2)
    rows = random_rows()
    batches = [made(session.task.collate(rows.fetch(p), p, session.stack.needs.columns), session) for p in pieces]
    wanted = []
    for batch in batches:
        with torch.no_grad():
            reference = session.forward(batch, "reference", grad=False).logp_N.double().numpy()
            out = session.forward(batch, grad=False)
            value = (out.hidden(-1) @ head.weight[0] + head.bias).double().numpy()
            logp = out.logp_N.double().numpy()
        for b in range(batch.examples):
            at = (batch.sequence_N == b).numpy()
            reward = -0.1 * (logp - reference)[at]
            reward[-1] += float(batch.columns["reward"][b])
            v = value[at]
            delta = reward + 0.9 * np.append(v[1:], 0.0) - v
            wanted.append([sum((0.9 * 0.8) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(v))])
            np.testing.assert_allclose(batch.columns["return_N"][at], np.array(wanted[-1]) + v, atol=1e-4)
    whole = np.concatenate(wanted)
    totals = session.stack.counts(batches, session)
    found = torch.cat([advantages(b, totals, "test") for b in batches])
    np.testing.assert_allclose(found, (whole - whole.mean()) / whole.std(ddof=1), atol=1e-3)


def test_a_completion_masked_out_has_no_part_in_the_spread():
    session, made = session_with(truncated="mask", max_new_tokens=12)
    rows = random_rows()
    batch = made(session.task.collate(rows.fetch(range(12)), range(12), session.stack.needs.columns), session)
    kept = batch.weight_N > 0
    assert 0 < int(kept.sum()) < len(kept)
    found = advantages(batch, session.stack.counts([batch], session), "test")[kept].double()
    assert float(found.mean()) == pytest.approx(0, abs=1e-5)
    assert float(found.std()) == pytest.approx(1, abs=1e-3)


def test_the_critic_learns_and_goes_away():
    session, _ = session_with(updates=2)
    rows = random_rows()
    Trainer(session, rows, settings(learning_rate=3e-3)).run()
    assert float(value_head.of(session.model).weight.detach().abs().max()) > 0
    session.stack.call("finish_model", session.model, session.processor)
    assert not any("value_head" in n for n in session.model.state_dict())


def test_the_critic_is_trained_beside_an_adapter_and_resumes(tmp_path):
    def run(folder=None, stop=None, resume=False):
        lora = LowRankAdaptation(rank=2, target_modules=["q_proj", "v_proj"])
        session, _ = session_with(parameters=[lora])

        def kill(event, record):
            if event in ("step", "tick") and record["step"] == stop:
                raise KeyboardInterrupt

        try:
            Trainer(session, random_rows(), settings(save_steps=1), folder=folder, observe=kill).run(resume=resume)
        except KeyboardInterrupt:
            assert stop is not None
        return session

    whole = run()
    head = value_head.of(whole.model)
    assert float(head.weight.detach().abs().max()) > 0
    run(tmp_path, stop=2)
    again = run(tmp_path, resume=True)
    for name, value in weights(whole.model).items():
        assert torch.equal(value, weights(again.model)[name]), name
    whole.stack.call("finish_model", whole.model, whole.processor)
    assert not any("value_head" in n for n in whole.model.state_dict())


def test_a_critic_that_reads_only():
    session, _ = session_with()
    rows = random_rows()
    batch = session.stack.transforms[0](
        session.task.collate(rows.fetch(range(2)), range(2), session.stack.needs.columns), session
    )
    batch.columns["advantage_N"] = torch.zeros_like(batch.weight_N)
    for shared in (True, False):
        session.stack.objective = PPO(shared_trunk=shared)
        torch.nn.init.ones_(value_head.of(session.model).weight)
        session.model.zero_grad()
        session.loss(batch).sum.backward()
        moved = session.model.model.layers[0].self_attn.q_proj.weight.grad
        assert bool((moved != 0).any()) == shared
        assert bool((value_head.of(session.model).weight.grad != 0).all())


def test_refusals():
    batch = sampled()
    with pytest.raises(UserError, match="set advantages: gae"):
        PPO().loss(KnownLogp(flat(LP)), batch, FakeContext())
    made = Rollouts(**OPTIONS)
    session = make_session(transforms=[made])
    rows = random_rows()
    with pytest.raises(UserError, match="needs a critic, which the objective 'ppo' brings"):
        made(session.task.collate(rows.fetch([0]), [0], session.stack.needs.columns), session)
    assert MASK.sum() == sum(LENGTHS)
