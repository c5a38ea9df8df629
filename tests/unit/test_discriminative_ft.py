"""Discriminative fine-tuning against float64: scores, normaliser, weights, loss, and the engine around them."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from discriminative_rows import PairRows, pair_session, random_pairs, rendered

from helpers import random_rows, settings, tiny_llama, weights
from luthier.core.errors import LuthierError, UserError
from luthier.engine.checkpoint import pack, unpack
from luthier.engine.loop import Trainer
from luthier.functional.discriminative import (
    as_answer,
    given_answer,
    merged,
    negative_weights,
    scores,
    surrogate,
    updated,
    with_answer,
)
from luthier.methods.objectives.discriminative_ft import DiscriminativeFineTuning, answer_starts

A = [-12.5, -3.25]
R = [[[-20.0, -31.5], [-4.0, -2.5]], [[-22.0, -30.0], [-6.5, -1.0]]]
Q = [[-18.0, -30.0], [-4.5, -3.5]]


def logmeanexp(x, axis):
    top = x.max(axis=axis, keepdims=True)
    return (top + np.log(np.exp(x - top).mean(axis=axis, keepdims=True))).squeeze(axis)


@pytest.mark.parametrize(("gamma", "tau"), [(0.85, 1.0), (0.9, 0.3), (1.0, 2.0)])
def test_two_visits_of_the_same_rows_against_float64(gamma, tau):
    log_u_B = torch.zeros(2)
    exp_u = np.ones(2)
    for visit in range(2):
        r_BK = torch.tensor(R[visit], requires_grad=True)
        a_B = torch.tensor(A, requires_grad=True)
        d_BK = r_BK.detach() / tau - torch.tensor(Q)
        log_u_B = updated(log_u_B, d_BK, gamma)
        p_BK, clamped = negative_weights(d_BK, log_u_B)
        loss_B = surrogate(a_B, r_BK, p_BK)
        loss_B.sum().backward()

        d = np.asarray(R[visit]) / tau - np.asarray(Q)
        exp_u = (1 - gamma) * exp_u + gamma * np.exp(d).mean(1)
        p = np.exp(d) / exp_u[:, None]
        np.testing.assert_allclose(log_u_B.numpy(), np.log(exp_u), rtol=2e-6)
        np.testing.assert_allclose(p_BK.numpy(), p, rtol=1e-5)
        np.testing.assert_allclose(
            loss_B.detach().numpy(), -np.asarray(A) + (p * np.asarray(R[visit])).mean(1), rtol=1e-5
        )
        np.testing.assert_allclose(a_B.grad.numpy(), [-1, -1])
        np.testing.assert_allclose(r_BK.grad.numpy(), p / 2, rtol=1e-5)
        assert int(clamped) == 0


def test_with_gamma_one_the_gradient_is_that_of_the_objective():
    tau = 0.7
    r_BK = torch.tensor(R[0], dtype=torch.float64, requires_grad=True)
    a_B = torch.tensor(A, dtype=torch.float64, requires_grad=True)
    q_BK = torch.tensor(Q, dtype=torch.float64)
    inner = torch.logsumexp(r_BK / tau - q_BK, dim=1) - np.log(2)
    wanted = torch.autograd.grad((-a_B + tau * inner).sum(), (a_B, r_BK))
    d_BK = r_BK.detach() / tau - q_BK
    p_BK, _ = negative_weights(d_BK, updated(torch.full((2,), 5.0, dtype=torch.float64), d_BK, 1.0))
    torch.testing.assert_close(p_BK / 2, torch.softmax(d_BK, dim=1))
    found = torch.autograd.grad(surrogate(a_B, r_BK, p_BK).sum(), (a_B, r_BK))
    torch.testing.assert_close(found, wanted)


def test_stale_normalisers_are_cut_and_counted_and_far_scores_stay_finite():
    d_BK = torch.tensor([[400.0, 0.0], [-5000.0, -5000.0]])
    u_B = updated(torch.zeros(2), d_BK, 0.5)
    np.testing.assert_allclose(u_B.numpy(), [400 - np.log(4), np.log(0.5)], rtol=1e-6)
    p_BK, clamped = negative_weights(d_BK, torch.tensor([300.0, 0.0]))
    assert int(clamped) == 1
    np.testing.assert_allclose(p_BK.numpy(), [[np.exp(30), 0], [0, 0]], rtol=1e-6)


def test_scores_sum_or_average_the_tokens_of_an_answer():
    logp_N, sequence_N = torch.tensor([-1.0, -2.0, -4.0, -0.5]), torch.tensor([1, 0, 1, 1])
    total_B, count_B = scores(logp_N, sequence_N, 2, mean=False)
    assert total_B.tolist() == [-2.0, -5.5]
    assert count_B.tolist() == [1, 3]
    mean_B, _ = scores(logp_N.double(), sequence_N, 2, mean=True)
    np.testing.assert_allclose(mean_B.numpy(), [-2 / (1 + 1e-8), -5.5 / (3 + 1e-8)], rtol=1e-15)


def test_merging_averages_visitors_and_leaves_the_unvisited_alone():
    before = torch.tensor([0.1, 0.2, 0.3, 0.4])
    after = merged(before, [([0, 2], [1.0, 2.0]), ([2], [4.0]), ([], [])])
    assert after[[1, 3]].tolist() == before[[1, 3]].tolist()
    assert after[[0, 2]].tolist() == [1.0, 3.0]


def test_answers_of_pairs_and_conversations():
    pair = {"kind": "pair", "prompt": "q", "completion": " 7"}
    assert given_answer(pair) == " 7"
    assert with_answer(pair, "8") == {"kind": "pair", "prompt": "q", "completion": "8"}
    assert as_answer("  8 9 ", " 7") == " 8 9 "
    assert as_answer("  8", "7") == "8"
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    chat = {"kind": "chat", "messages": json.dumps(messages), "source": "x.jsonl", "row": 3}
    assert given_answer(chat) == "a"
    assert json.loads(with_answer(chat, "b")["messages"]) == [messages[0], {"role": "assistant", "content": "b"}]
    with pytest.raises(UserError, match=r"x\.jsonl, row 3: the conversation does not end"):
        given_answer({**chat, "messages": json.dumps(messages[:1])})
    with pytest.raises(UserError, match="kind 'text' has no prompt"):
        given_answer({"kind": "text", "text": "a"})


# -- the objective in a session


def numpy_answer(model, row, text):
    """(sum of the answer's token log-probabilities in float64, number of tokens)."""
    ids, (start, end) = rendered({**row, "completion": text})
    with torch.no_grad():
        logp = torch.log_softmax(model.double()(input_ids=torch.tensor([ids])).logits[0], dim=-1).numpy()
    model.float()
    return sum(logp[t - 1, ids[t]] for t in range(start, end)), end - start


def batch_of(session, rows, index):
    return session.task.collate(rows.fetch(index), index, session.stack.needs.columns)


@pytest.mark.parametrize("variant", ["dft", "dft2"])
def test_loss_and_normaliser_of_a_session_against_float64(variant):
    rows, index = random_pairs(8), [5, 2]
    method = DiscriminativeFineTuning(variant=variant)
    session = pair_session(method)
    session.model.train()
    method.prepare(session, rows)
    gamma, tau = {"dft": (0.85, 1.0), "dft2": (0.9, 0.3)}[variant]
    exp_u = np.ones(2)
    for epoch in range(2):
        session.epoch = epoch
        found = session.loss(batch_of(session, rows, index))
        total, metrics = 0.0, {"score": 0.0, "negative_score": 0.0, "objective": 0.0, "kl": 0.0, "tokens": 0}
        for i, b in enumerate(index):
            row = rows.pairs[b]
            negatives = row["negatives"][2 * epoch : 2 * epoch + 2]
            pairs = [numpy_answer(session.model, row, t) for t in [row["completion"], *negatives]]
            base = [numpy_answer(tiny_llama(), row, t)[0] for t in negatives]
            s = np.array([x / (n + 1e-8) if variant == "dft2" else x for x, n in pairs])
            d = s[1:] / tau - (np.array(base) if variant == "dft" else 0.0)
            exp_u[i] = (1 - gamma) * exp_u[i] + gamma * np.exp(d).mean()
            total += -s[0] + (np.exp(d) / exp_u[i] * s[1:]).mean()
            metrics["score"] += s[0]
            metrics["negative_score"] += s[1:].mean()
            metrics["objective"] += tau * np.log(exp_u[i]) - s[0]
            metrics["kl"] += sum(q - x for q, (x, _) in zip(base, pairs[1:], strict=True))
            metrics["tokens"] += sum(n for _, n in pairs[1:])
        # The terms cancel: float32 leaves a few parts in ten million of each.
        assert float(found.sum.detach()) == pytest.approx(total, rel=1e-5, abs=3e-7 * abs(metrics["score"]))
        assert (float(found.weight), found.unit) == (2.0, "sequence")
        for name in ("score", "negative_score", "objective"):
            assert float(found.metrics[name][0]) == pytest.approx(metrics[name], rel=1e-5), name
        if variant == "dft":
            value, count = found.metrics["kl_on_negatives"]
            assert int(count) == metrics["tokens"]
            assert float(value) == pytest.approx(metrics["kl"], abs=1e-4)
        assert ("kl_on_negatives" in found.metrics) == (variant == "dft")
        np.testing.assert_allclose(method.state()["log_u"][index].numpy(), np.log(exp_u), rtol=1e-5, atol=5e-6)
        with torch.no_grad():  # the model moves, the reference does not
            session.model.lm_head.weight.mul_(1.2)


def gradients_of(loss, model):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def test_negatives_far_below_the_base_leave_the_gradient_of_the_summed_plain_loss():
    rows, index = random_pairs(6), [0, 1, 4]
    method = DiscriminativeFineTuning(u_init=200.0)
    session = pair_session(method)
    session.model.train()
    method.prepare(session, rows)
    batch = batch_of(session, rows, index)
    found = gradients_of(session.loss(batch).sum, session.model)
    wanted = gradients_of(-session.forward(batch).logp_N.sum(), session.model)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)


def test_evaluation_mode_leaves_the_normalisers_and_unvisited_rows_keep_theirs():
    rows = random_pairs(6)
    method = DiscriminativeFineTuning(u_init=0.25)
    session = pair_session(method)
    method.prepare(session, rows)
    session.model.eval()
    session.loss(batch_of(session, rows, [1, 3]))
    assert method.state()["log_u"].tolist() == [0.25] * 6
    session.model.train()
    session.loss(batch_of(session, rows, [1, 3]))
    assert [i for i, u in enumerate(method.state()["log_u"].tolist()) if u != 0.25] == [1, 3]


def test_weights_of_examples_multiply_their_losses_and_a_filling_batch_visits_nobody():
    rows = random_pairs(4)
    method = DiscriminativeFineTuning()
    session = pair_session(method)
    session.model.train()
    parts = {}
    for key, factor in (("a", [1.0, 0.0]), ("b", [0.0, 1.0]), ("both", [2.0, 0.5])):
        method.prepare(session, rows)
        batch = batch_of(session, rows, [0, 2])
        parts[key] = session.loss(batch.with_weights(torch.tensor(factor)[batch.sequence_N]))
        visited = [i for i, u in enumerate(method.state()["log_u"].tolist()) if u != 0.0]
        assert visited == {"a": [0], "b": [2], "both": [0, 2]}[key]
    sums = {key: loss.sum.detach() for key, loss in parts.items()}
    assert float(sums["both"]) == pytest.approx(2 * float(sums["a"]) + 0.5 * float(sums["b"]), rel=1e-5)
    assert float(parts["both"].weight) == 2.5


def test_cached_and_computed_references_give_the_same_loss(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))
    rows, found = random_pairs(6), []
    for fingerprint in ("", "a base", "a base"):
        method = DiscriminativeFineTuning()
        session = pair_session(method, fingerprint=fingerprint)
        session.model.train()
        method.prepare(session, rows)
        passes = []
        if fingerprint:
            compute = session._forward
            monkeypatch.setattr(session, "_forward", lambda b, m, *a, c=compute, p=passes: p.append(m) or c(b, m, *a))
        with torch.no_grad():
            session.model.lm_head.weight.mul_(1.1)
        found.append((float(session.loss(batch_of(session, rows, [0, 1, 2])).sum.detach()), passes.count("reference")))
        session.close()
    assert found == [(found[0][0], 0), (found[0][0], 1), (found[0][0], 0)]


@pytest.mark.parametrize("variant", ["dft", "dft2"])
def test_accumulation_and_resuming_change_nothing(variant, tmp_path):
    def train(folder=None, stop=None, resume=False, rows=None, **values):
        def kill(event, record):
            if event in ("step", "tick") and record["step"] == stop:
                raise KeyboardInterrupt

        session = pair_session(DiscriminativeFineTuning(variant=variant))
        training = settings(epochs=2, save_steps=1, **values)
        trainer = Trainer(session, rows or random_pairs(), training, folder=folder, observe=kill)
        try:
            trainer.run(resume=resume)
        except KeyboardInterrupt:
            assert stop is not None
        return session

    plain = {"optimizer": "sgd", "learning_rate": 0.1, "schedule": "constant"}
    one, four = train(**plain), train(accumulation=4, **plain)
    for name, value in weights(one.model).items():
        torch.testing.assert_close(weights(four.model)[name], value, atol=2e-5, rtol=1e-3)
    whole = train()
    train(tmp_path, stop=2)
    train(tmp_path, stop=4, resume=True)
    last = train(tmp_path, resume=True)
    assert last.step == whole.step == 6
    for name, value in weights(whole.model).items():
        assert torch.equal(weights(last.model)[name], value), name
    log_u = [s.stack.objective.state()["log_u"] for s in (whole, last)]
    assert torch.equal(*log_u)
    assert bool((log_u[0] != 0).all())
    other = random_pairs()
    other.keys = other.keys[::-1]
    with pytest.raises(LuthierError, match="belong to other training rows"):
        train(tmp_path, resume=True, rows=other)


def test_state_survives_json_and_safetensors_bit_for_bit():
    rows = random_pairs(6)
    method = DiscriminativeFineTuning()
    session = pair_session(method)
    session.model.train()
    method.prepare(session, rows)
    session.loss(batch_of(session, rows, [0, 3]))
    tensors = {}
    plain = json.loads(json.dumps(pack(method.state(), tensors)))
    again = DiscriminativeFineTuning()
    again.prepare(session, rows)
    again.load(unpack(plain, tensors))
    assert torch.equal(again.state()["log_u"], method.state()["log_u"])


def test_plain_loss_while_warming_up_then_the_method():
    rows = random_pairs()
    found = {}
    for share in (0.0, 0.5):
        session = pair_session(DiscriminativeFineTuning(sft_warmup=share))
        records = []
        trainer = Trainer(
            session, rows, settings(epochs=1, max_steps=2), observe=lambda e, r, k=records: k.append((e, r))
        )
        trainer.run()
        found[share] = [r for e, r in records if e == "step"]
    assert ["margin" in r for r in found[0.0]] == [True, True]
    assert ["margin" in r for r in found[0.5]] == [False, True]
    assert found[0.5][0]["loss"] == pytest.approx(found[0.5][0]["nll"], rel=1e-6)
    identity = DiscriminativeFineTuning(sft_warmup=1.0).needs
    assert identity.positionwise
    assert not identity.columns + identity.models


def test_needs_follow_the_variant_and_where_negatives_come_from():
    assert DiscriminativeFineTuning().needs.models == ("reference",)
    assert "negatives" in DiscriminativeFineTuning().needs.columns
    assert DiscriminativeFineTuning(variant="dft2").needs.models == ()
    online = DiscriminativeFineTuning(negatives="online").needs
    assert online.generation
    assert "negatives" not in online.columns


def test_online_negatives_are_written_by_the_current_model_to_the_same_prompts():
    rows = random_pairs(6)
    method = DiscriminativeFineTuning(negatives="online", max_new_tokens=3, samples_per_prompt=3)
    session = pair_session(method)
    session.processor.decode = lambda ids, skip_special_tokens: " ".join(str(int(i)) for i in ids if int(i) > 2)
    try:
        session.model.train()
        method.prepare(session, rows)
        batch = batch_of(session, rows, [4, 1])
        made = method._negatives(batch, session)
        assert session.model.training
        assert made.examples == 6
        start_B = answer_starts(batch)[0].tolist()
        for k in range(6):
            start = start_B[k // 3]
            assert made.inputs["input_ids"][k, :start].tolist() == batch.inputs["input_ids"][k // 3, :start].tolist()
            assert int((made.sequence_N == k).sum()) <= 4
        assert torch.isfinite(session.loss(batch).sum)
    finally:
        del session.processor.decode


# -- what is refused


def prepared(pairs, **options):
    method = DiscriminativeFineTuning(**options)
    session = pair_session(method)
    session.model.train()
    rows = PairRows(pairs)
    method.prepare(session, rows)
    return session, rows


PAIR = {"prompt": "5", "completion": "6 7", "source": "train.jsonl"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, r"^train\.jsonl, row 2: no negative available for this prompt: put the data stage"),
        ({"negatives": []}, r"^train\.jsonl, row 2: no negative available"),
        ({"negatives": ["8"]}, r"^train\.jsonl, row 2: no negative available .* in every epoch: 2 are needed .* 1 are"),
        ({"negatives": "8 9"}, r"must be a list of texts"),
        ({"negatives": [8, 9]}, r"must be a list of texts"),
    ],
)
def test_rows_without_enough_negatives_are_refused_before_the_first_step(columns, message):
    with pytest.raises(UserError, match=message) as error:
        prepared([{**PAIR, "negatives": ["8", "9"]}, {**PAIR, **columns}])
    assert "\n" not in str(error.value)


def test_rows_of_a_dataset_without_the_column_are_refused_too():
    rows = random_rows()
    del rows.columns["negatives"]
    with pytest.raises(UserError, match=r"data\.train, row 1: no negative available"):
        Trainer(pair_session(DiscriminativeFineTuning()), rows, settings())


def test_every_epoch_needs_its_own_negatives_unless_they_are_taken_again():
    pair = {**PAIR, "negatives": ["8", "9"]}
    session, rows = prepared([pair])
    session.epoch = 1
    with pytest.raises(UserError, match=r"no negative available .* in every epoch: 4 are needed"):
        session.loss(batch_of(session, rows, [0]))
    session, rows = prepared([pair], resample_per_epoch=False)
    session.epoch = 1
    assert torch.isfinite(session.loss(batch_of(session, rows, [0])).sum)
    session.total_epochs = 2
    DiscriminativeFineTuning(resample_per_epoch=False).prepare(session, rows)
    with pytest.raises(UserError, match="4 are needed"):
        DiscriminativeFineTuning().prepare(session, rows)


def test_batches_that_are_not_what_was_prepared_are_refused():
    session, rows = prepared([{**PAIR, "negatives": ["8", "9"]}, {**PAIR, "negatives": ["8", ""]}])
    batch = batch_of(session, rows, [0, 1])
    with pytest.raises(UserError, match="changed the inputs"):
        session.loss(batch.with_inputs(input_ids=batch.inputs["input_ids"]))
    uneven_N = torch.ones_like(batch.weight_N)
    uneven_N[0] = 0.5
    with pytest.raises(UserError, match="weights the tokens of an answer"):
        session.loss(batch.with_weights(uneven_N))
    with pytest.raises(LuthierError, match="twice in a batch"):
        session.loss(batch_of(session, rows, [1, 1]))
    rows.keys = rows.keys[::-1]
    with pytest.raises(LuthierError, match="rows of other data"):
        session.loss(batch_of(session, rows, [0, 1]))
    with pytest.raises(LuthierError, match="use Luthier's own training loop"):
        DiscriminativeFineTuning().loss(session.forward(batch), batch, session)


def test_negatives_without_tokens_or_with_another_prompt_are_refused():
    session, rows = prepared([{**PAIR, "negatives": ["8", ""]}])
    batch = batch_of(session, rows, [0])
    real = session._render
    session._render = lambda some: real(some).take(torch.tensor([0, 1])).positions(torch.tensor([0, 1]))
    with pytest.raises(UserError, match="no token to score"):
        session.loss(batch)
    session._render = lambda some: real([{**row, "prompt": "5 5 5"} for row in some])
    with pytest.raises(UserError, match="other tokens before its negative"):
        session.loss(batch)


def test_falling_answers_are_warned_about_once():
    method = DiscriminativeFineTuning()
    for value in [-1.0] * 20:
        method._watch(value)
    method._watch(-9.0)
    with pytest.warns(UserWarning, match=r"fell from -1\.00 to -2\."):
        method._watch(-9.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method._watch(-9.0)
