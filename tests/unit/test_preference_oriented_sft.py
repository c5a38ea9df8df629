"""Preference-oriented SFT against float64: loss, weight, limits, sequence means, and the engine around them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from modular_addition import Adder, Sums

from helpers import MemoryRows, OpenAll, make_session, random_rows, settings, tiny_llama, weights
from luthier.core import registry
from luthier.core.errors import UserError
from luthier.engine.loop import Trainer
from luthier.engine.session import Session
from luthier.engine.stack import Stack
from luthier.functional.preference_oriented import (
    Correlation,
    answer_likelihood,
    characters,
    merge_weights,
    merged,
    preference_loss,
    quality_weight,
    quantiles,
    text_hash,
)
from luthier.methods.objectives.preference_oriented_sft import PreferenceOrientedFineTuning, all_tokens
from luthier.tasks.classification import SequenceClassification

L = [-0.25, -1.5, -4.0, -2.0]
S = [-1.0, -1.5, -0.5, -8.0]


@pytest.mark.parametrize(("beta", "gamma"), [(1.0, 0.0), (5.0, 0.3), (0.4, -1.2)])
def test_loss_and_gradient_against_float64(beta, gamma):
    l_B = torch.tensor(L, dtype=torch.float64, requires_grad=True)
    s_B = torch.tensor(S, dtype=torch.float64)
    loss_B = preference_loss(l_B, s_B, beta, gamma)
    loss_B.sum().backward()
    margin = beta * (np.array(L) - np.array(S)) + gamma
    np.testing.assert_allclose(loss_B.detach().numpy(), np.log1p(np.exp(-margin)), rtol=1e-12)
    c = 1 / (1 + np.exp(-(beta * (np.array(S) - np.array(L)) - gamma)))
    np.testing.assert_allclose(l_B.grad.numpy(), -beta * c, rtol=1e-12)
    np.testing.assert_allclose(quality_weight(l_B.detach(), s_B, beta, gamma).numpy(), c, rtol=1e-12)


def test_far_margins_stay_finite_in_float32():
    l_B = torch.tensor([-500.0, 0.0], requires_grad=True)
    loss_B = preference_loss(l_B, torch.tensor([0.0, -500.0]), 10.0, 0.0)
    loss_B.sum().backward()
    assert loss_B.tolist() == [5000.0, 0.0]
    assert l_B.grad.tolist() == [-10.0, 0.0]


def test_likelihood_is_the_mean_over_the_targets_of_each_example():
    logp_N, sequence_N = torch.tensor([-1.0, -2.0, -4.0, -0.5]), torch.tensor([2, 0, 2, 2])
    l_B, weight_B, count_B = answer_likelihood(logp_N, torch.tensor([1.0, 0.5, 1.0, 1.0]), sequence_N, 4)
    np.testing.assert_allclose(l_B.tolist(), [-2.0, 0.0, -5.5 / 3, 0.0], rtol=1e-6)
    assert weight_B.tolist() == [0.5, 0.0, 1.0, 0.0]
    assert count_B.tolist() == [1, 0, 3, 0]
    uneven_B = answer_likelihood(logp_N, torch.tensor([2.0, 1.0, 1.0, 0.0]), sequence_N, 3)[0]
    np.testing.assert_allclose(uneven_B.tolist(), [-2.0, 0.0, -2.0], rtol=1e-6)


def test_merging_rules_and_what_they_refuse():
    names = ["org/zephyr", "./yi", "llama"]
    row = [-1.0, -4.0, -2.5]
    for rule, wanted in [
        ("mean", -2.5),
        ("max", -1.0),
        ("min", -4.0),
        ("zephyr", -1.0),
        ("./yi", -4.0),
        ([1, 0, 3], (-1 - 7.5) / 4),
    ]:
        assert merged(row, merge_weights(rule, names)) == pytest.approx(wanted, rel=1e-15)
    assert merged([-1.0, None, -2.0], merge_weights("zephyr", names)) is None
    for rule, message in [
        ("zephyrr", r"names none of the models\. Did you mean"),
        ([1.0], "1 weights for 3 models"),
        ([-1.0, 1.0, 1.0], "must not be negative"),
        ([0.0, 0.0, 0.0], "one must be above 0"),
    ]:
        with pytest.raises(UserError, match=message):
            merge_weights(rule, names)


def test_quantiles_and_correlation_against_numpy():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 40))
    found = Correlation()
    for start in range(0, 40, 7):
        found.add(x[start : start + 7].tolist(), y[start : start + 7].tolist())
    assert found.value == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-9)
    assert Correlation().value is None
    by = quantiles(x.tolist(), ["b"] * 30 + ["a"] * 10)
    assert list(by) == ["a", "b"]
    assert (by["a"]["rows"], by["b"]["q0.5"]) == (10, pytest.approx(np.median(x[:30])))


# -- in a session


def scored(count=24, *, seed=0, low=-6.0, high=-2.0, **columns):
    rows = random_rows(count, seed=seed)
    rows.columns |= {"ref_score": np.random.default_rng(seed).uniform(low, high, count).tolist(), **columns}
    return rows


def batch_of(session, rows, index):
    return session.task.collate(rows.fetch(index), index, session.stack.needs.columns)


def numpy_logp(model, ids, start, end):
    """Float64 log-probabilities of tokens start..end of one row, alone and without padding."""
    with torch.no_grad():
        logits = model.double()(input_ids=torch.tensor(np.asarray(ids, dtype=np.int64))[None]).logits[0]
    model.float()
    logp = torch.log_softmax(logits, dim=-1).numpy()
    return np.array([logp[t - 1, ids[t]] for t in range(start, end)])


@pytest.mark.parametrize(("targets", "normalise"), [("assistant", "token"), ("assistant", "char"), ("all", "token")])
def test_a_batch_against_float64_of_each_row_alone(targets, normalise):
    beta, gamma, mix = 2.0, 0.5, 0.25
    method = PreferenceOrientedFineTuning(
        beta=beta, gamma=gamma, sft_mix=mix, train_targets=targets, normalise=normalise
    )
    session, rows, index = make_session(objective=method), scored(), [3, 11, 0]
    rows.columns["ref_score"] = [{"value": s, "per": normalise} for s in rows.columns["ref_score"]]
    method.prepare(session, rows)
    found = session.loss(batch_of(session, rows, index))
    total, values = 0.0, {"likelihood": 0.0, "ref_score": 0.0, "quality_weight": 0.0, "above_reference": 0.0}
    for i in index:
        first, last = rows.spans[i].tolist() if targets == "assistant" else (1, len(rows.ids[i]))
        logp = numpy_logp(tiny_llama(), rows.ids[i], first, last)
        size = len(logp) if normalise == "token" else len(rows.columns["completion"][i])
        like, score = logp.sum() / size, rows.columns["ref_score"][i]["value"]
        total += np.log1p(np.exp(-(beta * (like - score) + gamma))) - mix * like
        values["likelihood"] += like
        values["ref_score"] += score
        values["quality_weight"] += 1 / (1 + np.exp(beta * (like - score) + gamma))
        values["above_reference"] += like > score
    assert float(found.sum.detach()) == pytest.approx(total, rel=1e-5)
    assert (float(found.weight), found.unit) == (3.0, "sequence")
    for name, value in values.items():
        assert float(found.metrics[name][0]) == pytest.approx(value, rel=1e-5), name
    assert int(found.metrics["without_targets"][0]) == 0


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def test_a_high_score_gives_beta_times_plain_fine_tuning_and_a_low_one_nothing():
    beta, index = 3.0, [2, 5, 7]
    found = {}
    for score in (1e6, -1e6):
        rows = scored()
        rows.columns["ref_score"] = [score] * len(rows)
        session = make_session(objective=PreferenceOrientedFineTuning(beta=beta))
        found[score] = gradients(session.loss(batch_of(session, rows, index)).sum, session.model)
    batch = batch_of(session, rows, index)
    logp_N = session.forward(batch).logp_N
    plain = sum(-logp_N[batch.sequence_N == b].mean() for b in range(3))
    for name, value in gradients(plain, session.model).items():
        torch.testing.assert_close(found[1e6][name], beta * value, atol=1e-6, rtol=1e-5)
        assert not found[-1e6][name].any()


def test_padding_batch_mates_and_an_end_token_that_is_the_padding_change_nothing():
    rows = [([1, 9, 8, 7, 2], [2, 5]), ([1, *range(10, 40), 2], [4, 32]), ([1, 9, 0, 7, 0], [2, 5])]
    made = MemoryRows(rows, {"ref_score": [-3.0, -4.0, -3.5]})
    session = make_session(objective=PreferenceOrientedFineTuning(beta=2.0))

    def likelihood(index):
        batch = batch_of(session, made, index)
        return answer_likelihood(session.forward(batch).logp_N, batch.weight_N, batch.sequence_N, len(index))

    together, _, count_B = likelihood([0, 1, 2])
    assert count_B.tolist() == [3, 28, 3]  # token 0 is the padding's id, and a target in the last row
    for i in range(3):
        torch.testing.assert_close(likelihood([i])[0][0], together[i], atol=1e-6, rtol=1e-6)
    whole = all_tokens(batch_of(session, made, [0, 2]))
    assert whole.target_N.tolist() == [9, 8, 7, 2, 9, 0, 7, 0]


def test_the_ablations():
    rows, index = scored(), [1, 4]
    s = np.array([rows.columns["ref_score"][i] for i in index])
    free = make_session(objective=PreferenceOrientedFineTuning(variant="reference_free", constant=-2.5, beta=2.0))
    assert free.stack.needs.columns == ("quality",)
    like = np.array([numpy_logp(tiny_llama(), rows.ids[i], *rows.spans[i].tolist()).mean() for i in index])
    wanted = np.log1p(np.exp(-2 * (like + 2.5))).sum()
    assert float(free.loss(batch_of(free, rows, index)).sum.detach()) == pytest.approx(wanted, rel=1e-5)
    static = make_session(objective=PreferenceOrientedFineTuning(variant="quality_weight", beta=0.5))
    found = static.loss(batch_of(static, rows, index))
    weight = 1 / (1 + np.exp(-0.5 * s))
    assert float(found.sum.detach()) == pytest.approx((-weight * like).sum(), rel=1e-5)
    assert float(found.metrics["quality_weight"][0]) == pytest.approx(weight.sum(), rel=1e-6)


def test_weights_of_examples_multiply_their_losses_and_a_filling_batch_is_empty():
    rows = scored()
    session = make_session(objective=PreferenceOrientedFineTuning())
    batch = batch_of(session, rows, [0, 2])
    alone = [float(session.loss(batch_of(session, rows, [i])).sum.detach()) for i in (0, 2)]
    found = session.loss(batch.with_weights(torch.tensor([2.0, 0.5])[batch.sequence_N]))
    assert float(found.sum.detach()) == pytest.approx(2 * alone[0] + 0.5 * alone[1], rel=1e-5)
    assert float(found.weight) == 2.5
    empty = session.loss(batch.with_weights(torch.zeros_like(batch.weight_N)))
    assert (float(empty.sum.detach()), float(empty.weight)) == (0.0, 0.0)


def test_accumulation_and_lora_and_a_resumed_correlation(tmp_path):
    plain = {"optimizer": "sgd", "learning_rate": 0.1, "schedule": "constant"}
    good = [bool(i % 3) for i in range(24)]

    def train(folder=None, stop=None, resume=False, parameters=None, **values):
        records = []

        def observe(event, record):
            records.append(record)
            if event in ("step", "tick") and record["step"] == stop:
                raise KeyboardInterrupt

        session = make_session(objective=PreferenceOrientedFineTuning(beta=2.0), parameters=parameters)
        trainer = Trainer(session, scored(quality=good), settings(epochs=2, **values), folder=folder, observe=observe)
        try:
            trainer.run(resume=resume)
        except KeyboardInterrupt:
            assert stop is not None
        return session, records

    one, records = train(**plain)
    four, _ = train(accumulation=4, **plain)
    for name, value in weights(one.model).items():
        torch.testing.assert_close(weights(four.model)[name], value, atol=2e-5, rtol=1e-3)
    first = next(r for r in records if r.get("step") == 1 and "loss" in r)
    assert {"likelihood", "quality_weight_good", "quality_weight_poor", "quality_correlation"} <= first.keys()
    train(tmp_path, stop=2, save_steps=1, **plain)
    again, _ = train(tmp_path, resume=True, save_steps=1, **plain)
    assert again.stack.objective.state() == one.stack.objective.state()
    record = json.loads(json.dumps(one.stack.objective.record()))
    assert record["scores"]["data.train"]["rows"] == 24
    assert -1 <= record["quality_correlation"] <= 1
    adapted, _ = train(parameters=[registry.get("parameters", "lora").build({"rank": 2})], **plain)
    assert adapted.step == one.step


def test_the_correlation_is_that_of_the_weights_with_the_quality():
    rows = scored(12, quality=[0.5, None, *range(10)])
    session = make_session(objective=PreferenceOrientedFineTuning())
    session.loss(batch_of(session, rows, range(12)))
    like = [numpy_logp(tiny_llama(), rows.ids[i], *rows.spans[i].tolist()).mean() for i in range(12)]
    c = 1 / (1 + np.exp(np.array(like) - np.array(rows.columns["ref_score"])))
    known = [0, *range(2, 12)]
    wanted = np.corrcoef(c[known], [0.5, *range(10)])[0, 1]
    assert session.logged["quality_correlation"] == pytest.approx(wanted, abs=1e-4)


def test_plain_loss_first_and_then_the_method():
    session, records = make_session(objective=PreferenceOrientedFineTuning(sft_warmup=0.5)), []
    Trainer(session, scored(), settings(max_steps=2), observe=lambda e, r: records.append((e, r))).run()
    steps = [r for e, r in records if e == "step"]
    assert ["likelihood" in r for r in steps] == [False, True]
    assert steps[0]["loss"] == pytest.approx(steps[0]["nll"], rel=1e-6)
    assert PreferenceOrientedFineTuning(sft_warmup=1.0).needs.positionwise


class ScoredSums(Sums):
    def fetch(self, index):
        return {**super().fetch(index), "ref_score": [-1.0 - int(i) / 10 for i in index]}


def test_classification_with_scores_of_its_own():
    rows = ScoredSums(8, np.random.default_rng(0))
    torch.manual_seed(0)
    method, opened = PreferenceOrientedFineTuning(beta=3.0), OpenAll()
    session = Session(
        model=opened.apply(Adder(), None),
        task=SequenceClassification(None),
        processor=None,
        stack=Stack(objective=method, parameters=[opened], named={"objective": method}),
    )
    method.prepare(session, rows)
    found = session.loss(session.task.collate(rows.fetch(range(8)), range(8), session.stack.needs.columns))
    with torch.no_grad():
        logp = session.model(torch.from_numpy(rows.pairs)).logits.double().log_softmax(-1).numpy()
    margin = 3 * (logp[np.arange(8), rows.label] - (-1.0 - np.arange(8) / 10))
    assert float(found.sum.detach()) == pytest.approx(np.log1p(np.exp(-margin)).sum(), rel=1e-5)
    with pytest.raises(UserError, match="train_targets: all is not for sequence-classification"):
        PreferenceOrientedFineTuning(train_targets="all").prepare(session, rows)


# -- what is refused


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (None, r"^data\.train, row 3: preference-oriented-sft: the row has no score: put the data stage"),
        ("high", "must hold a number, not 'high'"),
        (float("nan"), "must hold a number, not nan"),
        (True, "must hold a number, not True"),
        ({"value": -1.0, "per": "char"}, "the score is per char, but the objective says normalise: token"),
        ({"value": -1.0, "per": "token", "text": "other"}, "the text is not the one that was scored"),
    ],
)
def test_rows_whose_score_cannot_be_used_are_refused_before_the_first_step(score, message):
    rows = scored(4)
    rows.columns["ref_score"][2] = score
    with pytest.raises(UserError, match=message) as error:
        Trainer(make_session(objective=PreferenceOrientedFineTuning()), rows, settings())
    assert "\n" not in str(error.value)


def test_scores_of_the_same_text_are_taken():
    rows = scored(4)
    fetched = rows.fetch(range(4))
    held = [{name: values[b] for name, values in fetched.items()} for b in range(4)]
    rows.columns["ref_score"] = [{"value": -1.0, "per": "token", "text": text_hash(row)} for row in held]
    session = make_session(objective=PreferenceOrientedFineTuning())
    session.stack.objective.prepare(session, rows)
    assert session.stack.objective.record()["scores"]["data.train"]["q0.5"] == -1.0


def test_transforms_that_change_what_is_compared_are_refused_unless_forced():
    rows = scored()
    for allowed in ("refuse", "allow"):
        session = make_session(objective=PreferenceOrientedFineTuning(transformed=allowed))
        batch = batch_of(session, rows, [0, 1])
        uneven_N = torch.ones_like(batch.weight_N)
        uneven_N[0] = 0.5
        for changed, message in (
            (batch.with_weights(uneven_N), "weights the tokens of an answer"),
            (batch.with_inputs(input_ids=batch.inputs["input_ids"]), "changed the inputs"),
        ):
            if allowed == "allow":
                assert torch.isfinite(session.loss(changed).sum)
            else:
                with pytest.raises(UserError, match=message):
                    session.loss(changed)


def test_options_that_do_not_go_together():
    with pytest.raises(UserError, match=r"constant is the score of variant: reference_free"):
        PreferenceOrientedFineTuning(constant=-1.0)
    with pytest.raises(UserError, match=r"normalise: char counts the characters of answers"):
        PreferenceOrientedFineTuning(normalise="char", train_targets="all")
    session = make_session(objective=PreferenceOrientedFineTuning())
    with pytest.raises(UserError, match="'quality' must hold true, false or a number, not 'good'"):
        session.loss(batch_of(session, scored(quality=["good"] * 24), [0]))


def test_characters_of_answers():
    said = [{"role": "assistant", "content": "abc"}, {"role": "assistant", "content": "de", "weight": 0}]
    chat = {"kind": "chat", "messages": json.dumps([{"role": "user", "content": "q"}, *said])}
    assert characters(chat) == 3
    assert characters({"kind": "pair", "completion": " 42"}) == 3
    with pytest.raises(UserError, match="kind 'text' has no answer"):
        characters({"kind": "text", "text": "a"})
