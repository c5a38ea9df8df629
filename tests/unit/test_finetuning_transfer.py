"""Fine-tuning transfer: exact sums, added tokens, the ends, what is lost to rounding, and what does not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import FakeContext, MemorySource

from luthier.core.errors import UserError
from luthier.methods.weights.finetuning_transfer import FinetuningTransfer, is_embedding, transferred

EMBEDDING, MATRIX = "model.embed_tokens.weight", "model.layers.0.mlp.weight"
TOKENS = {"a": 0, "b": 1, "c": 2, "d": 3}


def model(seed, rows=4, kind=torch.float32, **about):
    generator = torch.Generator().manual_seed(seed)
    tensors = {EMBEDDING: torch.randn(rows, 3, generator=generator), MATRIX: torch.randn(3, 5, generator=generator)}
    return MemorySource({n: t.to(kind) for n, t in tensors.items()}, **about)


def carry(tuned, base, target, **options):
    op, ctx = FinetuningTransfer(target="t", **options), FakeContext()
    sources = {"tuned": tuned, "base": base, "target": target}
    op.prepare(sources, ctx)
    onto = sources[op.onto]
    flat = {n: {k: s.tensor(n).reshape(-1) for k, s in sources.items()} for n in onto.names()}
    return op, {n: op.tensor(n, flat[n], ctx).view(onto.shapes()[n]) for n in onto.names()}


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_the_sum_in_float64(scale):
    tuned, base, target = model(1), model(2), model(3)
    _, found = carry(tuned, base, target, scale=scale)
    for name in (EMBEDDING, MATRIX):
        t, b, m = (s.tensor(name).double().numpy() for s in (tuned, base, target))
        np.testing.assert_array_equal(found[name].numpy(), (m + scale * (t - b)).astype(np.float32))


def test_the_ends():
    tuned, base, target = model(1), model(2), model(3, kind=torch.bfloat16)
    _, none = carry(tuned, base, target, scale=0.0)
    assert all(torch.equal(none[n], target.tensor(n)) for n in none)
    _, same = carry(tuned, base, base)
    for name, tensor in same.items():
        np.testing.assert_array_max_ulp(tensor.numpy(), tuned.tensor(name).numpy(), maxulp=1)


def test_rows_of_added_tokens_are_the_fine_tuned_ones():
    tuned, base, target = model(1, rows=6), model(2, rows=4), model(3, rows=5)
    _, found = carry(tuned, base, target)
    t, b, m = (s.tensor(EMBEDDING).double() for s in (tuned, base, target))
    rows = found[EMBEDDING]
    assert rows.shape == (6, 3)
    assert torch.equal(rows[5], tuned.tensor(EMBEDDING)[5])
    torch.testing.assert_close(rows[4].double(), m[4] + t[4], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rows[:4].double(), m[:4] + t[:4] - b[:4], rtol=1e-6, atol=1e-6)


def test_pieces_that_base_and_target_do_not_reach():
    tuned = torch.arange(6.0)
    assert transferred(tuned[4:], torch.zeros(0), torch.zeros(0), 1.0).tolist() == [4.0, 5.0]
    assert transferred(tuned, torch.ones(2), torch.full((4,), 10.0), 2.0).tolist() == [8.0, 10.0, 14.0, 16.0, 8.0, 10.0]


def test_another_tokenizer_is_refused_or_its_embeddings_left():
    tuned, base = model(1, tokens=TOKENS), model(2, tokens=TOKENS)
    other = model(3, rows=7, tokens={"x": 0, "y": 1})
    with pytest.raises(
        UserError, match=r"'model\.embed_tokens\.weight' has shape \(4, 3\) .* and \(7, 3\) in the target"
    ):
        carry(tuned, base, other)
    small = model(3, rows=2, tokens={"x": 0, "b": 1})
    with pytest.raises(
        UserError, match="target is not that of the fine-tuned model: token 'x' has id 0 there and None"
    ):
        carry(tuned, base, small)
    op, found = carry(tuned, base, other, embeddings="skip")
    assert op.onto == "target"
    assert torch.equal(found[EMBEDDING], other.tensor(EMBEDDING))
    expected = other.tensor(MATRIX).double() + tuned.tensor(MATRIX).double() - base.tensor(MATRIX).double()
    assert torch.equal(found[MATRIX], expected.float())


def test_what_does_not_fit_is_named():
    tuned, base = model(1), model(2)
    lacks = MemorySource({EMBEDDING: base.tensor(EMBEDDING)})
    with pytest.raises(UserError, match=f"'{MATRIX}' of the fine-tuned model is not in the base"):
        carry(tuned, lacks, model(3))
    wide = MemorySource({**model(3).tensors, MATRIX: torch.zeros(3, 6)})
    with pytest.raises(UserError, match=rf"'{MATRIX}' has shape \(3, 5\) .* and \(3, 6\) in the target"):
        carry(tuned, base, wide)
    more = MemorySource({**model(3).tensors, "extra": torch.zeros(1)})
    with pytest.raises(UserError, match="'extra' of the target is not in the fine-tuned model"):
        carry(tuned, base, more)
    turned = model(3, config={"rope_theta": 5e5})
    with pytest.warns(UserWarning, match="rope_theta of the target is 500000.0, of the fine-tuned model None"):
        carry(tuned, base, turned)


def test_what_rounding_loses_is_told():
    kind = torch.bfloat16
    base = MemorySource({MATRIX: torch.full((4,), 1.0, dtype=kind)})
    target = MemorySource({MATRIX: torch.full((4,), 256.0, dtype=kind)})
    # bfloat16 has steps of 1 below 256 and 2 above: 0.5 more vanishes, 1 less and 4 more do not, and 0 is no change
    tuned = MemorySource({MATRIX: torch.tensor([1.5, 0.0, 5.0, 1.0], dtype=kind)})
    op, found = carry(tuned, base, target)
    assert found[MATRIX].tolist() == [256.0, 255.0, 260.0, 256.0]
    assert op.recipe["share_of_changes_lost_to_rounding"] == pytest.approx(1 / 3)
    assert op.recipe["norm_of_the_change"] == pytest.approx((0.25 + 1.0 + 16.0) ** 0.5)
    assert op.recipe["norm_between_the_bases"] == pytest.approx((4 * 255.0**2) ** 0.5)


def test_the_same_adapter_on_the_new_base():
    generator = torch.Generator().manual_seed(5)
    base, target, a, b = (torch.randn(s, generator=generator) for s in ((8, 6), (8, 6), (2, 6), (8, 2)))
    found = transferred(base + b @ a, base, target, 1.0).float()
    torch.testing.assert_close(found, target + b @ a, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lm_head.weight", True),
        ("transformer.wte.weight", True),
        ("bert.embeddings.word_embeddings.weight", True),
        ("bert.embeddings.position_embeddings.weight", False),
        (MATRIX, False),
    ],
)
def test_what_has_a_row_per_token(name, expected):
    assert is_embedding(name) is expected
