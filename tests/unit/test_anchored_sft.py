"""Anchored and dynamic fine-tuning against values and gradients worked out in float64 numpy, and within the engine."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from fakes import FakeContext, FakeOutputs, KnownLogp, position_batch
from transformers import ViTConfig, ViTForImageClassification

from helpers import OpenAll, make_session, random_rows, settings, tiny_llama, weights
from luthier.core.errors import LuthierError, UserError
from luthier.engine.loop import Trainer
from luthier.engine.session import Session
from luthier.engine.stack import Stack
from luthier.functional.divergences import coarse_divergence, divergence, largest
from luthier.methods.objectives.anchored_sft import AnchoredSFT
from luthier.methods.objectives.beyond_log_likelihood import BeyondLogLikelihood
from luthier.methods.objectives.dynamic_ft import DynamicFineTuning
from luthier.methods.objectives.sft import SupervisedFineTuning
from luthier.methods.parameters.lora import LowRankAdaptation
from luthier.methods.selection.uds import UtilityDiversitySampling
from luthier.methods.transforms.masked_thought import MaskedThought
from luthier.tasks.classification import ImageClassification

MODES = ("sft", "dft", "sft+kl", "asft")
DIRECTIONS = ("forward", "reverse")
# [B=2, T=4, V=7] with labels of which -100 are not supervised, as in the specification.
LOGITS = np.random.default_rng(0).normal(size=(2, 4, 7)) * 2
REFERENCE = LOGITS + np.random.default_rng(1).normal(size=LOGITS.shape)
LABELS = np.array([[-100, 3, 0, 6], [-100, -100, 2, -100]])


def log_softmax(x):
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def by_hand(logits_BTV, reference_BTV, mode, direction, weight, *, sg=None):
    """The mean loss over supervised positions; ``sg`` holds the detached p of each, for finite differences."""
    total, count = 0.0, 0
    for b, t in np.argwhere(LABELS != -100):
        lp, lq = log_softmax(logits_BTV[b, t]), log_softmax(reference_BTV[b, t])
        nll = -lp[LABELS[b, t]]
        p = math.exp(-nll) if sg is None else sg[b, t]
        kl = sum(math.exp(q) * (q - m) for m, q in zip(lp, lq, strict=True))
        if direction == "reverse":
            kl = sum(math.exp(m) * (m - q) for m, q in zip(lp, lq, strict=True))
        total += (p if mode in ("dft", "asft") else 1.0) * nll + (weight * kl if mode in ("sft+kl", "asft") else 0.0)
        count += 1
    return total / count


def numeric_gradient(mode, direction, weight):
    p_BT = np.array(
        [
            [math.exp(log_softmax(LOGITS[b, t])[LABELS[b, t]]) if LABELS[b, t] >= 0 else 0 for t in range(4)]
            for b in (0, 1)
        ]
    )
    found = np.zeros_like(LOGITS)
    for index in np.ndindex(*LOGITS.shape):
        up, down = LOGITS.copy(), LOGITS.copy()
        up[index] += 1e-6
        down[index] -= 1e-6
        values = [by_hand(x, REFERENCE, mode, direction, weight, sg=p_BT) for x in (up, down)]
        found[index] = (values[0] - values[1]) / 2e-6
    return found


def supervised(kind=torch.float64):
    """The logits of the supervised positions with a graph to [B, T, V], the batch, and the reference's logits."""
    where = torch.from_numpy(LABELS != -100)
    logits = torch.tensor(LOGITS, dtype=kind, requires_grad=True)
    target_N = torch.from_numpy(LABELS)[where]
    batch = position_batch(4, target_N=target_N, weight_N=torch.ones(4, dtype=kind))
    batch.sequence_N = torch.nonzero(where)[:, 0]
    return logits, where, batch, torch.tensor(REFERENCE, dtype=kind)[where]


def context(reference_NV, **about):
    """A reference whose logits belong to the positions asked for."""

    def forward(part, model):
        assert model == "reference"
        return FakeOutputs(reference_NV[part.position_N], part)

    return FakeContext(forward=forward, **about)


def loss_of(method, kind=torch.float64):
    logits, where, batch, reference_NV = supervised(kind)
    loss = method.loss(FakeOutputs(logits[where], batch), batch, context(reference_NV))
    (loss.sum / loss.weight).backward()
    return loss, logits.grad


# -- the mathematics


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_modes_and_directions_are_those_worked_out_by_hand(mode, direction):
    loss, gradient = loss_of(AnchoredSFT(mode=mode, anchor_weight=0.3, kl_direction=direction))
    wanted = by_hand(LOGITS, REFERENCE, mode, direction, 0.3)
    assert float(loss.sum.detach() / loss.weight) == pytest.approx(wanted, rel=1e-12)
    np.testing.assert_allclose(gradient.numpy(), numeric_gradient(mode, direction, 0.3), atol=1e-8)
    assert not gradient[torch.from_numpy(LABELS) == -100].any()


def test_the_gradient_of_dynamic_ft_is_that_of_the_mean_of_one_minus_p():
    _, gradient = loss_of(DynamicFineTuning())
    logits, where, batch, _ = supervised()
    p_N = logits[where].softmax(-1).gather(1, batch.target_N[:, None])
    (1 - p_N).mean().backward()
    torch.testing.assert_close(gradient, logits.grad, atol=1e-15, rtol=1e-12)
    _, learns_the_same = loss_of(BeyondLogLikelihood(objective="p"))
    torch.testing.assert_close(gradient, learns_the_same, atol=1e-15, rtol=1e-12)


@pytest.mark.parametrize(("with_kl", "without"), [("asft", "dft"), ("sft+kl", "sft")])
def test_without_anchor_weight_the_anchor_is_gone_bit_for_bit(with_kl, without):
    one, first = loss_of(AnchoredSFT(mode=with_kl, anchor_weight=0.0))
    two, second = loss_of(AnchoredSFT(mode=without))
    assert torch.equal(one.sum, two.sum)
    assert torch.equal(first, second)
    plain = DynamicFineTuning() if without == "dft" else SupervisedFineTuning()
    assert torch.equal(one.sum, loss_of(plain)[0].sum)
    assert torch.equal(first, loss_of(plain)[1])
    assert AnchoredSFT(mode=with_kl, anchor_weight=0.0).needs.models == ()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"p_power": 0.5}, [0.9**0.5, 0.25**0.5, 0.04**0.5]),
        ({"weight_floor": 0.1, "weight_cap": 0.5}, [0.5, 0.25, 0.1]),
        ({"weight_level": "sequence"}, [(0.9 * 0.25) ** 0.5, (0.9 * 0.25) ** 0.5, 0.04]),
    ],
)
def test_weights_of_tokens_and_of_responses(options, wanted):
    p = np.array([0.9, 0.25, 0.04])
    batch = position_batch(3, weight_N=torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64))
    batch.sequence_N = torch.tensor([0, 0, 1])
    for method in (DynamicFineTuning(**options), AnchoredSFT(mode="dft", **options)):
        logp_N = torch.tensor(np.log(p), requires_grad=True)
        loss = method.loss(KnownLogp(logp_N, batch.sequence_N), batch, FakeContext(step=1))
        assert float(loss.sum) == pytest.approx(float((wanted * -np.log(p) * [1, 2, 1]).sum()))
        loss.sum.backward()
        np.testing.assert_allclose(-logp_N.grad, np.array(wanted) * [1, 2, 1])
        assert float(loss.weight) == 4.0
        assert method.needs.positionwise == (options.get("weight_level") != "sequence")


def test_positions_of_weight_zero_are_no_part_of_a_response():
    logp_N = torch.log(torch.tensor([0.5, 0.001]))
    batch = position_batch(2, weight_N=torch.tensor([1.0, 0.0]))
    loss = DynamicFineTuning(weight_level="sequence").loss(KnownLogp(logp_N), batch, FakeContext(step=1))
    assert float(loss.sum) == pytest.approx(0.5 * math.log(2))


def test_the_weight_of_another_member_takes_the_place_of_p():
    _, gradient = loss_of(AnchoredSFT(mode="dft", member="top_p-0.2"))
    _, wanted = loss_of(BeyondLogLikelihood(objective="top_p-0.2", denominator="all"))
    torch.testing.assert_close(gradient, wanted, atol=1e-15, rtol=1e-12)


def test_what_is_logged():
    logp_N = torch.log(torch.tensor([0.95, 0.55, 0.001]))
    batch = position_batch(3)
    loss = DynamicFineTuning().loss(KnownLogp(logp_N), batch, FakeContext(step=200))
    share = {k: float(a) / float(n) for k, (a, n) in loss.metrics.items()}
    assert share["weight"] == pytest.approx((0.95 + 0.55 + 0.001) / 3)
    assert share["share_below_0.01"] == share["share_above_0.9"] == pytest.approx(1 / 3)
    assert [share[f"weight_from_{i / 10}"] for i in (0, 5, 9)] == pytest.approx([1 / 3] * 3)
    later = DynamicFineTuning().loss(KnownLogp(logp_N), batch, FakeContext(step=201))
    assert "weight_from_0.5" not in later.metrics
    anchored, _ = loss_of(AnchoredSFT(anchor_weight=0.3))
    kl, count = (float(x) for x in anchored.metrics["kl"])
    token = float(anchored.metrics["token_loss"][0])
    assert float(anchored.sum.detach()) == pytest.approx(token + 0.3 * kl)
    assert kl / count == pytest.approx(
        by_hand(LOGITS, REFERENCE, "sft+kl", "forward", 1.0) - by_hand(LOGITS, REFERENCE, "sft", "forward", 1.0)
    )


def test_divergences_equal_torchs_and_their_gradients_are_exact():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 500, generator=generator, dtype=torch.float64, requires_grad=True)  # several blocks
    y = torch.randn(600, 500, generator=generator, dtype=torch.float64)
    twin = x.detach().clone().requires_grad_()
    for direction in DIRECTIONS:
        own, other = (twin.log_softmax(-1), y.log_softmax(-1))
        pair = (own, other) if direction == "forward" else (other, own)
        wanted = torch.nn.functional.kl_div(*pair, log_target=True, reduction="none").sum(-1)
        found = divergence(x, y, direction)
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-10)
        upstream = torch.rand(600, generator=generator, dtype=torch.float64)
        (a,) = torch.autograd.grad((found * upstream).sum(), x)
        (b,) = torch.autograd.grad((wanted * upstream).sum(), twin)
        torch.testing.assert_close(a, b, atol=1e-14, rtol=1e-9)
        assert torch.equal(divergence(x, x.detach(), direction), torch.zeros(600, dtype=torch.float64))
    with pytest.raises(ValueError, match="shapes"):
        divergence(x, y[:, :-1])


def test_float32_resolves_a_small_drift_and_knows_an_empty_chunk():
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(8, 32000, generator=generator) * 4
    x = y + 1e-2 * torch.randn(8, 32000, generator=generator)
    for direction in DIRECTIONS:
        wanted = divergence(x.double(), y.double(), direction)
        assert float((divergence(x, y, direction).double() - wanted).abs().max()) < 3e-6
        assert torch.equal(divergence(y, y, direction), torch.zeros(8))
        assert divergence(x[:0], y[:0], direction).shape == (0,)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_coarse_divergence_is_never_larger_and_exact_over_the_whole_vocabulary(direction):
    generator = torch.Generator().manual_seed(2)
    x, y = (2 * torch.randn(40, 30, generator=generator, dtype=torch.float64) for _ in range(2))
    full, before = divergence(x, y, direction), torch.zeros(40, dtype=torch.float64)
    for k in (1, 5, 20, 30, 64):
        ids, logq, rest = largest(y, k)
        found = coarse_divergence(x.log_softmax(-1).gather(1, ids), logq, rest, direction)
        assert bool((found <= full + 1e-6).all())
        assert bool((found >= before - 1e-6).all())  # a finer partition sees more
        before = found
    torch.testing.assert_close(before, full, atol=1e-5, rtol=1e-5)


# -- the options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "sft", "p_power": 2.0}, "mode sft has no weight"),
        ({"mode": "sft+kl", "weight_cap": 0.5}, "mode sft\\+kl has no weight"),
        ({"mode": "dft", "cache_top_k": 64}, "mode dft has no reference"),
        ({"mode": "sft", "reference": "adapter-off"}, "mode sft has no reference"),
        ({"member": "top_p-0.3", "p_power": 2.0}, "one of the two"),
        ({"member": "nonsense"}, "unknown member"),
        ({"weight_floor": 0.9, "weight_cap": 0.5}, "above weight_cap"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        AnchoredSFT(**options)


def test_dynamic_ft_refuses_crossed_bounds():
    with pytest.raises(UserError, match="above weight_cap"):
        DynamicFineTuning(weight_floor=0.9, weight_cap=0.5)


# -- the engine


def trained(method, *, rows=None, model=None, parameters=None, chunk=None, transforms=(), **values):
    """The session after training, and its records."""
    stack = {"parameters": parameters} if parameters else {}
    session = make_session(model, objective=method, transforms=list(transforms), **stack)
    session.head_chunk = chunk
    records = []
    Trainer(
        session,
        rows or random_rows(),
        settings(**{"max_steps": 4, **values}),
        observe=lambda event, record: records.append(record) if event == "step" else None,
    ).run()
    return session, records


def adapters(**options):
    return [LowRankAdaptation(rank=4, **options)]


@pytest.mark.parametrize("make", [lambda: [OpenAll()], adapters, lambda: adapters(dora=True)])
def test_the_divergence_starts_at_zero_and_the_reference_stays_as_it_was(make):
    base = weights(tiny_llama())
    session, records = trained(AnchoredSFT(anchor_weight=0.5), parameters=make())
    assert records[0]["kl"] <= 1e-6
    assert records[-1]["kl"] > 1e-5
    frozen = session._models.get("reference")
    if frozen is not None:
        for name, value in weights(frozen).items():
            assert torch.equal(value, base[name])
        assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    else:
        own = {
            n.replace("base_model.model.", "").replace(".base_layer", ""): v for n, v in weights(session.model).items()
        }
        assert all(torch.equal(value, own[name]) for name, value in base.items())


def test_adapters_switched_off_are_a_copy_of_the_base():
    session, _ = trained(AnchoredSFT(), parameters=adapters(dora=True))
    assert "reference" not in session._models
    rows = random_rows(4)
    batch = session.task.collate(rows.fetch(range(4)), range(4))
    keep = lambda logits_CV, index_C: logits_CV  # noqa: E731
    wanted = make_session(tiny_llama().eval()).forward(batch, grad=False).over_vocabulary(keep)
    torch.testing.assert_close(session.forward(batch, "reference").over_vocabulary(keep), wanted)
    assert not torch.allclose(session.forward(batch, grad=False).over_vocabulary(keep), wanted)


def test_dropout_of_the_trained_model_does_not_reach_the_reference():
    session, records = trained(AnchoredSFT(), model=tiny_llama(dropout=0.3))
    assert records[0]["kl"] > 1e-6  # of the policy alone
    rows = random_rows(4)
    batch = session.task.collate(rows.fetch(range(4)), range(4))
    session.model.train()
    twice = [session.forward(batch, "reference").logp_N for _ in range(2)]
    assert torch.equal(*twice)


@pytest.mark.parametrize("options", [{}, {"kl_direction": "reverse"}, {"weight_level": "sequence"}, {"cache_top_k": 8}])
def test_chunks_of_the_head_change_nothing(options):
    values = {"optimizer": "sgd", "learning_rate": 0.1}
    whole, _ = trained(AnchoredSFT(anchor_weight=0.5, **options), **values)
    cut, _ = trained(AnchoredSFT(anchor_weight=0.5, **options), chunk=5, **values)
    for name, value in weights(whole.model).items():
        torch.testing.assert_close(weights(cut.model)[name], value, atol=1e-6, rtol=1e-4)


def test_a_step_has_the_gradient_of_the_plain_formula():
    rows = random_rows(6)
    session, _ = trained(AnchoredSFT(anchor_weight=0.5), rows=rows, optimizer="sgd", learning_rate=0.1, max_steps=3)
    session.model.zero_grad()
    batch = session.task.collate(rows.fetch(range(6)), range(6))
    loss = session.loss(batch)
    (loss.sum / loss.weight).backward()
    found = {n: p.grad.clone() for n, p in session.model.named_parameters()}
    twin, base = copy.deepcopy(session.model).double(), tiny_llama().double()
    twin.zero_grad()
    own, other = (m(**batch.inputs).logits.reshape(-1, 64)[batch.position_N].log_softmax(-1) for m in (twin, base))
    logp_N = own.gather(1, batch.target_N[:, None]).squeeze(1)
    kl_N = torch.nn.functional.kl_div(own, other.detach(), log_target=True, reduction="none").sum(-1)
    (-(logp_N.exp().detach() * logp_N) + 0.5 * kl_N).mean().backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(found[name].double(), parameter.grad, atol=1e-6, rtol=1e-3)


def test_the_cache_over_the_whole_vocabulary_is_the_exact_divergence(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))
    values = {"optimizer": "sgd", "learning_rate": 0.1, "max_steps": 6, "epochs": 2}
    exact, records = trained(AnchoredSFT(anchor_weight=0.5), **values)
    cached, kept = trained(AnchoredSFT(anchor_weight=0.5, cache_top_k=64), **values)
    np.testing.assert_allclose([r["kl"] for r in kept], [r["kl"] for r in records], atol=2e-5)
    for name, value in weights(exact.model).items():
        torch.testing.assert_close(weights(cached.model)[name], value, atol=2e-5, rtol=1e-3)
    (folder,) = (tmp_path / "store" / "reference-top-k").iterdir()
    before = (folder / "ids.bin").stat().st_mtime_ns
    trained(AnchoredSFT(anchor_weight=0.5, cache_top_k=64), **values)
    assert (folder / "ids.bin").stat().st_mtime_ns == before  # scored once
    _, few = trained(AnchoredSFT(anchor_weight=0.5, cache_top_k=4), **values)
    assert 0 < few[-1]["kl"] < records[-1]["kl"]
    trained(AnchoredSFT(anchor_weight=0.5, cache_top_k=4), model=tiny_llama(1), **values)
    assert len(list((tmp_path / "store" / "reference-top-k").iterdir())) == 3  # another k, another reference


def reference_passes(**about):
    """How often the frozen copy reads inputs in three steps with a cache."""
    session = make_session(objective=AnchoredSFT(cache_top_k=64), **about)
    trainer = Trainer(session, random_rows(), settings(max_steps=3))
    calls = []
    session._models["reference"].get_decoder().register_forward_pre_hook(lambda *_: calls.append(1))
    trainer.run()
    return len(calls)


def test_a_cached_step_runs_no_reference_and_corrupted_inputs_run_the_live_one():
    assert reference_passes() == 0
    noise = MaskedThought(rate_max=0.4, rate_schedule="constant", mask_token="pad")
    assert reference_passes(transforms=[noise]) == 3


def test_a_batch_without_supervised_positions_gives_zero_with_a_graph():
    session, _ = trained(AnchoredSFT(anchor_weight=0.5))
    rows = random_rows(3)
    batch = session.task.collate(rows.fetch(range(3)), range(3))
    for empty in (batch.positions(torch.arange(0)), batch.with_weights(torch.zeros_like(batch.weight_N))):
        session.model.zero_grad()
        loss = session.loss(empty)
        assert float(loss.sum.detach()) == 0.0
        loss.sum.backward()
        assert all(not p.grad.any() for p in session.model.parameters() if p.grad is not None)


def test_a_resumed_run_must_have_the_reference_it_was_begun_with(tmp_path):
    def begin(model):
        session = make_session(model, objective=AnchoredSFT())
        return Trainer(session, random_rows(), settings(max_steps=2, save_steps=1), folder=tmp_path)

    begin(tiny_llama()).run()
    begin(tiny_llama()).run(resume=True)
    with pytest.raises(LuthierError, match="not the one this run was begun with"):
        begin(tiny_llama(1)).run(resume=True)


class NotAtZero(LowRankAdaptation):
    """An adapter that changes the outputs before training."""

    def apply(self, model, ctx):
        model = super().apply(model, ctx)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.1)
        return model


def test_an_adapter_that_does_not_start_at_the_base_is_refused_unless_the_base_is_meant():
    with pytest.raises(UserError, match=r"must be 0: .* reference: adapter-off"):
        trained(AnchoredSFT(), parameters=[NotAtZero(rank=4)])
    _, records = trained(AnchoredSFT(reference="adapter-off"), parameters=[NotAtZero(rank=4)])
    assert records[0]["kl"] > 1e-6
    with pytest.raises(UserError, match="adapter-off needs adapters"):
        trained(AnchoredSFT(reference="adapter-off"))


def test_references_that_cannot_serve_are_refused():
    session = make_session(objective=AnchoredSFT())
    session._models["reference"] = tiny_llama(vocabulary=80).eval()
    with pytest.raises(UserError, match="predicts 80 tokens and the model 64"):
        session.stack.objective.prepare(session, random_rows())
    with pytest.raises(UserError, match="needs the model 'teacher'"):
        make_session(objective=AnchoredSFT(reference="teacher"))


def test_it_goes_with_corruption_selection_and_adapters():
    session = make_session(
        objective=AnchoredSFT(anchor_weight=0.5),
        parameters=adapters(),
        transforms=[MaskedThought(rate_max=0.3, rate_schedule="constant", mask_token="pad")],
        selector=UtilityDiversitySampling(keep_fraction=0.5, memory=16, columns=8, rows=4),
    )
    records = []
    Trainer(
        session,
        random_rows(48),
        settings(max_steps=3),
        observe=lambda event, record: records.append(record) if event == "step" else None,
    ).run()
    # The reference reads the same corrupted inputs, so that the divergence starts at zero here too.
    assert records[0]["kl"] <= 1e-6 < records[-1]["kl"]


def test_a_classifier_has_one_position_per_picture():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_labels=5,
    )  # fmt: skip
    method, opened = AnchoredSFT(anchor_weight=0.5), OpenAll()
    stack = Stack(objective=method, parameters=[opened], named={"objective": method, "parameters#0": opened})
    model = ViTForImageClassification(config)
    session = Session(model=model, task=ImageClassification(None), processor=None, stack=stack)
    with torch.no_grad():
        model.classifier.weight.add_(torch.randn_like(model.classifier.weight) * 0.1)
    pixels, target_N = torch.randn(6, 3, 8, 8), torch.arange(6) % 5
    batch = position_batch(6, target_N=target_N)
    batch.inputs, batch.row_B, batch.sequence_N = {"pixel_values": pixels}, torch.arange(6), torch.arange(6)
    session.model.eval()
    loss = session.loss(batch)
    own, other = (m(pixels).logits.double().log_softmax(-1) for m in (model, session._models["reference"]))
    logp_N = own.gather(1, target_N[:, None]).squeeze(1)
    kl_N = (other.exp() * (other - own)).sum(-1)
    assert float(kl_N.detach().mean()) > 1e-4
    wanted = (-(logp_N.exp().detach() * logp_N) + 0.5 * kl_N).sum()
    assert float(loss.sum.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    loss.sum.backward()
    found = model.classifier.weight.grad.clone()
    model.zero_grad()
    wanted.backward()
    torch.testing.assert_close(found, model.classifier.weight.grad, atol=1e-6, rtol=1e-4)
