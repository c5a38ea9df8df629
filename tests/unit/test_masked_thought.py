"""Input corruption: which positions, with what, at which rate; nothing else may change."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from fakes import FakeContext, FakeTokenizer, token_batch

from helpers import OpenAll, make_session, random_rows, settings, tiny_llama, weights
from luthier.core.errors import LuthierError, UserError
from luthier.engine.loop import Trainer
from luthier.functional.input_corruption import corrupt, embedding_noise, last_occurrence, linear_rate
from luthier.functional.mask_tokens import add_mask_token, mask_token_id, strip_mask_token
from luthier.methods.transforms.masked_thought import MaskedThought

ROWS = [([1, 10, 11, 12, 13, 14, 2], 3), ([1, 20, 21, 22, 2], 2)]
CONSTANT = {"rate_schedule": "constant"}


def changed(before, after):
    return (before.inputs["input_ids"] != after.inputs["input_ids"]).nonzero().tolist()


def assert_all_but_ids_equal(before, after):
    for name in ("position_N", "target_N", "weight_N", "sequence_N", "row_B", "adjustable_BT", "supervised_BT"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name
    assert torch.equal(before.inputs["attention_mask"], after.inputs["attention_mask"])


def test_given_numbers_replace_exactly_the_candidates_below_the_rate():
    ids_BT = torch.tensor([[5, 6, 7, 8]])
    candidates_BT = torch.tensor([[False, True, True, True]])
    uniform_BT = torch.tensor([[0.0, 0.19, 0.2, 0.05]])
    new_BT, corrupted_BT = corrupt(ids_BT, candidates_BT, uniform_BT, 0.2, torch.full((1, 4), 99))
    assert new_BT.tolist() == [[5, 99, 7, 99]]
    assert corrupted_BT.tolist() == [[False, True, False, True]]
    assert ids_BT.tolist() == [[5, 6, 7, 8]]


def test_the_noise_is_that_of_the_named_stream_and_only_solution_inputs_change():
    batch, ctx = token_batch(ROWS), FakeContext(seed=3, epoch=2)
    before = batch.inputs["input_ids"].clone()
    after = MaskedThought(rate_max=0.5, mask_token="pad", **CONSTANT)(batch, ctx)
    expected = before.clone()
    for row, place in ((0, [3, 4, 5, 6]), (1, [2, 3, 4])):
        uniform = torch.rand(len(place), generator=ctx.rng("noise", "masked-thought", 0, 2, row))
        for p, u in zip(place, uniform.tolist(), strict=True):
            if u < 0.5:
                expected[row, p] = 0
    assert torch.equal(after.inputs["input_ids"], expected)
    assert not torch.equal(expected, before)
    assert torch.equal(batch.inputs["input_ids"], before)
    assert_all_but_ids_equal(batch, after)
    assert after.keys_B is None


def test_the_pad_token_as_mask_leaves_the_padding_mask_alone():
    after = MaskedThought(rate_max=0.99, mask_token="pad", **CONSTANT)(token_batch(ROWS), FakeContext())
    assert after.inputs["attention_mask"].sum(1).tolist() == [7, 5]


def test_rate_zero_gives_the_very_batch_back():
    batch = token_batch(ROWS)
    assert MaskedThought(rate_max=0.0)(batch, FakeContext()) is batch
    assert MaskedThought(rate_max=0.4)(batch, FakeContext(step=0)) is batch


@pytest.mark.parametrize(
    ("step", "total", "expected"),
    [(0, 300, 0.0), (100, 300, 0.4 * 100 / 201), (201, 300, 0.4), (299, 300, 0.4)],
)
def test_the_schedule_by_steps(step, total, expected):
    assert linear_rate(step, total, 0.4, 2 / 3) == pytest.approx(expected)
    ctx = FakeContext(step=step, total_steps=total)
    assert MaskedThought(rate_max=0.4).rate(ctx) == pytest.approx(expected)


def test_the_schedule_by_examples_counts_whole_steps():
    method, ctx = MaskedThought(rate_max=0.2, rate_warmup_examples=20), FakeContext(total_steps=None)
    rates = []
    for step in range(4):
        ctx.step = step
        rates += [method.rate(ctx, 4), method.rate(ctx, 4)]  # two micro-batches of one step have one rate
    np.testing.assert_allclose(rates, [0, 0, 0.08, 0.08, 0.16, 0.16, 0.2, 0.2])
    again = MaskedThought(rate_max=0.2, rate_warmup_examples=40)
    again.load(method.state())
    ctx.step = 4
    assert again.rate(ctx, 4) == pytest.approx(0.2 * 32 / 40)


def test_the_other_schedules():
    assert MaskedThought(rate_max=0.3, **CONSTANT).rate(FakeContext(total_steps=None)) == 0.3
    method = MaskedThought(rate_max=0.3, rate_schedule="random")
    rates = [method.rate(FakeContext(step=s)) for s in range(400)]
    assert rates[7] == method.rate(FakeContext(step=7))
    assert 0 <= min(rates) < max(rates) < 0.3
    assert np.mean(rates) == pytest.approx(0.15, abs=3 * 0.3 / math.sqrt(12 * 400))
    with pytest.raises(UserError, match=r"training\.max_steps"):
        MaskedThought(rate_max=0.3).rate(FakeContext(total_steps=None))


@pytest.mark.parametrize(
    ("where", "places"), [("target", [3, 4, 5, 6]), ("source", [1, 2]), ("all", [1, 2, 3, 4, 5, 6])]
)
def test_where(where, places):
    batch = token_batch(ROWS[:1])
    method = MaskedThought(rate_max=0.9, where=where, mask_token="pad", **CONSTANT)
    hit = set()
    for epoch in range(40):
        hit |= {t for _, t in changed(batch, method(batch, FakeContext(epoch=epoch)))}
    assert sorted(hit) == places


def test_excluded_ids_and_special_tokens_are_never_touched():
    batch = token_batch([([1, 10, 0, 12, 0, 14, 2], 1)])
    method = MaskedThought(rate_max=0.9, exclude_ids=[12], corruption="random", **CONSTANT)
    hit = set()
    for epoch in range(40):
        hit |= {t for _, t in changed(batch, method(batch, FakeContext(epoch=epoch)))}
    assert sorted(hit) == [1, 5, 6]  # the end token may be corrupted, the special token 0 and id 12 may not


def test_the_reasoning_before_the_answer_marker_alone():
    tokenizer = FakeTokenizer()
    ids = tokenizer.encode("a=3 b=7 #### 10")
    batch = token_batch([(ids, 3)])
    method = MaskedThought(rate_max=0.9, where="reasoning", mask_token="pad", **CONSTANT)
    start = 1 + "a=3 b=7 #### 10".index("####")
    hit = set()
    for epoch in range(40):
        hit |= {t for _, t in changed(batch, method(batch, FakeContext(epoch=epoch, processor=tokenizer)))}
    assert hit
    assert max(hit) < start
    assert last_occurrence([1, 2, 3, 1, 2], [[1, 2], []]) == 3
    assert last_occurrence([1, 2], [[3]]) == 2


def big_batch(rows=50, length=200):
    return token_batch([([1, *([7] * length)], 1) for _ in range(rows)])


def test_the_realised_rate_lies_within_three_standard_errors():
    ctx = FakeContext()
    after = MaskedThought(rate_max=0.4, mask_token="pad", **CONSTANT)(big_batch(), ctx)
    share = float((after.inputs["input_ids"] == 0).float().sum()) / 10_000
    assert share == pytest.approx(0.4, abs=3 * math.sqrt(0.24 / 10_000))
    assert ctx.logged == pytest.approx({"masked_thought_rate": 0.4, "masked_thought_corrupted": share})


def test_random_ids_are_uniform_over_ordinary_tokens():
    tokenizer = FakeTokenizer(mask=True)
    method = MaskedThought(rate_max=0.99, corruption="random", exclude_ids=[5], **CONSTANT)
    after = method(big_batch(), FakeContext(processor=tokenizer))
    counts = torch.bincount(after.inputs["input_ids"][:, 1:].flatten(), minlength=len(tokenizer)).double()
    allowed = [i for i in range(len(tokenizer)) if i not in (0, 1, 2, 3, 5, 7)]  # 7 is also what stays uncorrupted
    assert counts[[0, 1, 2, 3, 5]].sum() == 0
    observed = counts[allowed].numpy()
    expected = observed.mean()
    # chi-square with n - 1 degrees of freedom: mean n - 1, standard deviation sqrt(2 (n - 1))
    freedom = len(allowed) - 1
    assert ((observed - expected) ** 2 / expected).sum() < freedom + 4 * math.sqrt(2 * freedom)


def test_a_mix_holds_both_kinds_in_proportion():
    method = MaskedThought(rate_max=0.8, corruption="mix", mix_rho=0.25, mask_token="pad", **CONSTANT)
    after = method(big_batch(), FakeContext())
    ids = after.inputs["input_ids"][:, 1:]
    masked, other = int((ids == 0).sum()), int(((ids != 0) & (ids != 7)).sum())
    assert masked / (masked + other) == pytest.approx(0.75, abs=0.03)


def test_predictions_stand_where_their_targets_are():
    batch = token_batch(ROWS[:1])

    class Guess:
        top1_N = torch.tensor([33, 34, 35, 36])

    method = MaskedThought(rate_max=0.9, corruption="predict", **CONSTANT)
    assert "top1" in method.needs.statistics
    seen = set()
    for epoch in range(40):
        ctx = FakeContext(epoch=epoch, forward=lambda b, m: Guess())
        after = method(batch, ctx).inputs["input_ids"]
        seen |= {(t, int(after[0, t])) for _, t in (after != batch.inputs["input_ids"]).nonzero().tolist()}
    assert seen == {(3, 33), (4, 34), (5, 35), (6, 36)}


def test_noise_depends_on_seed_epoch_and_row_and_on_nothing_else():
    def noisy(rows, order, **about):
        seed = about.pop("option_seed", 0)
        batch = token_batch([rows[i] for i in order])
        batch.row_B = torch.tensor(order)
        after = MaskedThought(rate_max=0.5, corruption="random", seed=seed, **CONSTANT)(batch, FakeContext(**about))
        width = {i: len(rows[i][0]) for i in order}
        return {i: after.inputs["input_ids"][b, : width[i]].tolist() for b, i in enumerate(order)}

    rows = [([1, *range(5, 30)], 3), ([1, *range(5, 18)], 3), ([1, *range(5, 44)], 3)]
    first = noisy(rows, [0, 1, 2])
    assert noisy(rows, [1], step=5)[1] == first[1]  # other neighbours, other padding, another step
    assert noisy(rows, [2, 0])[0] == first[0]
    assert noisy(rows, [1], epoch=1)[1] != first[1]
    assert noisy(rows, [1], seed=1)[1] != first[1]
    assert noisy(rows, [1], option_seed=1)[1] != first[1]


def test_dropping_attention_hides_the_corrupted_positions_alone():
    batch = token_batch(ROWS)
    method = MaskedThought(rate_max=0.6, mask_token="pad", drop_attention=True, **CONSTANT)
    after = method(batch, FakeContext())
    hidden = (batch.inputs["attention_mask"] == 1) & (after.inputs["attention_mask"] == 0)
    assert hidden.nonzero().tolist() == changed(batch, after)
    del batch.inputs["attention_mask"]
    with pytest.raises(UserError, match="one entry per token"):
        method(batch, FakeContext())


def test_positions_behind_a_corrupted_token_are_marked():
    batch = token_batch(ROWS)
    after = MaskedThought(rate_max=0.6, mask_token="pad", **CONSTANT)(batch, FakeContext())
    width = batch.inputs["input_ids"].shape[1]
    corrupted = {(b, t) for b, t in changed(batch, after)}
    for n, place in enumerate(batch.position_N.tolist()):
        assert bool(after.columns["predecessor_corrupted_N"][n]) == ((place // width, place % width) in corrupted)


def test_a_task_without_tokens_is_refused():
    batch = token_batch(ROWS)
    batch.adjustable_BT = None
    with pytest.raises(UserError, match="batches have none"):
        MaskedThought(rate_max=0.5, **CONSTANT)(batch, FakeContext())


@pytest.mark.parametrize(("rows", "rate"), [(19_999, 0.4), (20_000, 0.2)])
def test_the_default_rate_follows_the_number_of_rows(rows, rate):
    method = MaskedThought()
    with pytest.raises(LuthierError, match="set rate_max"):
        method.rate(FakeContext())
    method.prepare(FakeContext(), range(rows))
    assert method.rate_max == rate
    own = MaskedThought(rate_max=0.1)
    own.prepare(FakeContext(), range(rows))
    assert own.rate_max == 0.1


def test_mask_tokens():
    assert mask_token_id(FakeTokenizer(mask=True), "auto") == 3
    assert mask_token_id(FakeTokenizer(mask=True), "pad") == 0
    assert mask_token_id(FakeTokenizer(), "auto") == 0
    assert mask_token_id(FakeTokenizer(), "#") == FakeTokenizer().get_vocab()["#"]
    with pytest.raises(UserError, match="no token '<mask>'"):
        mask_token_id(FakeTokenizer(), "add")
    bare = FakeTokenizer()
    bare.pad_token_id = None
    with pytest.raises(UserError, match="neither a mask nor a pad"):
        mask_token_id(bare, "auto")


@pytest.mark.parametrize("strip", [True, False])
def test_an_added_token_leaves_model_and_tokenizer_as_they_were_unless_it_stays(strip):
    tokenizer = FakeTokenizer()
    model = tiny_llama(vocabulary=len(tokenizer))
    before, size = dict(vars(tokenizer)), len(tokenizer)
    before["tokens"] = list(before["tokens"])
    method = MaskedThought(rate_max=0.2, mask_token="add", strip_mask_token=strip)
    method.prepare_model(model, tokenizer)
    assert len(tokenizer) == size + 1
    after = method(token_batch(ROWS), FakeContext(step=9, processor=tokenizer))
    assert set(after.inputs["input_ids"].flatten().tolist()) & {size} == {size}
    method.finish_model(model, tokenizer)
    assert len(tokenizer) == model.get_input_embeddings().weight.shape[0] == size + (not strip)
    assert (tokenizer.tokens == before["tokens"]) == strip


@pytest.mark.parametrize("tied", [False, True])
def test_an_added_mask_token_starts_at_the_mean_and_can_be_stripped(tied):
    tokenizer = FakeTokenizer()
    model = tiny_llama(vocabulary=len(tokenizer), tied=tied)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = torch.tensor([[1, 5, 6]])
    logits = model(input_ids=ids).logits
    MaskedThought(rate_max=0.2, mask_token="add").prepare_model(model, tokenizer)
    token = mask_token_id(tokenizer, "add")
    assert token == len(tokenizer) - 1
    assert add_mask_token(model, tokenizer) == token  # a second time changes nothing
    for layer, name in (
        (model.get_input_embeddings(), "model.embed_tokens.weight"),
        (model.get_output_embeddings(), "model.embed_tokens.weight" if tied else "lm_head.weight"),
    ):
        old = before[name].double().numpy()
        np.testing.assert_allclose(layer.weight.detach()[token].numpy(), old.mean(0), atol=1e-7)
        np.testing.assert_array_equal(layer.weight.detach()[:token].numpy(), before[name].numpy())
    assert model.generation_config.suppress_tokens == [token]
    strip_mask_token(model, token)
    assert model.get_input_embeddings().weight.shape[0] == token
    assert torch.equal(model(input_ids=ids).logits, logits)
    assert not model.generation_config.suppress_tokens
    with pytest.raises(LuthierError, match="not the last"):
        strip_mask_token(model, 5)


def embedded(model, batch):
    """What the model's first block is given."""
    seen = []
    handle = (
        model.get_decoder()
        .layers[0]
        .register_forward_pre_hook(
            lambda module, inputs, named: seen.append(inputs[0] if inputs else named["hidden_states"]), with_kwargs=True
        )
    )
    model(**batch.inputs)
    handle.remove()
    return seen[0]


def test_noise_on_embeddings_at_corrupted_tokens_alone():
    model, batch = tiny_llama(vocabulary=64), token_batch(ROWS)
    ctx = FakeContext(seed=3, epoch=2)
    ctx.model = model
    method = MaskedThought(rate_max=0.5, corruption="noise", noise_alpha=2.0, **CONSTANT)
    method.prepare_model(model, ctx.processor)
    method.prepare(ctx, range(10))  # watches once, not twice
    after = method(batch, ctx)
    assert_all_but_ids_equal(batch, after)
    assert torch.equal(after.inputs["input_ids"], batch.inputs["input_ids"])
    assert after.keys_B is None
    table = model.get_input_embeddings().weight.detach()
    expected = table[batch.inputs["input_ids"]].clone()
    for row, place, length in ((0, [3, 4, 5, 6], 7), (1, [2, 3, 4], 5)):
        generator = ctx.rng("noise", "masked-thought", 0, 2, row)
        uniform = torch.rand(len(place), generator=generator)
        noise = 2.0 / math.sqrt(length * 16) * (2 * torch.rand(len(place), 16, generator=generator) - 1)
        for p, u, n in zip(place, uniform.tolist(), noise, strict=True):
            if u < 0.5:
                expected[row, p] += n
    torch.testing.assert_close(embedded(model, after), expected)
    assert not torch.equal(expected, table[batch.inputs["input_ids"]])
    assert torch.equal(embedded(model, batch), table[batch.inputs["input_ids"]])  # other batches are left alone
    method.finish_model(model, ctx.processor)
    assert torch.equal(embedded(model, after), table[batch.inputs["input_ids"]])


def test_embeddings_are_blended_with_those_of_random_tokens_and_both_learn():
    model, batch = tiny_llama(vocabulary=64), token_batch(ROWS)
    ctx = FakeContext()
    ctx.model = model
    method = MaskedThought(rate_max=0.9, corruption="blend", blend_share=0.3, **CONSTANT)
    method.prepare(ctx, range(10))
    random = MaskedThought(rate_max=0.9, corruption="random", **CONSTANT)(batch, ctx).inputs["input_ids"]
    ids, table = batch.inputs["input_ids"], model.get_input_embeddings().weight
    corrupted = random != ids  # the same draws, apart from tokens that were drawn as they are
    expected = torch.where(corrupted[..., None], 0.7 * table[ids] + 0.3 * table[random], table[ids])
    found = embedded(model, method(batch, ctx))
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    drawn = random[corrupted]
    assert (table.grad[drawn] != 0).all()


def test_a_reference_copied_from_the_model_sees_the_same_noise():
    model = tiny_llama()
    method = MaskedThought(rate_max=0.5, corruption="noise", **CONSTANT)
    method.prepare_model(model, None)
    copied = copy.deepcopy(model)
    ctx = FakeContext()
    ctx.model = model
    after = method(token_batch(ROWS), ctx)
    assert torch.equal(embedded(model, after), embedded(copied, after))


def test_a_model_that_does_not_look_its_ids_up_is_told():
    ctx = FakeContext()
    ctx.model = tiny_llama()
    method = MaskedThought(rate_max=0.5, corruption="noise", **CONSTANT)
    method.prepare(ctx, range(10))
    held = method(token_batch(ROWS), ctx)
    assert held.keys_B is None
    ctx.step = 1
    with pytest.raises(LuthierError, match="has not reached the model"):
        method(token_batch(ROWS), ctx)


@pytest.mark.parametrize("corruption", ["noise", "blend"])
def test_changed_embeddings_train_alike_under_accumulation_and_not_like_plain(corruption):
    found = []
    for accumulation, rate in ((1, 0.4), (4, 0.4), (1, 0.0)):
        method = MaskedThought(rate_max=rate, corruption=corruption, noise_alpha=20.0, **CONSTANT)
        session = make_session(tiny_llama(), transforms=[method], parameters=[OpenAll()])
        options = {"optimizer": "sgd", "learning_rate": 0.1, "schedule": "constant", "epochs": 2}
        Trainer(session, random_rows(24), settings(accumulation=accumulation, **options)).run()
        found.append(weights(session.model))
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], atol=2e-5, rtol=1e-3)
    assert any(not torch.allclose(value, found[2][key], atol=1e-4) for key, value in found[0].items())


def test_the_scale_of_the_noise():
    noise = embedding_noise(200, 200, 50, 6.0, torch.Generator().manual_seed(0))
    bound = 6.0 / math.sqrt(200 * 50)
    assert float(noise.abs().max()) < bound
    assert float(noise.abs().max()) > 0.99 * bound
    # A uniform number in plus and minus a has variance a^2 / 3, so noise on a whole row has a norm of alpha / sqrt(3).
    assert float(noise.norm()) == pytest.approx(6.0 / math.sqrt(3), rel=0.02)
