"""Probability-based token losses against values and derivatives worked out in float64 numpy."""

from __future__ import annotations

import copy
import io
import math
import warnings

import numpy as np
import pytest
import torch
from fakes import FakeContext, FakeOutputs, KnownLogp, position_batch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from helpers import OpenAll, settings
from luthier import lab
from luthier.core.errors import LuthierError, UserError
from luthier.engine.loop import Trainer
from luthier.engine.session import Session
from luthier.engine.stack import Stack
from luthier.functional.probability_losses import Member, kept, parse, token_loss, token_weight
from luthier.methods.objectives.beyond_log_likelihood import BeyondLogLikelihood
from luthier.methods.objectives.sft import SupervisedFineTuning
from luthier.tasks.classification import ImageClassification

P = np.array([1 - 1e-9, 0.999, 0.9, 0.5, 0.3, 0.05, 1e-4, 1e-12])
LOGP = np.log(P)
LOGP[0] = math.log1p(-1e-9)

# f and w = -f'(p) p by hand.
BY_HAND = {
    "nll": (lambda p, lp: -lp, lambda p: np.ones_like(p)),
    "p": (lambda p, lp: -np.expm1(lp), lambda p: p),
    "general-0.5": (lambda p, lp: -np.expm1(0.5 * lp) / 0.5, lambda p: p**0.5),
    "general-8": (lambda p, lp: -np.expm1(8 * lp) / 8, lambda p: p**8),
    "general--1": (lambda p, lp: np.expm1(-lp), lambda p: 1 / p),
    "general-0": (lambda p, lp: -lp, lambda p: np.ones_like(p)),
    "top_p-0.3": (lambda p, lp: -np.expm1(lp), lambda p: p * (p >= 0.3)),
    "bottom_p-0.5": (lambda p, lp: -np.expm1(lp), lambda p: p * (p <= 0.5)),
    "top_logp-0.4": (lambda p, lp: -lp, lambda p: 1.0 * (p >= 0.4)),
    "bottom_logp-0.4": (lambda p, lp: -lp, lambda p: 1.0 * (p <= 0.4)),
}


def outputs(p=P, kind=torch.float64):
    return torch.tensor(np.log(p), dtype=kind, requires_grad=True)


def loss_of(options, p, weight=None, step=50):
    logp_N = outputs(np.asarray(p, dtype=float))
    weight_N = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    batch = position_batch(len(p), weight_N=weight_N)
    return BeyondLogLikelihood(**options).loss(KnownLogp(logp_N), batch, FakeContext(step=step)), logp_N


@pytest.mark.parametrize("name", BY_HAND)
def test_values_and_gradients_are_those_worked_out_by_hand(name):
    member = parse(name)
    value, weight = BY_HAND[name]
    logp_N = torch.tensor(LOGP, requires_grad=True)
    loss_N = token_loss(member, logp_N)
    np.testing.assert_allclose(loss_N.detach().numpy(), value(P, LOGP), rtol=1e-9)
    inside_N = kept(member, logp_N)
    (loss_N * inside_N).sum().backward()
    # grad f = f'(p) p = -w(p), also at p = 1e-12 where a naive 1 - exp loses every digit
    np.testing.assert_allclose(-logp_N.grad.numpy(), weight(P), rtol=2e-8)
    np.testing.assert_allclose(token_weight(member, logp_N).numpy(), weight(P), rtol=2e-8)


@pytest.mark.parametrize("name", ["p", "general-0.5", "nll", "general--1"])
def test_gradients_through_real_logits_agree_with_finite_differences(name):
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    batch = position_batch(6, target_N=torch.tensor([0, 1, 2, 3, 4, 0]), weight_N=torch.ones(6, dtype=torch.float64))
    method = BeyondLogLikelihood(objective=name)

    def run(x):
        return method.loss(FakeOutputs(x, batch), batch, FakeContext(step=50)).sum

    run(logits_NV).backward()
    numeric = torch.zeros_like(logits_NV)
    for index in np.ndindex(*logits_NV.shape):
        moved = logits_NV.detach().clone()
        moved[index] += 1e-6
        up = float(run(moved).detach())
        moved[index] -= 2e-6
        numeric[index] = (up - float(run(moved).detach())) / 2e-6
    torch.testing.assert_close(logits_NV.grad, numeric, atol=1e-7, rtol=1e-6)


def test_float32_keeps_one_minus_p_near_one_and_the_gradient_near_zero():
    logp_N = torch.tensor([-1e-9, math.log(1e-12)], requires_grad=True)
    loss_N = token_loss(Member("p"), logp_N)
    assert float(loss_N.detach()[0]) == pytest.approx(1e-9, rel=1e-6)
    loss_N.sum().backward()
    assert float(-logp_N.grad[1]) == pytest.approx(1e-12, rel=1e-5)


def test_general_at_its_ends_is_p_and_nll():
    logp_N = outputs()
    assert torch.equal(token_loss(parse("general-1"), logp_N), token_loss(Member("p"), logp_N))
    assert torch.equal(token_loss(parse("general-0"), logp_N), -logp_N)
    near = token_loss(parse("general-1e-6"), logp_N)
    torch.testing.assert_close(near, -logp_N, atol=0, rtol=2e-5)
    tiny = token_loss(parse("general-1e-12"), logp_N)
    torch.testing.assert_close(tiny, -logp_N, atol=1e-9, rtol=1e-9)


def test_p_has_the_gradient_of_likelihood_weighted_by_detached_p():
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(8, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    second = first.detach().clone().requires_grad_()
    batch = position_batch(8, target_N=torch.arange(8) % 7, weight_N=torch.ones(8, dtype=torch.float64))
    BeyondLogLikelihood(objective="p").loss(FakeOutputs(first, batch), batch, FakeContext(step=50)).sum.backward()
    logp_N = FakeOutputs(second, batch).logp_N
    (-logp_N * logp_N.detach().exp()).sum().backward()
    torch.testing.assert_close(first.grad, second.grad, atol=1e-15, rtol=1e-12)


def test_a_threshold_takes_tokens_out_of_the_denominator():
    loss, _ = loss_of({"objective": "top_p", "q": 0.4}, [0.9, 0.5, 0.05])
    assert loss.sum.item() / float(loss.weight) == pytest.approx((0.1 + 0.5) / 2)
    assert [float(v) for v in loss.metrics["kept_share"]] == [2.0, 3.0]
    everything, _ = loss_of({"objective": "top_p", "q": 0.4, "denominator": "all"}, [0.9, 0.5, 0.05])
    assert everything.sum.item() / float(everything.weight) == pytest.approx(0.6 / 3)


def test_thresholds_at_their_ends_keep_everything():
    p = [1.0, 0.9, 0.5, 1e-9]
    for name, plain in (("top_p-0", "p"), ("bottom_p-1", "p"), ("top_logp-0", "nll"), ("bottom_logp-1", "nll")):
        cut, _ = loss_of({"objective": name}, p)
        whole, _ = loss_of({"objective": plain}, p)
        assert torch.equal(cut.sum, whole.sum)
        assert float(cut.weight) == float(whole.weight) == 4.0


def test_log_probabilities_rounded_above_zero_stay_inside_bottom_one():
    assert bool(kept(parse("bottom_p-1"), torch.tensor([1e-7])).all())


def test_nothing_kept_gives_zero_with_a_graph_and_no_nan():
    for micro_mean in (False, True):
        loss, logp_N = loss_of({"objective": "top_p", "q": 0.99, "micro_mean": micro_mean}, [0.5, 0.1])
        (loss.sum / loss.weight).backward()
        assert loss.sum.item() == 0.0
        assert torch.equal(logp_N.grad, torch.zeros(2, dtype=torch.float64))
        assert float(loss.metrics["nothing_kept"][0]) == 1.0


def test_a_dropped_infinite_token_leaves_no_trace():
    logp_N = torch.tensor([-0.1, -torch.inf], requires_grad=True)
    loss = BeyondLogLikelihood(objective="top_logp-0.5").loss(
        KnownLogp(logp_N), position_batch(2), FakeContext(step=50)
    )
    loss.sum.backward()
    assert loss.sum.item() == pytest.approx(0.1)
    assert logp_N.grad.tolist() == [-1.0, 0.0]


@pytest.mark.parametrize(("denominator", "expected"), [("kept", 1.3 / 2), ("all", 1.3 / 3), ("weights", 1.3 / 5)])
def test_position_weights_and_denominators(denominator, expected):
    # p = .9 .5 .05 and weights 3 2 7; kept are the first two: 3 * .1 + 2 * .5 = 1.3
    options = {"objective": "top_p-0.4", "denominator": denominator}
    loss, _ = loss_of(options, [0.9, 0.5, 0.05], weight=[3.0, 2.0, 7.0])
    assert loss.sum.item() / float(loss.weight) == pytest.approx(expected)


def test_positions_of_weight_zero_do_not_count():
    loss, _ = loss_of({"objective": "p"}, [0.9, 0.5, 0.05], weight=[1.0, 0.0, 1.0])
    assert float(loss.weight) == 2.0
    assert loss.sum.item() == pytest.approx(0.1 + 0.95)


def test_micro_mean_is_the_mean_of_the_micro_batches_means():
    one, _ = loss_of({"objective": "p", "micro_mean": True}, [0.9])
    two, _ = loss_of({"objective": "p", "micro_mean": True}, [0.5, 0.1, 0.3])
    assert (one.unit, one.weight) == ("batch", 1.0)
    mean = (one.sum.item() + two.sum.item()) / (one.weight + two.weight)
    assert mean == pytest.approx((0.1 + (0.5 + 0.9 + 0.7) / 3) / 2)


def test_the_identity_setting_is_sft_bit_for_bit():
    generator = torch.Generator().manual_seed(2)
    first = torch.randn(50, generator=generator).sub(3).requires_grad_()
    second = first.detach().clone().requires_grad_()
    weight_N = torch.rand(50, generator=generator)
    batch, ctx = position_batch(50, weight_N=weight_N), FakeContext(step=50)
    ours = BeyondLogLikelihood(objective="nll", denominator="weights").loss(KnownLogp(first), batch, ctx)
    plain = SupervisedFineTuning().loss(KnownLogp(second), batch, ctx)
    assert torch.equal(ours.sum, plain.sum)
    assert torch.equal(ours.weight, plain.weight)
    ours.sum.backward()
    plain.sum.backward()
    assert torch.equal(first.grad, second.grad)


def test_chunks_of_positions_add_up_to_the_whole():
    p = [0.9, 0.5, 0.05, 0.7, 0.2]
    whole, _ = loss_of({"objective": "top_p-0.3"}, p)
    parts = [loss_of({"objective": "top_p-0.3"}, part)[0] for part in (p[:2], p[2:])]
    assert sum(x.sum.item() for x in parts) == pytest.approx(whole.sum.item())
    assert sum(float(x.weight) for x in parts) == pytest.approx(float(whole.weight))


@pytest.mark.parametrize(
    ("text", "member"),
    [
        ("general-2", Member("general", alpha=2.0)),
        ("general--0.5", Member("general", alpha=-0.5)),
        ("general", Member("general", alpha=1.0)),
        ("top_p-0.3", Member("top_p", q=0.3)),
        ("GeneralFamily-8", Member("general", alpha=8.0)),
        ("OnlyTopP-0.1", Member("top_p", q=0.1)),
        ("OnlyBottomLogP-0.9", Member("bottom_logp", q=0.9)),
        ("original", Member("nll")),
        ("logp", Member("nll")),
    ],
)
def test_compact_and_official_names(text, member):
    assert parse(text) == member
    assert parse(str(member)) == member


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "general", "alpha": float("nan")}, "finite alpha"),
        ({"objective": "p", "alpha": 2.0}, "'p' has no alpha"),
        ({"objective": "nll", "q": 0.5}, "'nll' has no threshold q"),
        ({"objective": "top_p"}, "needs a threshold q"),
        ({"objective": "top_p", "q": 1.0}, "0 <= q < 1"),
        ({"objective": "bottom_p", "q": 0.0}, "0 < q <= 1"),
        ({"objective": "general-2", "alpha": 2.0}, "already carries its value"),
        ({"objective": "p-2"}, "takes no value"),
        ({"objective": "logarithm"}, "unknown member"),
        ({"objective": "general-"}, "cannot read"),
        ({"objective": "custom"}, "go together"),
        ({"custom": "math:log"}, "go together"),
        ({"auto": True, "objective": "nll"}, "auto chooses"),
        ({"auto": True, "strong_from": 0.2}, "weak_up_to"),
    ],
)
def test_bad_options_are_refused_with_the_way_out(options, message):
    with pytest.raises(UserError, match=message):
        BeyondLogLikelihood(**options)


def test_what_it_tells_the_engine():
    assert BeyondLogLikelihood().needs.positionwise
    assert BeyondLogLikelihood().needs.fixed_weight
    assert not BeyondLogLikelihood(objective="top_p-0.3").needs.fixed_weight
    assert BeyondLogLikelihood(objective="top_p-0.3", denominator="all").needs.fixed_weight
    assert not BeyondLogLikelihood(micro_mean=True).needs.positionwise
    assert not BeyondLogLikelihood(micro_mean=True).needs.fixed_weight
    assert "general-2, denominator kept" in str(BeyondLogLikelihood(objective="GeneralFamily-2"))


def test_a_custom_function_from_the_users_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def square(lp):\n    return lp ** 2\n\ndef wrong(lp):\n    return lp\n\ndef off(lp):\n    return 1 - lp\n"
    )
    loss, logp_N = loss_of({"objective": "custom", "custom": f"{file}:square"}, [0.5, 0.25])
    assert loss.sum.item() == pytest.approx(math.log(2) ** 2 + math.log(4) ** 2)
    loss.sum.backward()
    np.testing.assert_allclose(logp_N.grad.numpy(), 2 * np.log([0.5, 0.25]))
    for reference, message in (
        (f"{file}:wrong", "must not increase"),
        (f"{file}:off", "must be 0 at p = 1"),
        (f"{file}:absent", "defines no function 'absent'"),
        (f"{tmp_path / 'absent.py'}:f", "no file"),
        ("no_such_module_here:f", "cannot import"),
        ("nothing", "must be path/to/file.py:name"),
    ):
        with pytest.raises(UserError, match=message):
            BeyondLogLikelihood(objective="custom", custom=reference)


@pytest.mark.parametrize(("p", "chosen"), [(0.9, "p"), (0.2, "nll"), (0.5, "nll")])
def test_auto_measures_once_and_survives_a_resume(p, chosen):
    ctx = FakeContext(scores=[torch.full((5,), math.log(p)), torch.full((2,), math.log(p))], step=50)
    method = BeyondLogLikelihood(auto=True)
    with pytest.raises(LuthierError, match="has not measured"):
        method.loss(KnownLogp(outputs([0.5])), position_batch(1), ctx)
    method.prepare(ctx, object())
    assert str(method.member) == chosen
    assert ctx.logged["continuum_mean_p"] == pytest.approx(p)
    again = BeyondLogLikelihood(auto=True)
    again.load(method.state())
    assert again.member == method.member


def test_a_weak_model_under_a_prior_leaning_loss_is_warned_about_once():
    method, ctx = BeyondLogLikelihood(objective="p"), FakeContext()
    for step in range(13):
        ctx.step = step
        call = lambda: method.loss(KnownLogp(outputs([0.01, 0.02])), position_batch(2), ctx)  # noqa: E731
        if step == 10:
            with pytest.warns(UserWarning, match=r"first 10 steps is 0\.015"):
                call()
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                call()


def test_overflowing_negative_powers_are_clamped_and_warned_about():
    logp_N = torch.tensor([-100.0, -1.0], requires_grad=True)
    method = BeyondLogLikelihood(objective="general", alpha=-1.0)
    with pytest.warns(UserWarning, match=r"below -80\.0 are clamped"):
        loss = method.loss(KnownLogp(logp_N), position_batch(2), FakeContext(step=50))
    loss.sum.backward()
    assert bool(loss.sum.isfinite())
    assert logp_N.grad[0] == 0.0
    assert float(-logp_N.grad[1]) == pytest.approx(math.e)
    np.testing.assert_allclose(token_weight(parse("general--1"), logp_N).numpy(), [0.0, math.e], rtol=1e-6)


def test_losses_of_the_paper_keep_their_class():
    leaning = {m: parse(m).prior_leaning for m in BY_HAND}
    assert [m for m, yes in leaning.items() if yes] == ["p", "general-0.5", "general-8", "top_p-0.3", "top_logp-0.4"]


class Pictures:
    """Prepared rows of lab:pictures: a coloured shape each, to be told by its colour."""

    task = "image-classification"

    def __init__(self, count):
        made = lab.dataset("pictures", n=count, difficulty=1, label="colour")
        self.labels = tuple(sorted({row["label"] for row in made}))
        self.images, self.label = [r["image"] for r in made], [self.labels.index(r["label"]) for r in made]
        self.lengths = np.zeros(count, dtype=np.int32)

    def __len__(self):
        return len(self.label)

    def fetch(self, index):
        return {"image": [self.images[int(i)] for i in index], "label": [self.label[int(i)] for i in index]}

    def pixels(self):
        """[n, 3, 16, 16] in [0, 1], read here once more."""
        read = [np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB")) for image in self.images]
        return torch.from_numpy(np.stack(read)).permute(0, 3, 1, 2) / 255


def to_pixels(images, return_tensors):
    return {"pixel_values": torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) / 255 for i in images])}


@pytest.mark.parametrize("name", ["p", "general-0.5", "top_logp-0.1"])
def test_pictures_are_classified(name):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4,
        num_labels=6, hidden_dropout_prob=0.0,
    )  # fmt: skip
    rows, model = Pictures(96), ViTForImageClassification(config)
    base, method, opened = copy.deepcopy(model).double().eval(), BeyondLogLikelihood(objective=name), OpenAll()
    session = Session(
        model=opened.apply(model, None),
        task=ImageClassification(to_pixels),
        processor=to_pixels,
        stack=Stack(objective=method, parameters=[opened], named={"objective": method, "parameters": opened}),
    )
    records = []
    Trainer(
        session,
        rows,
        settings(batch_rows=96, epochs=60, learning_rate=5e-3),
        observe=lambda event, record: records.append(record) if event == "step" else None,
    ).run()
    target_N = torch.tensor(rows.label)

    def p_of(classifier):
        with torch.no_grad():
            logits_NV = classifier(rows.pixels().to(next(classifier.parameters()))).logits
        return torch.softmax(logits_NV.double(), -1)[torch.arange(96), target_N].numpy()

    # The first step's loss is that of the untrained model, one position per picture.
    p_N = p_of(base)
    kept_N = p_N >= 0.1 if name == "top_logp-0.1" else np.full(96, True)
    assert records[0]["loss"] == pytest.approx(BY_HAND_AT[name](p_N)[kept_N].mean(), rel=1e-4)
    assert records[0]["mean_probability"] == pytest.approx(p_N.mean(), rel=1e-4)
    assert p_N.mean() < 0.3 < 0.6 < p_of(session.model.eval()).mean()


BY_HAND_AT = {"p": lambda p: 1 - p, "general-0.5": lambda p: 2 * (1 - np.sqrt(p)), "top_logp-0.1": lambda p: -np.log(p)}
