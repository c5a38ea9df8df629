"""Composable sparse fine-tuning: the mask by hand, two phases and a rewind, what is held, and deltas that add up."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import FakeContext
from transformers import LlamaForSequenceClassification

import luthier
from helpers import make_session, random_rows, settings, tiny_bert, tiny_llama, weights
from luthier.core.errors import UserError
from luthier.core.protocols import Artefact
from luthier.engine.loop import Trainer
from luthier.functional.tying import is_tied, untie
from luthier.methods.parameters.composable_sparse_ft import SLUG, l1_gradient, select
from luthier.methods.parameters.composable_sparse_ft import ComposableSparseFineTuning as Sparse
from luthier.methods.procedures.composable_sparse_ft import Phase, composable_sparse_ft, phase_steps
from luthier.models.delta import Delta

BASE = "the base"


# -- the mask


def test_the_largest_changes_over_all_tensors_and_growing():
    start = {"a": torch.zeros(2, 3), "b": torch.tensor([10.0, 10.0])}
    tuned = {"a": torch.tensor([[0.1, -0.5, 0.0], [0.4, 0.0, -0.2]]), "b": torch.tensor([10.3, 9.0])}
    first = select(tuned, start, 2)
    assert first["a"].int().tolist() == [[0, 1, 0], [0, 0, 0]]
    assert first["b"].int().tolist() == [0, 1]
    # Later changes are larger elsewhere; what is chosen stays, and two others come in.
    tuned["a"][0] = torch.tensor([9.0, 0.0, 0.0])
    second = select(tuned, start, 2, first)
    assert second["a"].int().tolist() == [[1, 1, 0], [1, 0, 0]]
    assert second["b"].int().tolist() == [0, 1]
    each = select(tuned, start, 4, per_tensor=True)
    assert (int(each["a"].sum()), int(each["b"].sum())) == (3, 1)


def test_what_is_masked_trained_and_frozen():
    maskable, heads = Sparse().divide(tiny_llama(), "causal-lm")
    assert heads == []
    assert "model.embed_tokens.weight" in maskable
    assert len(maskable) == 1 + 2 * 7
    assert not any("norm" in name for name in maskable)
    assert Sparse(freeze_decoder=False).divide(tiny_llama(), "causal-lm")[1] == ["lm_head.weight"]
    assert len(Sparse(freeze_layer_norms=False).divide(tiny_llama(), "causal-lm")[0]) == 15 + 5
    assert "model.embed_tokens.weight" not in Sparse(freeze_embeddings=True).divide(tiny_llama(), "causal-lm")[0]
    only = Sparse(trainable=["category:attention"]).divide(tiny_llama(), "causal-lm")[0]
    assert len(only) == 8
    classifier = LlamaForSequenceClassification(tiny_llama().config)
    assert Sparse().divide(classifier, "sequence-classification")[1] == ["score.weight"]
    assert Sparse(freeze_head=True).divide(classifier, "sequence-classification")[1] == []
    bert = tiny_bert()
    maskable, heads = Sparse().divide(bert, "masked-lm")
    # The decoder of BERT is tied to the embedding and is no head; its transform and biases are trained in full.
    assert "bert.embeddings.word_embeddings.weight" in maskable
    assert set(heads) == {
        "cls.predictions.bias",
        "cls.predictions.transform.dense.weight",
        "cls.predictions.transform.dense.bias",
    }


def test_budgets():
    there = sum(p.numel() for n, p in tiny_llama().named_parameters() if "norm" not in n and n != "lm_head.weight")
    for options, wanted in (({}, there // 100), ({"proportion": 0.5}, there // 2), ({"num_entries": 7}, 7)):
        method = Sparse(**options)
        method.apply(tiny_llama().requires_grad_(False), FakeContext())
        assert sum(method.record()["entries"].values()) == wanted


def test_l1_by_hand():
    theta, theta0 = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[1.0, 0.0], [4.0, -1.5]])
    # (0.3 / 20) * (0 + 2 + 1 + 0.5) by finite differences of each entry
    penalty = lambda t: 0.3 / 20 * np.abs(t - theta0.double().numpy()).sum()  # noqa: E731
    assert penalty(theta.double().numpy()) == pytest.approx(0.0525)
    found = l1_gradient(theta, theta0, 0.3, 20)
    assert found.tolist()[0][0] == 0.0
    for i, j in ((0, 1), (1, 0), (1, 1)):
        step = np.zeros((2, 2))
        step[i, j] = 1e-4
        numeric = (penalty(theta.double().numpy() + step) - penalty(theta.double().numpy() - step)) / 2e-4
        assert float(found[i, j]) == pytest.approx(numeric)


# -- training


def train(method, *, model=None, given=None, folder=None, resume=False, **values):
    session = make_session(model or tiny_llama(), parameters=[method], given={SLUG: given or {}})
    losses = []
    trainer = Trainer(
        session,
        random_rows(),
        settings(**{"epochs": 2, **values}),
        folder=folder,
        observe=lambda event, r: losses.append(r) if event == "step" else None,
    )
    trainer.run(resume=resume)
    return session, losses


def test_held_entries_do_not_move_and_the_delta_is_the_difference():
    method = Sparse(proportion=0.1)
    session, _ = train(method, weight_decay=0.5)
    base = weights(tiny_llama())
    moved = {n: p != base[n] for n, p in session.model.named_parameters()}
    entries = method.record()["entries"]
    for name, change in moved.items():
        assert int(change.sum()) <= entries.get(name, 0), name
        if name in entries:
            assert not bool((change & ~method._masked.masks[name]).any()), name
    assert 0 < sum(int(c.sum()) for c in moved.values()) <= sum(entries.values())
    delta = Delta(BASE, *method.delta(session.model))
    plain = tiny_llama().eval()
    ids = torch.arange(3, 11)[None]
    with delta.applied(plain, BASE):
        torch.testing.assert_close(
            plain(input_ids=ids).logits, session.model.eval()(input_ids=ids).logits, atol=1e-6, rtol=0
        )
    assert all(torch.equal(p, base[n]) for n, p in plain.named_parameters())


def test_the_l1_pull_acts_once_per_step_and_holds_entries_nearer_to_the_start():
    def distance(accumulation=1, **options):
        session, records = train(Sparse(proportion=0.2, **options), accumulation=accumulation, max_grad_norm=None)
        base = weights(tiny_llama())
        return sum(float((p.detach() - base[n]).abs().sum()) for n, p in session.model.named_parameters()), records

    free, _ = distance()
    pulled, records = distance(sparse_l1=200.0)
    assert pulled < 0.9 * free
    assert records[0]["l1"] == 0.0 < records[-1]["l1"]
    assert distance(4, sparse_l1=200.0)[0] == pytest.approx(pulled, rel=1e-3)


@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_llama(tied=True)])
def test_a_tied_output_matrix_gets_a_copy_and_stays(make):
    model = make()
    before = model.lm_head.weight.detach().clone()
    session, _ = train(Sparse(proportion=0.5), model=model)
    assert not is_tied(session.model)
    assert not session.model.config.tie_word_embeddings
    assert torch.equal(session.model.lm_head.weight, before)
    assert not torch.equal(session.model.model.embed_tokens.weight, before)


def test_a_delta_of_an_untied_model_unties_the_one_it_is_applied_to():
    method = Sparse(proportion=0.5)
    session, _ = train(method, model=tiny_llama(tied=True))
    delta = Delta(BASE, *method.delta(session.model), {"untied": True})
    plain = tiny_llama(tied=True)
    delta.apply(plain, BASE)
    for (name, a), b in zip(plain.named_parameters(), session.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=0, msg=name)
    assert not untie(plain)


# -- the procedure, with trainings of the engine


class Shop:
    """What the procedure calls of a run."""

    def __init__(self, model, options, **values):
        self.options, self.values, self.calls = options, {"epochs": 2, **values}, []
        training = SimpleNamespace(batch_rows=8)
        choice = SimpleNamespace(slug=SLUG, build=lambda: Sparse(**options))
        self.plan = SimpleNamespace(
            parameters=[choice], task="causal-lm", recipe=SimpleNamespace(training=training, seed=0)
        )
        self.loaded = SimpleNamespace(model=model, fingerprint=BASE)
        self.data = SimpleNamespace(train=SimpleNamespace(prepared=random_rows()))

    def train(self, source, *, stage=None, given=None, training=None):
        model = self.loaded.model if stage is None else copy.deepcopy(self.loaded.model)
        self.method = Sparse(**self.options)
        session = make_session(model, parameters=[self.method], given=given)
        Trainer(session, source.prepared, settings(**{**self.values, **(training or {})})).run()
        self.calls.append((stage, given, weights(session.model), session.step))
        return Artefact(model=session.model)


def test_two_phases_with_a_rewind():
    shop = Shop(tiny_llama(), {"proportion": 0.1})
    made = composable_sparse_ft(shop, full_max_steps=3, sparse_epochs=3, sparse_max_steps=5)
    (first, told, full, steps), (second, _, _, more) = shop.calls
    assert (first, second, steps, more) == ("full-1", None, 3, 5)
    assert told[SLUG]["phase"] == "full"
    base = weights(tiny_llama())
    names = Sparse().divide(tiny_llama(), "causal-lm")[0]
    change = np.concatenate([(full[n] - base[n]).abs().numpy().ravel() for n in names])
    wanted = set(np.argsort(-change, kind="stable")[: int(0.1 * len(change))].tolist())
    now = np.concatenate([(made.model.get_parameter(n).detach() != base[n]).numpy().ravel() for n in names])
    moved = set(np.flatnonzero(now).tolist())
    assert moved <= wanted
    assert len(moved) > 0.9 * len(wanted)


def test_iterations_grow_the_mask_and_keep_what_was_learned():
    shop = Shop(tiny_llama(), {"proportion": 0.1})
    composable_sparse_ft(shop, iterations=2)
    assert [c[0] for c in shop.calls] == ["full-1", "sparse-1", "full-2", None]
    told = [c[1][SLUG] for c in shop.calls]
    assert told[0]["start"] == told[1]["start"] == {}
    one, two = told[1]["mask"], told[3]["mask"]
    half = int(0.1 * sum(m.numel() for m in one.values())) // 2
    assert sum(int(m.sum()) for m in one.values()) == half
    assert sum(int(m.sum()) for m in two.values()) == 2 * half
    assert all(bool((two[n] >= one[n]).all()) for n in one)
    for name, value in told[2]["start"].items():
        assert torch.equal(value, shop.calls[1][2][name]), name
    final, base = shop.calls[3][2], weights(tiny_llama())
    assert all(not bool(((final[n] != base[n]) & ~two[n]).any()) for n in two)


def test_all_entries_are_plain_training_of_the_same_tensors():
    """K = all of M and T = 1: the sparse phase is full fine-tuning from the base in the same order."""
    options = {"proportion": 1.0}
    shop = Shop(tiny_llama(), options)
    made = composable_sparse_ft(shop)

    class Backbone:
        def apply(self, model, ctx):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("norm" not in name and name != "lm_head.weight")
            return model

        def groups(self, model):
            return [{"params": [p for p in model.parameters() if p.requires_grad]}]

        def on_grad(self, model, ctx): ...

        def on_step(self, model, ctx): ...

    session, _ = train(Backbone())
    for (name, a), b in zip(made.model.named_parameters(), session.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_controls():
    base = weights(tiny_llama())
    shops = {}
    for selection in ("random", "all", "prune", "change-per-tensor"):
        shop = shops[selection] = Shop(tiny_llama(), {"proportion": 0.1})
        composable_sparse_ft(shop, selection=selection)
    assert [len(s.calls) for s in shops.values()] == [1, 1, 1, 2]
    names = Sparse().divide(tiny_llama(), "causal-lm")[0]
    total = sum(base[n].numel() for n in names)
    moved = {k: sum(int((s.calls[-1][2][n] != base[n]).sum()) for n in names) for k, s in shops.items()}
    assert moved["all"] > 0.9 * total
    assert moved["random"] <= int(0.1 * total) >= moved["change-per-tensor"]
    assert moved["prune"] == int(0.1 * total)
    dense = shops["all"].calls[0][2]
    for name in names:  # pruning keeps the values of the full phase
        kept = shops["prune"].calls[0][2][name] != base[name]
        assert torch.equal(shops["prune"].calls[0][2][name][kept], dense[name][kept])


@pytest.mark.parametrize(
    ("phase", "batch_rows", "wanted"),
    [
        (Phase(max_steps=7), 8, 7),
        (Phase(max_steps=7), None, 7),
        (Phase(epochs=2.5), 8, 31),
        (Phase(epochs=1.0, min_steps=20), 8, 20),
        (Phase(epochs=9.0, max_steps=50), 8, 50),
        (Phase(epochs=1.0), None, None),
    ],
)
def test_the_length_rule(phase, batch_rows, wanted):
    assert phase_steps(phase, 100, batch_rows) == wanted


@pytest.mark.parametrize(
    ("phase", "batch_rows", "text"),
    [
        (Phase(min_steps=3), 8, "needs epochs or max_steps"),
        (Phase(min_steps=3, max_steps=2), 8, r"min_steps \(3\) is more than max_steps \(2\)"),
        (Phase(epochs=1.0, min_steps=3), None, "not batch_tokens"),
    ],
)
def test_impossible_lengths(phase, batch_rows, text):
    with pytest.raises(UserError, match=text):
        phase_steps(phase, 100, batch_rows)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_entries": 10**6}, r"num_entries is 1,000,000, but only \d"),
        ({"proportion": 1e-6}, "is none; raise it"),
        ({"trainable": ["category:norm"]}, "leave no tensor of the backbone"),
        ({"trainable": ["q_prj"]}, "nearest names: q_proj"),
    ],
)
def test_refusals(options, text):
    with pytest.raises(UserError, match=text):
        Sparse(**options).apply(tiny_llama().requires_grad_(False), FakeContext())


def test_two_budgets_and_another_checkpoint_are_refused():
    with pytest.raises(UserError, match="both state the budget"):
        Sparse(proportion=0.1, num_entries=5)
    made = []
    for proportion in (0.1, 0.2):
        method = Sparse(proportion=proportion)
        method.apply(tiny_llama().requires_grad_(False), FakeContext())
        made.append(method)
    with pytest.raises(UserError, match="Resume with the same options"):
        made[1].load(made[0].state())


# -- from recipe to folder

RECIPE = """\
luthier: 1
model: lab:nano
data: {train: "lab:arithmetic?n=48", test: "lab:arithmetic?n=8", keep: null}
parameters:
  - composable-sparse-ft: {proportion: 0.05}
procedure: composable-sparse-ft
training: {epochs: 1, batch_rows: 16, learning_rate: 1.0e-3, log_steps: 1}
evaluation: {before: false, generate: false}
"""


def test_a_skill_on_top_of_another_and_the_exchange(tmp_path):
    from luthier.models.load import load

    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    skill = luthier.tune(file, overrides=[f"output={tmp_path / 'skill'}"], quiet=True)
    assert (skill.folder / "stages" / "full-1" / "metrics.jsonl").exists()
    there = str(skill.folder / "delta")
    recipe = RECIPE.replace(
        "procedure: composable-sparse-ft", f"procedure: {{composable-sparse-ft: {{start: [{there}]}}}}"
    )
    recipe += f"weights:\n  - composable-sparse-ft: {{remove: [{there}]}}\n"
    file.write_text(recipe.replace("lab:arithmetic?n=48", "lab:strings?n=48"))
    task = luthier.tune(file, overrides=[f"output={tmp_path / 'task'}"], quiet=True)
    base = load("lab:nano")
    own = Delta.load(task.folder / "delta")
    assert own.base == base.fingerprint
    assert json.loads((task.folder / "methods.json").read_text())[f"parameters:{SLUG}"]["tuned"] >= own.entries > 0
    # The task's delta does not contain the skill: with the skill taken out, the base and the task remain.
    own.apply(base.model, base.fingerprint)
    for (name, a), b in zip(base.model.named_parameters(), task.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b[1], atol=1e-6, rtol=0, msg=name)
    whole = load(task.folder / "model-trained").model
    skill_delta = Delta.load(there)
    both = load("lab:nano")
    (own + skill_delta).apply(both.model, both.fingerprint)
    for (name, a), b in zip(both.model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0, msg=name)
    own.__class__("another", own.parts).save(tmp_path / "other")
    (tmp_path / "two.yaml").write_text(recipe.replace(there, str(tmp_path / "other")))
    with pytest.raises(UserError, match=r"belongs to the base another, this is \w+"):
        luthier.tune(tmp_path / "two.yaml", overrides=[f"output={tmp_path / 'two'}"], quiet=True)
