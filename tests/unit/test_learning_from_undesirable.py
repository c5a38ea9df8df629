"""Learning from the undesirable: the twin, its distance and what the two passes leave alone, worked out independently."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import KnownLogp
from transformers import BertConfig, BertForSequenceClassification

from helpers import PROCESSOR, OpenAll, make_session, random_rows, settings, tiny_llama, weights
from luthier.core.errors import LuthierError, UserError
from luthier.core.protocols import Batch
from luthier.core.rng import stream
from luthier.engine.loop import Trainer
from luthier.functional.temporary_additions import Addition, places
from luthier.methods.objectives.learning_from_undesirable import LearningFromUndesirable
from luthier.methods.objectives.sft import SupervisedFineTuning
from luthier.methods.parameters.lora import LowRankAdaptation

SGD = {"optimizer": "sgd", "learning_rate": 0.1, "schedule": "constant"}


class TwoLinearBlocks(torch.nn.Module):
    """h1 = W1 x, h2 = W2 h1."""

    config = SimpleNamespace(is_encoder_decoder=False)

    def __init__(self, first, second):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(len(w), len(w), bias=False) for w in (first, second))
        self.double()
        for layer, weight in zip(self.layers, (first, second), strict=True):
            layer.weight.data = torch.tensor(weight)

    def get_decoder(self):
        return self

    def forward(self, inputs_embeds, attention_mask=None):
        return self.layers[1](self.layers[0](inputs_embeds))


class LinearContext:
    """log p of position n is -||V h2||^2 / 2."""

    step, device, totals = 0, torch.device("cpu"), {}

    def __init__(self, model, v):
        self.model, self.v = model, torch.tensor(v)

    def rng(self, name, *keys):
        return stream(0, name, *keys)

    def forward(self, batch):
        state = self.model(**batch.inputs).reshape(-1, 3).index_select(0, batch.position_N)
        return KnownLogp(-0.5 * (state @ self.v.T).square().sum(-1))


def linear_case():
    rng = np.random.default_rng(0)
    first, second, x, v = (rng.normal(size=s) for s in ((3, 3), (3, 3), (2, 4, 3), (2, 3)))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    position = torch.tensor([1, 2, 4])
    batch = Batch(
        inputs={"inputs_embeds": torch.tensor(x), "attention_mask": mask},
        position_N=position,
        target_N=torch.zeros(3, dtype=torch.long),
        weight_N=torch.ones(3, dtype=torch.float64),
        sequence_N=torch.tensor([0, 0, 1]),
        row_B=torch.tensor([0, 1]),
        supervised_BT=torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0]]).bool(),
    )
    ctx = LinearContext(TwoLinearBlocks(first, second), v)
    ctx.totals = {"token": 3.0, "sequence": 2.0}
    return ctx, batch, (first, second, x, v)


def run_linear(ctx, batch, **options):
    method = LearningFromUndesirable(aux="steer", alpha_relative=False, reduction="sum_dim", **options)
    method.prepare(ctx, None)
    loss = method.loss(ctx.forward(batch), batch, ctx)
    method.finish_model(ctx.model, None)
    return loss


@pytest.mark.parametrize("fused", [True, False])
def test_two_linear_blocks_by_hand(fused):
    ctx, batch, (first, second, x, v) = linear_case()
    alpha, factor = 0.3, 0.7
    loss = run_linear(ctx, batch, alpha=alpha, consistency_weight=factor, fused=fused)
    # L = sum_n ||V h2_n||^2 / 2 over the three positions; g is that of its mean.
    flat = x.reshape(-1, 3)[[1, 2, 4]]
    h2 = flat @ first.T @ second.T
    g2 = (h2 @ v.T @ v).sum(0) / 3
    g1 = second.T @ g2
    norm = np.sqrt((g1**2).sum() + (g2**2).sum())
    d1, d2 = alpha * g1 / norm, alpha * g2 / norm
    # The shift of a linear network is the same for all tokens: d1 behind block 1, W2 d1 + d2 behind block 2.
    s1, s2 = d1, second @ d1 + d2
    apart = ((s1**2).sum() + (s2**2).sum()) / 2
    assert float(loss.metrics["ascent_norm"][0]) == pytest.approx(norm, rel=1e-10)
    assert float(loss.metrics["consistency"][0]) == pytest.approx(2 * apart, rel=1e-10)
    assert loss.metrics["consistency"][1] == 2
    assert float(loss.metrics["consistency_block_1"][0]) == pytest.approx(2 * (s1**2).sum(), rel=1e-10)
    assert float(loss.metrics["consistency_block_2"][0]) == pytest.approx(2 * (s2**2).sum(), rel=1e-10)
    plain = 0.5 * ((h2 @ v.T) ** 2).sum()
    # A mean over rows beside a mean over the step's 3 tokens: 2 rows * 3 / 2.
    assert loss.sum.item() == pytest.approx(plain + factor * 3 * apart, rel=1e-10)
    # h' depends on W through h'1 = W1 x + d1 and h'2 = W2 h'1 + d2; h is constant.
    loss.sum.backward()
    d_first = sum(np.outer(second.T @ v.T @ v @ h, xi) for h, xi in zip(h2, flat, strict=True))
    d_second = sum(np.outer(v.T @ v @ h, first @ xi) for h, xi in zip(h2, flat, strict=True))
    for row, length in ((0, 4), (1, 2)):
        for xi in x[row, :length]:
            share = factor * 3 / 2 / length
            d_second = d_second + share * np.outer(s2, first @ xi + d1)
            d_first = d_first + share * np.outer(s1 + second.T @ s2, xi)
    np.testing.assert_allclose(ctx.model.layers[0].weight.grad.numpy(), d_first, rtol=1e-10)
    np.testing.assert_allclose(ctx.model.layers[1].weight.grad.numpy(), d_second, rtol=1e-10)


def test_gradient_of_the_distance_by_finite_differences_with_the_step_held_constant():
    ctx, batch, (first, second, x, v) = linear_case()
    run_linear(ctx, batch, alpha=0.3, consistency_weight=0.7).sum.backward()
    analytic = ctx.model.layers[1].weight.grad.numpy().copy()
    flat = x.reshape(-1, 3)[[1, 2, 4]]
    g2 = (flat @ first.T @ second.T @ v.T @ v).sum(0)
    g1 = second.T @ g2
    d1, d2 = (0.3 * g / np.sqrt((g1**2).sum() + (g2**2).sum()) for g in (g1, g2))
    h1 = x @ first.T
    h2 = h1 @ second.T

    def total(w):
        moved = (h1 + d1) @ w.T + d2
        rows = [((d1**2).sum() + ((moved - h2)[b, :n] ** 2).sum(-1).mean()) / 2 for b, n in ((0, 4), (1, 2))]
        return 0.5 * ((flat @ first.T @ w.T @ v.T) ** 2).sum() + 0.7 * 1.5 * sum(rows)

    numeric = np.zeros((3, 3))
    for i, j in np.ndindex(3, 3):
        step = np.zeros((3, 3))
        step[i, j] = 1e-6
        numeric[i, j] = (total(second + step) - total(second - step)) / 2e-6
    np.testing.assert_allclose(analytic, numeric, rtol=1e-6)


def test_a_twin_per_example_is_that_of_the_example_alone():
    ctx, batch, _ = linear_case()
    both = run_linear(ctx, batch, alpha=0.3, twin_per="example")
    parts = []
    for row in (0, 1):
        part = batch.positions(torch.nonzero(batch.sequence_N == row).squeeze(1))
        part.inputs = {k: v[row : row + 1] for k, v in batch.inputs.items()}
        part.position_N, part.sequence_N = part.position_N - 4 * row, part.sequence_N - row
        part.row_B = batch.row_B[row : row + 1]
        parts.append(run_linear(ctx, part, alpha=0.3))
    apart = sum(float(p.metrics["consistency"][0]) for p in parts)
    assert float(both.metrics["consistency"][0]) == pytest.approx(apart, rel=1e-10)
    assert both.sum.item() == pytest.approx(sum(p.sum.item() for p in parts), rel=1e-10)


def test_stop_gradients_are_parts_of_one_whole():
    found = {}
    for side in ("original", "twin", "none"):
        ctx, batch, _ = linear_case()
        run_linear(ctx, batch, alpha=0.3, stop_gradient=side, consistency_weight=1.0).sum.backward()
        found[side] = ctx.model.layers[1].weight.grad
    ctx, batch, _ = linear_case()
    run_linear(ctx, batch, consistency_weight=0.0).sum.backward()
    plain = ctx.model.layers[1].weight.grad
    torch.testing.assert_close(found["none"] - plain, found["original"] + found["twin"] - 2 * plain)
    assert (found["twin"] - plain).abs().max() > 1e-3


def test_variants_of_the_distance():
    ctx, batch, (first, second, x, _) = linear_case()
    h1 = x @ first.T
    h2 = h1 @ second.T
    sizes = {n: np.linalg.norm(np.concatenate([h[0], h[1, :2]]), axis=-1).mean() for n, h in ((1, h1), (2, h2))}
    relative = LearningFromUndesirable(aux="steer", alpha=0.05)
    relative.prepare(ctx, None)
    loss = relative.loss(ctx.forward(batch), batch, ctx)
    relative.finish_model(ctx.model, None)
    whole = run_linear(ctx, batch, alpha=0.05 * (sizes[1] + sizes[2]) / 2)
    ratio = float(whole.metrics["consistency"][0]) / float(loss.metrics["consistency"][0])
    assert ratio == pytest.approx(3.0, rel=1e-10)  # mean over the three dimensions
    second_only = run_linear(ctx, batch, alpha=0.3, layers=[2])
    assert "consistency_block_1" not in second_only.metrics
    everything = run_linear(ctx, batch, alpha=0.3)
    assert float(second_only.metrics["consistency"][0]) == pytest.approx(
        float(everything.metrics["consistency_block_2"][0]), rel=1e-10
    )
    per_layer = run_linear(ctx, batch, alpha=0.3, norm_scope="per_layer")
    assert float(per_layer.metrics["consistency_block_1"][0]) == pytest.approx(2 * 0.3**2, rel=1e-10)
    response = run_linear(ctx, batch, alpha=0.3, tokens="response", layer_norm_targets=True)
    s1 = float(everything.metrics["consistency_block_1"][0]) / 2
    norms = [(h1[0, 2:] ** 2).sum(-1).mean(), (h1[1, 1] ** 2).sum()]
    assert float(response.metrics["consistency_block_1"][0]) == pytest.approx(sum(s1 / n for n in norms), rel=1e-10)


# -- on a transformer


def a_session(model=None, parameters=None, rows=6, **options):
    method = LearningFromUndesirable(**options)
    session = make_session(model or tiny_llama(), objective=method, parameters=parameters)
    data = random_rows(rows)
    session.model.train()
    method.prepare(session, data)
    batch = session.task.collate(data.fetch(range(rows)), list(range(rows)))
    session.totals = {"token": float(batch.weight_N.sum()), "sequence": float(rows)}
    return session, method, batch


def test_low_rank_additions_are_changed_weights():
    session, method, batch = a_session(alpha=0.5, reduction="sum_dim", aux_scale=0.5, aux_rank=3)
    out = session.forward(batch)
    maps = {id(m): n for n, m in session.model.named_modules()}
    low = {f"{maps[key]}.weight": a.down.clone() for key, a in method._seen.additions.items()}
    assert len(low) == 2 * 7
    loss = method.loss(out, batch, session)
    loss.sum.backward()
    # The same with W + s B A put in place of W, logits and cross-entropy of the whole model.
    model = tiny_llama()
    own = dict(model.named_parameters())
    up = {n: torch.zeros(own[n].shape[0], 3, requires_grad=True) for n in low}

    def states(additions):
        seen = []
        hooks = [b.register_forward_hook(lambda m, i, o: seen.append(o)) for b in model.model.layers]
        named = {n: own[n] + 0.5 * additions[n] @ low[n] for n in low}
        logits = torch.func.functional_call(model, named, kwargs={**batch.inputs, "use_cache": False}).logits
        for hook in hooks:
            hook.remove()
        logits = logits.reshape(-1, 64)[batch.position_N]
        return torch.nn.functional.cross_entropy(logits, batch.target_N), seen

    plain, before = states(up)
    ascent = torch.autograd.grad(plain, list(up.values()), retain_graph=True)
    norm = torch.sqrt(sum(g.square().sum() for g in ascent))
    step = {n: 0.5 * g / norm for n, g in zip(up, ascent, strict=True)}
    assert torch.sqrt(sum(s.square().sum() for s in step.values())).item() == pytest.approx(0.5, rel=1e-5)
    twin, after = states(step)
    mask = batch.inputs["attention_mask"]
    apart = sum(
        (((a - b.detach()).square().sum(-1) * mask).sum(1) / mask.sum(1)).mean() / 2
        for a, b in zip(after, before, strict=True)
    )
    (plain + 0.1 * apart).backward()
    tokens = float(loss.weight)
    assert float(loss.metrics["ascent_norm"][0]) == pytest.approx(norm.item(), rel=1e-4)
    assert loss.sum.item() / tokens == pytest.approx((plain + 0.1 * apart).item(), rel=1e-5)
    assert float(loss.metrics["twin_nll"][0]) / tokens == pytest.approx(twin.item(), rel=1e-5)
    assert float(loss.metrics["consistency"][0]) / 6 == pytest.approx(apart.item(), rel=1e-4)
    for name, parameter in session.model.named_parameters():
        torch.testing.assert_close(parameter.grad / tokens, own[name].grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("aux", ["lora", "steer"])
def test_the_twin_is_worse_after_ascent_and_better_after_descent(aux):
    nll = {}
    for direction in ("ascent", "random", "descent"):
        session, method, batch = a_session(aux=aux, alpha=0.01, alpha_relative=False, direction=direction)
        metrics = method.loss(session.forward(batch), batch, session).metrics
        nll[direction] = float(metrics["twin_nll"][0] - metrics["base_loss"][0])
        assert float(metrics["consistency"][0]) > 0
    assert nll["descent"] < 0 < nll["ascent"]
    assert abs(nll["random"]) < nll["ascent"]


def trained(folder=None, *, sft=False, parameters=None, steps=4, training=None, **options):
    objective = SupervisedFineTuning() if sft else LearningFromUndesirable(**options)
    session = make_session(
        tiny_llama(dropout=0.3), objective=objective, parameters=[parameters() if parameters else OpenAll()]
    )
    records = []
    Trainer(
        session,
        random_rows(16),
        settings(max_steps=steps, epochs=4, **(training or {})),
        observe=lambda event, values: records.append(values) if event == "step" else None,
    ).run()
    return session, weights(session.model), records


def adapters():
    return LowRankAdaptation(rank=2, dropout=0.2)


@pytest.mark.parametrize("parameters", [None, adapters], ids=["full", "lora"])
@pytest.mark.parametrize(
    "options",
    [
        {"consistency_weight": 0.0, "alpha": 0.5},
        {"alpha": 0.0, "consistency_weight": 5.0},
        {"consistency_weight": 0.0, "aux": "steer", "fused": False},
        {"alpha": 0.0, "twin_per": "example", "stop_gradient": "none"},
    ],
    ids=["weight 0", "alpha 0", "steer, weight 0, unfused", "example, alpha 0"],
)
def test_without_a_step_or_a_weight_it_is_sft_bit_for_bit_under_dropout(options, parameters):
    _, plain, _ = trained(sft=True, parameters=parameters)
    _, same, records = trained(parameters=parameters, **options)
    for name, value in plain.items():
        assert torch.equal(value, same[name]), name
    measured = [r["consistency"] for r in records]
    assert all(c == 0 for c in measured) if options.get("alpha") == 0 else all(c > 0 for c in measured)


@pytest.mark.parametrize("options", [{}, {"aux": "steer"}, {"twin_per": "example"}, {"stop_gradient": "twin"}], ids=str)
@pytest.mark.parametrize("parameters", [None, adapters], ids=["full", "lora"])
def test_fused_and_unfused_give_the_same_update(options, parameters):
    options = {"alpha": 0.5, "consistency_weight": 3.0, **options}
    found = [trained(parameters=parameters, training=SGD, fused=f, **options) for f in (True, False)]
    _, plain, _ = trained(sft=True, parameters=parameters, training=SGD)
    for name, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][name], atol=1e-6, rtol=1e-4)
    assert any(not torch.allclose(v, plain[n], atol=1e-6, rtol=1e-4) for n, v in found[0][1].items())
    assert found[0][2][-1]["gradient_ratio"] > 0
    assert "gradient_ratio" not in found[1][2][-1]


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_additions_leave_no_trace():
    for parameters in (None, [LowRankAdaptation(rank=2)]):
        session, method, batch = a_session(parameters=parameters)
        names, trainable = list(session.model.state_dict()), sum(p.requires_grad for p in session.model.parameters())
        watching = hooks_of(session.model)
        method.loss(session.forward(batch), batch, session).sum.backward()
        assert hooks_of(session.model) == watching == 4
        assert list(session.model.state_dict()) == names
        assert sum(p.requires_grad for p in session.model.parameters()) == trainable
        method.finish_model(session.model, PROCESSOR)
        assert hooks_of(session.model) == 0


def test_hooks_go_when_a_pass_fails(monkeypatch):
    session, method, batch = a_session()
    watching = hooks_of(session.model)
    out = session.forward(batch)

    def broken(*arguments, **named):
        raise RuntimeError("broken")

    monkeypatch.setattr(session.model.model.norm, "forward", broken)
    with pytest.raises(RuntimeError, match="broken"):
        session.forward(batch)
    assert hooks_of(session.model) == watching
    monkeypatch.undo()
    out = session.forward(batch)
    monkeypatch.setattr(session.model.model.norm, "forward", broken)
    with pytest.raises(RuntimeError, match="broken"):
        method.loss(out, batch, session)
    assert hooks_of(session.model) == watching
    monkeypatch.undo()
    assert method.loss(session.forward(batch), batch, session).sum.isfinite()


def test_no_gradient_is_left_and_the_generator_stands_where_it_stood():
    session, method, batch = a_session(tiny_llama(dropout=0.3))
    out = session.forward(batch)
    before = torch.get_rng_state()
    method.loss(out, batch, session)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in session.model.parameters())


def test_adapted_maps_count_once_and_their_sum_is_perturbed():
    session, method, _ = a_session(parameters=[LowRankAdaptation(rank=2)])
    assert [type(m).__name__ for _, m in method._where.maps[:1]] == ["Linear"]
    assert len(method._where.maps) == 2 * 7
    assert all(hasattr(m, "base_layer") for _, m in method._where.maps)
    some = places(session.model, ["q_proj", "mlp.up_proj"], who="x")
    assert [number for number, _ in some.maps] == [0, 0, 1, 1]


def test_additions_stay_in_float32_under_bf16():
    for aux in ("lora", "steer"):
        session, method, batch = a_session(aux=aux, alpha=0.0)
        session.precision = "bf16"
        out = session.forward(batch)
        assert {a.up.dtype for a in method._seen.additions.values()} == {torch.float32}
        loss = method.loss(out, batch, session)
        assert float(loss.metrics["consistency"][0]) == 0
        assert float(loss.metrics["ascent_norm"][0]) > 0


def test_padding_and_rows_without_supervision():
    session, method, batch = a_session(rows=2)
    loss = method.loss(session.forward(batch), batch, session)
    pad = torch.zeros(2, 3, dtype=torch.long)
    width = batch.inputs["input_ids"].shape[1]
    wider = batch.with_inputs(**{k: torch.cat([v, pad], 1) for k, v in batch.inputs.items()})
    wider.position_N = batch.position_N + 3 * batch.sequence_N
    assert wider.inputs["input_ids"].shape[1] == width + 3
    again = method.loss(session.forward(wider), wider, session)
    assert float(again.metrics["consistency"][0]) == pytest.approx(float(loss.metrics["consistency"][0]), rel=1e-4)
    silent = batch.with_weights(torch.zeros_like(batch.weight_N))
    nothing = method.loss(session.forward(silent), silent, session)
    assert nothing.sum.item() == 0
    assert float(nothing.metrics["ascent_missing"][0]) == 1
    assert float(nothing.metrics["consistency"][1]) == 0


def test_every_nth_step_and_no_graph():
    session, method, batch = a_session(every=2)
    session.step = 1
    loss = method.loss(session.forward(batch), batch, session)
    assert "consistency" not in loss.metrics
    session.step = 2
    assert "consistency" in method.loss(session.forward(batch), batch, session).metrics
    with torch.no_grad():
        assert "consistency" not in method.loss(session.forward(batch), batch, session).metrics


def test_another_objective_is_the_one_that_ascends():
    session, method, batch = a_session(base_objective={"beyond-log-likelihood": {"objective": "p"}}, alpha=0.01)
    out = session.forward(batch)
    expected = (1 - out.logp_N.exp()).sum().item()
    loss = method.loss(out, batch, session)
    assert float(loss.metrics["base_loss"][0]) == pytest.approx(expected, rel=1e-6)
    assert method.state() == {"member": "p"}
    method.load({"member": "p"})
    assert not method.needs.positionwise


@pytest.mark.parametrize("options", [{"aux": "steer"}, {"aux": "lora", "twin_per": "example"}])
def test_a_classifier_of_the_other_family(options):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=3, **size))
    from luthier.engine.session import Session
    from luthier.engine.stack import Stack
    from luthier.tasks import get_task

    method = LearningFromUndesirable(alpha=0.5, **options)
    task = get_task("sequence-classification", PROCESSOR)
    stack = Stack(objective=method, named={"objective": method})
    session = Session(model=model, task=task, processor=PROCESSOR, stack=stack)
    method.prepare(session, None)
    model.train()
    ids = [np.array(r, dtype=np.int32) for r in ([5, 6, 7], [8, 9], [3, 4, 5, 6])]
    batch = task.collate({"input_ids": ids, "label": [0, 2, 1]}, [0, 1, 2])
    session.totals = {"token": 3.0, "sequence": 3.0}
    torch.manual_seed(1)  # dropout is on: equal passes need equal generators
    loss = method.loss(session.forward(batch), batch, session)
    assert float(loss.metrics["consistency"][0]) > 0
    method.alpha = 0.0
    loss = method.loss(session.forward(batch), batch, session)
    assert float(loss.metrics["consistency"][0]) == 0
    response = LearningFromUndesirable(tokens="response", aux="steer")
    response.prepare(session, None)
    method.finish_model(model, None)
    with pytest.raises(UserError, match="use tokens: all"):
        response.loss(session.forward(batch), batch, session)


def test_models_that_have_no_place_for_it():
    with pytest.raises(UserError, match="no block 3: the model has 2"):
        a_session(layers=[1, 3])
    with pytest.raises(UserError, match=r"called 'q_prj'. Did you mean 'q_proj'"):
        a_session(aux_targets=["q_prj"])
    model = tiny_llama()
    model.gradient_checkpointing_enable()
    with pytest.raises(UserError, match="gradient checkpointing"):
        a_session(model)


def test_outputs_of_an_unwatched_pass_and_bad_gradients_are_errors():
    session, method, batch = a_session()
    out = session.forward(batch)
    method.loss(out, batch, session)
    with pytest.raises(LuthierError, match="has not seen"):
        method.loss(session.forward(batch), batch.take(torch.tensor([0])), session)
    old = session.forward(batch)
    session.forward(batch)
    with pytest.raises(LuthierError, match="does not come from"):
        method.loss(old, batch, session)
    out = session.forward(batch)
    for addition in method._seen.additions.values():
        addition.up.register_hook(lambda g: g * float("nan"))
    with pytest.raises(LuthierError, match="not finite at step 1"):
        method.loss(out, batch, session)


@pytest.mark.parametrize("twins", [1, 3])
def test_a_probe_has_the_gradient_of_an_addition_of_zeros(twins):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, 4).double(), torch.randn(6, 4).double()
    down, up = torch.randn(2, 4).double(), torch.zeros(twins, 6, 2).double().requires_grad_()
    found = {}
    for name in ("plain", "probe"):
        given = x.clone().requires_grad_()
        out = torch.nn.functional.linear(given, weight)
        if name == "plain":
            changed = out + 1.7 * torch.einsum("btr,bor->bto", given @ down.T, up.expand(3, -1, -1))
        else:
            changed = Addition(1, up, down, 1.7).probe(given, out)
        # In place, as some models do with what leaves a linear map.
        value = changed.mul_(2).sin().sum()
        found[name] = (value.detach(), *torch.autograd.grad(value, (given, up)))
    for plain, probed in zip(*found.values(), strict=True):
        torch.testing.assert_close(probed, plain, atol=1e-12, rtol=0)
