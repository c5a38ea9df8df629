"""One rendering path: prompts are prefixes, spans are what the model is to write, and nothing else."""

import json
from pathlib import Path

import pytest
from data_tokenizers import byte_level, metaspace, word_piece

from luthier.core.errors import UserError
from luthier.data.render import Renderer
from luthier.data.templates import BUILT_IN, GENERATION

UNMARKED = GENERATION.sub("", BUILT_IN["chatml"]).replace("{% endgeneration %}", "")
# As reasoning models have it: the opening tag is part of the prompt, and reasoning of earlier turns is left out.
REASONING = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}\
{% set said = m.content.split('</think>')[-1].lstrip('\n') %}\
{% if loop.last and '</think>' in m.content %}{{ m.content }}{% else %}{{ said }}{% endif %}\
{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"""
PAIR = {"kind": "pair", "prompt": "2+2?", "completion": "4", "source": "f.jsonl", "row": 3}


def chat(*turns, **more):
    messages = [t if isinstance(t, dict) else {"role": t[0], "content": t[1]} for t in turns]
    return {"kind": "chat", "messages": json.dumps(messages), "source": "f.jsonl", "row": 3, **more}


TWO_TURNS = chat(("system", "Be kind."), ("user", "hi"), ("assistant", "hello"), ("user", "more"), ("assistant", "bye"))


def supervised(renderer, row):
    rendered = renderer.render(row)
    return [renderer.processor.decode(rendered.input_ids[s:e]) for s, e in rendered.spans]


def causal(tokenizer, **options):
    return Renderer(tokenizer, task="causal-lm", **options)


@pytest.mark.parametrize("make", [byte_level, lambda: byte_level(bos=True), metaspace])
def test_a_raw_pair_is_prompt_completion_and_the_end_token(make):
    tokenizer = make()
    rendered = causal(tokenizer).render(PAIR)
    bos = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []
    prompt = bos + tokenizer.encode("2+2?", add_special_tokens=False)
    expected = prompt + tokenizer.encode("4", add_special_tokens=False) + [tokenizer.eos_token_id]
    assert rendered.input_ids == expected
    assert rendered.spans == [(len(prompt), len(expected))]
    assert rendered.origins == [(0, len(prompt), "prompt"), (len(prompt), len(expected), "completion")]
    assert causal(tokenizer).prompt_ids(PAIR) == prompt
    assert causal(tokenizer, add_eos=False).render(PAIR).input_ids == expected[:-1]


def test_the_separator_stands_only_where_there_is_no_space():
    tokenizer = byte_level()
    row = {**PAIR, "separator": "\n"}
    assert tokenizer.decode(causal(tokenizer).prompt_ids(row)) == "2+2?\n"
    assert tokenizer.decode(causal(tokenizer).prompt_ids({**row, "prompt": "2+2? "})) == "2+2? "
    assert tokenizer.decode(causal(tokenizer).prompt_ids({**row, "completion": " 4"})) == "2+2?\n"
    assert tokenizer.decode(causal(tokenizer, system="Add.").prompt_ids(PAIR)) == "Add.\n\n2+2?"


def test_special_tokens_in_the_text_are_not_doubled():
    tokenizer = byte_level(bos=True)
    rendered = causal(tokenizer).render({**PAIR, "prompt": "<s>2+2?", "completion": "4</s>"})
    assert rendered.input_ids == causal(tokenizer).render(PAIR).input_ids


@pytest.mark.parametrize("bos", [True, False])
def test_text_is_supervised_but_for_its_first_token(bos):
    tokenizer = byte_level(bos=bos)
    rendered = causal(tokenizer).render({"kind": "text", "text": "hello world", "source": "f", "row": 1})
    words = tokenizer.encode("hello world", add_special_tokens=False)
    assert rendered.input_ids == ([tokenizer.bos_token_id] if bos else []) + words + [tokenizer.eos_token_id]
    assert rendered.spans == [(1, len(rendered.input_ids))]


def test_a_pair_is_a_conversation_where_there_is_a_template():
    tokenizer = byte_level(template=UNMARKED)
    renderer = causal(tokenizer)
    text = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    assert renderer.render(PAIR).input_ids == tokenizer.encode(text, add_special_tokens=False)
    assert supervised(renderer, PAIR) == ["4<|im_end|>"]
    assert supervised(causal(tokenizer, template="none"), PAIR) == ["4</s>"]
    assert renderer.stop_ids == tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])


def test_markers_and_diffed_prefixes_give_the_same_spans():
    tokenizer = byte_level()
    marked, diffed = causal(tokenizer, template="chatml"), causal(tokenizer, template=UNMARKED)
    for row in (PAIR, TWO_TURNS, chat(("user", "a"), ("assistant", "b"), ("user", "unanswered"))):
        one, two = marked.render(row), diffed.render(row)
        assert (one.input_ids, one.spans) == (two.input_ids, two.spans)
    assert supervised(diffed, TWO_TURNS) == ["hello<|im_end|>", "bye<|im_end|>"]


def test_spans_are_those_of_transformers_own_mask():
    tokenizer = byte_level(template=BUILT_IN["chatml"])
    for row in (PAIR, TWO_TURNS):
        rendered = causal(tokenizer).render(row)
        messages = json.loads(
            row.get("messages", '[{"role":"user","content":"2+2?"},{"role":"assistant","content":"4"}]')
        )
        peer = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        mask = [0] * len(rendered.input_ids)
        for start, end in rendered.spans:
            mask[start:end] = [1] * (end - start)
        assert rendered.input_ids == peer["input_ids"]
        assert mask == peer["assistant_masks"]


@pytest.mark.parametrize("template", ["chatml", "plain", UNMARKED])
@pytest.mark.parametrize("row", [PAIR, TWO_TURNS, {**PAIR, "completion": "\n\nfour"}, {**PAIR, "completion": " four "}])
def test_generation_starts_from_the_prefix_of_the_training_row(template, row):
    renderer = causal(byte_level(), template=template)
    rendered = renderer.render(row)
    prompt = renderer.prompt_ids(row)
    assert rendered.input_ids[: len(prompt)] == prompt
    assert rendered.prompt_length == len(prompt)
    assert rendered.spans[-1][0] == len(prompt)


def test_a_token_across_the_end_of_the_prompt_is_cut_there():
    # A newline of the prompt and the answer's own are one token in this text, which generation never sees.
    tokenizer = byte_level()
    backend = tokenizer.backend_tokenizer
    assert len(backend.encode("\n\n", add_special_tokens=False).ids) == 2
    tokenizer.add_tokens("\n\n")
    renderer = causal(tokenizer, template=UNMARKED)
    row = {**PAIR, "completion": "\nfour"}
    rendered = renderer.render(row)
    assert rendered.input_ids[: rendered.prompt_length] == renderer.prompt_ids(row)
    assert supervised(renderer, row) == ["\nfour<|im_end|>"]


def test_a_template_that_rewrites_the_prompt_is_refused_with_two_ways_out():
    renderer = causal(byte_level(template=REASONING))
    with pytest.raises(UserError) as caught:
        renderer.render(TWO_TURNS)
    assert str(caught.value).startswith("f.jsonl, row 3: the chat template does not write the prompt")
    assert "`data.thinking: strip`" in str(caught.value)
    assert "another `data.template`" in str(caught.value)


def test_dropped_reasoning_is_refused_and_stripping_helps():
    keeps = REASONING.replace("assistant\n<think>\n", "assistant\n")
    row = chat(("user", "hi"), ("assistant", "<think>\na\n</think>\n\nx"), ("user", "b"), ("assistant", "y"))
    with pytest.raises(UserError, match="does not write message 2 as it was given"):
        causal(byte_level(template=keeps)).render(row)
    for template in (keeps, REASONING):
        renderer = causal(byte_level(template=template), thinking="strip")
        assert supervised(renderer, row) == ["x<|im_end|>", "y<|im_end|>"]
        assert renderer.render(row).input_ids[: len(renderer.prompt_ids(row))] == renderer.prompt_ids(row)
    last = chat(("user", "hi"), ("assistant", "<think>\na\n</think>\n\nx"))
    assert supervised(causal(byte_level(template=keeps)), last) == ["<think>\na\n</think>\n\nx<|im_end|>"]


def test_a_dropped_tool_call_is_refused():
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    row = chat(("user", "a"), call, ("tool", "7"), ("assistant", "seven"))
    with pytest.raises(UserError, match="message 2 as it was given"):
        causal(byte_level(template=UNMARKED)).render(row)


def test_messages_of_weight_0_are_not_learnt():
    row = chat(("user", "a"), {"role": "assistant", "content": "b", "weight": 0}, ("user", "c"), ("assistant", "d"))
    for template in ("chatml", UNMARKED):
        assert supervised(causal(byte_level(), template=template), row) == ["d<|im_end|>"]


def test_preferences_render_both_sides():
    row = {**PAIR, "kind": "preference", "rejected": "5"}
    for template in ("none", "chatml"):
        renderer = causal(byte_level(), template=template)
        rendered = renderer.render(row)
        assert rendered.rejected is not None
        prompt = renderer.prompt_ids(row)
        assert rendered.rejected.input_ids[: len(prompt)] == prompt == rendered.input_ids[: len(prompt)]
        start, end = rendered.rejected.spans[0]
        assert renderer.processor.decode(rendered.rejected.input_ids[start:end])[0] == "5"


def test_a_batch_is_its_rows():
    rows = [PAIR, TWO_TURNS, {**PAIR, "kind": "preference", "rejected": "5"}, {**PAIR, "completion": "\nfour"}]
    renderer = causal(byte_level(), template="chatml")
    for row, one in zip(rows, renderer.render_batch(rows), strict=True):
        alone = renderer.render(row)
        alone.origins = []
        assert alone == one


def test_truncation_keeps_the_start_and_counts():
    renderer = causal(byte_level(), max_length=6, truncation="keep_start")
    row = {**PAIR, "completion": "4 5 6 7 8 9"}
    whole = causal(byte_level()).render(row)
    rendered = renderer.render(row)
    assert rendered.input_ids == whole.input_ids[:6]
    assert rendered.over == len(whole.input_ids) - 6
    assert rendered.lost == whole.supervised - rendered.supervised
    assert rendered.spans == [(whole.spans[0][0], 6)]


def test_a_slow_tokenizer_gives_the_same_spans():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    for template in ("chatml", UNMARKED):
        renderer = causal(tokenizer, template=template)
        assert supervised(renderer, TWO_TURNS) == ["hello<|im_end|>", "bye<|im_end|>"]
        prompt = renderer.prompt_ids(TWO_TURNS)
        assert renderer.render(TWO_TURNS).input_ids[: len(prompt)] == prompt
    assert supervised(causal(tokenizer), PAIR) == ["4</s>"]


def test_origins_name_each_message():
    rendered = causal(byte_level(), template="chatml").render(TWO_TURNS)
    names = [where for _, _, where in rendered.origins]
    assert names == [
        "message 1: system",
        "message 2: user",
        "message 3: assistant",
        "message 4: user",
        "message 5: assistant",
    ]
    assert rendered.origins[0][0] == 0
    assert rendered.origins[-1][1] == len(rendered.input_ids)


def test_a_conversation_without_a_template_says_what_to_do():
    with pytest.raises(UserError, match=r"f.jsonl, row 3: .*`data.template` to chatml"):
        causal(byte_level()).render(TWO_TURNS)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"template": "chatnl"}, "Did you mean 'chatml'?"),
        ({"truncation": "keep_end"}, "Accepted: error, keep_start, drop"),
        ({"thinking": "off"}, "Accepted: keep, strip"),
        ({"template": "{{ 'no words' }}"}, "does not write the assistant's content"),
    ],
)
def test_bad_options(options, part):
    with pytest.raises(UserError, match=r".*") as caught:
        causal(byte_level(), **options)
    assert part in str(caught.value)


def test_a_template_that_refuses_names_the_row():
    template = "{{ raise_exception('no system here') if messages[0].role == 'system' }}" + UNMARKED
    with pytest.raises(UserError, match=r"f.jsonl, row 3: the chat template refuses .*no system here"):
        causal(byte_level(), template=template).render(TWO_TURNS)


def test_templates_that_want_parts_get_them():
    template = UNMARKED.replace("message['content']", "message['content'][0]['text']")
    assert supervised(causal(byte_level(), template=template), PAIR) == ["4<|im_end|>"]


def test_words_and_tags_meet_at_the_first_token_of_a_word():
    tokenizer = word_piece()
    renderer = Renderer(tokenizer, task="token-classification")
    row = {"kind": "tags", "tokens": ["Kim", "left", "Nairobi", "."], "tags": ["B", "O", "B", "O"]}
    rendered = renderer.render(row)
    assert tokenizer.convert_ids_to_tokens(rendered.input_ids) == [
        "[CLS]",
        "kim",
        "left",
        "nai",
        "##robi",
        ".",
        "[SEP]",
    ]
    assert rendered.positions == [1, 2, 3, 5]
    assert rendered.words == [0, 1, 2, 3]
    short = Renderer(tokenizer, task="token-classification", max_length=5, truncation="keep_start").render(row)
    assert tokenizer.convert_ids_to_tokens(short.input_ids) == ["[CLS]", "kim", "left", "nai", "[SEP]"]
    assert (short.positions, short.lost) == ([1, 2, 3], 1)


def test_words_that_the_tokenizer_drops_have_no_position():
    rendered = Renderer(word_piece(), task="token-classification").render(
        {"kind": "tags", "tokens": ["Kim", "\u200b", "left"], "tags": ["B", "O", "O"]}
    )
    assert rendered.words == [0, 2]


def test_a_sentence_keeps_its_closing_token_when_cut():
    tokenizer = word_piece()
    row = {"kind": "classification", "text": "good film . good film .", "label": "x"}
    rendered = Renderer(tokenizer, task="sequence-classification", max_length=4, truncation="keep_start").render(row)
    assert tokenizer.convert_ids_to_tokens(rendered.input_ids) == ["[CLS]", "good", "film", "[SEP]"]
    assert rendered.over == 4


def trl_templates():
    try:
        import trl
    except ImportError:
        return []
    return sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


@pytest.mark.parametrize("path", trl_templates(), ids=lambda p: p.stem)
def test_templates_of_released_models(path):
    """With reasoning stripped every released template trains a pair, and generation starts from its prefix."""
    renderer = causal(byte_level(), template=str(path), thinking="strip")
    rows = (PAIR, chat(("user", "zebra"), ("assistant", "hello"), ("user", "more"), ("assistant", "bye")))
    for row, words in zip(rows, (["4"], ["hello", "bye"]), strict=True):
        said = supervised(renderer, row)
        assert len(said) == len(words)
        assert all(w in s and "zebra" not in s and "2+2" not in s for w, s in zip(words, said, strict=True))
        prompt = renderer.prompt_ids(row)
        assert renderer.render(row).input_ids[: len(prompt)] == prompt
