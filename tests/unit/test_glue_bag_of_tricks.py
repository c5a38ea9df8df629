"""Adversarial fine-tuning: the divergence, the ascent and the loss worked out independently, and what the passes leave."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import FakeOutputs
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from helpers import PROCESSOR, OpenAll, make_session, random_rows, settings, tiny_llama, weights
from luthier.core.errors import LuthierError, UserError
from luthier.core.protocols import Batch
from luthier.core.rng import stream
from luthier.engine.loop import Trainer
from luthier.engine.session import Session
from luthier.engine.stack import Stack
from luthier.functional.adversarial import ascend, embedding_scale, length, project, squared_difference
from luthier.functional.adversarial import symmetric_divergence as divergence
from luthier.methods.objectives.glue_bag_of_tricks import SLUG, AdversarialFineTuning, clean_logits
from luthier.methods.parameters.lora import LowRankAdaptation
from luthier.tasks import get_task
from luthier.tasks.regression import NumberOutputs

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


# -- the mathematics


def test_symmetric_divergence_by_hand():
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    wanted = 0.5 * math.log(2) - 0.25 * math.log(2)  # each direction: 1/2 log 2 + 1/4 log 1/2
    logits = torch.tensor(np.log([20 * p, 0.3 * p]), requires_grad=True)
    other = torch.tensor(np.log([q, p]), requires_grad=True)
    found = divergence(logits, other)
    assert found.tolist() == pytest.approx([2 * wanted, 0.0], abs=1e-15)
    # d/da sum_v (p - q)(log p - log q) = p * (log p/q - sum p log p/q) + p - q, and the same with the sides exchanged.
    found.sum().backward()
    ratio = np.log(p / q)
    np.testing.assert_allclose(logits.grad[0], p * (ratio - (p * ratio).sum()) + p - q, atol=1e-15)
    np.testing.assert_allclose(other.grad[0], q * (-ratio + (q * ratio).sum()) + q - p, atol=1e-15)
    assert divergence(logits[1:], logits[1:]).item() == 0
    assert squared_difference(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])).tolist() == [4.0, 0.0]


def test_projection_and_ascent_by_hand():
    delta = torch.tensor([[[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]], dtype=torch.float64)
    found = project(delta, 1.0, "l2")
    np.testing.assert_allclose(found[0], [[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]])
    np.testing.assert_allclose(project(delta, 1.0, "inf")[0], [[1.0, 1.0], [0.3, 0.4], [0.0, 0.0]])
    gradient = torch.tensor([[[0.0, 2.0], [-3.0, 4.0], [0.0, 0.0]]], dtype=torch.float64)
    start = torch.tensor([[[0.1, 0.0], [0.0, 0.0], [0.2, 0.0]]], dtype=torch.float64)
    step = {"step_size": 0.5, "radius": 0.45}
    # Steps of length one half along g, then back to the ball.
    long = math.hypot(0.1, 0.5)
    wanted = [[0.1 * 0.45 / long, 0.5 * 0.45 / long], [-0.27, 0.36], [0.2, 0.0]]
    np.testing.assert_allclose(ascend(start, gradient, norm="l2", **step)[0], wanted, rtol=1e-11)
    wanted = [[0.1, 0.45], [-0.375, 0.45], [0.2, 0.0]]
    np.testing.assert_allclose(ascend(start, gradient, norm="inf", **step)[0], wanted, rtol=1e-11)


def test_a_perturbation_of_normalised_embeddings_comes_back_in_the_original_scale():
    rng = np.random.default_rng(0)
    e, delta = rng.normal(size=(2, 3, 8)) * 0.02 + 0.5, rng.normal(size=(2, 3, 8))
    e_hat = torch.nn.functional.layer_norm(torch.tensor(e), (8,), eps=1e-7)
    scale = np.sqrt(e.var(-1, keepdims=True) + 1e-7)
    wanted = e.mean(-1, keepdims=True) + scale * (e_hat.numpy() + delta)
    found = torch.tensor(e) + embedding_scale(torch.tensor(e, requires_grad=True)) * torch.tensor(delta)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12)
    assert not embedding_scale(torch.tensor(e, requires_grad=True)).requires_grad


# -- one whole step on a linear model


class Linear(torch.nn.Module):
    """logits = V * mean over the real tokens of the word embeddings."""

    config = SimpleNamespace(is_encoder_decoder=False)

    def __init__(self, table, v):
        super().__init__()
        self.words = torch.nn.Embedding(*table.shape, _weight=torch.tensor(table))
        self.v = torch.nn.Parameter(torch.tensor(v))

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids, attention_mask):
        mask = attention_mask[..., None].double()
        return ((self.words(input_ids) * mask).sum(1) / mask.sum(1)) @ self.v.t()


class LinearContext:
    step, total_steps, device = 3, 10, torch.device("cpu")
    task = SimpleNamespace(name="sequence-classification")

    def __init__(self, model):
        self.model = model

    def rng(self, name, *keys):
        return stream(0, name, *keys)

    def forward(self, batch):
        return FakeOutputs(self.model(**batch.inputs), batch)


IDS, MASK = torch.tensor([[1, 2, 3], [4, 2, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
LABEL, WEIGHTS, ROWS = [2, 0], [1.0, 0.5], [5, 9]


def linear_case(**columns):
    rng = np.random.default_rng(0)
    table, v = rng.normal(size=(5, 4)), rng.normal(size=(3, 4))
    batch = Batch(
        inputs={"input_ids": IDS, "attention_mask": MASK},
        position_N=torch.arange(2),
        target_N=torch.tensor(LABEL),
        weight_N=torch.tensor(WEIGHTS, dtype=torch.float64),
        sequence_N=torch.arange(2),
        row_B=torch.tensor(ROWS),
        columns=columns,
    )
    return LinearContext(Linear(table, v)), batch, table, v


def run_linear(ctx, batch, **options):
    method = AdversarialFineTuning(**options)
    method.prepare(ctx, None)
    loss = method.loss(ctx.forward(batch), batch, ctx)
    method.finish_model(ctx.model, None)
    return loss


def log_softmax(z):
    return z - z.max() - np.log(np.exp(z - z.max()).sum())


def by_hand(table, v, *, variant, steps, step_size, radius, sigma):
    """delta of each row, its clean and perturbed logits, and D or L before the ascent."""
    found = []
    for ids, mask, label, weight, row in zip(IDS.numpy(), MASK.numpy(), LABEL, WEIGHTS, ROWS, strict=True):
        n = mask.sum()
        e = table[ids[:n]]
        scale = np.ones((n, 1)) if variant == "smart" else np.sqrt(e.var(-1, keepdims=True) + 1e-7)
        generator = stream(0, "noise", SLUG, 3, row)
        delta = sigma * torch.randn(int(n), 4, generator=generator, dtype=torch.float64).numpy()
        clean = v @ e.mean(0)

        def moved(delta, e=e, scale=scale):
            return v @ (e + scale * delta).mean(0)

        before = None
        for _ in range(0 if variant == "r3f" else steps):
            lp, lq = log_softmax(clean), log_softmax(moved(delta))
            p, q = np.exp(lp), np.exp(lq)
            if variant == "fgm":
                value, slope = -weight * lq[label], weight * (q - np.eye(3)[label])
            else:
                value = weight * ((p - q) * (lp - lq)).sum()
                slope = weight * (q * ((lq - lp) - (q * (lq - lp)).sum()) + q - p)
            before = value if before is None else before
            gradient = scale * (v.T @ slope)[None] / n
            delta = delta + step_size * gradient / np.linalg.norm(gradient, axis=-1, keepdims=True)
            size = np.linalg.norm(delta, axis=-1, keepdims=True)
            delta = delta * np.minimum(1, radius / size)
        found.append((clean, moved(delta), before, delta))
    return found


@pytest.mark.parametrize("variant", ["sift", "smart", "fgm", "r3f"])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_loss_of_a_linear_model_by_hand(variant, steps):
    ctx, batch, table, v = linear_case()
    factor, radius = 0.7, 0.4
    loss = run_linear(
        ctx, batch, variant=variant, steps=steps, step_size=0.3, radius=radius, noise=0.01, adversarial_weight=factor
    )
    rows = by_hand(table, v, variant=variant, steps=steps, step_size=0.3, radius=radius, sigma=0.01)
    task = -sum(w * log_softmax(z)[y] for (z, *_), w, y in zip(rows, WEIGHTS, LABEL, strict=True))
    extra = 0.0
    for (clean, moved, _, _), weight, label in zip(rows, WEIGHTS, LABEL, strict=True):
        lp, lq = log_softmax(clean), log_softmax(moved)
        own = -lq[label] if variant == "fgm" else ((np.exp(lp) - np.exp(lq)) * (lp - lq)).sum()
        extra += weight * own
    assert loss.sum.item() == pytest.approx(task + factor * extra, rel=1e-9)
    assert loss.weight.item() == 1.5
    name = "perturbed_loss" if variant == "fgm" else "divergence"
    assert float(loss.metrics[name][0]) == pytest.approx(extra, rel=1e-8)
    assert float(loss.metrics["task_loss"][0]) == pytest.approx(task, rel=1e-9)
    norms = sum(np.linalg.norm(d, axis=-1).sum() for *_, d in rows)
    assert float(loss.metrics["delta_norm"][0]) == pytest.approx(norms, rel=1e-8)
    assert loss.metrics["delta_norm"][1] == 5
    if variant != "r3f":
        before = sum(b for _, _, b, _ in rows)
        assert float(loss.metrics["before_ascent"][0]) == pytest.approx(before, rel=1e-8)
        assert extra > before


@pytest.mark.parametrize("variant", ["sift", "fgm"])
@pytest.mark.parametrize("given", [None, [0.5, None]])
def test_the_loss_of_a_linear_regression_by_hand(variant, given):
    columns = {} if given is None else {"glue_target": given, "glue_weight": [None, 3.0]}
    ctx, batch, table, v = linear_case(**columns)
    v, y, sigma = v[0], np.array([1.25, -0.5]), 0.01
    ctx.model.v = torch.nn.Parameter(torch.tensor(v))
    ctx.task = SimpleNamespace(name="sequence-regression")
    ctx.forward = lambda b: NumberOutputs(ctx.model(**b.inputs), b.target_N, b.sequence_N)
    batch.target_N = torch.tensor(y, dtype=torch.float32)
    loss = run_linear(ctx, batch, variant=variant, step_size=0.3, radius=0.4, noise=sigma, adversarial_weight=0.7)
    wanted_y, weights = (y, WEIGHTS) if given is None else ([0.5, -0.5], [1.0, 1.5])
    total = 0.0
    for ids, mask, label, weight, own, row in zip(
        IDS.numpy(), MASK.numpy(), wanted_y, weights, WEIGHTS, ROWS, strict=True
    ):
        n = mask.sum()
        e = table[ids[:n]]
        scale = np.sqrt(e.var(-1, keepdims=True) + 1e-7)
        drawn = torch.randn(int(n), 4, generator=stream(0, "noise", SLUG, 3, row), dtype=torch.float64).numpy()
        delta, f = sigma * drawn, v @ e.mean(0)
        moved = v @ (e + scale * delta).mean(0)
        # d D/d delta = 2 (f' - f) s v/n, or of the squared error; its direction is all that counts.
        slope = weight * 2 * (moved - label) if variant == "fgm" else 2 * (moved - f)
        gradient = slope * scale * v[None] / n
        delta = delta + 0.3 * gradient / np.linalg.norm(gradient, axis=-1, keepdims=True)
        delta = delta * np.minimum(1, 0.4 / np.linalg.norm(delta, axis=-1, keepdims=True))
        moved = v @ (e + scale * delta).mean(0)
        extra = weight * (moved - label) ** 2 if variant == "fgm" else own * (moved - f) ** 2
        total += weight * (f - label) ** 2 + 0.7 * extra
    assert loss.sum.item() == pytest.approx(total, rel=1e-9)
    assert loss.weight.item() == 1.5


@pytest.mark.parametrize("detach", [False, True])
def test_gradient_by_finite_differences_with_delta_constant(detach):
    ctx, batch, table, v = linear_case()
    run_linear(ctx, batch, adversarial_weight=2.0, step_size=0.5, radius=0.6, detach_clean=detach).sum.backward()
    rows = by_hand(table, v, variant="sift", steps=1, step_size=0.5, radius=0.6, sigma=1e-3)

    def total(w, frozen):
        value = 0.0
        for ids, mask, label, weight, (_, _, _, delta) in zip(
            IDS.numpy(), MASK.numpy(), LABEL, WEIGHTS, rows, strict=True
        ):
            e = table[ids[: mask.sum()]]
            own = log_softmax(w @ e.mean(0))
            lp = log_softmax(frozen @ e.mean(0)) if detach else own
            lq = log_softmax(w @ (e + np.sqrt(e.var(-1, keepdims=True) + 1e-7) * delta).mean(0))
            value += weight * (-own[label] + 2.0 * ((np.exp(lp) - np.exp(lq)) * (lp - lq)).sum())
        return value

    numeric = np.zeros_like(v)
    for place in np.ndindex(*v.shape):
        step = np.zeros_like(v)
        step[place] = 1e-6
        numeric[place] = (total(v + step, v) - total(v - step, v)) / 2e-6
    np.testing.assert_allclose(ctx.model.v.grad.numpy(), numeric, rtol=1e-6)


def test_class_probabilities_factors_and_the_ramp_of_pseudo_labels_by_hand():
    target = [0.1, 0.6, 0.3]
    ctx, batch, table, v = linear_case(glue_target=[target, None], glue_weight=[None, 3.0], glue_pseudo=[True, False])
    rows = by_hand(table, v, variant="sift", steps=1, step_size=0.1, radius=1.0, sigma=1e-3)
    losses = [-(np.array(target) * log_softmax(rows[0][0])).sum(), -log_softmax(rows[1][0])[0]]
    # Step 3 of 10 is 0.6 of the first half; without a ramp the factor is 1 at once.
    for share, risen in ((0.5, 0.6), (0.0, 1.0)):
        loss = run_linear(ctx, batch, adversarial_weight=0.0, pseudo_ramp=share)
        assert loss.sum.item() == pytest.approx(risen * losses[0] + 0.5 * 3.0 * losses[1], rel=1e-6)
        assert loss.weight.item() == 1.5
    together = run_linear(ctx, batch, variant="fgm", step_size=0.3)
    assert float(together.metrics["perturbed_loss"][0]) > float(together.metrics["task_loss"][0])
    with pytest.raises(UserError, match="has 2 classes, and the model has 3"):
        run_linear(*linear_case(glue_target=[[0.5, 0.5], None])[:2], adversarial_weight=0.0)


# -- on transformers


def classifier(model, method, parameters=None, **options):
    task = get_task("sequence-classification", PROCESSOR)
    opened = parameters or OpenAll()
    stack = Stack(objective=method, parameters=[opened], named={"objective:glue": method, "parameters:open": opened})
    return Session(model=opened.apply(model, None), task=task, processor=PROCESSOR, stack=stack, **options)


def bert(dropout=0.1):
    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=3, **SIZE, **rates))


def sentences(session, rows=([5, 6, 7], [8, 9], [3, 4, 5, 6])):
    ids = [np.array(r, dtype=np.int32) for r in rows]
    return session.task.collate({"input_ids": ids, "label": [0, 2, 1][: len(ids)]}, list(range(len(ids))))


def spied(monkeypatch, method):
    """Every delta a perturbed pass was given."""
    found, forward = [], method._forward

    def watch(batch, ctx, delta, same):
        found.append(None if delta is None else delta.detach().clone())
        return forward(batch, ctx, delta, same)

    monkeypatch.setattr(method, "_forward", watch)
    return found


@pytest.mark.parametrize("norm", ["l2", "inf"])
def test_delta_stays_in_the_ball_off_the_padding_and_raises_the_divergence(norm, monkeypatch):
    method = AdversarialFineTuning(norm=norm, radius=0.05, step_size=0.04, steps=4, noise=1e-2)
    session = classifier(bert(), method)
    session.model.train()
    method.prepare(session, None)
    deltas = spied(monkeypatch, method)
    batch = sentences(session)
    loss = method.loss(session.forward(batch), batch, session)
    assert len(deltas) == 5
    for delta in deltas:
        assert delta.dtype == torch.float32
        assert float(length(delta, norm).max()) <= 0.05 * (1 + 1e-6)
        assert torch.equal(delta[batch.inputs["attention_mask"] == 0], torch.zeros(3, 16))
    assert float(length(deltas[-1], norm).max()) == pytest.approx(0.05, rel=1e-5)
    assert float(loss.metrics["divergence"][0]) > 2 * float(loss.metrics["before_ascent"][0]) > 0
    assert all(p.grad is None for p in session.model.parameters())
    loss.sum.backward()
    assert all(p.grad is not None for n, p in session.model.named_parameters())


def test_dropout_masks_are_the_same_and_random_streams_are_left_alone():
    method = AdversarialFineTuning(radius=1e-9)
    session = classifier(bert(dropout=0.5), method)
    session.model.train()
    method.prepare(session, None)
    batch = sentences(session)
    torch.manual_seed(1)
    out = session.forward(batch)
    after = torch.get_rng_state()
    same = method.loss(out, batch, session)
    assert torch.equal(torch.get_rng_state(), after)
    assert float(same.metrics["divergence"][0]) < 1e-12
    other = AdversarialFineTuning(variant="dropout")
    other.prepare(session, None)
    assert float(other.loss(session.forward(batch), batch, session).metrics["divergence"][0]) > 1e-5
    session = classifier(bert(dropout=0.0), other)
    other.prepare(session, None)
    with pytest.raises(UserError, match="needs a model with dropout"):
        other.loss(session.forward(batch), batch, session)


def test_noise_belongs_to_the_row_whatever_stands_beside_it(monkeypatch):
    found = []
    for rows in (([5, 6], [8, 9, 10, 11, 12]), ([5, 6],)):
        method = AdversarialFineTuning(variant="r3f", noise=0.1)
        session = classifier(bert(dropout=0.0), method)
        method.prepare(session, None)
        deltas = spied(monkeypatch, method)
        batch = sentences(session, rows)
        method.loss(session.forward(batch), batch, session)
        found.append(deltas[0][0, :2])
    assert torch.equal(found[0], found[1])
    assert found[0].std() == pytest.approx(0.1, rel=0.5)


def test_a_decoder_as_classifier_reads_the_same_token_when_perturbed():
    # Given embeddings in place of ids such a model would take the last column, which is padding here.
    method = AdversarialFineTuning(radius=1e-9)
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=64, num_labels=3, pad_token_id=0, **SIZE))
    session = classifier(model, method)
    method.prepare(session, None)
    batch = sentences(session)
    assert float(method.loss(session.forward(batch), batch, session).metrics["divergence"][0]) < 1e-12


def test_logits_over_a_vocabulary_are_computed_again_as_the_model_computes_them():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, head_dim=8, num_key_value_heads=2, final_logit_softcapping=2.0, pad_token_id=0, **SIZE
    )
    model = Gemma2ForCausalLM(config)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=1.0)
    session = make_session(model, objective=AdversarialFineTuning())
    data = random_rows(4)
    batch = session.task.collate(data.fetch(range(4)), range(4))
    model.eval()
    wanted = model(**batch.inputs).logits.reshape(-1, 64)[batch.position_N]
    assert wanted.abs().max() > 1.5
    index = torch.tensor([3, 0])
    torch.testing.assert_close(clean_logits(session.forward(batch), session)(index), wanted[index])


@pytest.mark.parametrize("variant", ["sift", "fgm"])
def test_a_language_model_in_chunks_is_the_one_in_one_piece(variant):
    found = []
    for chunk in (None, 3):
        method = AdversarialFineTuning(variant=variant, step_size=0.5, noise=0.1)
        session = make_session(tiny_llama(), objective=method)
        session.head_chunk = chunk
        Trainer(session, random_rows(8), settings(optimizer="sgd", max_steps=2)).run()
        found.append(weights(session.model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-6, rtol=1e-4)


def test_with_adapters_and_in_low_precision():
    method = AdversarialFineTuning(step_size=0.5)
    session = make_session(tiny_llama(), objective=method, parameters=[LowRankAdaptation(rank=2)])
    session.precision = "bf16"
    records = []
    trainer = Trainer(
        session, random_rows(8), settings(max_steps=2), observe=lambda e, r: records.append(r) if e == "step" else 0
    )
    trainer.run()
    assert all(math.isfinite(r["loss"]) and r["divergence"] > 0 for r in records)
    hooks = session.model.get_input_embeddings()._forward_hooks
    assert len(hooks) == 1
    method.finish_model(session.model, None)
    assert len(hooks) == 0


# -- what it refuses


def test_options_that_cannot_work():
    for variant in ("sift", "smart", "r3f"):
        with pytest.raises(UserError, match="without a direction"):
            AdversarialFineTuning(variant=variant, noise=0.0)
    AdversarialFineTuning(variant="fgm", noise=0.0)
    with pytest.raises(UserError, match="remove detach_clean"):
        AdversarialFineTuning(variant="fgm", detach_clean=True)
    assert AdversarialFineTuning(adversarial_weight=0.0).needs.positionwise
    assert not AdversarialFineTuning().needs.positionwise


def test_models_that_it_refuses():
    method = AdversarialFineTuning()
    for model, said in (
        (SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=True)), "one stack"),
        (torch.nn.Linear(2, 2), "no word embeddings"),
    ):
        with pytest.raises(UserError, match=said):
            method.prepare(SimpleNamespace(model=model), None)


def test_outputs_of_an_unwatched_pass_and_repeated_words_are_errors():
    ctx, batch, *_ = linear_case()
    method = AdversarialFineTuning()
    with pytest.raises(LuthierError, match="has not seen"):
        method.loss(ctx.forward(batch), batch, ctx)
    method.prepare(ctx, None)
    out = ctx.forward(batch)
    ctx.forward = lambda batch: FakeOutputs(ctx.model(**batch.inputs) + ctx.model(**batch.inputs), batch)
    with pytest.raises(LuthierError, match="2 times in one pass"):
        method.loss(out, batch, ctx)


def test_class_probabilities_are_refused_where_a_row_has_many_targets():
    session = make_session(tiny_llama(), objective=AdversarialFineTuning(adversarial_weight=0.0))
    data = random_rows(4)
    data.columns["glue_target"] = [[0.5, 0.5]] * 4
    with pytest.raises(UserError, match="one class per row"):
        Trainer(session, data, settings(max_steps=1)).run()
