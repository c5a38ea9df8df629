"""LiNeS: scales by hand, names that mislead, the choice of alpha and beta on tables, the ratio of norms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import FakeContext, MemorySource

from luthier.core.errors import UserError
from luthier.methods.weights.lines import LayerIncreasingScaling, block_lists, l1_ratio, scaled, scales

NAMES = ("model.embed_tokens.weight", *(f"model.layers.{i}.mlp.weight" for i in range(3)), "model.norm.weight")
SHAPES = dict.fromkeys(NAMES, (4, 3))


def model(seed, names=NAMES):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(4, 3, generator=generator) for name in names}


def cook(base, tuned, ctx=None, **options):
    op, ctx = LayerIncreasingScaling(**options), ctx or FakeContext()
    op.prepare({"base": MemorySource(base), "tuned": MemorySource(tuned)}, ctx)
    return op, {name: op.tensor(name, {"base": base[name], "tuned": tuned[name]}, ctx) for name in tuned}


def test_three_blocks_by_hand():
    base, tuned = model(0), model(1)
    op, found = cook(base, tuned, alpha=0.1, beta=0.9)
    expected = dict(zip(NAMES, (0.1, 0.1, 0.55, 1.0, 0.1), strict=True))
    assert op.factors == pytest.approx(expected, rel=1e-15)
    for name, scale in expected.items():
        x, y = base[name].double().numpy(), tuned[name].double().numpy()
        np.testing.assert_allclose(found[name].double().numpy(), x + scale * (y - x), rtol=1e-12, atol=1e-12)
    assert op.recipe["scales"]["model.layers.1"] == pytest.approx(0.55)
    norm = torch.linalg.vector_norm((tuned[NAMES[1]] - base[NAMES[1]]).double()).item()
    assert op.recipe["norms"]["model.layers.0"] == pytest.approx(norm, rel=1e-6)


def test_the_ends():
    base, tuned = model(0), model(1)
    _, all_of_it = cook(base, tuned, alpha=1.0)
    assert all(torch.equal(all_of_it[n], tuned[n]) for n in NAMES)
    _, none = cook(base, tuned, alpha=0.0, beta=0.0)
    assert all(torch.equal(none[n].float(), base[n]) for n in NAMES)
    _, deepest = cook(base, tuned, alpha=0.0)
    assert torch.equal(deepest[NAMES[3]], tuned[NAMES[3]])
    assert torch.equal(deepest[NAMES[0]].float(), base[NAMES[0]])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"outside": "keep"}, (1.0, 0.2, 0.4, 0.6, 1.0)),
        ({"outside": "interp"}, (0.2, 0.2, 0.4, 0.6, 0.6)),
        ({"curve": "constant"}, (0.2, 0.2, 0.2, 0.2, 0.2)),
        ({"curve": "reverse"}, (0.2, 0.6, 0.4, 0.2, 0.2)),
        ({"curve": "quadratic"}, (0.2, 0.2, 0.3, 0.6, 0.2)),
        ({"curve": "sqrt"}, (0.2, 0.2, 0.2 + 0.4 * 0.5**0.5, 0.6, 0.2)),
    ],
)
def test_outside_and_curves(options, expected):
    found = scales(SHAPES, {"model.layers": 3}, 0.2, 0.4, **options)
    assert list(found.values()) == pytest.approx(list(expected))


def test_names_that_mislead():
    names = [f"h.{i}.{rest}" for i in range(12) for rest in ("mlp.0.weight", "mlp.1.weight", "experts.1.w")]
    shapes = dict.fromkeys(["embeddings.1.weight", *names, "classifier.0.weight", "classifier.2.weight"], (8, 8))
    lists = block_lists(shapes)
    assert lists == {"h": 12}
    found = scales(shapes, lists, 0.0, 1.0)
    assert found["h.1.mlp.1.weight"] == pytest.approx(1 / 11)
    assert found["h.10.mlp.1.weight"] == pytest.approx(10 / 11)
    assert found["h.10.experts.1.w"] == pytest.approx(10 / 11)
    assert found["classifier.2.weight"] == 0.0
    # a short list of small matrices before the blocks is no list of blocks
    assert block_lists({"stem.0.w": (2,), "stem.1.w": (2,), "h.0.w": (9, 9), "h.1.w": (9, 9)}) == {"h": 2}


def test_encoder_and_decoder_are_numbered_each():
    shapes = {f"{side}.layers.{i}.w": (3, 3) for side, count in (("encoder", 2), ("decoder", 3)) for i in range(count)}
    assert block_lists(shapes) == {"encoder.layers": 2, "decoder.layers": 3}
    found = scales(shapes, block_lists(shapes), 0.0, 1.0)
    assert found == {
        "encoder.layers.0.w": 0.0,
        "encoder.layers.1.w": 1.0,
        "decoder.layers.0.w": 0.0,
        "decoder.layers.1.w": 0.5,
        "decoder.layers.2.w": 1.0,
    }


def test_what_has_no_depth():
    with pytest.raises(UserError, match=r"no list of blocks.*blocks: model\.layers"):
        block_lists({"a.weight": (2, 2), "b.3.weight": (2, 2)})
    with pytest.raises(UserError, match="no list of blocks"):
        block_lists(SHAPES, "model.h")
    assert block_lists(SHAPES, "model.layers") == {"model.layers": 3}
    with pytest.raises(UserError, match="share their weights"):
        block_lists({"albert.encoder.albert_layer_groups.0.albert_layers.0.attention.key.weight": (2, 2)})
    one = {"layers.0.w": torch.ones(4, 3)}
    with pytest.warns(UserWarning, match="one block has no depth"):
        op, _ = cook(one, one, alpha=0.25, beta=0.5)
    assert op.factors == {"layers.0.w": 0.75}


def test_alpha_is_chosen_by_the_trade_off():
    base, tuned = model(0), model(1)
    # The middle block tells alpha: its scale is (1 + alpha) / 2.
    middle = NAMES[2]
    length = float((tuned[middle] - base[middle]).double().norm())

    def alpha_of(tensors):
        return 2 * float((tensors[middle] - base[middle]).double().norm()) / length - 1

    def target(tensors):  # 1 for the tuned model, falls slowly
        return 1.0 - 0.1 * (1 - alpha_of(tensors)) ** 2

    def control(tensors):  # 1 for the base, at alpha = -1
        return 1.0 - 0.15 * (alpha_of(tensors) + 1) ** 2

    ctx = FakeContext(evaluate=target, controls={"x": control})
    op, _ = cook(base, tuned, ctx)
    # score = 2 (1 - 0.1 (1 - a)^2) + 1 - 0.15 (a + 1)^2, largest where 0.4 (1 - a) = 0.3 (a + 1), at 1/7: 0.1 on the grid
    assert op.recipe["alpha"] == 0.1
    assert op.recipe["beta"] == 0.9
    table = {row["alpha"]: row for row in op.recipe["search"]}
    assert list(table) == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    assert table[0.5]["score"] == pytest.approx(2 * (1 - 0.1 * 0.25) + 1 - 0.15 * 2.25, rel=1e-5)
    # With nothing to lose the tuned model stays: strictly better wins.
    flat = FakeContext(evaluate=lambda _: 0.5, controls={"x": lambda _: 0.5})
    assert cook(base, tuned, flat)[0].recipe["alpha"] == 1.0


def merged(base, models, factor):
    return {n: base[n].double() + factor * sum(m[n].double() - base[n].double() for m in models) for n in base}


@pytest.mark.parametrize(("count", "factor"), [(2, 1.0), (3, 1.0), (3, 0.4)])
def test_the_ratio_of_a_sum_is_one_over_n(count, factor):
    base, models = model(0), [model(s) for s in range(1, count + 1)]
    sources = {str(i): MemorySource(m) for i, m in enumerate(models)}
    found = l1_ratio(MemorySource(merged(base, models, factor)), MemorySource(base), sources)
    assert found == pytest.approx(1 / (factor * count), rel=1e-12)
    with pytest.raises(UserError, match="equals its base"):
        l1_ratio(MemorySource(base), MemorySource(base), sources)


def test_after_a_merge_alpha_is_the_ratio_and_beta_is_chosen():
    base, models = model(0), [model(1), model(2)]
    summed = merged(base, models, 1.0)
    last = NAMES[3]
    length = float((summed[last] - base[last]).norm())

    def score(tensors):  # best where the last block's scale, 0.5 + beta, is 0.83
        return -abs(float((tensors[last] - base[last]).norm()) / length - 0.83)

    sources = {"a": MemorySource(models[0]), "b": MemorySource(models[1])}
    op, _ = cook(base, summed, FakeContext(evaluate=score, models=sources))
    assert op.recipe["alpha"] == pytest.approx(0.5, rel=1e-12)
    assert op.recipe["beta"] == 0.3
    op, _ = cook(base, summed, FakeContext(models=sources), beta=0.1)
    assert op.recipe["scales"]["model.layers.2"] == pytest.approx(0.6, rel=1e-12)


def test_a_scaled_low_rank_update_is_the_scaled_merge():
    generator = torch.Generator().manual_seed(5)
    base, a, b = (torch.randn(s, generator=generator) for s in ((8, 6), (2, 6), (8, 2)))
    lora = base + 2.0 * (0.3 * b) @ a
    torch.testing.assert_close(scaled(base + 2.0 * b @ a, base, 0.3).float(), lora, atol=1e-6, rtol=1e-6)
