"""Deltas: every form against dense arithmetic, exact reverting, files, and what is refused."""

from __future__ import annotations

import pytest
import torch

from helpers import tiny_llama
from luthier.core.errors import UserError
from luthier.functional.differences import Block, Dense, LowRank, Sparse, add, dense, difference, from_published
from luthier.models.delta import Delta

Q, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
BASE, OTHER = "aaaa", "bbbb"


def values(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def parts():
    g = torch.Generator().manual_seed(0)
    return {
        Q: Sparse((16, 16), torch.tensor([0, 17, 255]), torch.tensor([1.0, -2.0, 0.5])),
        UP: Block((32, 16), 0, torch.tensor([3, 30]), torch.randn(2, 16, generator=g)),
        "model.embed_tokens.weight": Dense(torch.randn(64, 16, generator=g)),
        "model.layers.1.self_attn.o_proj.weight": LowRank(
            torch.randn(16, 2, generator=g), torch.randn(2, 16, generator=g), 0.5
        ),
    }


def by_hand():
    """The same as dense tensors, written out."""
    p = parts()
    sparse = torch.zeros(16, 16)
    sparse[0, 0], sparse[1, 1], sparse[15, 15] = 1.0, -2.0, 0.5
    block = torch.zeros(32, 16)
    block[3], block[30] = p[UP].value
    rank = p["model.layers.1.self_attn.o_proj.weight"]
    return {
        Q: sparse,
        UP: block,
        "model.embed_tokens.weight": p["model.embed_tokens.weight"].value,
        "model.layers.1.self_attn.o_proj.weight": 0.5 * rank.left @ rank.right,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_adds_and_revert_restores_bit_for_bit(dtype):
    model = tiny_llama().to(dtype)
    before = values(model)
    done = Delta(BASE, parts()).apply(model, BASE, factor=2.0)
    for name, value in values(model).items():
        change = by_hand().get(name, torch.zeros(value.shape))
        torch.testing.assert_close(value.float(), (before[name].float() + 2 * change).to(dtype).float())
    done.revert()
    assert all(torch.equal(v, before[n]) for n, v in values(model).items())


def test_as_a_context_manager_also_after_an_error():
    model = tiny_llama()
    before = values(model)
    with pytest.raises(RuntimeError), Delta(BASE, parts()).applied(model, BASE):  # noqa: PT012
        assert not torch.equal(values(model)[Q], before[Q])
        raise RuntimeError
    assert all(torch.equal(v, before[n]) for n, v in values(model).items())


def test_dense_forms_and_sums():
    p, wanted = parts(), by_hand()
    for name, part in p.items():
        torch.testing.assert_close(dense(part), wanted[name])
        torch.testing.assert_close(dense(add(part, part.scaled(-3.0))), -2 * wanted[name], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(dense(add(part, Dense(torch.ones(part.shape)))), wanted[name] + 1)
    one = Sparse((2, 3), torch.tensor([1, 4]), torch.tensor([1.0, 2.0]))
    two = Sparse((2, 3), torch.tensor([0, 4]), torch.tensor([5.0, 7.0]))
    both = add(one, two)
    assert both.index_K.tolist() == [0, 1, 4]
    assert both.value_K.tolist() == [5.0, 1.0, 9.0]
    with pytest.raises(ValueError, match="differ"):
        add(one, Dense(torch.zeros(3, 2)))


def test_sum_and_scale_of_deltas():
    p = parts()
    first, second = Delta(BASE, {Q: p[Q]}), Delta(BASE, {Q: p[Q], UP: p[UP]})
    model = tiny_llama()
    before = values(model)
    (first + second.scaled(0.5)).apply(model, BASE)
    torch.testing.assert_close(values(model)[Q], before[Q] + 1.5 * by_hand()[Q])
    torch.testing.assert_close(values(model)[UP], before[UP] + 0.5 * by_hand()[UP])
    assert second.entries == 3 + 2 * 16


def test_the_form_that_suits_a_difference():
    base = torch.zeros(4, 5)
    few, many = base.clone(), torch.ones(4, 5)
    few[1, 2], few[3, 0], few[0, 0] = 2.0, -1.0, 1e-9
    found = difference(few, base, tolerance=1e-7)
    assert (found.index_K.tolist(), found.value_K.tolist()) == ([7, 15], [2.0, -1.0])
    assert isinstance(difference(many, base), Dense)
    assert difference(base, base) is None


def test_saved_and_loaded_the_same(tmp_path):
    delta = Delta(BASE, parts(), {"lm_head.weight": torch.ones(64, 16)}, {"made": "here"})
    delta.save(tmp_path / "d")
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["delta.safetensors"]
    for again in (Delta.load(tmp_path / "d"), Delta.load(tmp_path / "d" / "delta.safetensors")):
        assert (again.base, again.about) == (BASE, {"made": "here"})
        assert {n: type(p) for n, p in again.parts.items()} == {n: type(p) for n, p in delta.parts.items()}
        assert all(torch.equal(dense(p), dense(delta.parts[n])) for n, p in again.parts.items())
        model = tiny_llama()
        again.apply(model, BASE)
        assert torch.equal(model.lm_head.weight, torch.ones(64, 16))
        other = tiny_llama()
        again.apply(other, BASE, absolute=False)
        assert torch.equal(other.lm_head.weight, tiny_llama().lm_head.weight)
        assert again.without_absolute().absolute == {}
    elsewhere = Delta(BASE, {Q: parts()[Q]}, {"a.head.that.only.one.task.has": torch.ones(3)})
    with pytest.raises(UserError, match=r"'a\.head\.that\.only\.one\.task\.has'"):
        elsewhere.apply(tiny_llama(), BASE)
    elsewhere.apply(tiny_llama(), BASE, absolute=False)


def test_of_two_models():
    base, tuned = tiny_llama(), tiny_llama()
    with torch.no_grad():
        tuned.get_parameter(Q)[2, 3] += 1.0
    delta = Delta.between(values(tuned), values(base), BASE)
    assert list(delta.parts) == [Q]
    assert delta.parts[Q].index_K.tolist() == [2 * 16 + 3]
    delta.apply(base, BASE)
    assert torch.equal(values(base)[Q], values(tuned)[Q])


def test_refusals(tmp_path):
    delta = Delta(BASE, parts())
    with pytest.raises(UserError, match="belongs to the base aaaa, this is bbbb"):
        delta.apply(tiny_llama(), OTHER)
    wider = tiny_llama(vocabulary=70)
    before = values(wider)
    with pytest.raises(UserError, match=r"'model.embed_tokens.weight' of shape \(64, 16\), which has shape \(70, 16\)"):
        delta.apply(wider, BASE)
    assert all(torch.equal(v, before[n]) for n, v in values(wider).items())
    with pytest.raises(UserError, match="is not there in this model"):
        Delta(BASE, {"nowhere": parts()[Q]}).apply(tiny_llama(), BASE)
    with pytest.raises(UserError, match="quantised"):
        delta.apply({n: v.to(torch.int8) for n, v in values(tiny_llama()).items()}, BASE)
    with pytest.raises(UserError, match="different bases cannot be added: aaaa and bbbb"):
        delta + Delta(OTHER, parts())
    head = {"lm_head.weight": torch.ones(64, 16)}
    with pytest.raises(UserError, match=r"full values of 'lm_head\.weight'"):
        Delta(BASE, {}, head) + Delta(BASE, {}, head)
    from safetensors.torch import save_file

    save_file(head, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="is no delta"):
        Delta.load(tmp_path / "x.safetensors")


def test_the_order_of_published_indices():
    # In a 2 x 3 tensor whose first dimension runs fastest, number 3 is [1, 1] and number 4 is [0, 2].
    entry = {"size": [2, 3], "index_steps": [1, 2, 1], "values": [10.0, 20.0, 30.0]}
    assert dense(from_published(entry)).tolist() == [[0, 0, 30], [10, 20, 0]]
