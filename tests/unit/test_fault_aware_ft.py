"""Fault-aware fine-tuning against float64: weights, loss, e- and its refresh, and the engine around them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fault_aware_rows import flagged_rows

from helpers import MemoryRows, make_session, random_rows, settings, tiny_llama, weights
from luthier.core import registry
from luthier.core.errors import LuthierError, UserError
from luthier.engine.loop import Trainer
from luthier.functional.error_sensitive import SENSITIVE, WRONG, emphasised, factor, levels, rows_of, token_weights
from luthier.methods.objectives.fault_aware_ft import FaultAwareFineTuning as Fait

SGD = {"optimizer": "sgd", "learning_rate": 0.1, "schedule": "constant"}


def logps(model, ids):
    """Log-probability of every token but the first under a model in evaluation mode, float64, at its place."""
    training = model.training
    with torch.no_grad():
        logits = model.eval().double()(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
    model.float().train(training)
    return np.array([0.0, *(logits[t - 1, ids[t]] for t in range(1, len(ids)))])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def batch_of(session, rows, index):
    return session.task.collate(rows.fetch(index), index, session.stack.needs.columns)


# -- the weights


def test_weights_of_hand_made_flags_and_likelihoods():
    level_N, weight_N = torch.tensor([0, 1, 2, 2, 0]), torch.ones(5)
    good, wrong = torch.tensor([-0.5, -2.0], dtype=torch.float64), torch.tensor([-1.5, -1.0], dtype=torch.float64)
    sequence_N = torch.tensor([0, 0, 0, 1, 1])
    for mode, expected in (
        ("dynamic", [2 / (1 + np.exp(1 / 0.8)), 2 / (1 + np.exp(-1 / 0.8))]),
        ("ratio", [np.exp(-0.7), np.exp(0.7)]),
        ("static", [1.0, 1.0]),
    ):
        g_B = factor(good, wrong, mode, temperature=0.8, ratio_clip=0.7)
        np.testing.assert_allclose(g_B.numpy(), expected, rtol=1e-12)
        omega_B = emphasised(g_B, 3.0, 5.0)
        omega = np.clip(1 + 3 * np.array(expected), 1, 5)
        np.testing.assert_allclose(omega_B.numpy(), omega, rtol=1e-12)
        found = token_weights(level_N, omega_B[sequence_N], weight_N, line_share=0.25, max_weight=5.0)
        np.testing.assert_allclose(found.numpy(), [1, 1 + 0.25 * (omega[0] - 1), omega[0], omega[1], 1], rtol=1e-7)


def test_omega_falls_as_the_model_learns_to_prefer_the_correct_answer():
    lead = torch.linspace(-5, 5, 41, dtype=torch.float64)
    for mode in ("dynamic", "ratio"):
        g = factor(lead, torch.zeros_like(lead), mode, temperature=1.0, ratio_clip=10.0)
        omega = emphasised(g, 1.0, 3.0)
        assert bool((g.diff() < 0).all())
        assert bool((omega.diff() <= 0).all())
        assert bool(((omega >= 1) & (omega <= 3)).all())
    dynamic = factor(lead, torch.zeros_like(lead), "dynamic", temperature=1.0, ratio_clip=2.0)
    assert bool(((dynamic > 0) & (dynamic < 2)).all())
    assert float(dynamic[20]) == 1.0


def test_weights_of_other_methods_multiply_and_the_product_is_cut():
    level_N, omega_N = torch.tensor([2, 2, 2, 0]), torch.tensor([3.0, 3.0, 3.0, 1.0])
    found = token_weights(level_N, omega_N, torch.tensor([1.0, 2.0, 7.0, 6.0]), line_share=0.5, max_weight=5.0)
    assert found.tolist() == [3.0, 5.0, 7.0, 6.0]


def test_flags_fall_on_the_positions_that_predict_them():
    position_N = torch.tensor([2, 3, 8, 9])  # two rows of 7: tokens 3, 4 of the first, 2, 3 of the second
    assert levels([{3: 1}, {3: 2, 6: 2}], position_N, 7).tolist() == [1, 0, 0, 2]


def test_wrong_answers_are_cut_behind_their_last_flag_and_stand_whole_without_one():
    variant = {"ids": [1, 5, 6, 7, 8, 2], "line": [2, 3], "token": [2], "response": [2, 6]}
    made = rows_of([[], [variant], [{**variant, "line": [], "token": []}]], "both")
    assert [ids.tolist() for ids in made["input_ids"]] == [[1, 5, 6, 7], [1, 5, 6, 7, 8, 2]]
    assert [spans.tolist() for spans in made["spans"]] == [[2, 3, 3, 4], [2, 3, 3, 4, 4, 5, 5, 6]]
    assert made["owner"] == [1, 2]
    assert rows_of([[variant]], "token")["spans"][0].tolist() == [2, 3]


# -- the loss


def expected(model, rows, index, mode, granularity, *, emphasis=2.0, normalise="tokens"):
    """The loss of the docstring, row by row in float64: (sum, weight, mean e-)."""
    total = weight = 0.0
    found = []
    for b in index:
        ids, (start, end) = rows.ids[b].tolist(), rows.spans[b].tolist()
        own, flags, variants = logps(model, ids), rows.columns[SENSITIVE][b], rows.columns[WRONG][b]
        line = {t for some in flags["line"] for t in some} if granularity != "token" else set()
        token = {t for some in flags["token"] for t in some} if granularity != "line" else set()
        omega = 1.0
        if variants:
            names = {"line": ("line",), "token": ("token",), "both": ("line", "token")}[granularity]
            pairs = [(v, sorted({t for name in names for t in v[name]})) for v in variants]
            wrong = np.mean([logps(model, v["ids"])[t] for v, tokens in pairs for t in tokens])
            lead = wrong - np.mean([own[t] for t in sorted(line | token)])
            g = {"dynamic": 2 * sigmoid(lead), "ratio": np.exp(np.clip(lead, -2, 2)), "static": 1.0}[mode]
            omega = np.clip(1 + emphasis * g, 1, 5)
            found.append(wrong)
        for t in range(start, end):
            share = 1.0 if t in token or (t in line and granularity == "line") else 0.5 if t in line else 0.0
            total -= (1 + share * (omega - 1)) * own[t]
            weight += (1 + share * (omega - 1)) if normalise == "weights" else 1
    return total, weight, np.mean(found)


@pytest.mark.parametrize("granularity", ["line", "token", "both"])
@pytest.mark.parametrize("mode", ["dynamic", "ratio", "static"])
def test_loss_of_a_session_against_float64(mode, granularity):
    rows, index = flagged_rows(12), [3, 5, 7, 11, 1]
    for normalise in ("tokens", "weights"):
        method = Fait(mode=mode, granularity=granularity, emphasis=2.0, normalise=normalise)
        assert method.needs.positionwise == (mode == "static")
        assert method.needs.fixed_weight == (normalise == "tokens")
        assert method.needs.columns == ((SENSITIVE,) if mode == "static" else (SENSITIVE, WRONG))
        session = make_session(objective=method)
        session.model.train()
        found = session.loss(batch_of(session, rows, index))
        total, weight, wrong = expected(session.model, rows, index, mode, granularity, normalise=normalise)
        assert float(found.sum.detach()) == pytest.approx(total, rel=1e-5)
        assert float(found.weight) == pytest.approx(weight, rel=1e-5)
        if mode != "static":
            value, count = found.metrics["wrong_logp"]
            assert (float(value / count), int(count)) == (pytest.approx(wrong, rel=1e-3), 4)
        assert session.model.training


def test_no_gradient_flows_through_the_weights():
    rows, index = flagged_rows(8), [1, 2, 4, 5]
    session = make_session(objective=Fait(emphasis=2.0))
    session.model.train()
    batch = batch_of(session, rows, index)
    session.loss(batch).sum.backward()
    found = {n: p.grad.clone() for n, p in session.model.named_parameters()}
    session.model.zero_grad()
    constant = {b: omega_of(session.model, rows, b) for b in index}
    out = session.forward(batch)
    w = []
    for n in range(len(batch.target_N)):
        b = int(batch.sequence_N[n])
        t = int(batch.position_N[n]) + 1 - b * batch.inputs["input_ids"].shape[1]
        flags, omega = rows.columns[SENSITIVE][index[b]], constant[index[b]]
        fine, line = ({t for some in flags[name] for t in some} for name in ("token", "line"))
        w.append(omega if t in fine else 1 + (omega - 1) / 2 if t in line else 1.0)
    (-(out.logp_N * torch.tensor(w)).sum()).backward()
    for name, p in session.model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-5, rtol=1e-4)


def omega_of(model, rows, b):
    flags, variants = rows.columns[SENSITIVE][b], rows.columns[WRONG][b]
    own = logps(model, rows.ids[b].tolist())
    good = np.mean([own[t] for t in sorted({t for some in flags["line"] for t in some})])
    wrong = np.mean([logps(model, v["ids"])[t] for v in variants for t in v["line"]])
    return float(np.clip(1 + 2 * 2 * sigmoid(wrong - good), 1, 5))


def test_the_wrong_answer_is_scored_without_dropout_and_the_mode_is_put_back():
    rows, index = flagged_rows(6), [1, 2]
    session = make_session(tiny_llama(dropout=0.5), objective=Fait())
    session.model.train()
    found = session.loss(batch_of(session, rows, index))
    _, _, wrong = expected(session.model, rows, index, "dynamic", "both")
    value, count = found.metrics["wrong_logp"]
    assert float(value / count) == pytest.approx(wrong, rel=1e-4)
    assert session.model.training


def test_a_member_of_beyond_log_likelihood_takes_the_place_of_nll():
    rows, index = flagged_rows(6, bare=7), [1, 2]
    session = make_session(objective=Fait(mode="static", member="p", granularity="token", emphasis=2.0))
    session.model.train()
    found = session.loss(batch_of(session, rows, index))
    total = 0.0
    for b in index:
        own, (start, end) = logps(session.model, rows.ids[b].tolist()), rows.spans[b].tolist()
        fine = {t for some in rows.columns[SENSITIVE][b]["token"] for t in some}
        total += sum((3.0 if t in fine else 1.0) * (1 - np.exp(own[t])) for t in range(start, end))
    assert float(found.sum.detach()) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("emphasis", [0.0, 2.0])
def test_unlikelihood_is_the_mean_over_the_examples_of_the_step(emphasis):
    rows, index = flagged_rows(8), [0, 1, 2, 4]
    session = make_session(objective=Fait(mode="static", emphasis=emphasis, unlikelihood=0.7))
    session.model.train()
    batch = batch_of(session, rows, index)
    session.totals = {"token": 90.0, "sequence": 8.0}
    found = session.loss(batch)
    plain, _, _ = expected(session.model, rows, index, "static", "both", emphasis=emphasis)
    pushed = sum(
        np.mean([-np.log1p(-np.exp(logps(session.model, v["ids"])[v["diverges"]])) for v in rows.columns[WRONG][b]])
        for b in index
        if rows.columns[WRONG][b]
    )
    assert float(found.sum.detach()) == pytest.approx(plain + 0.7 * pushed * 90 / 8, rel=1e-5)
    assert float(found.metrics["unlikelihood"][1]) == 4.0


def test_the_curriculum_grows_from_plain_sft_to_the_full_emphasis():
    rows, index = flagged_rows(12), [1, 2, 4]
    session = make_session(objective=Fait(mode="static", emphasis=2.0, curriculum=0.5))
    session.model.train()
    session.total_steps = 20
    batch = batch_of(session, rows, index)
    for step, emphasis in ((0, 0.0), (5, 1.0), (10, 2.0), (19, 2.0)):
        session.step = step
        total, _, _ = expected(session.model, rows, index, "static", "both", emphasis=emphasis)
        assert float(session.loss(batch).sum.detach()) == pytest.approx(total, rel=1e-5)
    session.total_steps = None
    with pytest.raises(UserError, match="curriculum is a share of the steps"):
        session.loss(batch)


def test_one_of_several_wrong_answers_is_drawn_by_epoch_and_row():
    rows = flagged_rows(60, most=4, bare=61)
    method = Fait(variants="sample")
    session = make_session(objective=method)
    batch = batch_of(session, rows, list(range(60)))
    drawn = {}
    for epoch in range(3):
        session.epoch = epoch
        drawn[epoch] = method._picked(batch, session)
        assert drawn[epoch] == method._picked(batch, session)
        for picked, flags in zip(drawn[epoch], rows.columns[SENSITIVE], strict=True):
            assert picked is None if len(flags["line"]) < 2 else picked < len(flags["line"])
    assert drawn[0] != drawn[1] != drawn[2]


# -- the engine around it


def run(rows=None, folder=None, stop=None, resume=False, options=None, parameters=None, **values):
    session = make_session(objective=Fait(**{"emphasis": 2.0, **(options or {})}), parameters=parameters)

    def kill(event, record):
        if event in ("step", "tick") and record["step"] == stop:
            raise KeyboardInterrupt

    training = settings(**{"epochs": 2, "save_steps": 1, **values})
    try:
        Trainer(session, rows or flagged_rows(), training, folder=folder, observe=kill).run(resume=resume)
    except KeyboardInterrupt:
        assert stop is not None
    return session


EPOCH = {"refresh": "epoch", "variants": "sample"}


@pytest.mark.parametrize("options", [{}, EPOCH, {"mode": "static", "unlikelihood": 0.5}], ids=str)
def test_accumulation_leaves_the_trajectory_and_runs_resume_bit_equal(options, tmp_path):
    one, four = (weights(run(options=options, accumulation=n, **SGD).model) for n in (1, 4))
    for name, value in one.items():
        torch.testing.assert_close(four[name], value, atol=2e-5, rtol=1e-3)
    whole = run(options=options)
    run(folder=tmp_path, stop=2, options=options)
    run(folder=tmp_path, stop=4, resume=True, options=options)
    last = run(folder=tmp_path, resume=True, options=options)
    assert last.step == whole.step == 6
    for name, value in weights(whole.model).items():
        assert torch.equal(weights(last.model)[name], value), name


def test_refreshed_by_epoch_the_wrong_answers_are_those_of_its_start():
    rows = flagged_rows(8)
    method = Fait(refresh="epoch")
    session = make_session(objective=method)
    session.model.train()
    method.prepare(session, rows)
    batch = batch_of(session, rows, [1, 2, 4])
    before = session.loss(batch)
    with torch.no_grad():
        session.model.lm_head.weight.mul_(1.5)
    same = before.metrics["wrong_logp"]
    after = session.loss(batch)
    assert float(after.metrics["wrong_logp"][0]) == float(same[0])
    assert float(after.metrics["good_logp"][0]) != float(before.metrics["good_logp"][0])
    session.epoch = 1
    _, _, wrong = expected(session.model, rows, [1, 2, 4], "dynamic", "both")
    value, count = session.loss(batch).metrics["wrong_logp"]
    assert float(value / count) == pytest.approx(wrong, rel=1e-4)
    assert int(method.state()["wrong"].isnan().sum()) == 3


def test_adapters_train_and_the_base_stays():
    session = run(parameters=[registry.get("parameters", "lora").build({"rank": 2})], max_steps=2)
    assert all("lora" in n for n, p in session.model.named_parameters() if p.requires_grad)


def test_rows_without_a_pair_are_plain_sft_and_no_emphasis_is_too():
    plain = make_session()
    Trainer(plain, random_rows(), settings(epochs=1)).run()
    nothing = flagged_rows()
    nothing.columns = {SENSITIVE: [{**f, "line": [], "token": []} for f in nothing.columns[SENSITIVE]]}
    for options in ({"emphasis": 0.0}, {"require_pairs": False}, {"require_pairs": False, "mode": "static"}):
        session = run(nothing, options=options, epochs=1)
        for name, value in weights(plain.model).items():
            assert torch.equal(weights(session.model)[name], value), (options, name)
    assert Fait(emphasis=0.0).needs.columns == ()
    assert Fait(emphasis=0.0).needs.positionwise


def test_what_was_found_is_recorded():
    session = run(max_steps=1)
    rows = flagged_rows()
    told = session.stack.objective.record()
    assert told["rows"] == 24
    assert told["rows_with_a_pair"] == sum(bool(v) for v in rows.columns[WRONG]) == 16
    assert told["variants"] == sum(len(v) for v in rows.columns[WRONG])
    assert told["flagged_tokens"] == sum(len({t for some in f["line"] for t in some}) for f in rows.columns[SENSITIVE])


def test_rows_without_the_stage_or_with_flags_of_other_tokens_are_refused():
    with pytest.raises(UserError, match=r"no training row has a wrong answer with flags\. Put the data stage"):
        run(random_rows())
    rows = flagged_rows()
    rows.columns["source"], rows.columns["row"] = ["x.jsonl"] * 24, list(range(1, 25))
    rows.ids[4] = rows.ids[4].copy()
    rows.ids[4][1] += 1
    with pytest.raises(
        UserError, match=r"^x\.jsonl, row 5: the flags of fault-aware-ft belong to other tokens"
    ) as error:
        run(rows)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_other_rows_and_options_that_cannot_be_are_refused(tmp_path):
    run(folder=tmp_path, stop=2, options=EPOCH)
    other = flagged_rows()
    other.keys = other.keys[::-1]
    with pytest.raises(LuthierError, match="other training rows"):
        run(other, folder=tmp_path, resume=True, options=EPOCH)
    with pytest.raises(UserError, match="use normalise: tokens"):
        Fait(unlikelihood=0.1, normalise="weights")
    with pytest.raises(UserError, match="fault-aware-ft: member: unknown member"):
        Fait(member="q")
    with pytest.raises(ValueError, match="max_weight"):
        registry.get("objective", "fault-aware-ft").build({"max_weight": 0.5})
    session = make_session(objective=Fait(refresh="epoch"))
    with pytest.raises(LuthierError, match="use Luthier's own training loop"):
        session.loss(batch_of(session, flagged_rows(4), [1]))


def test_many_rows_are_swept_in_batches(monkeypatch):
    monkeypatch.setattr("luthier.methods.objectives.fault_aware_ft.SWEEP_TOKENS", 20)
    rows: MemoryRows = flagged_rows(20)
    method = Fait(refresh="epoch")
    session = make_session(objective=method)
    method.prepare(session, rows)
    session.loss(batch_of(session, rows, [1]))
    for b in (2, 10, 19):
        _, _, wrong = expected(session.model, rows, [b], "dynamic", "both")
        assert float(method.state()["wrong"][b]) == pytest.approx(wrong, rel=1e-4)
