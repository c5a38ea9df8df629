"""The laws of the engine: equivalent settings give one trajectory, killed runs resume bit-equal."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from helpers import MemoryRows, make_session, random_rows, settings, tiny_llama, weights
from luthier.core.errors import LuthierError, UserError
from luthier.core.protocols import Loss, Needs
from luthier.engine import checkpoint
from luthier.engine.loop import Trainer
from luthier.engine.order import DataOrder, split

# AdamW turns rounding errors of tiny gradients into whole steps; trajectories are compared under SGD.
SGD = {"optimizer": "sgd", "learning_rate": 0.3, "schedule": "constant"}


def trained(rows=None, *, session=None, **values):
    session = session or make_session()
    Trainer(session, rows or random_rows(), settings(**values)).run()
    return weights(session.model)


def assert_same(a, b, *, exact=True, tolerance=2e-6):
    assert a.keys() == b.keys()
    for name in a:
        if exact:
            assert torch.equal(a[name], b[name]), name
        else:
            torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=1e-4)


def test_training_lowers_the_loss_to_the_value_of_a_hand_written_loop():
    rows, model = random_rows(16), tiny_llama()
    session = make_session(tiny_llama())
    Trainer(session, rows, settings(max_steps=4, epochs=9, batch_rows=16, **SGD, max_grad_norm=None)).run()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for _ in range(4):
        total, count = torch.zeros(()), 0
        for ids, spans in zip(rows.ids, rows.spans, strict=True):
            ids_T = torch.from_numpy(ids).long()
            logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0]
            logp_TV = logits_TV.log_softmax(-1)
            for j in range(int(spans[0]), int(spans[1])):
                total = total - logp_TV[j - 1, ids_T[j]]
                count += 1
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    assert_same(weights(session.model), weights(model), exact=False)


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_does_not_change_the_trajectory(accumulation):
    one = trained(accumulation=1, epochs=2, **SGD)
    many = trained(accumulation=accumulation, epochs=2, **SGD)
    assert_same(one, many, exact=False)


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not():
    assert_same(trained(), trained())
    other = trained(session=make_session(seed=1))
    assert any(not torch.equal(v, other[n]) for n, v in trained().items())


def test_the_order_is_a_pure_function_of_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(1, 50, size=101)
    order = DataOrder(lengths, seed=3, batch_rows=8)
    first = [s.tolist() for s in order.epoch(0)]
    order.epoch(5)
    assert [s.tolist() for s in order.epoch(0)] == first
    assert sorted(r for s in first for r in s) == list(range(101))
    assert [s.tolist() for s in order.epoch(1)] != first
    assert order.steps(1.0) == 13
    assert order.steps(1.5) == 20
    assert order.locate(14) == (1, 1)


@pytest.mark.parametrize("size", [{"batch_rows": 8}, {"batch_rows": None, "batch_tokens": 200}])
def test_repeated_steps_have_the_same_rows_and_the_epochs_as_many_different_ones(size):
    lengths = np.random.default_rng(0).integers(1, 50, size=101)
    once, thrice = (DataOrder(lengths, seed=3, repeats=n, **size) for n in (1, 3))
    assert thrice.steps(2.0) == 3 * once.steps(2.0)
    for step in range(thrice.steps(2.0)):
        epoch, rows = thrice.rows(step)
        assert (epoch, rows.tolist()) == (once.rows(step // 3)[0], once.rows(step // 3)[1].tolist())


def test_batches_by_tokens_stay_within_the_budget_and_lose_no_row():
    lengths = np.random.default_rng(0).integers(1, 50, size=300)
    order = DataOrder(lengths, seed=0, batch_rows=None, batch_tokens=200)
    steps = order.epoch(0)
    assert sorted(r for s in steps for r in s.tolist()) == list(range(300))
    assert max(int(lengths[s].max()) * len(s) for s in steps) <= 200
    assert order.steps(2.0) == len(order.epoch(0)) + len(order.epoch(1))
    with pytest.raises(UserError, match="longest row has"):
        DataOrder(lengths, seed=0, batch_rows=None, batch_tokens=20)


def test_buckets_cut_padding():
    lengths = np.random.default_rng(0).integers(1, 200, size=4000)

    def padded(buckets):
        steps = DataOrder(lengths, seed=0, batch_rows=8, buckets=buckets).epoch(0)
        return sum(int(lengths[s].max()) * len(s) for s in steps) / lengths.sum()

    assert padded(True) < 1.05 < 1.5 < padded(False)


def test_the_widest_step_of_an_epoch_comes_first():
    lengths = np.random.default_rng(0).integers(1, 200, size=403)
    for order in (
        DataOrder(lengths, seed=0, batch_rows=8),
        DataOrder(lengths, seed=0, batch_rows=None, batch_tokens=900),
    ):
        for epoch in (0, 1):
            sizes = [len(s) * int(lengths[s].max()) for s in order.epoch(epoch)]
            assert sizes[0] == max(sizes) > sizes[-1]
            assert sorted(r for s in order.epoch(epoch) for r in s.tolist()) == list(range(403))


def test_micro_batches_of_a_step_are_its_rows():
    rows = np.asarray([5, 1, 9, 3, 7])
    pieces = split(rows, np.arange(10), 8)
    assert sorted(np.concatenate(pieces).tolist()) == [1, 3, 5, 7, 9]
    assert len(pieces) == 8


class StopAfter:
    """Ends the run like a kill: an exception between two steps."""

    def __init__(self, step):
        self.step = step

    def __call__(self, event, values):
        if event in ("step", "tick") and values["step"] == self.step:
            raise KeyboardInterrupt


def test_a_run_killed_twice_resumes_bit_equal(tmp_path):
    whole = trained(epochs=3, save_steps=2)
    for stop in (3, 6):
        session = make_session()
        trainer = Trainer(
            session, random_rows(), settings(epochs=3, save_steps=2), folder=tmp_path, observe=StopAfter(stop)
        )
        with pytest.raises(KeyboardInterrupt):
            trainer.run(resume=True)
    session = make_session()
    Trainer(session, random_rows(), settings(epochs=3, save_steps=2), folder=tmp_path).run(resume=True)
    assert_same(whole, weights(session.model))
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 10))


def test_dropout_resumes_bit_equal(tmp_path):
    def session():
        return make_session(tiny_llama(dropout=0.3))

    whole = trained(session=session(), epochs=2)
    part = session()
    with pytest.raises(KeyboardInterrupt):
        Trainer(part, random_rows(), settings(epochs=2, save_steps=1), folder=tmp_path, observe=StopAfter(3)).run()
    rest = session()
    Trainer(rest, random_rows(), settings(epochs=2, save_steps=1), folder=tmp_path).run(resume=True)
    assert_same(whole, weights(rest.model))


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.6])
    session = make_session()
    trainer = Trainer(
        session,
        random_rows(40),
        settings(eval_steps=1, keep_checkpoints=2),
        folder=tmp_path,
        evaluate=lambda: {"loss": next(losses)},
    )
    trainer.run()
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.glob("step-*")) == ["step-00000002", "step-00000004", "step-00000005"]
    assert (folder / "best").readlink().name == "step-00000002"
    assert (folder / "last").readlink().name == "step-00000005"


def test_early_stopping_stops_after_patience(tmp_path):
    losses = iter([3.0, 1.0, 1.0, 1.5, 1.2, 9.0])
    trainer = Trainer(
        make_session(),
        random_rows(80),
        settings(eval_steps=1, early_stopping={"patience": 3}),
        folder=tmp_path,
        evaluate=lambda: {"loss": next(losses)},
    )
    totals = trainer.run()
    assert (totals["steps"], totals["total_steps"], totals["stopped_early"]) == (5, 10, True)


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path):
    Trainer(make_session(), random_rows(), settings(save_steps=1), folder=tmp_path).run()
    newest = checkpoint.latest(tmp_path / "checkpoints")
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "model.safetensors").write_bytes(data)
    with pytest.raises(LuthierError, match=r"model\.safetensors is missing or damaged.*Delete"):
        Trainer(make_session(), random_rows(), settings(save_steps=1), folder=tmp_path).run(resume=True)


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    Trainer(make_session(), random_rows(), settings(save_steps=1), folder=tmp_path).run()
    with pytest.raises(LuthierError, match="the data or the training section changed"):
        Trainer(make_session(), random_rows(50), settings(save_steps=1), folder=tmp_path).run(resume=True)


class NotFinite:
    needs = Needs(positionwise=True)

    def loss(self, out, batch, ctx):
        factor = float("nan") if ctx.step == 2 else 1.0
        return Loss(sum=-(out.logp_N * batch.weight_N).sum() * factor, weight=batch.weight_N.sum())


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_rows(tmp_path):
    session = make_session(objective=NotFinite())
    trainer = Trainer(session, random_rows(), settings(epochs=2), folder=tmp_path)
    two_steps = trained(epochs=2, session=(probe := make_session()), max_steps=None) and probe
    with pytest.raises(LuthierError, match="loss of step 3 is nan"):
        trainer.run()
    found = json.loads((tmp_path / "not-finite-step-3-rank-0.json").read_text())
    assert sorted(found["prepared_rows"]) == sorted(trainer.order.rows(2)[1].tolist())
    assert all(torch.isfinite(p).all() for p in session.model.parameters())
    assert two_steps.step == 6


class TakeFirst:
    """A selector that offers twice the rows and takes the first half."""

    oversample = 2

    def select(self, batch, ctx):
        keep = torch.arange((batch.examples + 1) // 2)
        return keep, torch.ones(len(keep))


def test_selection_offers_more_rows_and_trains_on_the_chosen():
    session = make_session(selector=TakeFirst())
    trainer = Trainer(session, random_rows(64), settings(batch_rows=8))
    assert trainer.total == 4
    trainer.run()
    assert trainer.seen["rows"] == 32


def test_taking_examples_keeps_positions_and_targets_together():
    session, rows = make_session(), random_rows(6)
    batch = session.task.collate(rows.fetch(range(6)), range(6))
    part = batch.take(torch.tensor([4, 1]), torch.tensor([2.0, 0.5]))
    direct = session.task.collate(rows.fetch([4, 1]), [4, 1])
    assert part.keys_B == direct.keys_B
    by_sequence = lambda b: sorted(  # noqa: E731
        zip(b.sequence_N.tolist(), b.target_N.tolist(), strict=True)
    )
    assert by_sequence(part) == by_sequence(direct)
    weight = {0: 2.0, 1: 0.5}
    assert part.weight_N.tolist() == [weight[s] for s in part.sequence_N.tolist()]
    with torch.no_grad():
        a = session.forward(part).logp_N
        b = session.forward(direct).logp_N
    for s in (0, 1):
        torch.testing.assert_close(a[part.sequence_N == s], b[direct.sequence_N == s], atol=1e-5, rtol=1e-5)


def test_rows_without_any_target_give_a_zero_loss_and_no_change():
    rows = MemoryRows([([1, 5, 6, 2], [0, 0]), ([1, 7, 8, 2], [0, 0])])
    session = make_session()
    before = weights(session.model)
    Trainer(session, rows, settings(max_steps=1, batch_rows=2)).run()
    assert_same(before, weights(session.model))
