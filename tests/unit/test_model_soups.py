"""Averages of models: exact means, the greedy pass on a table of scores, learned mixtures, and the approximation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import FakeContext, FakeOutputs, MemorySource, position_batch

from luthier.core.errors import LuthierError, UserError
from luthier.functional.averaging import (
    Average,
    angle,
    barrier,
    disagreement,
    greedy,
    interpolate,
    learn_mixture,
    mean,
    mixture,
    ranked,
    second_difference,
    soup_ensemble_gap,
)
from luthier.methods.weights.model_soups import ModelSoups, tempered_loss


def random_models(count, kind=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "a.weight": torch.randn(3, 4, generator=generator).to(kind),
            "b": torch.randn(5, generator=generator).to(kind),
            "steps": torch.tensor(10 + k),
        }
        for k in range(count)
    ]


def names(count):
    return ["tuned", *(f"run{k}" for k in range(1, count))]


def cook(models, options=None, ctx=None, base=None):
    """The soup of models labelled tuned, run1, run2, ..."""
    ctx = ctx or FakeContext()
    labels = names(len(models))
    sources = {"base": MemorySource(base or models[0])}
    sources |= {n: MemorySource(m) for n, m in zip(labels, models, strict=True)}
    method = ModelSoups(ingredients=labels[1:], **(options or {}))
    method.prepare(sources, ctx)
    found = {name: method.tensor(name, {k: s.tensor(name) for k, s in sources.items()}, ctx) for name in models[0]}
    return method, found


# -- means


def test_uniform_and_weighted_means_are_those_of_numpy():
    models = random_models(5)
    stack = np.stack([m["a.weight"].double().numpy() for m in models])
    _, plain = cook(models)
    np.testing.assert_array_equal(plain["a.weight"].numpy(), stack.mean(0).astype(np.float32))
    weights = {"tuned": 1.0, "run1": 2.0, "run3": 5.0}
    method, weighted = cook(models, {"coefficients": weights})
    expected = (stack[0] + 2 * stack[1] + 5 * stack[3]) / 8
    np.testing.assert_allclose(weighted["a.weight"].numpy(), expected, atol=1e-7)
    assert method.recipe["coefficients"] == {"tuned": 1 / 8, "run1": 2 / 8, "run3": 5 / 8}


def test_the_order_of_the_ingredients_changes_nothing():
    models = random_models(6)
    one = mean([m["b"] for m in models])
    two = mean([m["b"] for m in reversed(models)])
    torch.testing.assert_close(one, two, atol=1e-7, rtol=0)


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_equal_ingredients_give_themselves_back(count, kind):
    model = random_models(1, kind)[0]
    assert torch.equal(mean([model["b"]] * count), model["b"])
    assert mean([model["b"]] * count).dtype is kind


def test_half_precision_is_summed_wide():
    # In bfloat16, 256 + 1 rounds to 256, so a narrow running sum would stay at 256 and give 64.
    values = [torch.tensor([256.0], dtype=torch.bfloat16)] + [torch.tensor([1.0], dtype=torch.bfloat16)] * 3
    assert mean(values).item() == torch.tensor(259 / 4).to(torch.bfloat16).item()


def test_a_single_ingredient_and_integer_buffers_come_back_as_they_are():
    models = random_models(3)
    _, alone = cook(models[:1])
    assert all(alone[n] is models[0][n] for n in alone)
    _, soup = cook(models)
    assert soup["steps"].item() == 10
    assert soup["steps"].dtype == torch.int64
    with pytest.raises(ValueError, match="nothing to average"):
        mean([])
    with pytest.raises(ValueError, match="sum to zero"):
        mean([models[0]["b"], models[1]["b"]], [1.0, -1.0])


def test_interpolation_between_base_and_tuned():
    base, tuned = random_models(2)
    torch.testing.assert_close(interpolate(base["b"], tuned["b"], 0.25), 0.75 * base["b"] + 0.25 * tuned["b"])
    assert interpolate(base["b"], tuned["b"], 0.0) is base["b"]
    assert interpolate(base["b"], tuned["b"], 1.0) is tuned["b"]
    _, found = cook([tuned], {"include_base": True, "coefficients": {"base": 3.0, "tuned": 1.0}}, base=base)
    torch.testing.assert_close(found["b"], 0.75 * base["b"] + 0.25 * tuned["b"])


# -- what cannot be averaged


def test_bad_options():
    with pytest.raises(UserError, match="named twice"):
        ModelSoups(ingredients=["a", "a"])
    with pytest.raises(UserError, match="belong to method: uniform"):
        ModelSoups(method="greedy", coefficients={"tuned": 1.0})
    with pytest.raises(UserError, match="Did you mean 'run1'"):
        cook(random_models(2), {"coefficients": {"rum1": 1.0}})
    with pytest.raises(UserError, match="more than 0"):
        cook(random_models(2), {"coefficients": {"run1": 0.0}})
    with pytest.raises(LuthierError, match="prepare must run"):
        ModelSoups().tensor("b", {}, FakeContext())
    with pytest.raises(UserError, match="was not opened"):
        ModelSoups(ingredients=["x"]).prepare({"base": MemorySource({}), "tuned": MemorySource({})}, FakeContext())
    with pytest.warns(UserWarning, match="batch-norm"):
        cook([{"bn.running_mean": torch.zeros(2)}] * 2)
    assert ModelSoups(ingredients=["runs/a"]).sources == {"runs/a": "runs/a"}


# -- the greedy pass

TABLE = {
    ("a",): 0.80,
    ("b",): 0.78,
    ("c",): 0.75,
    ("d",): 0.70,
    ("a", "b"): 0.82,
    ("a", "b", "c"): 0.82,
    ("a", "b", "d"): 0.83,
    ("a", "b", "c", "d"): 0.81,
}
ALONE = {k[0]: v for k, v in TABLE.items() if len(k) == 1}


def score(labels):
    return TABLE[tuple(labels)]


def test_the_pass_accepts_only_strictly_better_soups():
    found = greedy(ranked(ALONE), ALONE, score)
    assert found.kept == ["a", "b", "d"]
    assert found.score == 0.83
    assert [(e["label"], e["kept"]) for e in found.log] == [("a", True), ("b", True), ("c", False), ("d", True)]
    assert found.score >= max(ALONE.values())


def test_not_worse_is_enough_when_asked():
    found = greedy(ranked(ALONE), ALONE, score, accept="ge")
    assert found.kept == ["a", "b", "c"]
    assert found.score == 0.82


def test_lower_is_better_mirrors_higher():
    flipped = {k: -v for k, v in ALONE.items()}
    found = greedy(ranked(flipped, higher=False), flipped, lambda k: -score(k), higher=False)
    assert found.kept == ["a", "b", "d"]


def test_ties_are_ranked_by_name():
    assert ranked({"b": 1.0, "a": 1.0, "c": 2.0}) == ["c", "a", "b"]
    assert ranked({"b": 1.0, "a": 1.0, "c": 2.0}, higher=False) == ["a", "b", "c"]


def test_the_greedy_soup_is_the_mean_of_what_was_accepted():
    models = random_models(4)
    target = (models[1]["b"] + models[3]["b"]) / 2
    seen = []

    def evaluate(model):
        seen.append(model)
        return -float((model["b"] - target).square().sum())

    method, found = cook(models, {"method": "greedy"}, FakeContext(evaluate=evaluate))
    kept = list(method.recipe["coefficients"])
    expected = np.mean([models[names(4).index(k)]["b"].double().numpy() for k in kept], axis=0)
    np.testing.assert_allclose(found["b"].numpy(), expected, atol=1e-7)
    assert method.recipe["score"] >= max(method.recipe["scores"].values())
    assert method.recipe["log"][0]["label"] == ranked(method.recipe["scores"])[0]
    # one evaluation per ingredient and one per candidate
    assert len(seen) == 4 + 3
    again, same = cook(models, {"method": "greedy"}, FakeContext(evaluate=evaluate))
    assert again.recipe == method.recipe
    assert torch.equal(same["b"], found["b"])


def test_other_orders_of_the_pass():
    models = random_models(3)
    ctx = FakeContext(evaluate=lambda m: float(m["b"].sum()))
    given, _ = cook(models, {"method": "greedy", "order": "given"}, ctx)
    assert given.recipe["order"] == names(3)
    one, _ = cook(models, {"method": "greedy", "order": "random", "seed": 3}, ctx)
    two, _ = cook(models, {"method": "greedy", "order": "random", "seed": 3}, ctx)
    assert one.recipe["order"] == two.recipe["order"]
    assert sorted(one.recipe["order"]) == sorted(names(3))


def test_an_average_is_a_lazy_mapping():
    models = random_models(2)
    found = Average(models)
    assert list(found) == list(models[0])
    assert len(found) == 3
    torch.testing.assert_close(found["b"], (models[0]["b"] + models[1]["b"]) / 2)


# -- learned mixtures


def linear_problem():
    generator = torch.Generator().manual_seed(4)
    models = [{"w": torch.randn(6, 4, generator=generator, dtype=torch.float64)} for _ in range(3)]
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    y = (x @ (0.7 * models[1]["w"] + 0.3 * models[2]["w"])).argmax(-1)
    return models, x, y


def cross_entropy(parameters, beta, batch):
    x, y = batch
    loss = torch.nn.functional.cross_entropy(beta * (x @ parameters["w"]), y, reduction="sum")
    return loss, float(len(y))


@pytest.mark.parametrize("rows", [1, 2])
def test_the_gradient_of_the_mixing_weights_agrees_with_finite_differences(rows):
    models, x, y = linear_problem()
    if rows == 2:
        models = [{"w": m["w"], "v": m["w"][:, :1] * 0.5} for m in models]

    def value(alpha):
        mixed = mixture(models, alpha)
        logits = x @ mixed["w"] + (x @ mixed["v"] if rows == 2 else 0)
        return torch.nn.functional.cross_entropy(logits * torch.arange(1.0, 5.0, dtype=torch.float64), y)

    alpha = torch.randn(rows, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(value, (alpha,), eps=1e-6, atol=1e-7)


def test_a_mixture_starts_uniform_and_one_hot_is_that_ingredient():
    models = random_models(3)
    start = mixture(models, torch.zeros(1, 3))
    torch.testing.assert_close(start["b"], torch.stack([m["b"] for m in models]).mean(0), atol=1e-6, rtol=0)
    assert start["steps"].item() == 10
    hot = torch.tensor([[-1e9, 0.0, -1e9]])
    assert torch.equal(mixture(models, hot)["b"], models[1]["b"])
    by_tensor = torch.tensor([[0.0, -1e9, -1e9], [-1e9, -1e9, 0.0]])
    mixed = mixture(models, by_tensor)
    assert torch.equal(mixed["a.weight"], models[0]["a.weight"])
    assert torch.equal(mixed["b"], models[2]["b"])


@pytest.mark.parametrize("by_tensor", [False, True])
def test_learning_lowers_the_held_out_loss_from_the_uniform_mean(by_tensor):
    models, x, y = linear_problem()
    batches = [(x[:20], y[:20]), (x[20:], y[20:])]
    one = learn_mixture(models, lambda: batches, cross_entropy, epochs=1, learning_rate=1e-12, by_tensor=by_tensor)
    uniform, _ = cross_entropy({"w": sum(m["w"] for m in models) / 3}, torch.tensor(1.0), (x, y))
    assert one.losses[0] == pytest.approx(uniform.item() / 40, rel=1e-6)
    found = learn_mixture(models, lambda: batches, cross_entropy, epochs=60, by_tensor=by_tensor)
    assert found.losses[-1] < 0.7 * found.losses[0]
    assert found.weight_TK.sum(-1).tolist() == pytest.approx([1.0])
    assert found.weight_TK[0].argmax().item() == 1
    assert found.beta > 1


@pytest.mark.parametrize("method", ["learned", "learned-by-tensor"])
def test_a_learned_soup_is_baked_from_its_coefficients(method):
    models, x, y = linear_problem()
    models = [{"w": m["w"].float(), "n": torch.tensor(k)} for k, m in enumerate(models)]
    batch = position_batch(40, target_N=y)

    def forward(b, model, parameters):
        return FakeOutputs(x.float() @ parameters["w"], b)

    ctx = FakeContext(forward=forward, held_out=[batch])
    made, found = cook(models, {"method": method, "epochs": 20}, ctx)
    weights = made.recipe["coefficients"]["w"] if method == "learned-by-tensor" else made.recipe["coefficients"]
    assert sum(weights.values()) == pytest.approx(1.0)
    assert max(weights, key=weights.get) == "run1"
    expected = sum(weights[label] * m["w"].double() for label, m in zip(names(3), models, strict=True))
    torch.testing.assert_close(found["w"], expected.float())
    assert found["n"].item() == 0
    assert made.recipe["held_out_losses"][-1] < made.recipe["held_out_losses"][0]


def test_the_tempered_loss_by_hand():
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]])
    batch = position_batch(2, target_N=torch.tensor([1, 0]), weight_N=torch.tensor([1.0, 2.0]))
    ctx = FakeContext(forward=lambda b, m, p: FakeOutputs(p["x"], b))
    value, weight = tempered_loss({"x": logits}, torch.tensor(2.0), batch, ctx)
    z = 2 * logits.double().numpy()
    logp = z - np.log(np.exp(z).sum(1, keepdims=True))
    assert value.item() == pytest.approx(-(logp[0, 1] + 2 * logp[1, 0]), rel=1e-6)
    assert weight == 3.0


# -- analysis


def test_barrier_and_angle_by_hand():
    assert barrier([1.0, 2.5, 2.0], [0.0, 0.5, 1.0]) == pytest.approx(1.0)
    assert barrier([1.0, 1.2, 2.0], [0.0, 0.5, 1.0]) == pytest.approx(0.0)
    with pytest.raises(ValueError, match="from 0 to 1"):
        barrier([1.0, 2.0], [0.1, 1.0])
    base = {"x": torch.tensor([1.0, 1.0]), "n": torch.tensor(3)}
    right = {"x": torch.tensor([2.0, 1.0]), "n": torch.tensor(4)}
    diagonal = {"x": torch.tensor([2.0, 2.0]), "n": torch.tensor(9)}
    assert angle(right, diagonal, base) == pytest.approx(45.0)
    with pytest.raises(ValueError, match="no direction"):
        angle(base, right, base)


def test_disagreement_is_the_variance_under_the_prediction():
    logits = np.array([[0.3, -1.0, 2.0], [1.0, 1.0, 1.0]])
    delta = np.array([[1.0, 2.0, -1.0], [0.0, 3.0, 6.0]])
    p = np.exp(1.5 * logits) / np.exp(1.5 * logits).sum(1, keepdims=True)
    variance = (p * delta**2).sum(1) - (p * delta).sum(1) ** 2
    found = disagreement(torch.from_numpy(logits), torch.from_numpy(delta), beta=1.5)
    assert found.item() == pytest.approx(variance.mean())
    assert second_difference(lambda t: 3 * t**2 + t, 0.4) == pytest.approx(6.0)


def test_the_approximation_meets_the_measured_gap_of_soup_and_ensemble():
    torch.manual_seed(0)
    start = [torch.randn(8, 32).double() / 3, torch.randn(32, 4).double() / 3]
    x = torch.randn(256, 8).double()
    y = (x @ torch.randn(8, 4).double()).argmax(-1)
    noisy_y = (y + (torch.rand(256) < 0.3).long()) % 4
    cross = torch.nn.functional.cross_entropy

    def logits(w):
        return torch.tanh(x @ w[0]) @ w[1]

    def tuned(seed, rate):
        w = [t.clone().requires_grad_() for t in start]
        generator = torch.Generator().manual_seed(seed)
        for _ in range(60):
            pick = torch.randint(256, (32,), generator=generator)
            loss = cross(logits(w)[pick], noisy_y[pick])
            for t, g in zip(w, torch.autograd.grad(loss, w), strict=True):
                t.data -= rate * g
        return [t.detach() for t in w]

    one, two = tuned(1, 0.3), tuned(2, 0.2)
    middle = [(a + b) / 2 for a, b in zip(one, two, strict=True)]
    errors = []
    for scale in (1.0, 0.5, 0.25):  # the two models, brought nearer to each other

        def at(t, scale=scale):
            return [m + scale * (t - 0.5) * (b - a) for m, a, b in zip(middle, one, two, strict=True)]

        measured = (cross(logits(at(0.5)), y) - cross((logits(at(0)) + logits(at(1))) / 2, y)).item()
        curvature = second_difference(lambda t: cross(logits(at(t)), y).item(), 0.5)
        variance = disagreement(logits(at(0.5)), logits(at(1)) - logits(at(0))).item()
        approximate = soup_ensemble_gap(0.5, curvature, variance)
        errors.append(abs(approximate / measured - 1))
    assert errors[0] < 0.05
    # at the middle the next term of the expansion is of second order in the distance
    assert errors[1] < 0.4 * errors[0]
    assert errors[2] < 0.01
