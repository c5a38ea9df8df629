"""Half fine-tuning: what is chosen, counted by hand; what is held, bit for bit."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import FakeContext
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from helpers import make_session, random_rows, settings, tiny_llama
from luthier.core.errors import UserError
from luthier.core.rng import stream
from luthier.engine.loop import Trainer
from luthier.functional import tensor_selection as selection
from luthier.methods.parameters.full import Full
from luthier.methods.parameters.half_ft import HalfFineTuning


def llama(layers=4, heads=4, kv_heads=4, hidden=32, **about):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": hidden, "intermediate_size": 48, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=kv_heads, **about))


def shapes(model):
    return {n: tuple(p.shape) for n, p in model.named_parameters()}


def applied(model=None, *, seed=0, **options):
    method = HalfFineTuning(**options)
    model = (model or llama()).requires_grad_(False)
    return method, method.apply(model, FakeContext(seed=seed))


def opened(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


def of_category(names, part):
    return [n for n in names if part in n]


# -- the choice


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5, 8])
def test_counts_by_category(layers):
    _, model = applied(llama(layers))
    blocks = {n for n in opened(model) if ".layers." in n}
    assert len(of_category(blocks, "self_attn")) == 2 * layers
    assert len(of_category(blocks, "mlp")) == round(1.5 * layers)
    assert len(of_category(blocks, "norm")) == layers
    per_layer = Counter(n.split(".")[2] for n in of_category(blocks, "mlp"))
    assert set(per_layer.values()) <= {1, 2}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= opened(model)


def test_about_half_of_the_block_parameters():
    for seed in range(20):
        method, _ = applied(llama(4), seed=seed)
        assert 0.45 <= method.trained_tensors()["share_of_blocks"] <= 0.55


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75, 1.0])
def test_other_fractions_meet_the_total(fraction):
    _, model = applied(llama(6), fraction=fraction)
    blocks = {n for n in opened(model) if ".layers." in n}
    assert len(of_category(blocks, "self_attn")) == round(6 * 4 * fraction)
    assert len(of_category(blocks, "mlp")) == round(6 * 3 * fraction)
    assert len(of_category(blocks, "norm")) == round(6 * 2 * fraction)


def test_the_seed_and_the_stage_decide():
    chosen = lambda **about: opened(applied(**about)[1])  # noqa: E731
    assert chosen() == chosen()
    assert chosen() != chosen(seed=1)
    assert chosen(mask_seed=7) == chosen(mask_seed=7, seed=5)

    def of_stage(stage, **options):
        ctx = FakeContext()
        ctx.stage = stage
        return opened(HalfFineTuning(**options).apply(llama().requires_grad_(False), ctx))

    assert of_stage(0) != of_stage(1)
    assert of_stage(0, resample="never") == of_stage(1, resample="never")
    first, second = (of_stage(s, fixed_selection="alternate") for s in (0, 1))
    outside = {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    assert first & second == outside
    assert first | second == {n for n, _ in llama().named_parameters()}


def test_every_unit_is_chosen_about_half_of_the_time():
    units = selection.block_units(shapes(llama(4)))
    counts = Counter()
    for seed in range(400):
        counts.update(selection.select(units, 0.5, stream(seed, "test")))
    shares = np.array([counts[u.name] / 400 for u in units])
    assert np.abs(shares - 0.5).max() < 4.5 * math.sqrt(0.25 / 400)


def test_balance_by_size_under_grouped_query_attention():
    grouped = llama(8, heads=4, kv_heads=1)

    def attention_share(balance, seed):
        return applied(grouped, seed=seed, balance=balance)[0].trained_tensors()["share_by_category"]["attention"]

    assert {attention_share("size", s) for s in range(5)} == {0.5}
    assert len({attention_share("count", s) for s in range(5)}) > 1


@pytest.mark.parametrize("level", ["layer", "model"])
def test_other_levels(level):
    method, model = applied(llama(6), level=level)
    share = method.trained_tensors()["share_of_blocks"]
    if level == "layer":
        assert share == 0.5
        layers = {n.split(".")[2] for n in opened(model) if ".layers." in n}
        assert len(layers) == 3
    else:
        assert share == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("fixed", "expected"),
    [
        ("attention", lambda n: "self_attn" in n),
        ("ffn", lambda n: "mlp" in n),
        ("lower", lambda n: n.split(".")[2] in "01"),
        ("upper", lambda n: n.split(".")[2] in "23"),
        (["up_proj", "model.layers.0.self_attn.q_proj", "layers.3.*norm"], None),
    ],
)
def test_fixed_selections(fixed, expected):
    _, model = applied(fixed_selection=fixed)
    blocks = {n for n, _ in model.named_parameters() if ".layers." in n}
    if expected is None:
        norms = ("model.layers.3.input_layernorm.weight", "model.layers.3.post_attention_layernorm.weight")
        listed = {"model.layers.0.self_attn.q_proj.weight", *norms}
        expected = lambda n: "up_proj" in n or n in listed  # noqa: E731
    assert opened(model) & blocks == {n for n in blocks if expected(n)}


def test_embeddings_and_final_norm_can_be_frozen_and_a_new_head_never_is():
    from transformers import LlamaForSequenceClassification

    _, model = applied(embeddings="freeze", final_norm="freeze")
    assert all(".layers." in n for n in opened(model))
    config = llama().config
    config.num_labels = 2
    _, model = applied(LlamaForSequenceClassification(config), embeddings="freeze", final_norm="freeze")
    assert "score.weight" in opened(model)
    _, tied = applied(tiny_llama(tied=True), embeddings="freeze")
    assert "model.embed_tokens.weight" not in opened(tied)


def test_errors_name_the_way_out():
    with pytest.raises(UserError, match="no transformer blocks"):
        applied(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)))
    with pytest.raises(UserError, match="Did you mean 'lower'"):
        HalfFineTuning(fixed_selection="lowr")
    with pytest.raises(UserError, match="fits no module"):
        applied(fixed_selection=["query_proj"])
    with pytest.raises(UserError, match="leaves no attention matrix"):
        applied(llama(2), fraction=0.01)
    with pytest.raises(UserError, match="names whole tensors"):
        HalfFineTuning(level="element", fixed_selection="ffn")


# -- recognising blocks


def test_units_of_other_architectures():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=16, n_positions=8))
    found = Counter((u.layer, u.category) for u in selection.block_units(shapes(gpt2)))
    assert found[("transformer.h", 0), "attention"] == 2
    assert found[("transformer.h", 0), "ffn"] == 2
    assert found[("transformer.h", 1), "norm"] == 2
    bias_with_matrix = next(u for u in selection.block_units(shapes(gpt2)) if u.name.endswith("h.0.mlp.c_fc"))
    assert [t.rpartition(".")[2] for t in bias_with_matrix.tensors] == ["weight", "bias"]
    assert bias_with_matrix.size == 8 * 32 + 32


def test_a_numbered_list_without_attention_is_no_stack_of_blocks():
    names = {"head.0.weight": (2, 2), "head.1.weight": (2, 2), "m.layers.0.self_attn.q_proj.weight": (2, 2)}
    assert [u.name for u in selection.block_units(names)] == ["m.layers.0.self_attn.q_proj"]


def test_encoder_and_decoder_stacks_stay_apart():
    part = "block.0.layer.0"
    names = {f"{s}.{part}.SelfAttention.q.weight": (2, 2) for s in ("encoder", "decoder")}
    assert {u.layer for u in selection.block_units(names)} == {("encoder.block", 0), ("decoder.block", 0)}


# -- fused matrices


def test_fused_rows_in_both_layouts():
    plain = selection.fused_rows("a.qkv_proj", 8, heads=2, kv_heads=1, head_dim=2, per_head=False)
    assert [r.tolist() for r in plain.rows] == [[0, 1, 2, 3], [4, 5], [6, 7]]
    inside = selection.fused_rows("a.query_key_value", 12, heads=2, kv_heads=2, head_dim=2, per_head=True)
    assert [r.tolist() for r in inside.rows] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    gate = selection.fused_rows("a.gate_up_proj", 6, heads=2, kv_heads=2, head_dim=1, per_head=False)
    assert [r.tolist() for r in gate.rows] == [[0, 1, 2], [3, 4, 5]]
    assert selection.fused_rows("a.qkv_proj", 9, heads=2, kv_heads=1, head_dim=2, per_head=False) is None
    assert selection.fused_rows("a.dense", 8, heads=2, kv_heads=1, head_dim=2, per_head=False) is None


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=64, n_positions=64))


def gpt_neox():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, vocab_size=64, max_position_embeddings=64))


@pytest.mark.parametrize(("make", "dim"), [(gpt2, 1), (gpt_neox, 0)])
def test_a_fused_matrix_counts_as_three_units_and_held_rows_do_not_move(make, dim):
    method = HalfFineTuning(fraction=0.5)
    session = make_session(make(), parameters=[method])
    model = session.model
    fused = [n for n in method._masked.masks if n.endswith("weight")]
    assert fused
    for layer in (0, 1):
        chosen = [u for u in method._units if u.layer[1] == layer and u.category == "attention"]
        assert len(chosen) == 4
        assert sum(u.name in method._chosen for u in chosen) == 2
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    Trainer(session, random_rows(), settings(weight_decay=0.5, max_steps=3)).run()
    after = dict(model.named_parameters())
    for name in method._masked.masks:
        moved = (after[name] != before[name]).reshape(before[name].shape)
        along = moved if moved.dim() == 1 else moved.any(dim=1 - dim)
        mask = method._masked.masks[name].flatten()
        assert not bool((along & ~mask).any()), name
        # Attention does not depend on the keys' bias, so its gradient is zero but for rounding.
        if not name.endswith("bias"):
            assert bool(along[mask].all()), name


def test_an_unknown_fused_layout_is_one_unit_with_a_warning():
    model = gpt2()
    model.config.n_head = 3
    method = HalfFineTuning()
    with pytest.warns(UserWarning, match="it is one unit"):
        method.apply(model.requires_grad_(False), FakeContext())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HalfFineTuning(split_fused=False).apply(gpt2().requires_grad_(False), FakeContext())


# -- training


def train(method, *, model=None, folder=None, resume=False, stop=None, **values):
    session = make_session(model or tiny_llama(), parameters=[method])

    def kill(event, record):
        if event in ("step", "tick") and record["step"] == stop:
            raise KeyboardInterrupt

    trainer = Trainer(
        session, random_rows(), settings(**{"weight_decay": 0.3, "epochs": 2, **values}), folder=folder, observe=kill
    )
    try:
        trainer.run(resume=resume)
    except KeyboardInterrupt:
        assert stop
    return session


def values_of(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def test_frozen_tensors_stay_bit_identical_and_chosen_ones_move():
    method = HalfFineTuning()
    base = values_of(tiny_llama())
    session = train(method)
    for name, parameter in session.model.named_parameters():
        assert torch.equal(parameter, base[name]) != parameter.requires_grad, name
    held = {id(p) for p in session.model.parameters() if not p.requires_grad}
    assert held
    assert not held & {id(p) for p in method.groups(session.model)[0]["params"]}


def test_fraction_one_is_full_fine_tuning_bit_for_bit():
    full, half = train(Full()), train(HalfFineTuning(fraction=1.0))
    for (name, a), b in zip(full.model.named_parameters(), half.model.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_single_entries_are_held_exactly(optimizer):
    method = HalfFineTuning(level="element", fraction=0.25)
    base = values_of(tiny_llama())
    session = train(method, optimizer=optimizer)
    inside = total = 0
    for name, mask in method._masked.masks.items():
        moved = dict(session.model.named_parameters())[name] != base[name]
        assert not bool((moved & ~mask).any()), name
        inside, total = inside + int(mask.sum()), total + mask.numel()
    assert inside / total == pytest.approx(0.25, abs=0.02)
    assert method.trained_tensors()["share_of_blocks"] == pytest.approx(0.25, abs=1e-3)


@pytest.mark.parametrize("level", ["category", "element"])
def test_resampling_within_a_run_holds_what_is_not_chosen_now(level):
    seen = []

    class Watch(HalfFineTuning):
        def on_step(self, model, ctx):
            super().on_step(model, ctx)
            seen.append((set(self._chosen), {n: m.clone() for n, m in self._masked.masks.items()}, values_of(model)))

    method = Watch(resample="steps:2", level=level)
    session = make_session(tiny_llama(), parameters=[method])
    start = values_of(session.model)
    Trainer(session, random_rows(), settings(weight_decay=0.3, epochs=2)).run()
    for (chosen, masks, new), old in zip(seen, [start, *(s[2] for s in seen)], strict=False):
        for unit in method._units:
            for name in unit.tensors:
                moved = old[name] != new[name]
                if unit.name not in chosen:
                    assert not bool(moved.any()), name
                elif name in masks:
                    assert not bool((moved & ~masks[name]).any()), name
    rounds = [(frozenset(c), frozenset((n, m.sum().item()) for n, m in masks.items())) for c, masks, _ in seen]
    assert rounds[0] == rounds[1] != rounds[2] == rounds[3] != rounds[4] == rounds[5]


def test_a_new_choice_of_each_epoch_holds_from_its_first_step():
    seen = []

    class Watch(HalfFineTuning):
        def on_step(self, model, ctx):
            super().on_step(model, ctx)
            seen.append((ctx.epoch, frozenset(self._chosen)))

    Trainer(make_session(tiny_llama(), parameters=[Watch(resample="epoch")]), random_rows(), settings(epochs=3)).run()
    assert len(seen) == 9
    assert len(set(seen)) == 3


def test_entries_that_come_back_start_with_fresh_moments():
    states = []

    class Watch(HalfFineTuning):
        def before_step(self, batches, ctx):
            super().before_step(batches, ctx)
            if ctx.step == 2:
                for name, mask in self._masked.masks.items():
                    kept = ctx.optimizer.state[ctx.model.get_parameter(name)]
                    states.append((mask, kept["exp_avg"].clone(), kept["exp_avg_sq"].clone()))

    method = Watch(resample="steps:2", level="element")
    Trainer(make_session(tiny_llama(), parameters=[method]), random_rows(), settings(max_steps=3)).run()
    assert states
    for mask, first, second in states:
        assert not bool(first[~mask].any())
        assert not bool(second[~mask].any())
        if mask.dim() > 1:  # of a vector the two choices may have nothing in common
            assert bool(first[mask].any())


@pytest.mark.parametrize("options", [{}, {"resample": "steps:2"}, {"resample": "epoch", "level": "element"}])
def test_killed_runs_resume_bit_equal(options, tmp_path):
    whole = train(HalfFineTuning(**options), save_steps=1)
    train(HalfFineTuning(**options), folder=tmp_path, stop=3, save_steps=1)
    train(HalfFineTuning(**options), folder=tmp_path, stop=5, resume=True, save_steps=1)
    last = train(HalfFineTuning(**options), folder=tmp_path, resume=True, save_steps=1)
    for (name, a), b in zip(whole.model.named_parameters(), last.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_resuming_with_another_selection_is_refused():
    method, _ = applied()
    other, _ = applied(fraction=0.75)
    with pytest.raises(UserError, match=r"fraction = 0\.5, this recipe says 0\.75"):
        other.load(method.state())
    other, _ = applied(seed=3)
    with pytest.raises(UserError, match="seed = 0"):
        other.load(method.state())


def test_what_is_trained_is_reported():
    method, model = applied(llama(4))
    report = method.trained_tensors()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report["trainable_share"] == pytest.approx(trained / sum(p.numel() for p in model.parameters()))
    assert report["share_by_category"]["attention"] == 0.5
    assert all(model.get_submodule(name).weight.numel() == size for name, size in report["tensors"].items())
    ctx = FakeContext()
    method.on_step(model, ctx)
    assert ctx.logged["trainable_share"] == report["trainable_share"]


def test_several_processes_cannot_resample_within_a_run(monkeypatch):
    fake = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2)
    monkeypatch.setattr(torch, "distributed", fake)
    with pytest.raises(UserError, match="several processes"):
        applied(resample="steps:5")
    applied(resample="stage")
