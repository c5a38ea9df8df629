"""What a session gives to methods: references, perturbed weights, weighted sums, scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers import OpenAll, make_session, random_rows, settings, tiny_llama, weights
from luthier.core.errors import LuthierError, UserError
from luthier.core.protocols import Loss, Needs
from luthier.core.store import Store
from luthier.engine.loop import Trainer
from luthier.engine.reference import ReferenceOutputs, ReferenceScores
from luthier.engine.stack import FunctionObjective, WeightedSum
from luthier.methods.objectives.sft import SupervisedFineTuning
from luthier.runs.verify import verify_head


class AgainstReference:
    """Mean difference to the reference's log-probability."""

    needs = Needs(models=("reference",))

    def loss(self, out, batch, ctx):
        ref_N = ctx.forward(batch, model="reference").logp_N
        return Loss(
            sum=((ref_N - out.logp_N) * batch.weight_N).sum(),
            weight=batch.weight_N.sum(),
            metrics={"gap": ((ref_N - out.logp_N.detach()).sum(), batch.weight_N.sum())},
        )


def logp_by_hand(model, ids, spans):
    """float64 log-probabilities of the supervised tokens of one row."""
    with torch.no_grad():
        logits_TV = model.double()(input_ids=torch.tensor([ids])).logits[0]
    rows = logits_TV.log_softmax(-1)
    return [float(rows[j - 1, ids[j]]) for j in range(spans[0], spans[1])]


def test_the_reference_is_the_base_as_it_was(tmp_path):
    session = make_session(objective=AgainstReference())
    gaps = []
    Trainer(
        session,
        random_rows(),
        settings(),
        observe=lambda event, values: gaps.append(values["gap"]) if event == "step" else None,
    ).run()
    assert gaps[0] == pytest.approx(0.0, abs=1e-6)
    assert gaps[-1] < -0.01  # the policy has become more likely than the reference
    batch = session.task.collate(random_rows().fetch([0, 1]), [0, 1])
    base = make_session(tiny_llama())
    torch.testing.assert_close(session.forward(batch, "reference").logp_N, base.forward(batch, grad=False).logp_N)


def test_outputs_are_the_log_probabilities_of_the_model(tmp_path):
    session, rows = make_session(), random_rows(5)
    batch = session.task.collate(rows.fetch(range(5)), range(5))
    found = session.forward(batch, grad=False).logp_N.numpy()
    wanted = [
        value
        for ids, spans in zip(rows.ids, rows.spans, strict=True)
        for value in logp_by_hand(tiny_llama(), ids.tolist(), spans.tolist())
    ]
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_reference_scores_are_kept_on_disk_by_row(tmp_path):
    session, rows = make_session(), random_rows(6)
    scores = ReferenceScores("model", options="x", store=Store(tmp_path))
    batch = session.task.collate(rows.fetch([3, 1]), [3, 1])
    calls = []

    def compute():
        calls.append(1)
        return session.forward(batch, grad=False)

    first = ReferenceOutputs(batch, scores, compute).logp_N
    scores.flush()
    again = ReferenceScores("model", options="x", store=Store(tmp_path))
    assert torch.equal(ReferenceOutputs(batch, again, compute).logp_N, first)
    assert len(calls) == 1
    other_order = session.task.collate(rows.fetch([1, 3]), [1, 3])
    swapped = ReferenceOutputs(other_order, again, compute).logp_N
    assert torch.equal(swapped, torch.cat([first[batch.sequence_N == 1], first[batch.sequence_N == 0]]))
    assert ReferenceScores("another", store=Store(tmp_path)).get(batch.keys_B) is None
    changed = batch.with_inputs(input_ids=batch.inputs["input_ids"].clone())
    _ = ReferenceOutputs(changed, again, compute).logp_N
    assert len(calls) == 2  # corrupted inputs are never answered from the cache


def test_perturbed_weights_act_and_pass_gradients():
    session, rows = make_session(), random_rows(4)
    batch = session.task.collate(rows.fetch(range(4)), range(4))
    name = "model.layers.0.mlp.up_proj.weight"
    own = dict(session.model.named_parameters())[name]
    shift = torch.zeros_like(own, requires_grad=True)
    same = session.forward(batch, parameters={name: own + shift})
    torch.testing.assert_close(same.logp_N, session.forward(batch).logp_N)
    same.logp_N.sum().backward()
    assert shift.grad is not None
    assert float(shift.grad.abs().sum()) > 0
    moved = session.forward(batch, parameters={name: own + 1.0}, grad=False)
    assert not torch.allclose(moved.logp_N, same.logp_N.detach())


def test_an_unknown_model_is_refused():
    session = make_session()
    batch = session.task.collate(random_rows(2).fetch([0]), [0])
    with pytest.raises(LuthierError, match="no model 'teacher'"):
        session.forward(batch, "teacher")


class PerSequence:
    """Mean over sequences of the summed negative log-likelihood."""

    needs = Needs()

    def loss(self, out, batch, ctx):
        return Loss(sum=-(out.logp_N * batch.weight_N).sum(), weight=float(batch.examples), unit="sequence")


def test_a_weighted_sum_divides_each_part_by_its_own_count():
    rows = random_rows(6)
    parts = [("sft", SupervisedFineTuning(), 0.25), ("per-sequence", PerSequence(), 2.0)]
    found = []
    for accumulation in (1, 3):
        session = make_session(objective=WeightedSum(parts))
        Trainer(
            session,
            rows,
            settings(batch_rows=6, accumulation=accumulation),
            observe=lambda event, values: found.append(values["loss"]) if event == "step" else None,
        ).run()
    total = -sum(
        sum(logp_by_hand(tiny_llama(), i.tolist(), s.tolist())) for i, s in zip(rows.ids, rows.spans, strict=True)
    )
    tokens = sum(int(s[1] - s[0]) for s in rows.spans)
    wanted = 0.25 * total / tokens + 2.0 * total / 6
    assert found[0] == pytest.approx(wanted, rel=1e-4)
    assert found[1] == pytest.approx(wanted, rel=1e-4)


def test_one_part_of_weight_one_is_the_objective_itself():
    alone, summed = make_session(), make_session(objective=WeightedSum([("sft", SupervisedFineTuning(), 1.0)]))
    for session in (alone, summed):
        Trainer(session, random_rows(), settings(optimizer="sgd", learning_rate=0.1)).run()
    for name, value in weights(alone.model).items():
        torch.testing.assert_close(dict(summed.model.named_parameters())[name].detach(), value, atol=1e-6, rtol=1e-5)


def test_a_model_dependent_denominator_cannot_be_summed():
    class Kept(SupervisedFineTuning):
        needs = Needs(positionwise=True, fixed_weight=False)

    with pytest.raises(UserError, match="cannot be one term of a weighted sum"):
        WeightedSum([("sft", SupervisedFineTuning(), 1.0), ("kept", Kept(), 1.0)])


def test_a_function_objective_must_return_one_value_per_position():
    session = make_session(objective=FunctionObjective(lambda logp_N, weight_N: -logp_N.sum()))
    with pytest.raises(UserError, match="one value per supervised position"):
        Trainer(session, random_rows(), settings()).run()


def test_scores_are_per_row():
    session, rows = make_session(), random_rows(5)
    found = session.score(rows)
    for score, ids, spans in zip(found, rows.ids, rows.spans, strict=True):
        np.testing.assert_allclose(score.numpy(), logp_by_hand(tiny_llama(), ids.tolist(), spans.tolist()), atol=2e-5)


def test_the_start_up_check_finds_an_unknown_output_layer():
    session = make_session()
    assert verify_head(session) < 1e-5
    head = session.model.lm_head
    forward = head.forward
    head.forward = lambda x: forward(x) * 1.5  # what an unknown architecture might do
    with pytest.raises(UserError, match="does something after its output embedding"):
        verify_head(session)


def test_bf16_stays_near_fp32():
    losses = {}
    for precision in ("fp32", "bf16"):
        session = make_session()
        session.precision = precision
        found = losses.setdefault(precision, [])
        Trainer(
            session,
            random_rows(),
            settings(epochs=2),
            observe=lambda event, values, found=found: found.append(values["loss"]) if event == "step" else None,
        ).run()
        assert all(p.dtype == torch.float32 for p in session.model.parameters())
    np.testing.assert_allclose(losses["bf16"], losses["fp32"], rtol=0.02)
    assert losses["bf16"] != losses["fp32"]


def test_gradient_checkpointing_gives_the_same_trajectory():
    plain, checked = make_session(), make_session()
    checked.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for session in (plain, checked):
        Trainer(session, random_rows(), settings(optimizer="sgd", learning_rate=0.1)).run()
    for name, value in weights(plain.model).items():
        torch.testing.assert_close(dict(checked.model.named_parameters())[name].detach(), value, atol=1e-6, rtol=1e-5)


def test_nothing_to_train_is_refused():
    class Nothing(OpenAll):
        def apply(self, model, ctx):
            return model

    with pytest.raises(UserError, match="leave nothing to train"):
        make_session(parameters=[Nothing()])


class AtExit:
    """The loss of an early exit."""

    needs = Needs(hidden=True)

    def __init__(self, layer):
        self.layer = layer

    def loss(self, out, batch, ctx):
        return Loss(sum=-(out.exit(self.layer).logp_N * batch.weight_N).sum(), weight=batch.weight_N.sum())


def test_an_exit_is_the_model_cut_after_that_block():
    rows = random_rows(4)
    for layer, blocks in ((2, 2), (1, 1)):
        session = make_session(objective=AtExit(layer))
        batch = session.task.collate(rows.fetch(range(4)), range(4))
        found = session.loss(batch)
        cut = tiny_llama()
        cut.model.layers = cut.model.layers[:blocks]
        wanted = make_session(cut).forward(batch, grad=False).logp_N
        assert float(found.sum.detach()) == pytest.approx(-float(wanted.sum()), rel=1e-5)
    with pytest.raises(UserError, match="no exit after block 3: the model has 2 blocks"):
        make_session(objective=AtExit(3)).loss(batch)


def test_every_token_has_its_own_hidden_state():
    session, rows = make_session(objective=AtExit(1)), random_rows(3)
    batch = session.task.collate(rows.fetch(range(3)), range(3))
    whole = batch.every_token()
    assert whole.position_N.numel() == int(rows.lengths.sum())
    hidden_NH = session.forward(whole, grad=False).hidden(-1)
    with torch.no_grad():
        state = session.model.model(**batch.inputs, use_cache=False).last_hidden_state
    wanted = torch.cat([state[b, : int(n)] for b, n in enumerate(rows.lengths)])
    torch.testing.assert_close(hidden_NH, wanted)
    ids = torch.cat([torch.from_numpy(i).long() for i in rows.ids])
    starts = np.cumsum([0, *rows.lengths[:-1]])
    inner = [n for n in range(len(ids)) if n + 1 not in {*starts.tolist(), len(ids)}]
    assert torch.equal(whole.target_N[inner], ids[[n + 1 for n in inner]])


def test_the_output_layer_makes_the_logits():
    session = make_session()
    weight_VH, bias_V, scale = session.output_layer()
    assert weight_VH is session.model.lm_head.weight
    assert bias_V is None
    assert scale == 1.0


class GapByPosition(AgainstReference):
    """The same loss, called chunk by chunk."""

    needs = Needs(models=("reference",), positionwise=True)


def test_chunks_share_one_reference_pass_and_cache_whole_rows(tmp_path):
    rows, found = random_rows(6), []
    for objective, chunk in ((AgainstReference(), None), (GapByPosition(), 3)):
        session = make_session(objective=objective)
        session.head_chunk = chunk
        session._scores = scores = ReferenceScores("model", store=Store(tmp_path / str(chunk)))
        with torch.no_grad():
            session.model.lm_head.weight.mul_(1.5)  # away from the reference
        passes = []
        session._models["reference"].register_forward_pre_hook(lambda *_, seen=passes: seen.append(1))
        session._models["reference"].model.register_forward_pre_hook(lambda *_, seen=passes: seen.append(1))
        for _ in range(2):
            batch = session.task.collate(rows.fetch(range(6)), range(6))
            loss = session.loss(batch)
            loss.sum.backward()
        assert len(passes) == 1
        found.append((loss.sum.detach(), session.model.lm_head.weight.grad, scores.get(batch.keys_B)))
    for value, other in zip(*found, strict=True):
        torch.testing.assert_close(value, other, atol=2e-5, rtol=1e-4)


def test_under_adapters_the_reference_is_the_base_beneath_them():
    from luthier.core import registry

    lora = registry.get("parameters", "lora").build({"rank": 2})
    session = make_session(objective=AgainstReference(), parameters=[lora])
    assert "reference" not in session._models  # no second copy
    gaps = []
    Trainer(
        session,
        random_rows(),
        settings(epochs=8),
        observe=lambda event, values: gaps.append(values["gap"]) if event == "step" else None,
    ).run()
    assert gaps[0] == pytest.approx(0.0, abs=1e-6)
    assert gaps[-1] < 0
    batch = session.task.collate(random_rows().fetch([0, 1]), [0, 1])
    base = make_session(tiny_llama())
    torch.testing.assert_close(session.forward(batch, "reference").logp_N, base.forward(batch, grad=False).logp_N)


def test_a_part_that_is_positionwise_within_a_loss_that_is_not():
    session = make_session(tiny_llama().double())
    session.head_chunk = 3
    data = random_rows(4)
    batch = session.task.collate(data.fetch(range(4)), range(4))
    found = {}
    for name in ("graph", "formed"):
        session.model.zero_grad()
        out = session.forward(batch)

        def part(at, some):
            return Loss(-(at.logp_N * some.weight_N).sum(), some.weight_N.sum(), metrics={"n": (len(at.logp_N), 1)})

        loss = part(out, batch) if name == "graph" else out.positionwise(batch, part)
        observed = out.observed_logp_N
        (loss.sum + out.hidden(-1).square().sum()).backward()
        assert not observed.requires_grad
        found[name] = (loss.sum.detach(), observed, *(p.grad.clone() for p in session.model.parameters()))
    assert loss.metrics["n"][0] == batch.target_N.numel()
    assert loss.metrics["n"][1] > 1  # it came in chunks
    for graph, formed in zip(*found.values(), strict=True):
        torch.testing.assert_close(formed, graph, atol=1e-9, rtol=1e-7)
