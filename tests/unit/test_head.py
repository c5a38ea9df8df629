"""The log-probability head against plain full-logits torch, in float64 and float32."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from luthier.core.errors import LuthierError, UserError
from luthier.core.memory import keep_pages
from luthier.core.protocols import Batch, Loss
from luthier.engine.head import Head, LogitsOutputs
from luthier.functional import chunked_projection
from luthier.functional.logit_rows import STATISTICS, choose, normalise_torch

N, V, H = 23, 101, 12


def problem(kind=torch.float64, *, bias=True, rows=N):
    """hidden, weight, bias, target, position weights from one seed."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, H, generator=generator, dtype=kind).requires_grad_()
    weight = torch.randn(V, H, generator=generator, dtype=kind).requires_grad_()
    bias_V = torch.randn(V, generator=generator, dtype=kind).requires_grad_() if bias else None
    target = torch.randint(V, (rows,), generator=generator)
    return hidden, weight, bias_V, target, torch.rand(rows, generator=generator, dtype=kind)


def batch_of(target, weights):
    empty = torch.zeros_like(target)
    return Batch({}, empty, target, weights, empty, torch.zeros(1, dtype=torch.long))


def full_log_p(hidden, weight, bias, scale=1.0, softcap=None):
    """Log-probabilities [N, V] the plain way."""
    logits = torch.nn.functional.linear(hidden, weight) * scale
    logits = logits if bias is None else logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits, -1)


def on_probability(out, batch):
    """A positionwise loss whose derivative by logp differs from position to position."""
    return Loss(((1 - out.logp_N.exp()) * batch.weight_N).sum(), batch.weight_N.sum())


def first_classes(logits_CV, index_C):
    """A function of the full rows: expected class number among the first seven."""
    return (logits_CV.softmax(-1)[:, :7] * torch.arange(7, dtype=logits_CV.dtype)).sum(-1)


def assert_near(found, expected, tolerance):
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f.to(e.dtype), e, atol=tolerance, rtol=tolerance)


CASES = list(itertools.product([torch.float64, torch.float32], [False, True], [1.0, 0.25], [None, 4.0], [None, 5]))


@pytest.mark.parametrize(("kind", "bias", "scale", "softcap", "chunk"), CASES)
@pytest.mark.parametrize("keep", [True, False])
def test_values_and_gradients_equal_full_logits(monkeypatch, kind, bias, scale, softcap, chunk, keep):
    monkeypatch.setattr(chunked_projection, "_KEEP_BYTES", {"cpu": 1 << 30 if keep else 0})
    hidden, weight, bias_V, target, weights = problem(kind, bias=bias)
    log_p = full_log_p(hidden, weight, bias_V, scale, softcap)
    logp = log_p.gather(1, target[:, None]).squeeze(1)
    trained = [hidden, weight, *([bias_V] if bias else [])]
    tolerance = 1e-10 if kind == torch.float64 else 2e-5
    head = Head(weight, bias_V, scale=scale, softcap=softcap, chunk=chunk)
    batch = batch_of(target, weights)

    out = head.outputs(hidden, target, batch.sequence_N, statistics=("logp", "entropy"))
    p = log_p.exp()
    assert torch.equal(out.top1_N, log_p.argmax(-1))
    assert_near(
        [out.logp_N, out.entropy_N, out.top1_logp_N, out.collision_N],
        [logp, -(p * log_p).sum(-1), log_p.amax(-1), p.square().sum(-1)],
        tolerance,
    )
    assert not any(t.requires_grad for t in (out.entropy_N, out.top1_N, out.top1_logp_N, out.collision_N))

    # A sum over positions: in the same pass, and through the graph.
    plain = on_probability(LogitsOutputs(log_p, target, batch.sequence_N), batch).sum
    expected = torch.autograd.grad(plain, trained, retain_graph=True)
    loss = head.positionwise(hidden, batch, on_probability)
    assert_near([loss.sum, loss.weight], [plain, weights.sum()], tolerance)
    assert_near(torch.autograd.grad(loss.sum, trained), expected, tolerance)
    for _ in range(2):  # a graph that is kept may be used again
        found = torch.autograd.grad(on_probability(out, batch).sum, trained, retain_graph=True)
        assert_near(found, expected, tolerance)

    # A loss that joins positions, and a function of the whole rows beside it.
    joined = (logp * weights).sum().square() + first_classes(log_p, None).square().sum()
    expected = torch.autograd.grad(joined, trained, retain_graph=True)
    mine = (out.logp_N * weights).sum().square() + out.over_vocabulary(first_classes).square().sum()
    assert_near([mine], [joined], tolerance)
    assert_near(torch.autograd.grad(mine, trained), expected, tolerance)

    # The same function of the rows within a positionwise loss, read before and after logp.
    both = plain + first_classes(log_p, None).square().sum()
    expected = torch.autograd.grad(both, trained)
    for vocabulary_first in (True, False):

        def objective(out, part, vocabulary_first=vocabulary_first):
            rows = out.over_vocabulary(first_classes) if vocabulary_first else None
            loss = on_probability(out, part)
            rows = out.over_vocabulary(first_classes) if rows is None else rows
            return Loss(loss.sum + rows.square().sum(), loss.weight)

        found = torch.autograd.grad(head.positionwise(hidden, batch, objective).sum, trained)
        assert_near(found, expected, tolerance)


def test_only_the_gradients_that_are_needed():
    for frozen in ("hidden", "weight"):
        hidden, weight, _, target, weights = problem(bias=False)
        (hidden if frozen == "hidden" else weight).requires_grad_(False)
        trained = weight if frozen == "hidden" else hidden
        expected = torch.autograd.grad(
            (full_log_p(hidden, weight, None).gather(1, target[:, None]).squeeze(1) * weights).sum(), trained
        )
        batch = batch_of(target, weights)

        def objective(out, part):
            return Loss((out.logp_N * part.weight_N).sum(), 1.0)

        head = Head(weight, chunk=7)
        assert_near(torch.autograd.grad(head.positionwise(hidden, batch, objective).sum, trained), expected, 1e-10)
        out = head.outputs(hidden, target, batch.sequence_N)
        assert_near(torch.autograd.grad(objective(out, batch).sum, trained), expected, 1e-10)


def test_without_gradients_nothing_has_a_graph():
    hidden, weight, bias, target, weights = problem()
    batch = batch_of(target, weights)
    with torch.no_grad():
        loss = Head(weight, bias).positionwise(hidden, batch, on_probability)
        out = Head(weight, bias).outputs(hidden, target, batch.sequence_N)
    # Outputs made without gradients stay so, wherever they are read.
    assert not loss.sum.requires_grad
    assert not out.logp_N.requires_grad
    assert not out.over_vocabulary(first_classes).requires_grad


def test_no_positions_give_zero_with_a_graph():
    hidden, weight, bias, target, weights = problem(rows=0)
    batch = batch_of(target, weights)
    head = Head(weight, bias)
    loss = head.positionwise(hidden, batch, on_probability)
    assert float(loss.sum.detach()) == 0
    assert float(loss.weight) == 0
    out = head.outputs(hidden, target, batch.sequence_N)
    for value in (loss.sum, out.logp_N.sum(), out.over_vocabulary(first_classes).sum()):
        grads = torch.autograd.grad(value, [hidden, weight, bias])
        assert [tuple(g.shape) for g in grads] == [(0, H), (V, H), (V,)]
        assert not any(g.any() for g in grads)


def test_weights_units_and_metrics_are_added_over_the_chunks():
    hidden, weight, bias, target, weights = problem()

    def objective(out, part):
        metrics = {"p": (out.logp_N.detach().exp().sum(), len(part.target_N))}
        return Loss(-(out.logp_N * part.weight_N).sum(), float(part.weight_N.sum()), "token", metrics)

    batch = batch_of(target, weights)
    loss = Head(weight, bias, chunk=4).positionwise(hidden, batch, objective)
    p = full_log_p(hidden, weight, bias).gather(1, target[:, None]).exp().sum()
    assert loss.unit == "token"
    assert loss.weight == pytest.approx(float(weights.sum()))
    assert float(loss.metrics["p"][0]) == pytest.approx(float(p.detach()))
    assert loss.metrics["p"][1] == N


def test_a_positionwise_loss_cannot_lose_a_gradient():
    hidden, weight, bias, target, weights = problem()
    other = torch.ones((), dtype=torch.float64, requires_grad=True)
    batch = batch_of(target, weights)

    def objective(out, part):
        return Loss((out.logp_N * other).sum(), 1.0)

    with pytest.raises(LuthierError, match="positionwise=False"):
        Head(weight, bias).positionwise(hidden, batch, objective)
    loss = Head(weight, bias).positionwise(hidden, batch, on_probability)
    loss.sum.backward(retain_graph=True)
    with pytest.raises(LuthierError, match="once only"):
        loss.sum.backward()


def test_the_hidden_states_in_a_positionwise_loss():
    hidden, weight, bias, target, weights = problem()
    batch = batch_of(target, weights)
    log_p = full_log_p(hidden, weight, bias).gather(1, target[:, None]).squeeze(1)
    expected = torch.autograd.grad((log_p * weights).sum() + hidden.square().sum(), [hidden, weight, bias])

    def objective(out, part):
        return Loss((out.logp_N * part.weight_N).sum() + out.hidden().square().sum(), 1.0)

    loss = Head(weight, bias, chunk=6).positionwise(hidden, batch, objective)
    assert_near(torch.autograd.grad(loss.sum, [hidden, weight, bias]), expected, 1e-10)


def test_tied_weights_get_both_gradients():
    _, weight, _, target, weights = problem(bias=False)
    batch = batch_of(target, weights)
    tokens = torch.arange(N) % V

    def gradient(of_head):
        hidden = torch.nn.functional.embedding(tokens, weight).tanh()
        return torch.autograd.grad(of_head(hidden), weight)

    plain = gradient(lambda h: (-full_log_p(h, weight, None).gather(1, target[:, None]).squeeze(1) * weights).sum())
    mine = gradient(
        lambda h: Head(weight).positionwise(h, batch, lambda o, b: Loss(-(o.logp_N * b.weight_N).sum(), 1.0)).sum
    )
    assert_near(mine, plain, 1e-10)


def test_statistics_are_float32_in_bfloat16_runs():
    hidden, weight, _, target, weights = problem(torch.float32, bias=False)
    batch = batch_of(target, weights)
    # The peer: autocast's own product, then log-softmax in float64 over the very same rounded logits.
    logits = (hidden.bfloat16() @ weight.bfloat16().T).double()
    expected = logits.log_softmax(-1).gather(1, target[:, None]).squeeze(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = Head(weight).outputs(hidden, target, batch.sequence_N, statistics=("logp", "entropy"))
        loss = Head(weight, chunk=6).positionwise(hidden, batch, on_probability)
        logp = out.logp_N
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp.double(), expected, atol=2e-6, rtol=1e-6)
    grads = torch.autograd.grad(loss.sum, [hidden, weight])
    assert {g.dtype for g in grads} == {torch.float32}
    exact = on_probability(LogitsOutputs(full_log_p(hidden, weight, None), target, batch.sequence_N), batch).sum
    for found, wanted in zip(grads, torch.autograd.grad(exact, [hidden, weight]), strict=True):
        assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.999


def test_rare_targets_keep_their_log_probability():
    # p = e^-200 is zero in float32, its logarithm is not.
    logits = torch.tensor([[200.0, 0.0, -50.0], [0.0, 0.0, 0.0]])
    found = normalise_torch(logits, torch.tensor([1, 2]), STATISTICS, True)
    np.testing.assert_allclose(found["logp"].numpy(), [-200.0, -np.log(3.0)], rtol=1e-6)
    np.testing.assert_allclose(found["entropy"].numpy(), [0.0, np.log(3.0)], atol=1e-6)
    np.testing.assert_allclose(found["collision"].numpy(), [1.0, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(logits.numpy(), [[1.0, -1.0, 0.0], [1 / 3, 1 / 3, -2 / 3]], atol=1e-6)


def test_logits_outputs_equal_the_head():
    hidden, weight, bias, target, _weights = problem()
    sequence = torch.zeros_like(target)
    one = LogitsOutputs(hidden @ weight.T + bias, target, sequence, layers=lambda layer: hidden)
    two = Head(weight, bias).outputs(hidden, target, sequence)
    for name in STATISTICS:
        torch.testing.assert_close(getattr(one, f"{name}_N"), getattr(two, f"{name}_N"))
    torch.testing.assert_close(one.over_vocabulary(first_classes), two.over_vocabulary(first_classes))
    assert one.hidden() is hidden
    assert two.hidden() is hidden
    with pytest.raises(LuthierError, match="hidden=True"):
        two.hidden(3)


def test_back_ends_are_refused_by_name():
    with pytest.raises(UserError, match="Did you mean 'torch'"):
        choose("torhc", torch.device("cpu"))
    for name in ("liger", "triton"):
        with pytest.raises(UserError, match=name):
            choose(name, torch.device("cpu"))


PARITY = """
import sys
import torch
from luthier.core.errors import UserError
from luthier.functional.logit_rows import STATISTICS, choose, normalise_torch

name = sys.argv[1]
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
other = choose(name, device)
names = STATISTICS if name == "triton" else ("logp",)
generator = torch.Generator().manual_seed(0)
for kind, gradient_tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
    for width in (101, 9001):
        logits = (torch.randn(6, width, generator=generator) * 4).to(kind).to(device)
        target = torch.randint(width, (6,), generator=generator).to(device)
        mine, theirs = logits.clone(), logits.clone()
        expected, found = normalise_torch(mine, target, names, True), other(theirs, target, names, True)
        for key in names:
            torch.testing.assert_close(found[key], expected[key], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(theirs, mine, atol=gradient_tolerance, rtol=gradient_tolerance)
        unchanged = logits.clone()
        other(unchanged, target, names, False)
        assert torch.equal(unchanged, logits)
        assert other(logits[:0], target[:0], names, True)["logp"].shape == (0,)
if name == "liger":
    try:
        other(logits, target, ("logp", "entropy"), True)
    except UserError as error:
        assert "entropy" in str(error)
    else:
        raise AssertionError("entropy was not refused")
print("parity")
"""


@pytest.mark.parametrize("name", ["triton", "liger"])
def test_parity_of_optional_back_ends(name):
    pytest.importorskip("triton")
    if name == "liger":
        pytest.importorskip("liger_kernel")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    if not torch.cuda.is_available():  # the same kernels, in Triton's interpreter
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", PARITY, name], env=environment, capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "parity" in done.stdout


def test_the_allocator_says_whether_it_keeps_pages():
    assert keep_pages() is (sys.platform == "linux" and "glibc" in os.confstr("CS_GNU_LIBC_VERSION"))
