"""Sparse fine-tuning with moving positions: the algorithm against a plain simulation, the layer against dense algebra."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import FakeContext
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from helpers import make_session, random_rows, settings, tiny_llama, weights
from luthier.core.errors import UserError
from luthier.engine.loop import Trainer
from luthier.functional import sparse_deltas as deltas
from luthier.functional.differences import dense
from luthier.functional.sparse_linear import SparseLinear, merged, wrap, wrapped
from luthier.methods.parameters.spiel import SparseIterativeFineTuning as Spiel

ROWS, COLUMNS, K, S, GAMMA, T, LR, RATE = 4, 6, 5, 4, 2, 15, 0.05, 0.8


# -- the whole algorithm on one 4 x 6 layer, against a simulation with dictionaries


class One(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin = torch.nn.Linear(COLUMNS, ROWS, bias=False)


def gradient(step, micro):
    return np.random.default_rng([step, micro]).normal(size=(ROWS, COLUMNS))


def drive(method, steps=T, micro_batches=1, factor=0.5, after=None):
    """Run a method over :func:`gradient`, whose raw micro-batch gradients are multiplied by ``factor`` at the end."""
    model = One().requires_grad_(False)
    ctx = FakeContext(total_steps=T)
    ctx.learning_rate, ctx.grad_factor = LR, factor
    method.apply(model, ctx)
    start = model.lin.index_K.tolist()
    for step in range(steps):
        ctx.step = step
        method.before_step([None] * micro_batches, ctx)
        for micro in range(micro_batches):
            # With x = I the gradient of the weight is what is sent back, transposed.
            model.lin(torch.eye(COLUMNS)).backward(torch.tensor(gradient(step, micro).T, dtype=torch.float32))
        model.lin.values.grad.mul_(factor)
        method.on_grad(model, ctx)
        method.update(model, ctx)
        assert model.lin.values.grad is None
        method.on_step(model, ctx)
        if after:
            after(step + 1, model)
    return start, model


def share_of(policy, t, rate=RATE):
    if policy == "cosine":
        return rate * (1 + math.cos(math.pi * t / T)) / 2
    return 1.0 if t == GAMMA else rate * (1 - t / T)


def simulate_ag(start, policy, micro_batches, scaling, seed_age, decay, factor=0.5):
    """The algorithm as the paper has it, in float64: slots of (position, value, m, v, age)."""
    b1, b2, eps = 0.9, 0.999, 1e-6
    slots = [[p, 0.0, 0.0, 0.0, 1.0] for p in start]
    seen, is_open, history = {}, True, []
    for step in range(T):
        raw = [gradient(step, m) for m in range(micro_batches)]
        whole = factor * sum(raw)
        if is_open:
            if not seen:
                order = np.argsort(-np.abs(raw[0].ravel()))[:K]
                seen = {int(p): [0.0, 0.0, 0] for p in order}
            for p, s in seen.items():
                samples = [whole.ravel()[p]] if scaling == "correct" else [factor * r.ravel()[p] for r in raw]
                for g in samples:
                    s[0], s[1], s[2] = s[0] + g, s[1] + g * g, s[2] + 1
        for slot in slots:
            p, value, m, v, age = slot
            g = whole.ravel()[p]
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            value -= LR * m / ((math.sqrt(v) + eps) * (1 - b1**age) / math.sqrt(1 - b2**age))
            value -= LR * decay * value
            slot[1:] = [value, m, v, age + 1]
        t = step + 1
        if t % S == GAMMA:
            r = int(K * share_of(policy, t))
            dropped = sorted(slots, key=lambda s: abs(s[1]))[:r]
            remaining = {s[0] for s in slots} - {s[0] for s in dropped}
            grown = sorted((p for p in seen if p not in remaining), key=lambda p: -abs(seen[p][0]))[:r]
            out = [s for s in dropped if s[0] not in grown]
            come = [p for p in grown if p not in {s[0] for s in dropped}]
            for slot, p in zip(out, come, strict=False):
                total, squares, n = seen[p]
                age = n / (micro_batches if scaling == "released" else 1)
                slot[:] = [p, 0.0, total / n * (1 - b1**age), squares / n * (1 - b2**age), age + (seed_age == "exact")]
            is_open, seen = False, {}
        if (t + 1) % S == 0:
            is_open, seen = True, {}
        history.append({s[0]: tuple(s[1:]) for s in slots})
    return history


@pytest.mark.parametrize("policy", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("micro_batches", "scaling", "seed_age", "decay"),
    [(1, "correct", "released", 0.0), (3, "correct", "exact", 0.5), (3, "released", "released", 0.0)],
)
def test_accumulated_gradients_against_a_simulation(policy, micro_batches, scaling, seed_age, decay):
    method = Spiel(
        num_weights=K,
        reselect_every=S,
        accumulate=GAMMA,
        reselect_rate=RATE,
        rate_policy=policy,
        accumulation_scaling=scaling,
        seed_age=seed_age,
        weight_decay=decay,
    )
    found = []

    def keep(step, model):
        state = zip(
            model.lin.values.tolist(), *(t.tolist() for t in (method.m_K, method.v_K, method.age_K)), strict=True
        )
        found.append(dict(zip(model.lin.index_K.tolist(), state, strict=True)))

    start, _ = drive(method, micro_batches=micro_batches, after=keep)
    assert start == sorted(start)
    wanted = simulate_ag(start, policy, micro_batches, scaling, seed_age, decay)
    for step, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.keys() == b.keys(), step
        for position, values in a.items():
            np.testing.assert_allclose(values, b[position], atol=1e-5, err_msg=f"step {step}, position {position}")
    assert len({frozenset(f) for f in found}) > 2


def simulate_ma(start, factor=0.5, eps=1e-8):
    slots, rows, columns, history = [[p, 0.0] for p in start], np.zeros(ROWS), np.zeros(COLUMNS), []
    for step in range(T):
        g = factor * gradient(step, 0)
        new_rows, new_columns = rows.copy(), columns.copy()
        for slot in slots:
            i, j = divmod(slot[0], COLUMNS)
            u = min(rows[i], columns[j]) + g[i, j] ** 2
            new_rows[i], new_columns[j] = max(new_rows[i], u), max(new_columns[j], u)
            slot[1] -= LR * g[i, j] / math.sqrt(u + eps)
        rows, columns = new_rows, new_columns
        t = step + 1
        if t % S == GAMMA:
            r = int(K * share_of("linear", t))
            active = {s[0] for s in slots}
            free = [p for p in range(ROWS * COLUMNS) if p not in active]
            grown = sorted(free, key=lambda p: -rows[p // COLUMNS] * columns[p % COLUMNS])[:r]
            for slot, p in zip(sorted(slots, key=lambda s: abs(s[1]))[:r], grown, strict=True):
                slot[:] = [p, 0.0]
        history.append((dict(map(tuple, slots)), rows, columns))
    return history


def test_momentum_approximation_against_a_simulation():
    method = Spiel(algorithm="ma", num_weights=K, reselect_every=S, accumulate=GAMMA, reselect_rate=RATE)
    found = []

    def keep(step, model):
        kept = dict(zip(model.lin.index_K.tolist(), model.lin.values.tolist(), strict=True))
        found.append((kept, *(method.accumulators["lin"][k].numpy().copy() for k in ("row", "column"))))

    start, _ = drive(method, after=keep)
    for step, (a, b) in enumerate(zip(found, simulate_ma(start), strict=True)):
        assert a[0].keys() == b[0].keys(), step
        np.testing.assert_allclose([a[0][p] for p in b[0]], list(b[0].values()), atol=1e-5)
        np.testing.assert_allclose(a[1], b[1], rtol=1e-5)
        np.testing.assert_allclose(a[2], b[2], rtol=1e-5)
    assert len({frozenset(f[0]) for f in found}) > 2


# -- the schedule


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        ("linear", [1.0, 0.15, 0.11, 0.07, 0.03]),
        ("cosine", [0.2 * (1 + math.cos(math.pi * t / 100)) / 2 for t in (5, 25, 45, 65, 85)]),
    ],
)
def test_when_phases_close_and_what_they_replace(policy, wanted):
    closing = [t for t in range(1, 101) if deltas.closes(t, 20, 5)]
    assert closing == [5, 25, 45, 65, 85]
    assert [t for t in range(1, 101) if deltas.opens(t, 20)] == [19, 39, 59, 79, 99]
    assert [deltas.replaced_share(policy, 0.2, t, 100, 5) for t in closing] == pytest.approx(wanted)


def test_budgets():
    assert deltas.layer_counts([100, 300, 7], 40) == [9, 29, 0]

    def sizes(**options):
        method = Spiel(**options)
        method.apply(tiny_llama().requires_grad_(False), FakeContext())
        return {path: x.values.numel() for path, x in method.layers.items()}

    total, targeted = sum(p.numel() for p in tiny_llama().parameters()), 2 * (4 * 256 + 3 * 512)
    by_density = sizes(density=0.05)
    assert len(by_density) == 14
    assert by_density["model.layers.0.mlp.up_proj"] == int(0.05 * total) * 512 // targeted
    assert sum(sizes(num_weights=1000).values()) <= 1000
    # A LoRA of rank 3 has 3 * (16 + 16) or 3 * (16 + 32) numbers per map.
    assert sum(sizes(rank_equivalent=3).values()) == pytest.approx(2 * 3 * (4 * 32 + 3 * 48), abs=14)
    assert set(sizes(density=0.01, target_modules=["layer:0 & category:attention"])) == {
        f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"
    }


# -- the layer


def linear(kind):
    torch.manual_seed(1)
    if kind == "conv1d":
        return Conv1D(5, 7)
    return torch.nn.Linear(7, 5, bias=kind == "linear")


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_forward_and_backward_equal_dense_algebra(kind):
    plain = linear(kind).requires_grad_(False)
    before = plain.weight.clone()
    layer = SparseLinear(plain, torch.tensor([0, 3, 11, 34]))
    layer.values.data = torch.tensor([1.0, -2.0, 0.5, 3.0])
    x = torch.randn(2, 3, 7, requires_grad=True)
    upstream = torch.randn(2, 3, 5)
    seen = []
    layer.watch = seen.append
    layer(x).backward(upstream)
    assert torch.equal(plain.weight, before)
    dense_weight = before.clone().double()
    dense_weight.view(-1)[[0, 3, 11, 34]] += torch.tensor([1.0, -2.0, 0.5, 3.0]).double()
    dense_weight.requires_grad_(True)
    x2 = x.detach().double().requires_grad_(True)
    out = x2 @ (dense_weight if kind == "conv1d" else dense_weight.t())
    out = out if plain.bias is None else out + plain.bias.double()
    out.backward(upstream.double())
    torch.testing.assert_close(layer(x).double(), out, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(x.grad.double(), x2.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen[0].double(), dense_weight.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        layer.values.grad.double(), dense_weight.grad.view(-1)[[0, 3, 11, 34]], atol=1e-5, rtol=1e-5
    )
    wanted = layer(x)
    torch.testing.assert_close(layer.merged()(x), wanted, atol=1e-6, rtol=1e-6)


def test_half_precision_leaves_the_weight_alone():
    plain = linear("linear").requires_grad_(False)
    before = plain.weight.clone()
    layer = SparseLinear(plain, torch.tensor([2, 30]))
    layer.values.data.fill_(0.25)
    x = torch.randn(4, 7, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    out.float().sum().backward()
    assert (out.dtype, x.grad.dtype, layer.values.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert torch.equal(plain.weight, before)
    effective = before.clone()
    effective.view(-1)[[2, 30]] += 0.25
    torch.testing.assert_close(out.float(), F.linear(x, effective, plain.bias), atol=0.05, rtol=0.05)


class Int8Linear(torch.nn.Linear):
    """Rows of integers with a scale each, as 8-bit bases keep them."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.scale_O = base.weight.detach().abs().amax(1) / 127
        whole = (base.weight.detach() / self.scale_O[:, None]).round().to(torch.int8)
        self.weight = torch.nn.Parameter(whole, requires_grad=False)
        if base.bias is not None:
            self.bias = torch.nn.Parameter(base.bias.detach(), requires_grad=False)

    def dequantize(self):
        return self.weight.float() * self.scale_O[:, None]

    def forward(self, x):
        return F.linear(x, self.dequantize(), self.bias)


def quantised_llama():
    model = tiny_llama()
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Int8Linear(module))
    return model


def test_over_a_quantised_base():
    base = quantised_llama()
    integers = {n: p.clone() for n, p in base.named_parameters() if p.dtype == torch.int8}
    method = Spiel(density=0.05, reselect_every=3, accumulate=1)
    session = make_session(base, parameters=[method])
    losses = []
    Trainer(
        session,
        random_rows(),
        settings(epochs=4),
        observe=lambda event, r: losses.append(r["loss"]) if event == "step" else None,
    ).run()
    assert losses[-1] < losses[0]
    kept = {n.replace(".base_layer", ""): p for n, p in session.model.named_parameters() if p.dtype == torch.int8}
    assert kept.keys() == integers.keys()
    assert all(torch.equal(kept[n], v) for n, v in integers.items())
    ids = torch.arange(3, 11)[None]
    session.model.eval()
    wanted = session.model(input_ids=ids).logits
    with pytest.warns(UserWarning, match="dequantised"):
        plain = method.export(session.model)
    assert all(p.is_floating_point() for p in plain.parameters())
    torch.testing.assert_close(plain(input_ids=ids).logits, wanted, atol=1e-6, rtol=1e-5)


# -- training


def train(method, *, model=None, folder=None, resume=False, stop=None, **values):
    session = make_session(model or tiny_llama(), parameters=[method])
    losses = []

    def kill(event, record):
        if event == "step":
            losses.append(record["loss"])
        if event in ("step", "tick") and record["step"] == stop:
            raise KeyboardInterrupt

    trainer = Trainer(session, random_rows(), settings(**{"epochs": 4, **values}), folder=folder, observe=kill)
    try:
        trainer.run(resume=resume)
    except KeyboardInterrupt:
        assert stop
    return session, losses


@pytest.mark.parametrize("algorithm", ["ag", "ma"])
def test_budget_counts_and_base_hold_at_every_step(algorithm):
    base = weights(tiny_llama())
    seen = []

    class Watch(Spiel):
        def on_step(self, model, ctx):
            super().on_step(model, ctx)
            plain = dict(merged(model).named_parameters())
            changed = {n: p != base[n] for n, p in plain.items() if not torch.equal(p, base[n])}
            seen.append({n.removesuffix(".weight"): int(c.sum()) for n, c in changed.items()})
            for path, layer in self.layers.items():
                assert layer.index_K.unique().numel() == counts[path]
                inside = torch.zeros(layer.shape, dtype=torch.bool)
                inside.view(-1)[layer.index_K] = True
                assert not bool((plain[f"{path}.weight"] != base[f"{path}.weight"])[~inside].any())

    method = Watch(algorithm=algorithm, density=0.05, reselect_every=4, accumulate=2, reselect_rate=0.5)
    total = int(0.05 * sum(p.numel() for p in tiny_llama().parameters()))
    shapes = {n: p.numel() for n, p in base.items() if "layers" in n and "norm" not in n}
    counts = {n.removesuffix(".weight"): total * size // sum(shapes.values()) for n, size in shapes.items()}
    session, losses = train(method)
    assert len(seen) == 12
    for changed in seen:
        assert all(count <= counts[path] for path, count in changed.items())
        assert sum(changed.values()) <= total
    assert losses[-1] < losses[0]
    # The first closing replaces all, but for positions that accumulated gradients choose again.
    first, all_of_them = method.record()["reselections"][0]["replaced"], sum(counts.values())
    assert first == all_of_them if algorithm == "ma" else 0.8 * all_of_them < first <= all_of_them
    assert set(method.record()["weights"].values()) <= set(counts.values())
    frozen = {n.replace(".base_layer", ""): p for n, p in session.model.named_parameters() if "values" not in n}
    assert all(torch.equal(p, base[n]) for n, p in frozen.items())


def test_the_whole_budget_with_fixed_positions_is_full_fine_tuning_of_these_layers():
    class Linears:
        def apply(self, model, ctx):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("proj" in name)
            return model

        def groups(self, model):
            return [{"params": [p for p in model.parameters() if p.requires_grad]}]

        def on_grad(self, model, ctx): ...

        def on_step(self, model, ctx): ...

    whole = 2 * (4 * 256 + 3 * 512)
    _, sparse = train(Spiel(num_weights=whole, reselect_rate=0.0, epsilon=1e-12))
    _, full = train(Linears(), epsilon=1e-12)
    np.testing.assert_allclose(sparse, full, atol=1e-5)
    assert sparse[-1] < sparse[0] - 0.05


@pytest.mark.parametrize("accumulation", [1, 2])
def test_accumulated_gradients_resume_bit_equal_inside_and_outside_a_phase(accumulation, tmp_path):
    options = {"density": 0.05, "reselect_every": 4, "accumulate": 2, "reselect_rate": 0.5}
    more = {"save_steps": 1, "accumulation": accumulation}
    whole, _ = train(Spiel(**options), **more)
    for stop in (1, 3, 4, 8):
        train(Spiel(**options), folder=tmp_path, stop=stop, resume=True, **more)
    last, _ = train(Spiel(**options), folder=tmp_path, resume=True, **more)
    a, b = (merged(s.model) for s in (whole, last))
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y), name


def test_memory_follows_the_budget_and_not_the_model():
    def measured(density, algorithm="ag"):
        method = Spiel(density=density, algorithm=algorithm)
        method.apply(tiny_llama().requires_grad_(False), FakeContext())
        return method.bytes(), sum(method.sizes)

    for density in (0.02, 0.2):
        held, count = measured(density)
        assert held == {"deltas": 8 * count, "optimizer": 12 * count}
    assert (
        measured(0.2, "ma")[0]["optimizer"]
        == measured(0.02, "ma")[0]["optimizer"]
        == 4 * 14 * 0 + sum(4 * (a + b) for a, b in [*[(16, 16)] * 8, *[(32, 16)] * 6])
    )


def test_the_delta_is_what_the_merged_model_has():
    method = Spiel(density=0.05, reselect_every=4, accumulate=2)
    session, _ = train(method)
    base, plain = weights(tiny_llama()), dict(method.export(session.model).named_parameters())
    parts, absolute = method.delta(session.model)
    assert absolute == {}
    for name, value in base.items():
        change = dense(parts[name]) if name in parts else torch.zeros_like(value)
        torch.testing.assert_close(plain[name], value + change, atol=1e-6, rtol=1e-6)
    assert wrapped(session.model), "the live model still has its layers"


def test_conv1d_models_train():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=64, n_positions=64, bos_token_id=1, eos_token_id=2)
    method = Spiel(density=0.05, reselect_every=4, accumulate=2)
    _, losses = train(method, model=GPT2LMHeadModel(config))
    assert len(method.layers) == 8
    assert losses[-1] < losses[0]


def test_a_new_head_is_trained_in_full():
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification(tiny_llama().config).requires_grad_(False)
    method = Spiel(density=0.05)
    method.apply(model, FakeContext(task="sequence-classification"))
    assert [n for n, p in model.named_parameters() if p.requires_grad and "values" not in n] == ["score.weight"]
    assert list(method.delta(model)[1]) == ["score.weight"]


# -- refusals


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"accumulate": 20}, r"accumulate \(20\) must be less than reselect_every \(20\)"),
        ({"density": 0.1, "num_weights": 5}, "density and num_weights both state the budget"),
    ],
)
def test_refused_options(options, text):
    with pytest.raises(UserError, match=text):
        Spiel(**options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_weights": 6000}, "budget of 6,000 weights is larger than the 5,120 weights"),
        ({"num_weights": 1}, "leaves none for any of 14 layers"),
        ({"target_modules": ["q_prj"]}, "spiel: target_modules: 'q_prj' fits no tensor.*nearest names: q_proj"),
        ({"target_modules": ["category:norm"]}, "holds no linear map"),
        ({"target_modules": ["embed_tokens"]}, "holds no linear map"),
    ],
)
def test_refused_models(options, text):
    with pytest.raises(UserError, match=text):
        Spiel(**options).apply(tiny_llama().requires_grad_(False), FakeContext())


def test_tied_matrices_and_several_processes_are_refused(monkeypatch):
    with pytest.raises(UserError, match="are one tensor, and its deltas would be counted twice"):
        Spiel(target_modules=["lm_head"]).apply(tiny_llama(tied=True).requires_grad_(False), FakeContext())
    fake = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2)
    monkeypatch.setattr(torch, "distributed", fake)
    with pytest.raises(UserError, match="Use algorithm: ma"):
        Spiel().apply(tiny_llama().requires_grad_(False), FakeContext())


def test_resuming_with_another_budget_is_refused():
    made = []
    for density in (0.05, 0.1):
        method = Spiel(density=density)
        method.apply(tiny_llama().requires_grad_(False), FakeContext())
        made.append(method)
    with pytest.raises(UserError, match="Resume with the same options"):
        made[1].load(made[0].state())


def test_wrapping_keeps_the_name_of_a_module():
    model = tiny_llama()
    wrap(model, "model.layers.0.mlp.up_proj", torch.tensor([0]))
    assert list(wrapped(model)) == ["model.layers.0.mlp.up_proj"]
    assert model.model.layers[0].mlp.up_proj.weight.shape == (32, 16)
