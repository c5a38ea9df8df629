"""Greedy decoding and sampling against one-prompt-at-a-time argmax and against the model's own probabilities."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from luthier.core import registry
from luthier.core.errors import UserError
from luthier.functional import sequences

END = 2


class Tokenizer:
    """Ids as words."""

    eos_token_id = END
    pad_token_id: int | None = 0

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return " ".join(str(i) for i in ids if not (skip_special_tokens and i in (0, 1, END)))


def context(**values: Any) -> Any:
    given = {
        "processor": Tokenizer(),
        "device": torch.device("cpu"),
        "rng": lambda name, *keys: torch.Generator().manual_seed(5),
    }
    return SimpleNamespace(**(given | values))


def tiny(positions: int = 64, **values: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=positions, bos_token_id=1, eos_token_id=END, pad_token_id=0,
        initializer_range=0.4, **values,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


PROMPTS = [[1, 5], [1, 9, 4, 17, 3, 3, 8], [1], [1, 11, 12, 13], [1, 20, 20]]


def by_hand(model: LlamaForCausalLM, prompt: list[int], most: int) -> tuple[int, ...]:
    """Greedy decoding without cache, padding or batches."""
    written: list[int] = []
    while len(written) < most:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + written]), use_cache=False).logits[0, -1]
        written.append(int(logits.argmax()))
        if written[-1] == END:
            break
    return tuple(written)


def build(slug: str, **options: Any) -> Any:
    return registry.get("decoding", slug).build(options)


@pytest.mark.parametrize("batch_rows", [1, 2, 32])
def test_greedy_is_the_argmax_of_each_prompt_alone(batch_rows: int) -> None:
    model = tiny()
    found = build("greedy", max_new_tokens=12, batch_rows=batch_rows).generate(model, PROMPTS, context())
    for prompt, completion in zip(PROMPTS, found, strict=True):
        assert completion.token_ids == by_hand(model, prompt, 12)
        assert completion.finished == (completion.token_ids[-1] == END)
        assert completion.text == Tokenizer().decode(completion.token_ids, skip_special_tokens=True)


def test_a_stop_token_ends_a_completion_and_is_not_in_its_text() -> None:
    model = tiny()
    prompt, written = max(((p, by_hand(model, p, 8)) for p in PROMPTS), key=lambda pair: len(set(pair[1])))
    stop = written[1]
    model.generation_config.eos_token_id = [stop, 23]
    found = build("greedy", max_new_tokens=12).generate(model, [prompt], context())[0]
    assert (found.token_ids, found.finished) == (written[: written.index(stop) + 1], True)
    assert build("greedy", max_new_tokens=1).generate(tiny(), [prompt], context())[0].finished is False


def test_a_tokenizer_without_padding_token() -> None:
    tokenizer = Tokenizer()
    tokenizer.pad_token_id = None
    found = build("greedy", max_new_tokens=6).generate(tiny(), PROMPTS, context(processor=tokenizer))
    assert [c.token_ids for c in found] == [by_hand(tiny(), p, 6) for p in PROMPTS]


def test_the_models_own_generation_settings_are_not_used() -> None:
    model = tiny()
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=3.0, no_repeat_ngram_size=1, min_length=30,
        eos_token_id=END, pad_token_id=0,
    )  # fmt: skip
    found = build("greedy", max_new_tokens=10).generate(model, PROMPTS, context())
    assert [c.token_ids for c in found] == [by_hand(model, p, 10) for p in PROMPTS]


@pytest.mark.parametrize("slug", ["greedy", "sample"])
def test_a_full_context(slug: str) -> None:
    model = tiny(positions=8)
    prompts = [[1, 3, 4, 5, 6, 7], [1, 3, 4, 5, 6, 7, 8, 9], [1, 4]]
    found = build(slug, max_new_tokens=4).generate(model, prompts, context())
    assert len(found[0].token_ids) <= 2
    assert (found[1].token_ids, found[1].finished) == ((), False)
    assert len(found[2].token_ids) <= 4
    if slug == "greedy":
        assert found[0].token_ids == by_hand(model, prompts[0], 2)
        assert found[2].token_ids == by_hand(model, prompts[2], 4)


@pytest.mark.parametrize("slug", ["greedy", "sample"])
def test_modes_and_random_state_are_left_as_they_were(slug: str) -> None:
    model = tiny(attention_dropout=0.5).train()
    before = torch.random.get_rng_state()
    found = build(slug, max_new_tokens=5).generate(model, PROMPTS, context())
    assert model.training
    assert torch.equal(before, torch.random.get_rng_state())
    assert found == build(slug, max_new_tokens=5).generate(model.eval(), PROMPTS, context())
    assert not model.training


@pytest.mark.parametrize("slug", ["greedy", "sample"])
def test_empty_input(slug: str) -> None:
    assert build(slug).generate(tiny(), [], context()) == []
    with pytest.raises(UserError, match="prompt 2 has no token"):
        build(slug).generate(tiny(), [[1], []], context())


def test_sampling_with_one_candidate_is_greedy() -> None:
    model = tiny()
    greedy = build("greedy", max_new_tokens=8).generate(model, PROMPTS, context())
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}):
        assert build("sample", max_new_tokens=8, **options).generate(model, PROMPTS, context()) == greedy, options


def test_sampling_follows_the_run_s_stream() -> None:
    streams = {seed: context(rng=lambda *_, seed=seed: torch.Generator().manual_seed(seed)) for seed in (1, 2)}
    draw = {seed: build("sample", max_new_tokens=8).generate(tiny(), PROMPTS, ctx) for seed, ctx in streams.items()}
    assert draw[1] != draw[2]
    assert draw[1] == build("sample", max_new_tokens=8).generate(tiny(), PROMPTS, streams[1])


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}, {"temperature": 2.0, "top_p": 0.8}],
    ids=str,
)
def test_sampled_frequencies_are_the_model_s_probabilities(options: dict[str, Any]) -> None:
    model, draws = tiny(), 3000
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    p = (logits / options.get("temperature", 1.0)).softmax(-1)
    order = p.argsort(descending=True)
    keep = torch.ones_like(p, dtype=torch.bool)
    if "top_k" in options:
        keep[order[options["top_k"] :]] = False
    if "top_p" in options:
        before = p[order].cumsum(0) - p[order]
        keep[order[before >= options["top_p"]]] = False
    if "min_p" in options:
        keep &= p >= options["min_p"] * p.max()
    expected = torch.where(keep, p, 0.0)
    expected /= expected.sum()
    sampler = build("sample", max_new_tokens=1, batch_rows=draws, **options)
    drawn = Counter(c.token_ids[0] for c in sampler.generate(model, [PROMPTS[0]] * draws, context()))
    assert all(expected[token] > 0 for token in drawn)
    frequency = torch.tensor([drawn[i] / draws for i in range(24)], dtype=torch.float64)
    # Five standard deviations of the largest cell.
    assert float((frequency - expected).abs().max()) < 5 * (0.25 / draws) ** 0.5


def test_what_is_written_does_not_depend_on_the_batch_and_log_probabilities_are_the_model_s() -> None:
    model = tiny()
    found = build("sample", max_new_tokens=9, temperature=1.3, batch_rows=1).generate(model, PROMPTS, context())
    assert found == build("sample", max_new_tokens=9, temperature=1.3).generate(model, PROMPTS, context())
    greedy = build("greedy", max_new_tokens=9).generate(model, PROMPTS, context())
    for temperature, some in ((1.3, found), (1.0, greedy)):
        for prompt, completion in zip(PROMPTS, some, strict=True):
            ids = [*prompt, *completion.token_ids]
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].double() / temperature
            logp = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(completion.token_ids)[:, None])
            assert completion.token_logp == pytest.approx(logp.squeeze(1).tolist(), abs=1e-5)
            assert completion.logp == pytest.approx(float(logp.sum()), abs=1e-4)


def test_length_groups_and_padding() -> None:
    assert sequences.length_groups([3, 1, 7, 7, 2], 2) == [[2, 3], [0, 4], [1]]
    ids, mask = sequences.left_pad([[5, 6, 7], [8]], 0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert sequences.stop_tokens(3, None, [5, 3]) == [3, 5]
    assert sequences.cut_after_stop([4, 3, 9], {3}) == ((4, 3), True)
    assert sequences.cut_after_stop([4, 9], {3}) == ((4, 9), False)
