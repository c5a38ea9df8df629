"""GreenTrainer: the exact selection against exhaustive search, costs by hand and by torch's counter, an invisible probe."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from helpers import MemoryRows, make_session, random_rows, settings, tiny_llama, weights
from luthier.core.errors import UserError
from luthier.engine.loop import Trainer
from luthier.functional.backward_costs import Costs, Recorder, best_set, reachable
from luthier.functional.parameter_selector import sites
from luthier.methods.parameters import green_trainer
from luthier.methods.parameters.full import Full
from luthier.methods.parameters.green_trainer import GreenTrainer, importances


def costs_of(dy, dw, forward=0.0):
    return Costs(tuple(f"t{i}" for i in range(len(dy))), np.array(dy, float), np.array(dw, float), forward)


# -- costs and budget


def test_the_cost_of_a_set_by_hand_and_by_a_running_maximum():
    costs = costs_of([5, 1, 4, 2], [3, 7, 1, 6], forward=14.5)
    assert costs.backward == 29
    # The second tensor from the input and the last: their own gradients, and passing through the last three.
    assert costs.of([0, 1, 0, 1]) == 7 + 6 + (1 + 4 + 2)
    assert costs.of([0, 0, 0, 0]) == 0
    assert costs.of([1, 1, 1, 1]) == 29
    for mask in itertools.product([0, 1], repeat=4):
        running = np.maximum.accumulate(mask)
        assert costs.of(mask) == (running * costs.dy).sum() + (np.array(mask) * costs.dw).sum()
    # rho = 0.8 of 14.5 + 29 = 34.8, of which 14.5 are the forward pass: 20.3 of 29.
    assert costs.backward_share(0.8) == pytest.approx(20.3 / 29)
    assert costs.backward_share(1.0) == 1.0
    assert costs.backward_share(0.3) < 0
    assert costs.share([0, 1, 0, 1]) == pytest.approx((14.5 + 20) / 43.5)
    assert reachable(costs, 0.25).tolist() == [False, True, True, True]


@pytest.mark.parametrize("rounding", ["floor", "ceil"])
def test_the_selection_is_exact(rounding):
    rng = np.random.default_rng(0)
    checked = 0
    for _ in range(300):
        n = int(rng.integers(1, 10))
        # Whole numbers that quantisation leaves as they are.
        costs = costs_of(rng.integers(0, 9, n), rng.integers(0, 9, n))
        if costs.backward == 0:
            continue
        importance = rng.normal(size=n)
        share = float(rng.uniform(0.05, 1.0))
        budget = np.floor(share * costs.backward + 1e-9)
        best = max(
            (sum(i for i, m in zip(importance, mask, strict=True) if m), mask)
            for mask in itertools.product([0, 1], repeat=n)
            if costs.of(mask) <= budget and all(importance[k] > 0 for k in range(n) if mask[k])
        )
        try:
            found = best_set(importance, costs, share, levels=int(costs.backward), rounding=rounding)
        except ValueError:
            assert min(costs.of(np.eye(n, dtype=bool)[k]) for k in range(n)) > budget
            continue
        checked += 1
        assert costs.of(found) <= budget
        if best[0] > 0:
            assert importance[found].sum() == pytest.approx(best[0])
        else:  # nothing pays: the best single tensor that fits
            (only,) = np.flatnonzero(found)
            fitting = [k for k in range(n) if costs.of(np.eye(n, dtype=bool)[k]) <= budget]
            assert importance[only] == max(importance[k] for k in fitting)
    assert checked > 200


def test_the_whole_budget_selects_everything_that_pays():
    costs = costs_of([3.3, 1.7, 0.2], [2.9, 8.1, 0.4])
    assert best_set(np.array([0.1, 1.0, 0.2]), costs, 1.0).all()


def test_importance_by_hand():
    before = [torch.tensor([1.0, 2.0]), torch.tensor([0.0]), torch.tensor([5.0])]
    after = [torch.tensor([0.9, 2.2]), torch.tensor([1.0]), torch.tensor([4.0])]
    grads = [torch.tensor([3.0, 1.0]), torch.tensor([0.4]), None]
    # -(3 * -0.1 + 1 * 0.2) = 0.1 and -0.4, over 0.4
    np.testing.assert_allclose(importances(before, after, grads), [0.25, -1.0, 0.0], atol=1e-6)


# -- costs of real models


def eager(kind, tied):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(
            n_embd=32, n_layer=3, n_head=4, vocab_size=96, n_positions=64, bos_token_id=1, eos_token_id=2
        )
        return GPT2LMHeadModel._from_config(config, attn_implementation="eager")
    sizes = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=96, num_key_value_heads=2, tie_word_embeddings=tied, **sizes)
    return LlamaForCausalLM._from_config(config, attn_implementation="eager")


def full_rows(count=8, length=24):
    """Rows of one length, so that nothing is padded."""
    rng = np.random.default_rng(0)
    return MemoryRows([([1, *rng.integers(3, 96, size=length - 1).tolist()], [1, length]) for _ in range(count)])


def flops(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2  # multiply-adds


@pytest.mark.parametrize(("kind", "tied"), [("gpt2", True), ("llama", True), ("llama", False)])
def test_counted_costs_against_the_counter_of_torch(kind, tied):
    model = eager(kind, tied)
    session = make_session(model)
    rows = full_rows()
    batch = session.task.collate(rows.fetch(range(8)), range(8))
    every = sites(model)
    recorder = Recorder(model, every, 32)
    recorder(batch, lambda: session.forward(batch, grad=False))
    costs = recorder.costs()
    assert set(costs.names) == {s.name for s in every}

    def measured(chosen):
        for name, c in zip(costs.names, chosen, strict=True):
            model.get_parameter(name).requires_grad_(bool(c))
        losses = []
        forward = flops(lambda: losses.append(session.loss(batch).sum))
        # The head forms its part of the gradient in the forward pass: together they are what a step costs.
        return forward + flops(losses[0].backward)

    n = len(costs.names)
    assert measured([1] * n) == pytest.approx(costs.forward + costs.backward, rel=0.05)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        chosen = best_set(rng.uniform(0.1, 1.0, n), costs, rng.uniform(0.3, 0.9))
        assert measured(chosen) == pytest.approx(costs.forward + costs.of(chosen), rel=0.15)


def test_linear_norm_and_attention_by_hand():
    model, rows = eager("llama", False), full_rows(2, 5)
    session = make_session(model)
    batch = session.task.collate(rows.fetch(range(2)), range(2))
    recorder = Recorder(model, sites(model), 32)
    recorder(batch, lambda: session.forward(batch, grad=False))
    costs = recorder.costs()
    of = {name: (dy, dw) for name, dy, dw in zip(costs.names, costs.dy, costs.dw, strict=True)}
    block = "model.layers.1"
    assert of[f"{block}.self_attn.q_proj.weight"] == (10 * 32 * 32, 10 * 32 * 32)
    assert of[f"{block}.self_attn.v_proj.weight"] == (10 * 32 * 16 + 4 * 2 * 25 * 32, 10 * 32 * 16)
    assert of[f"{block}.input_layernorm.weight"] == (320, 320)
    assert of["lm_head.weight"] == (8 * 96 * 32, 8 * 96 * 32)  # four predicted tokens of each row
    assert of["model.embed_tokens.weight"] == (0, 320)
    assert costs.names[0] == "model.embed_tokens.weight"
    assert costs.names[-1] == "lm_head.weight"
    matrices = 10 * 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 80) + 8 * 96 * 32 + 3 * 2 * 2 * 25 * 32
    assert costs.forward == matrices


def test_padding_is_not_counted():
    model = tiny_llama()
    session = make_session(model)
    rows = random_rows(6)
    whole, alone = (Recorder(model, sites(model), 16) for _ in range(2))
    batch = session.task.collate(rows.fetch(range(6)), range(6))
    whole(batch, lambda: session.forward(batch, grad=False))
    for i in range(6):
        one = session.task.collate(rows.fetch([i]), [i])
        alone(one, lambda one=one: session.forward(one, grad=False))
    np.testing.assert_allclose(whole.costs().dy, alone.costs().dy)
    np.testing.assert_allclose(whole.costs().dw[1:], alone.costs().dw[1:])


# -- training


def train(method, *, model=None, folder=None, resume=False, stop=None, rows=None, **values):
    session = make_session(model or tiny_llama(), parameters=[method])
    records = []

    def watch(event, record):
        if event == "step":
            records.append(record)
        if event in ("step", "tick") and record["step"] == stop:
            raise KeyboardInterrupt

    trainer = Trainer(session, rows or random_rows(), settings(**{"epochs": 3, **values}), folder=folder, observe=watch)
    try:
        trainer.run(resume=resume)
    except KeyboardInterrupt:
        assert stop
    return session, records


def same(a, b):
    for (name, x), y in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("values", [{}, {"optimizer": "sgd"}, {"accumulation": 2}])
def test_a_probe_that_changes_nothing_leaves_no_trace(values, monkeypatch):
    """Weights, moments and step count are restored: with everything selected the run is full fine-tuning."""
    monkeypatch.setattr(green_trainer, "best_set", lambda importance, *_, **__: np.ones(len(importance), bool))
    probed, _ = train(
        GreenTrainer(flops=0.9, reselect_epochs=1), model=tiny_llama(dropout=0.1), weight_decay=0.1, **values
    )
    assert len(probed.stack.parameters[0].record()["choices"]) == 3
    full, _ = train(Full(), model=tiny_llama(dropout=0.1), weight_decay=0.1, **values)
    same(probed, full)


def test_moments_wait_for_a_tensor_that_comes_back(monkeypatch):
    """The whole set, then the upper half, then the whole set again, against one AdamW over all tensors."""
    rounds = iter([1.0, 0.5, 1.0])

    def pick(importance, *_, **__):
        n, share = len(importance), next(rounds)
        return np.arange(n) >= round(n * (1 - share))

    monkeypatch.setattr(green_trainer, "best_set", pick)
    session, _ = train(GreenTrainer(flops=0.9, reselect_steps=3), epochs=3, schedule="constant", max_grad_norm=None)

    class Halves:
        """Full fine-tuning that takes the gradients of the lower half away for three steps."""

        def apply(self, model, ctx):
            return model.requires_grad_(True)

        def groups(self, model):
            return [{"params": list(model.parameters())}]

        def on_grad(self, model, ctx):
            if 3 <= ctx.step < 6:
                for name in low:
                    model.get_parameter(name).grad = None

        def on_step(self, model, ctx): ...

    low = set(session.stack.parameters[0]._choices[0]["tensors"]) - set(
        session.stack.parameters[0]._choices[1]["tensors"]
    )
    assert len(low) == 10
    plain, _ = train(Halves(), epochs=3, schedule="constant", max_grad_norm=None)
    same(session, plain)


def test_frozen_tensors_are_untouched_and_shares_are_kept():
    base = weights(tiny_llama())
    session, records = train(GreenTrainer(flops=0.5, reselect_epochs=3), weight_decay=0.3)
    (choice,) = session.stack.parameters[0].record()["choices"]
    moved = {n for n, p in session.model.named_parameters() if not torch.equal(p, base[n])}
    assert moved == set(choice["tensors"])
    assert choice["flops_share"] == pytest.approx(0.5, abs=0.05)
    assert 0 < choice["importance_captured"] <= 1
    assert {r["flops_share"] for r in records} == {choice["flops_share"]}


def test_the_choice_prefers_what_pays():
    """With the importances given, the selection under the real costs is the exact one."""
    session, _ = train(GreenTrainer(flops=0.6, reselect_epochs=9), max_steps=1)
    captured = session.stack.parameters[0].record()["choices"][0]["importance_captured"]
    assert captured > 0.3


@pytest.mark.parametrize("options", [{"reselect_epochs": 1}, {"reselect_steps": 2, "coarse": True, "rounding": "ceil"}])
def test_resumes_bit_equal_across_choices(options, tmp_path):
    make = lambda: GreenTrainer(flops=0.5, **options)  # noqa: E731
    whole, _ = train(make(), save_steps=1)
    for stop in (2, 3, 5, 7):
        train(make(), folder=tmp_path, stop=stop, resume=True, save_steps=1)
    last, _ = train(make(), folder=tmp_path, resume=True, save_steps=1)
    same(whole, last)
    assert whole.stack.parameters[0].record() == last.stack.parameters[0].record()


def test_weight_and_bias_of_a_module_together():
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=64, bos_token_id=1, eos_token_id=2)
    session, _ = train(GreenTrainer(flops=0.5, coarse=True), model=GPT2LMHeadModel(config), max_steps=1)
    chosen = set(session.stack.parameters[0].record()["choices"][0]["tensors"])
    modules = {name.rpartition(".")[0] for name in chosen if "wte" not in name and "wpe" not in name}
    assert chosen >= {f"{m}.{kind}" for m in modules for kind in ("weight", "bias")}


def test_candidates_limit_the_choice():
    session, _ = train(GreenTrainer(flops=0.6, candidates=["category:attention"]), max_steps=1)
    assert all("self_attn" in n for n in session.stack.parameters[0].record()["choices"][0]["tensors"])


def test_a_budget_below_the_forward_pass_warns_and_an_impossible_one_is_refused(monkeypatch):
    with pytest.warns(UserWarning, match=r"the least that can be had is 0\.\d\d"):
        train(GreenTrainer(flops=0.05), rows=random_rows(8), max_steps=1)
    monkeypatch.setattr(green_trainer, "_LEAST", 0.0)
    refused = pytest.raises(UserError, match=r"not even the last tensor can be trained; the least is 0\.\d")
    with refused, pytest.warns(UserWarning, match="forward pass alone"):
        train(GreenTrainer(flops=0.01), model=eager("llama", False), max_steps=1)
    with pytest.raises(UserError, match=r"green-trainer: candidates: 'q_prj' fits no tensor.*nearest names: q_proj"):
        make_session(tiny_llama(), parameters=[GreenTrainer(candidates=["q_prj"])])
