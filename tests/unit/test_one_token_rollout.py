"""One-token rollout against loss and gradient worked out in float64 numpy, and within the engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import FakeContext, FakeOutputs, position_batch
from transformers import ViTConfig, ViTForImageClassification

from helpers import OpenAll, make_session, random_rows, settings, tiny_llama, weights
from luthier.core import registry
from luthier.core.errors import LuthierError, UserError
from luthier.engine.loop import Trainer
from luthier.engine.session import Session
from luthier.engine.stack import Stack
from luthier.functional import draws
from luthier.methods.objectives.beyond_log_likelihood import BeyondLogLikelihood
from luthier.methods.objectives.one_token_rollout import OneTokenRollout
from luthier.methods.objectives.sft import SupervisedFineTuning
from luthier.methods.parameters.lora import LowRankAdaptation
from luthier.methods.transforms.masked_thought import MaskedThought
from luthier.tasks.classification import ImageClassification

LOGITS = np.random.default_rng(0).normal(size=(2, 5)) * 1.5
TARGET = np.array([3, 1])
# K = 8 draws at each of two positions.
COUNTS = np.array([[1, 0, 2, 4, 1], [5, 0, 1, 0, 2]])


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def numbers_for(counts, q):
    """Uniform numbers that stand in the middle of each drawn token's share of the distribution function."""
    ends = q.cumsum(-1)
    rows = [np.repeat((end - row / 2), count) for end, row, count in zip(ends, q, counts, strict=True)]
    return torch.from_numpy(np.stack(rows))


def two_positions():
    target_N = torch.from_numpy(TARGET)
    return position_batch(2, target_N=target_N, weight_N=torch.ones(2, dtype=torch.float64))


def result(method, logits=LOGITS, batch=None, **ctx):
    """The mean loss, its gradient by the logits, and what was logged."""
    z = torch.tensor(logits, requires_grad=True)
    batch = two_positions() if batch is None else batch
    made = method.loss(FakeOutputs(z, batch), batch, FakeContext(**{"step": 50, **ctx}))
    value = made.sum / made.weight
    value.backward()
    assert not any(isinstance(a, torch.Tensor) and a.requires_grad for pair in made.metrics.values() for a in pair)
    logged = {k: float(a) / max(float(n), 1e-12) for k, (a, n) in made.metrics.items()}
    return float(value.detach()), z.grad.numpy(), logged


def by_hand(coefficients):
    """Loss and gradient of - 1/N sum_n sum_v w_nv log p_nv: by the logits it is -1/N sum_v w_v (e_v - p)."""
    p = softmax(LOGITS)
    value = -(coefficients * np.log(p)).sum() / len(p)
    return value, -(coefficients - coefficients.sum(-1, keepdims=True) * p) / len(p)


@pytest.mark.parametrize("beta", [-0.1, 0.0, -1.0])
@pytest.mark.parametrize("extra", [{}, {"unbiased_temperature": True}, {"baseline": "expected"}, {"sft_mix": 0.3}])
def test_loss_and_gradient_of_given_counts(beta, extra, monkeypatch):
    p, q = softmax(LOGITS), softmax(LOGITS / 1.3)
    hit = np.eye(5)[TARGET]
    q_target = (q * hit).sum(-1, keepdims=True)
    reward = np.where(hit == 1, 1.0, beta)
    if "baseline" in extra:
        reward = reward - (q_target + beta * (1 - q_target))
    coefficients = COUNTS / 8 * reward * (p / q if "unbiased_temperature" in extra else 1.0)
    mix = extra.get("sft_mix", 0.0)
    value, gradient = by_hand((1 - mix) * coefficients + mix * hit)
    monkeypatch.setattr(OneTokenRollout, "_uniform", lambda *_: numbers_for(COUNTS, q))
    found = result(OneTokenRollout(samples=8, wrong_reward=beta, **extra))
    assert found[0] == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(found[1], gradient, atol=1e-14)


def test_what_is_logged_of_given_counts(monkeypatch):
    p, q = softmax(LOGITS), softmax(LOGITS / 1.3)
    monkeypatch.setattr(OneTokenRollout, "_uniform", lambda *_: numbers_for(COUNTS, q))
    logged = result(OneTokenRollout(samples=8, wrong_reward=-0.1))[2]
    right = np.array([0.5, 0.0])
    assert logged["hit_share"] == pytest.approx(right.mean())
    assert logged["no_hit"] == pytest.approx(0.5)
    assert logged["reward"] == pytest.approx((right - 0.1 * (1 - right)).mean())
    assert logged["rollout_probability"] == pytest.approx(q[[0, 1], TARGET].mean())
    terms = COUNTS / 8 * np.log(p)
    hit = abs(terms[[0, 1], TARGET].sum())
    wrong = 0.1 * abs(terms.sum() - terms[[0, 1], TARGET].sum())
    assert logged["wrong_share"] == pytest.approx(wrong / (hit + wrong))
    assert logged["entropy"] == pytest.approx(-(COUNTS / 8 * p / q * np.log(p)).sum(-1).mean())


@pytest.mark.parametrize("extra", [{}, {"temperature": 2.0, "unbiased_temperature": True}])
def test_the_expectation_without_wrong_rewards_is_the_probability_objective(extra):
    options = {"temperature": 1.0, **extra}
    _, gradient, logged = result(OneTokenRollout(wrong_reward=0.0, estimator="expected", **options))
    z = torch.tensor(LOGITS, requires_grad=True)
    p_N = torch.softmax(z, -1)[torch.arange(2), torch.from_numpy(TARGET)]
    (1 - p_N).mean().backward()
    np.testing.assert_allclose(gradient, z.grad.numpy(), atol=1e-15)
    np.testing.assert_allclose(gradient, result(BeyondLogLikelihood(objective="p"))[1], atol=1e-15)
    p = softmax(LOGITS)
    weighted = -p[[0, 1], TARGET][:, None] * (np.eye(5)[TARGET] - p) / 2
    np.testing.assert_allclose(gradient, weighted, atol=1e-15)
    assert logged["entropy"] == pytest.approx(-(p * np.log(p)).sum(-1).mean())
    assert "no_hit" not in logged


def test_a_baseline_leaves_the_expected_gradient_at_temperature_one():
    plain, less = (
        result(OneTokenRollout(estimator="expected", temperature=1.0, baseline=b))[1] for b in ("none", "expected")
    )
    np.testing.assert_allclose(plain, less, atol=1e-15)
    hot = [result(OneTokenRollout(estimator="expected", baseline=b))[1] for b in ("none", "expected")]
    assert np.abs(hot[0] - hot[1]).max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"unbiased_temperature": True, "baseline": "expected"}, {"top_k": 3}])
def test_sampled_gradients_converge_to_the_expected_one(options):
    target = result(OneTokenRollout(estimator="expected", wrong_reward=-0.5, **options))[1]
    method = OneTokenRollout(samples=2, wrong_reward=-0.5, **options)
    found = np.stack([result(method, step=50 + i)[1] for i in range(1600)])
    errors = [
        np.sqrt(((found.reshape(-1, n, 2, 5).mean(1) - target) ** 2).sum((1, 2)).mean()) / np.linalg.norm(target)
        for n in (4, 100)
    ]
    # 25 times as many draws, a fifth of the error: 16 averages of 100 tell it to about a fifth
    assert errors[0] / errors[1] == pytest.approx(5.0, rel=0.35)
    whole = np.abs(found.mean(0) - target) / (found.std(0) / 40 + 1e-12)
    assert whole.max() < 4.5


# -- the draws


@pytest.mark.parametrize("width", [5, 32, 100, 1000])
def test_draws_are_those_of_the_distribution_function(width):
    rng = np.random.default_rng(width)
    logits, uniform = rng.normal(size=(7, width)) * 3, rng.random((7, 50))
    q = softmax(logits / 0.7)
    wanted = np.stack([np.searchsorted(row.cumsum(), u, side="right") for row, u in zip(q, uniform, strict=True)])
    target = torch.from_numpy(rng.integers(0, width, 7))
    ids_Ck, q_Ck = draws.draw(torch.from_numpy(logits), torch.from_numpy(uniform), target, 0.7)
    np.testing.assert_array_equal(ids_Ck[:, :-1].numpy(), wanted)
    assert torch.equal(ids_Ck[:, -1], target)
    np.testing.assert_allclose(q_Ck.numpy(), np.take_along_axis(q, ids_Ck.numpy(), 1), rtol=1e-12)


def test_blocks_of_rows_do_not_change_the_draws(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    given = (torch.randn(9, 70, generator=generator), torch.rand(9, 11, generator=generator), torch.arange(9))
    whole = draws.draw(*given, 1.3)
    monkeypatch.setattr(draws, "_BLOCK_BYTES", {"cpu": 96 * 4 * 2})
    cut = draws.draw(*given, 1.3)
    assert torch.equal(whole[0], cut[0])
    assert torch.equal(whole[1], cut[1])


def test_the_ends_of_the_distribution_never_give_an_impossible_token():
    logits = torch.full((1, 70), -torch.inf)
    logits[0, [3, 40, 41]] = torch.tensor([0.0, 1.0, 0.5])
    edge = torch.tensor([[0.0, 1e-9, 0.25, 0.999999, 1 - 2**-24]])
    ids_Ck, _ = draws.draw(logits, edge, torch.tensor([0]), 1.0)
    assert set(ids_Ck[0, :-1].tolist()) == {3, 40, 41}
    assert ids_Ck[0, [0, 4]].tolist() == [3, 41]


def test_filters_by_hand():
    p = np.array([[0.05, 0.5, 0.1, 0.3, 0.05]])
    logits = torch.from_numpy(np.log(p))

    def support(**filters):
        q = draws.tempered(logits, 1.0, draws.support_floor(logits, 1.0, **filters))
        return torch.nonzero(q[0]).squeeze(1).tolist(), q[0]

    assert support(top_k=2)[0] == [1, 3]
    assert float(support(top_k=2)[1][1]) == pytest.approx(0.625)
    assert support(top_p=0.6)[0] == [1, 3]
    assert support(top_p=0.85)[0] == [1, 2, 3]
    assert support(top_p=1e-6)[0] == [1]
    assert support(top_k=9)[0] == [0, 1, 2, 3, 4]
    # within the two most likely, 0.625 and 0.375
    assert support(top_k=2, top_p=0.6)[0] == [1]
    assert draws.support_floor(logits, 1.0) is None


def test_a_target_that_is_filtered_out_is_never_hit():
    batch = position_batch(2, target_N=torch.from_numpy(LOGITS.argmin(-1)), weight_N=torch.ones(2).double())
    logged = result(OneTokenRollout(top_k=2, samples=64), batch=batch)[2]
    assert logged["hit_share"] == logged["rollout_probability"] == 0.0
    assert logged["no_hit"] == 1.0


def test_the_share_of_draws_is_the_probability():
    logged = result(OneTokenRollout(samples=200_000))[2]
    q = softmax(LOGITS / 1.3)[[0, 1], TARGET]
    assert logged["hit_share"] == pytest.approx(q.mean(), abs=4 * np.sqrt((q * (1 - q)).sum() / 4 / 200_000))
    p = softmax(LOGITS)
    assert logged["entropy"] == pytest.approx(-(p * np.log(p)).sum(-1).mean(), rel=0.02)


# -- in the engine


def one_step(method, batch_of=lambda batch: batch, *, chunk=None, forward=False, model=None, parameters=None):
    """Loss and gradients of one batch of three rows."""
    torch.manual_seed(0)
    session = make_session(model or tiny_llama(), objective=method, parameters=parameters)
    session.head_chunk, session.step = chunk, 50
    rows = random_rows(5)
    batch = batch_of(session.task.collate(rows.fetch(range(5)), range(5)))
    loss = method.loss(session.forward(batch), batch, session) if forward else session.loss(batch)
    (loss.sum / loss.weight).backward()
    found = {n: p.grad for n, p in session.model.named_parameters() if p.grad is not None}
    return float(loss.sum.detach()), found


@pytest.mark.parametrize("options", [{}, {"estimator": "expected"}, {"wrong_reward": 0.0}, {"baseline": "expected"}])
def test_chunks_and_the_joined_head_give_the_same_loss_and_gradient(options):
    method = OneTokenRollout(samples=8, **options)
    value, gradients = one_step(method)
    for other in ({"chunk": 4}, {"forward": True}, {"forward": True, "chunk": 4}):
        again, found = one_step(method, **other)
        assert again == pytest.approx(value, rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-7, rtol=1e-4)


def test_the_gradient_through_the_model_is_that_of_the_plain_formula():
    method = OneTokenRollout(samples=8, wrong_reward=-0.5)
    session = make_session(tiny_llama(), objective=method)
    rows = random_rows(4)
    batch = session.task.collate(rows.fetch(range(4)), range(4))
    session.step = 50
    loss = session.loss(batch)
    (loss.sum / loss.weight).backward()
    twin = tiny_llama().double()
    logits_NV = twin(**batch.inputs).logits.reshape(-1, 64)[batch.position_N]
    q = softmax(logits_NV.detach().numpy() / 1.3)
    uniform = method._uniform(batch, session).double().numpy()
    total = 0.0
    for n, (row, numbers) in enumerate(zip(q, uniform, strict=True)):
        drawn = np.searchsorted(row.cumsum(), numbers, side="right")
        target = int(batch.target_N[n])
        logp_V = logits_NV[n].log_softmax(-1)
        total = total - sum((1.0 if a == target else -0.5) * logp_V[a] for a in drawn) / 8
    (total / len(q)).backward()
    assert float(loss.sum.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    for (name, own), (_, wanted) in zip(session.model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(own.grad.double(), wanted.grad, atol=1e-6, rtol=1e-3, msg=name)


def test_padding_and_other_rows_do_not_change_a_rows_draws():
    # Alone, or beside longer rows that widen it: draws belong to the row.
    method = OneTokenRollout(samples=8)
    whole = one_step(method, lambda batch: batch.take(torch.tensor([0, 2])))
    parts = [one_step(method, lambda batch, b=b: batch.take(torch.tensor([b])))[0] for b in (0, 2)]
    assert whole[0] == pytest.approx(sum(parts), rel=1e-5)
    rows = random_rows(5)
    narrow = make_session(tiny_llama(), objective=method)
    narrow.step = 50
    shortest = int(rows.lengths.argmin())
    alone = narrow.loss(narrow.task.collate(rows.fetch([shortest]), [shortest])).sum
    beside = one_step(method, lambda batch: batch.take(torch.tensor([shortest])))[0]
    assert beside == pytest.approx(float(alone.detach()), rel=1e-5)


def test_prompts_and_padding_get_no_gradient():
    session = make_session(tiny_llama(), objective=OneTokenRollout(samples=8))
    rows = random_rows(3)
    batch = session.task.collate(rows.fetch(range(3)), range(3))
    states = []
    session.model.get_decoder().register_forward_hook(lambda module, args, out: states.append(out.last_hidden_state))
    loss = session.loss(batch)
    states[0].retain_grad()
    loss.sum.backward()
    touched = states[0].grad.reshape(-1, 16).abs().sum(1) > 0
    assert torch.equal(torch.nonzero(touched).squeeze(1), batch.position_N.sort().values)


@pytest.mark.parametrize("options", [{"estimator": "expected"}, {"samples": 8}])
def test_uneven_micro_batches_are_one_batch(options):
    found = []
    for accumulation in (1, 2):
        session = make_session(tiny_llama(), objective=OneTokenRollout(**options))
        values = settings(max_steps=3, accumulation=accumulation, optimizer="sgd", learning_rate=0.1)
        Trainer(session, random_rows(), values).run()
        found.append(weights(session.model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=2e-6, rtol=1e-4)


def test_a_mix_of_one_is_plain_fine_tuning_bit_for_bit():
    value, gradients = one_step(SupervisedFineTuning())
    again, found = one_step(OneTokenRollout(sft_mix=1.0))
    assert again == value
    assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())


def test_adapters_and_corrupted_inputs():
    session = make_session(
        objective=OneTokenRollout(samples=8, exclude=["end", "predecessor_corrupted"]),
        parameters=[LowRankAdaptation(rank=2)],
        transforms=[MaskedThought(rate_max=0.4, rate_schedule="constant", mask_token="pad")],
    )
    before, records = weights(session.model), []
    Trainer(
        session,
        random_rows(),
        settings(max_steps=2),
        observe=lambda event, record: records.append(record) if event == "step" else None,
    ).run()
    assert all(0 <= record["hit_share"] <= 1 and record["entropy"] > 0 for record in records)
    after = weights(session.model)
    assert {n.rsplit(".", 3)[1] for n in after if not torch.equal(before[n], after[n])} <= {"lora_A", "lora_B"}


def test_excluded_targets_keep_plain_likelihood(monkeypatch):
    q = softmax(LOGITS / 1.3)
    monkeypatch.setattr(OneTokenRollout, "_uniform", lambda *_: numbers_for(COUNTS, q))
    method = OneTokenRollout(samples=8, wrong_reward=-0.1, exclude=["end", "marked"])
    method.prepare(FakeContext(), None)  # the end token of the stand-in is 2
    coefficients = COUNTS / 8 * np.where(np.eye(5)[TARGET] == 1, 1.0, -0.1)
    batch = two_positions()
    batch.columns["marked_N"] = torch.tensor([False, True])
    coefficients[1] = np.eye(5)[TARGET[1]]
    value, gradient = by_hand(coefficients)
    found = result(method, batch=batch)
    assert found[0] == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(found[1], gradient, atol=1e-14)
    assert found[2]["hit_share"] == 0.5  # of the first position alone
    method._excluded_ids = torch.tensor([3])
    coefficients[0] = np.eye(5)[TARGET[0]]
    assert result(method, batch=batch)[0] == pytest.approx(by_hand(coefficients)[0], rel=1e-12)


def test_exclusions_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="names tokens, and targets of image-classification are classes"):
        OneTokenRollout(exclude=["end"]).prepare(FakeContext(task="image-classification"), None)
    ctx = FakeContext()
    ctx.processor.eos_token_id = None
    with pytest.raises(UserError, match="has no end token"):
        OneTokenRollout(exclude=["end"]).prepare(ctx, None)
    with pytest.raises(UserError, match=r"no transform of this run names a group of positions 'code'. Accepted: end"):
        result(OneTokenRollout(exclude=["code"], samples=2))


def test_a_classifier_has_one_draw_table_per_picture():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_labels=5,
    )  # fmt: skip
    method, opened = OneTokenRollout(estimator="expected", wrong_reward=-0.5), OpenAll()
    stack = Stack(objective=method, parameters=[opened], named={"objective": method, "parameters#0": opened})
    model = ViTForImageClassification(config)
    session = Session(model=model, task=ImageClassification(None), processor=None, stack=stack)
    pixels, target_N = torch.randn(6, 3, 8, 8), torch.arange(6) % 5
    batch = position_batch(6, target_N=target_N)
    batch.inputs, batch.row_B, batch.sequence_N = {"pixel_values": pixels}, torch.arange(6), torch.arange(6)
    session.model.eval()
    loss = session.loss(batch)
    logits_NV = model(pixels).logits.double()
    logp_NV, q_NV = logits_NV.log_softmax(-1), (logits_NV.detach() / 1.3).softmax(-1)
    reward_NV = torch.full_like(q_NV, -0.5).scatter_(1, target_N[:, None], 1.0)
    wanted = -(q_NV * reward_NV * logp_NV).sum()
    assert float(loss.sum.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    loss.sum.backward()
    found = model.classifier.weight.grad.clone()
    model.zero_grad()
    wanted.backward()
    torch.testing.assert_close(found, model.classifier.weight.grad, atol=1e-6, rtol=1e-4)
    many = OneTokenRollout(samples=20_000, wrong_reward=-0.5)
    session.stack.objective = many
    assert float(session.loss(batch).sum.detach()) == pytest.approx(float(wanted.detach()), rel=0.05)


def test_the_same_step_draws_the_same_and_another_step_others():
    values = [result(OneTokenRollout(samples=4), step=step)[0] for step in (50, 50, 51)]
    assert values[0] == values[1] != values[2]


def test_predictions_that_are_not_numbers_end_the_run_with_the_engines_message():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    session = make_session(model, objective=OneTokenRollout(samples=4))
    with pytest.raises(LuthierError, match="the loss of step 1 is nan"):
        Trainer(session, random_rows(), settings(max_steps=1)).run()


def test_a_model_that_never_draws_the_target_is_warned_about_once():
    far = np.zeros((2, 5))
    far[[0, 1], TARGET] = -30.0
    method = OneTokenRollout(samples=4)
    for step in range(10):
        result(method, far, step=step)
    with pytest.warns(UserWarning, match=r"at 100% of the positions .* Set sft_mix above 0"):
        result(method, far, step=10)
    mixed = OneTokenRollout(samples=4, sft_mix=0.5)
    for step in range(12):
        result(mixed, far, step=step)
    assert mixed._early is None


@pytest.mark.parametrize(
    "bad",
    [{"samples": 0}, {"temperature": 0.0}, {"wrong_reward": 1.5}, {"sft_mix": 1.1}, {"top_p": 0.0}, {"top_k": 0}],
)
def test_bad_values_are_refused_by_name(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=rf"(?s){name}.*{value}"):
        registry.get("objective", "one-token-rollout").build(bad)


def test_rewarding_errors_is_warned_about():
    with pytest.warns(UserWarning, match=r"wrong_reward 0\.2 is above 0: errors are rewarded"):
        OneTokenRollout(wrong_reward=0.2)
