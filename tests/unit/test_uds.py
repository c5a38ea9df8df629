"""UDS over real models, against scores worked out in numpy from full logits."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import FakeContext, FakeOutputs, position_batch, token_batch
from logit_references import fft_sketch, svd_norm

from helpers import PROCESSOR, MemoryRows, make_session, random_rows, settings, tiny_llama, weights
from luthier.core.errors import LuthierError, UserError
from luthier.engine.checkpoint import pack, unpack
from luthier.engine.loop import Trainer
from luthier.functional import logit_matrices as lm
from luthier.methods.parameters.lora import LowRankAdaptation
from luthier.methods.selection.uds import UtilityDiversitySampling as UDS
from luthier.methods.selection.uds import counted, ranks
from luthier.methods.transforms.masked_thought import MaskedThought

SMALL = {"memory": 16, "columns": 6, "rows": 3}


# -- the selector over a real model


def offered(session, count=8, seed=3):
    rows = random_rows(count, seed=seed)
    index = np.arange(count)
    session.stack.selector.prepare(session, rows)
    return session.task.collate(rows.fetch(index), index), rows


def logits_of(session, batch):
    """Full logits [B, T, V] by the model itself, in float64."""
    with torch.no_grad():
        return session.model.eval()(**batch.inputs).logits.double().numpy()


def chosen(session, batch):
    index_b, weight_b = session.stack.selector.select(batch, session)
    assert weight_b.tolist() == [1.0] * len(index_b)
    return index_b.tolist()


def expected_scores(z_BTV, mask_BT, selector, memory=()):
    """u and v of every example, from full logits of the counted rows."""
    u, v = [], []
    for z, mask in zip(z_BTV, mask_BT.numpy().astype(bool), strict=True):
        u.append(svd_norm(z[mask]))
        if selector.drawn:
            counted = np.where(mask[:, None], z, 0.0)
            e = fft_sketch(counted, selector.drawn)
            v.append(np.mean([np.linalg.norm(e - q) for q in memory]) if len(memory) else 0.0)
    return np.array(u), np.array(v)


def test_alpha_zero_selects_by_nuclear_norm_alone():
    session = make_session(selector=UDS(alpha=0.0, **SMALL))
    batch, _ = offered(session)
    u, _ = expected_scores(logits_of(session, batch), batch.inputs["attention_mask"], session.stack.selector)
    assert chosen(session, batch) == sorted(np.argsort(-u)[:2].tolist())
    assert session.logged["utility_kept"] == pytest.approx(np.sort(u)[-2:].mean(), rel=1e-5)
    assert session.logged["utility_dropped"] == pytest.approx(np.sort(u)[:-2].mean(), rel=1e-5)
    assert session.stack.selector.state()["queue"] is None


@pytest.mark.parametrize("utility", ["nuclear_norm", "none"])
def test_scores_and_memory_over_two_steps(utility):
    selector = UDS(alpha=0.5, utility=utility, **SMALL)
    session = make_session(selector=selector)
    batch, _ = offered(session)
    z, mask = logits_of(session, batch), batch.inputs["attention_mask"]
    first = chosen(session, batch)
    memory = [fft_sketch(np.where(mask[i].numpy()[:, None] > 0, z[i], 0), selector.drawn) for i in first]
    np.testing.assert_allclose(selector.queue_MD[: selector.count].numpy(), memory, rtol=1e-3, atol=1e-3)
    u, v = expected_scores(z, mask, selector, memory)
    score = 0.5 * v + (u if utility == "nuclear_norm" else 0)
    assert chosen(session, batch) == sorted(np.argsort(-score)[:2].tolist())
    assert (selector.pointer, selector.count) == (4, 4)
    if utility == "nuclear_norm":
        assert session.logged["diversity_to_utility"] == pytest.approx(0.5 * v.mean() / u.mean(), rel=1e-4)
    assert session.logged["rows_scored"] == 8
    assert session.logged["rows_kept"] == 2


@pytest.mark.parametrize(("choice", "power"), [("per_token", 1.0), ("sqrt_tokens", 0.5)])
def test_normalised_utilities(choice, power):
    session = make_session(selector=UDS(alpha=0.0, utility_normalise=choice, **SMALL))
    batch, _ = offered(session)
    mask = batch.inputs["attention_mask"]
    u, _ = expected_scores(logits_of(session, batch), mask, session.stack.selector)
    u = u / mask.sum(1).numpy() ** power
    assert chosen(session, batch) == sorted(np.argsort(-u)[:2].tolist())
    assert session.logged["utility_kept"] == pytest.approx(np.sort(u)[-2:].mean(), rel=1e-5)


def scores(session, batch):
    with torch.no_grad():
        found = session.stack.selector._utilities(batch, session)
    session.step += 1  # the output embedding was read for this step
    return found


def with_padding(batch, left, right):
    """The same rows with more padding on either side, and positions moved along."""
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    old, new = ids.shape[1], ids.shape[1] + left + right
    pad = torch.nn.functional.pad
    moved = batch.position_N // old * new + batch.position_N % old + left
    made = batch.with_inputs(
        input_ids=pad(ids, (left, right)),
        attention_mask=pad(mask, (left, right)),
        position_ids=(pad(mask, (left, right)).cumsum(1) - 1).clamp(min=0),
    )
    made.position_N, made.supervised_BT = moved, pad(batch.supervised_BT, (left, right))
    return made


@pytest.mark.parametrize("positions", ["non_pad", "response"])
@pytest.mark.parametrize(("left", "right"), [(0, 7), (5, 0), (3, 4)])
def test_scores_do_not_depend_on_padding(positions, left, right):
    session = make_session(selector=UDS(alpha=0.1, positions=positions, **SMALL))
    session.model.eval()
    batch, _ = offered(session)
    u, e = scores(session, batch)
    padded_u, padded_e = scores(session, with_padding(batch, left, right))
    torch.testing.assert_close(padded_u, u, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(padded_e, e, rtol=1e-4, atol=1e-3)


def test_response_positions_are_the_rows_that_predict_targets():
    session = make_session(selector=UDS(alpha=0.1, positions="response", **SMALL))
    batch, _ = offered(session)
    session.model.eval()
    u, e = scores(session, batch)
    predicts = torch.zeros_like(batch.inputs["attention_mask"])
    predicts.view(-1)[batch.position_N] = 1
    z = logits_of(session, batch)
    wanted, _ = expected_scores(z, predicts, session.stack.selector)
    np.testing.assert_allclose(u.numpy(), wanted, rtol=1e-5)
    drawn = session.stack.selector.drawn
    sketches = [fft_sketch(np.where(m.numpy()[:, None] > 0, x, 0), drawn) for x, m in zip(z, predicts, strict=True)]
    np.testing.assert_allclose(e.numpy(), sketches, rtol=1e-3, atol=1e-3)


def test_all_positions_count_the_padding_as_the_released_code():
    session = make_session(selector=UDS(alpha=0.1, positions="all", **SMALL))
    batch, _ = offered(session)
    session.model.eval()
    u, e = scores(session, batch)
    z, everything = logits_of(session, batch), torch.ones_like(batch.inputs["attention_mask"])
    np.testing.assert_allclose(u.numpy(), expected_scores(z, everything, session.stack.selector)[0], rtol=1e-5)
    np.testing.assert_allclose(
        e.numpy(), [fft_sketch(x, session.stack.selector.drawn) for x in z], rtol=1e-3, atol=1e-3
    )


def test_a_soft_cap_goes_through_the_logits_and_a_bias_does_not():
    model = tiny_llama()
    model.config.final_logit_softcapping = 0.1
    session = make_session(model, selector=UDS(alpha=0.1, **SMALL))
    batch, _ = offered(session)
    session.model.eval()
    u, e = scores(session, batch)
    z, mask = 0.1 * np.tanh(logits_of(session, batch) / 0.1), batch.inputs["attention_mask"]
    np.testing.assert_allclose(u.numpy(), expected_scores(z, mask, session.stack.selector)[0], rtol=1e-5)
    wanted = [fft_sketch(x[m.numpy() > 0], session.stack.selector.drawn) for x, m in zip(z, mask, strict=True)]
    np.testing.assert_allclose(e.numpy(), wanted, rtol=1e-3, atol=1e-3)

    model = tiny_llama()
    bias = torch.nn.Linear(16, 64)
    bias.weight = model.lm_head.weight
    model.lm_head = bias
    session = make_session(model, selector=UDS(alpha=0.1, **SMALL))
    batch, _ = offered(session)
    session.model.eval()
    u, _ = scores(session, batch)
    z = logits_of(session, batch)
    np.testing.assert_allclose(u.numpy(), expected_scores(z, mask, session.stack.selector)[0], rtol=1e-5)


def test_scoring_in_pieces_gives_the_same_choice():
    picks = []
    for rows in (64, 3):
        session = make_session(selector=UDS(alpha=0.1, scoring_rows=rows, **SMALL))
        batch, _ = offered(session, 16)
        picks.append([chosen(session, batch), chosen(session, batch), session.logged["utility_kept"]])
    assert picks[0][:2] == picks[1][:2]
    assert picks[0][2] == pytest.approx(picks[1][2], rel=1e-6)


def test_groups_choose_one_after_the_other():
    selector = UDS(keep_fraction=0.25, alpha=0.3, candidates=4, **SMALL)
    session = make_session(selector=selector)
    batch, _ = offered(session, 12)
    found = chosen(session, batch)
    z, mask = logits_of(session, batch), batch.inputs["attention_mask"]
    memory, wanted = [], []
    order = torch.randperm(12, generator=session.rng("data", "uds", "groups", 0)).numpy()
    for group in order.reshape(3, 4):
        u, v = expected_scores(z[group], mask[group], selector, memory)
        best = group[np.argmax(u + 0.3 * v)]
        wanted.append(best)
        memory.append(fft_sketch(z[best][mask[best].numpy() > 0], selector.drawn))
    assert found == sorted(wanted)


def test_max_loss_and_gradient_norm_against_autograd():
    for score in ("max_loss", "grad_norm"):
        session = make_session(selector=UDS(score=score))
        batch, _ = offered(session)
        weight, losses, norms = session.model.lm_head.weight, [], []
        for b in range(8):
            loss = -session.forward(batch.take(torch.tensor([b]))).logp_N.mean()
            (gradient,) = torch.autograd.grad(loss, weight)
            losses.append(float(loss.detach()))
            norms.append(float(gradient.norm()))
        wanted = np.array(losses if score == "max_loss" else norms)
        assert chosen(session, batch) == sorted(np.argsort(-wanted)[:2].tolist())
        assert session.logged[f"{score}_kept"] == pytest.approx(np.sort(wanted)[-2:].mean(), rel=1e-4)


def test_random_full_and_the_steps_before_the_start():
    session = make_session(selector=UDS(score="random"))
    batch, _ = offered(session)
    first = chosen(session, batch)
    assert first == chosen(session, batch)
    assert len(first) == 2
    session.step = 1
    assert len({tuple(first), *(tuple(_at(session, batch, s)) for s in range(1, 6))}) > 2
    for selector in (UDS(score="full"), UDS(start_step=10), UDS(keep_fraction=1.0)):
        session = make_session(selector=selector)
        batch, _ = offered(session)
        session.step = 9
        session.forward = None  # no pass is made
        assert chosen(session, batch) == list(range(8))


def _at(session, batch, step):
    session.step = step
    return chosen(session, batch)


@pytest.mark.parametrize(("fraction", "oversample", "kept"), [(0.25, 4, 4), (0.5, 2, 8), (1.0, 1, 16), (0.01, 100, 1)])
def test_counts(fraction, oversample, kept):
    selector = UDS(keep_fraction=fraction)
    assert (selector.oversample, selector.kept_of(16)) == (oversample, kept)


def test_dropout_while_scoring_is_off_or_a_function_of_the_step():
    for train_mode in (False, True):
        model = tiny_llama(dropout=0.5)
        session = make_session(model, selector=UDS(alpha=0.0, score_in_train_mode=train_mode, **SMALL))
        batch, _ = offered(session)
        session.model.train()
        torch.manual_seed(1)
        chosen(session, batch)
        first = session.logged["utility_kept"]
        state = torch.random.get_rng_state()
        torch.manual_seed(2)
        chosen(session, batch)
        assert session.logged["utility_kept"] == first
        torch.manual_seed(1)
        assert torch.equal(state, torch.random.get_rng_state())  # the stream of training is left alone
        assert session.model.training
        assert all(m.training for m in session.model.modules())
        session.model.eval()
        chosen(session, batch)
        assert (session.logged["utility_kept"] == first) is not train_mode


def test_the_output_embedding_is_read_once_while_it_is_frozen(monkeypatch):
    from luthier.methods.selection import uds

    calls = []
    monkeypatch.setattr(uds, "output_map", lambda *a, **k: calls.append(1) or lm.output_map(*a, **k))
    session = make_session(parameters=[LowRankAdaptation(rank=4)], selector=UDS(**SMALL))
    Trainer(session, random_rows(64), settings(max_steps=2)).run()
    assert len(calls) == 1
    session = make_session(selector=UDS(scoring_rows=8, **SMALL))
    Trainer(session, random_rows(64), settings(max_steps=2)).run()
    assert len(calls) == 3


def test_exactly_a_quarter_is_trained_and_costs_are_logged():
    records = []
    session = make_session(selector=UDS(keep_fraction=0.25, **SMALL))
    trainer = Trainer(
        session, random_rows(64), settings(epochs=2), observe=lambda e, r: records.append(r) if e == "step" else None
    )
    trainer.run()
    assert trainer.seen["rows"] == 2 * 64 // 4
    assert [r["rows_scored"] for r in records] == [32.0] * 4
    assert [r["rows_kept"] for r in records] == [8.0] * 4
    assert all(r["scoring_seconds"] > 0 for r in records)
    assert {"utility_kept", "utility_dropped", "diversity_kept", "length_kept", "length_dropped"} <= records[-1].keys()


def test_state_brings_back_signs_frequencies_and_memory():
    session = make_session(selector=UDS(alpha=0.2, **SMALL))
    batch, rows = offered(session)
    chosen(session, batch)
    tensors = {}
    plain = json.loads(json.dumps(pack(session.stack.selector.state(), tensors)))
    tensors = {k: v.clone() for k, v in tensors.items()}
    other = make_session(selector=UDS(alpha=0.2, **SMALL), seed=5)
    other.stack.selector.prepare(other, rows)
    other.stack.selector.load(unpack(plain, tensors))
    other.model.load_state_dict(session.model.state_dict())
    assert chosen(other, batch) == chosen(session, batch)
    a, b = session.stack.selector, other.stack.selector
    assert torch.equal(a.queue_MD, b.queue_MD)
    assert (a.pointer, a.count) == (b.pointer, b.count) == (4, 4)
    assert all(torch.equal(b.drawn[name], value) for name, value in a.drawn.items())


def test_goes_with_lora_and_masked_thought():
    session = make_session(
        parameters=[LowRankAdaptation(rank=4)],
        transforms=[MaskedThought(corruption="random")],
        selector=UDS(keep_fraction=0.5, **SMALL),
    )
    before = weights(session.model)
    Trainer(session, random_rows(32), settings(max_steps=2)).run()
    assert any(not torch.equal(v, before[n]) for n, v in weights(session.model).items() if "lora_" in n)


def test_trained_as_if_only_the_chosen_rows_were_there():
    """The weights after a step are those of plain SFT on the chosen rows."""
    session = make_session(selector=UDS(alpha=0.0, **SMALL))
    rows = random_rows(32)
    Trainer(session, rows, settings(max_steps=1, batch_rows=8)).run()
    again = make_session(selector=UDS(alpha=0.0, **SMALL))
    batch = again.task.collate(rows.fetch(range(32)), np.arange(32))
    again.stack.selector.prepare(again, rows)
    kept = chosen(again, batch)
    plain = make_session()
    part = MemoryRows([(rows.ids[i].tolist(), rows.spans[i].tolist()) for i in kept])
    Trainer(plain, part, settings(max_steps=1, batch_rows=8)).run()
    for name, value in weights(plain.model).items():
        torch.testing.assert_close(weights(session.model)[name], value, rtol=1e-4, atol=1e-5)


# -- classifiers, and what is refused


def classifier(logits_NV, selector, task="sequence-classification", lengths=(1,)):
    model = torch.nn.Linear(1, 1)
    model.config = SimpleNamespace()
    ctx = FakeContext(task=task, processor=PROCESSOR, forward=lambda b, m: FakeOutputs(logits_NV, b))
    ctx.model = model
    with pytest.warns(UserWarning, match="made for language models"):
        selector.prepare(ctx, SimpleNamespace(lengths=np.array(lengths)))
    return ctx


def test_a_classifier_is_scored_by_the_length_of_its_logits_with_a_warning():
    logits = torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0], [2.0, 0.0]])
    batch = position_batch(4)
    batch.sequence_N, batch.row_B = torch.arange(4), torch.arange(4)
    selector = UDS(keep_fraction=0.5, alpha=1e-3, **SMALL)
    ctx = classifier(logits, selector)
    assert selector.select(batch, ctx)[0].tolist() == [0, 2]
    assert ctx.logged["utility_kept"] == pytest.approx(7.5)
    assert ctx.logged["utility_dropped"] == pytest.approx(1.5)


def test_positions_and_ranks_of_a_padded_batch():
    batch = token_batch([([1, 5, 6, 7], 2), ([1, 9], 1)])
    assert counted(batch, "non_pad").position_N.tolist() == [0, 1, 2, 3, 4, 5]
    assert counted(batch, "response").position_N.tolist() == [1, 2, 4]
    padded = counted(batch, "all")
    assert padded.position_N.tolist() == list(range(8))
    assert ranks(padded, padded=True).tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert ranks(batch, padded=False).tolist() == [1, 2, 0]


def test_a_row_longer_than_the_sketch_is_an_error_that_names_both():
    session = make_session(selector=UDS(max_length=5, **SMALL))
    batch, _ = offered(session)
    with pytest.raises(UserError, match=r"a row has 1\d tokens, but max_length is 5"):
        chosen(session, batch)


def test_scores_that_are_not_finite_name_the_rows():
    for score in ("uds", "max_loss", "grad_norm"):
        session = make_session(selector=UDS(score=score, **SMALL))
        batch, _ = offered(session, 4)
        with torch.no_grad():
            session.model.model.norm.weight[0] = float("nan")
        with pytest.raises(LuthierError, match="offered: 0, 1, 2, 3"):
            chosen(session, batch)


def test_what_cannot_work_is_refused():
    with pytest.raises(UserError, match="nothing to choose by"):
        UDS(utility="none", alpha=0.0)
    ctx = FakeContext(task="image-classification")
    with pytest.raises(UserError, match="grad_norm reads the output embedding"):
        UDS(score="grad_norm").prepare(ctx, SimpleNamespace(lengths=np.ones(3)))
