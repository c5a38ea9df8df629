"""TL-Training's data stage: turns that are learnt, and the positions of their key tokens, by hand."""

from __future__ import annotations

import json
import logging

import pytest
from datasets import Dataset
from tool_world import FOUR, KNOWN, NATIVE, TOOLS, canonical, learnt, processor, result, said, stage, tool, user

from luthier.core.errors import UserError
from luthier.data.read import read
from luthier.functional import tool_calls as calls
from luthier.methods.data.tl_training import ToolDialogues

# -- turns


def test_errors_are_never_targets_and_always_context():
    rows, renderer = stage(canonical(FOUR))
    targets = ['get_weather(city="Rome")', 'search(city="Rome", unit="x")']
    assert [learnt(renderer, row) for row in rows] == [[f" {t}</s>"] for t in targets]
    texts = [renderer.processor.decode(renderer.prompt_ids(row)) for row in rows]
    wrong = "Assistant: get_weather(town=\"Rome\")</s>\nOutput: TypeError: unexpected keyword argument 'town'\n"
    assert texts[0].endswith(f"User: Weather?\n{wrong}Assistant:")
    middle = 'Assistant: get_time(city="Atlantis")</s>\nOutput: {"error": "no such city"}\nAssistant:'
    assert texts[1].endswith(f"{wrong}Assistant: {targets[0]}</s>\nOutput: sunny\n{middle}")
    assert all(text.startswith(f"<s>System: {calls.stubs(KNOWN)}\nUser") for text in texts)
    masked, _ = stage(canonical(FOUR), layout="masked_dialogue")
    assert [learnt(renderer, row) for row in masked] == [[f" {t}</s>" for t in targets]]
    whole = renderer.render_batch([masked[0]])[0]
    parts = renderer.render_batch(list(rows))
    assert [p.spans[0] for p in parts] == whole.spans
    assert parts[1].input_ids == whole.input_ids[: len(parts[1].input_ids)]
    places = [json.loads(row["extra"]) for row in (*rows, masked[0])]
    for name in ("key_tokens", "closing_tokens"):
        assert places[0][name] + places[1][name] == places[2][name]
        assert len(places[0][name]) > 1


def test_with_the_filter_off_every_turn_with_a_result_is_learnt():
    rows, renderer = stage(canonical(FOUR), drop_errors=False)
    assert [len(learnt(renderer, row)) for row in rows] == [1, 1, 1, 1]
    assert learnt(renderer, rows[0]) == [' get_weather(town="Rome")</s>']


def test_turns_that_are_not_followed_by_a_result_are_skipped():
    talk = [user("hi"), {"role": "assistant", "content": "Where?"}, user("Rome"), said("search", city="Rome")]
    rows, renderer = stage(canonical(talk))
    assert [learnt(renderer, row) for row in rows] == [[' search(city="Rome")</s>']]
    rows, renderer = stage(canonical(talk), text_turns="keep")
    assert [learnt(renderer, row) for row in rows] == [[" Where?</s>"], [' search(city="Rome")</s>']]
    assert json.loads(rows[0]["extra"])["key_tokens"] == []
    silent = [
        user("hi"),
        {**said("search", city="x"), "weight": 0},
        result("ok"),
        {"role": "assistant", "content": "so"},
    ]
    rows, renderer = stage(canonical(silent))
    assert [learnt(renderer, row) for row in rows] == [[" so</s>"]]


def dialogue(text):
    return [user("q"), said("search", city="x"), result(text), {"role": "assistant", "content": "done"}]


def test_patterns_are_compared_without_signs_and_their_share_is_shown(caplog):
    texts = ["ok", "Invalid-API call!", "400 CLIENT error", "fine", "No error found"]
    with (
        caplog.at_level(logging.INFO, logger="luthier"),
        pytest.warns(UserWarning, match=r"3 of 5 calls .*'\"error\":'"),
    ):
        rows, _ = stage(canonical(*map(dialogue, texts)), patterns=["Invalid API call", '"error":', "'error'"])
    assert len(rows) == 7
    assert "2 of 5 results (40.0%) have '\"error\":'" in caplog.text
    assert "1 of 5 results (20.0%) have 'Invalid API call'" in caplog.text
    with pytest.raises(UserError, match=r"of the pattern '\?!' no letter or digit is left"):
        ToolDialogues(patterns=["?!"])


def test_an_own_function_may_tell_errors(tmp_path):
    (tmp_path / "mine.py").write_text("def bad(text):\n    return text.startswith('E')\n")
    rows, renderer = stage(canonical(dialogue("E1"), dialogue("error")), is_error=f"{tmp_path / 'mine.py'}:bad")
    assert [learnt(renderer, r)[0] for r in rows] == [" done</s>", ' search(city="x")</s>', " done</s>"]
    for wrong in ("nothing.py:bad", "no_such_module:bad", f"{tmp_path / 'mine.py'}:other", "bad"):
        with pytest.raises(UserError, match="is_error"):
            ToolDialogues(is_error=wrong)
    with pytest.raises(UserError, match="give one of them"):
        ToolDialogues(is_error="a:b", patterns=["x"])


@pytest.mark.parametrize(
    ("turn", "why"),
    [
        (
            {"role": "assistant", "content": '{"name": "search", "arguments": {city}}'},
            "message 2: the tool call is not JSON",
        ),
        (
            {"role": "assistant", "content": "search\n{city}"},
            "message 2: the arguments of the call to 'search' are not JSON",
        ),
        ({"role": "assistant", "content": "search(city=Rome)"}, "message 2: only JSON values can be arguments"),
        ({"role": "assistant", "content": "search(city='Rome'"}, "message 2: the call is not closed"),
        (said("find"), "message 2: it calls 'find', which is not among"),
        ({"role": "assistant", "tool_calls": said("a")["tool_calls"] * 2}, "message 2: it makes 2 calls at once"),
    ],
)
def test_a_call_that_cannot_be_read_gets_one_line_or_is_not_learnt(turn, why):
    rows = canonical(dialogue("ok"), [user("q"), turn, result("ok"), {"role": "assistant", "content": "so"}])
    with pytest.raises(UserError) as caught:
        stage(rows)
    assert str(caught.value).startswith(f"d.jsonl, row 2: {why}")
    assert "\n" not in str(caught.value)
    found, renderer = stage(rows, bad_calls="drop")
    assert [learnt(renderer, r)[0] for r in found] == [' search(city="x")</s>', " done</s>", " so</s>"]


def test_data_that_cannot_be_used_is_refused_with_its_place():
    with pytest.raises(UserError, match=r"row 1: two tools have the name 'search'"):
        stage(canonical(dialogue("ok"), tools=[*TOOLS, tool("search")]))
    with pytest.raises(UserError, match=r"row 1: message 2: it calls 'search', and the row has no tools"):
        stage(canonical(dialogue("ok"), tools=None))
    pair = canonical(dialogue("ok")).to_list()[0] | {"kind": "pair"}
    with pytest.raises(UserError, match="a row of kind 'pair' is none"):
        stage(Dataset.from_list([pair]))
    with pytest.raises(UserError, match=r"Set data\.template: plain"):
        stage(canonical(dialogue("ok")), template="none")


def test_the_papers_own_form_is_read():
    raw = [
        {"role": "system", "content": json.dumps(TOOLS)},
        user("q"),
        {"role": "assistant", "content": 'search\n{"city": "Rome"}'},
        {"role": "function", "content": "ok"},
        {"role": "assistant", "content": "get_time('Rome')"},
    ]
    rows = read([{"messages": raw}], progress=False)
    found, renderer = stage(rows.dataset)
    assert [learnt(renderer, r)[0] for r in found] == [' search(city="Rome")</s>', ' get_time(city="Rome")</s>']
    assert found[0]["tools"] is None
    assert json.loads(found[0]["extra"])["tools"] == TOOLS


# -- key positions


def tokens_of(row, renderer, column):
    rendered = renderer.render_batch([row])[0]
    places = json.loads(row["extra"])[column]
    start = rendered.spans[0][0]
    return [p - start for p in places], [renderer.processor.decode([rendered.input_ids[p]]) for p in places]


@pytest.mark.parametrize(
    ("name", "places", "words"),
    [
        # ' get' '_' 'weather' '(' : first token, where get_time departs, and the one behind the name
        ("get_weather", [0, 2, 3], [" get", "weather", "("]),
        ("get_weather_alerts", [0, 2, 3], [" get", "weather", "_"]),
        ("get_time", [0, 2], [" get", "time"]),
        ("search", [0], [" search"]),
    ],
)
def test_key_positions_are_where_names_depart(name, places, words):
    rows, renderer = stage(canonical([user("q"), said(name, city="Paris")]))
    assert tokens_of(rows[0], renderer, "key_tokens") == (places, words)
    assert tokens_of(rows[0], renderer, "closing_tokens")[1] == ['"', ")"]


def test_closing_positions_are_quotes_and_what_follows_an_argument():
    rows, renderer = stage(canonical([user("q"), said("search", city="a, (b)", unit=3)]))
    target = learnt(renderer, rows[0])[0]
    assert target == ' search(city="a, (b)", unit=3)</s>'
    assert tokens_of(rows[0], renderer, "closing_tokens")[1] == ['"', ",", ")"]
    rows, renderer = stage(canonical([user("q"), said("search")]))
    # '(' behind the name departs from no name, so ')' is found and '(' is of the others.
    assert tokens_of(rows[0], renderer, "closing_tokens") == ([2], [")"])


def test_without_a_closing_token_it_is_the_second_last():
    words = processor()
    ids = words('{"name": "search"}</s>')["input_ids"]
    found = calls.key_tokens(ids, calls.Call("search", {"city": "x"}), [], words.decode)
    assert words.decode([ids[found[0][0]]]) == "search"
    assert found[1] == [len(ids) - 2]


def test_key_positions_in_a_templates_own_form_of_calls():
    rows, renderer = stage(canonical(FOUR), template=NATIVE, rendering="template")
    assert learnt(renderer, rows[0])[0].startswith('[call]{"name": "get_weather", ')
    assert tokens_of(rows[0], renderer, "key_tokens")[1] == ["get", "weather", '"']
    assert tokens_of(rows[0], renderer, "closing_tokens")[1] == ['"', "}"]
    assert json.loads(rows[0]["messages"])[2]["role"] == "tool"


def test_characters_cut_into_several_tokens_do_not_move_the_positions():
    words = processor()
    ids = words('日本 ü get_time(city="東京")</s>')["input_ids"]
    others = [words('get_weather(city="東京")')["input_ids"]]
    ids = ids[:-1] + words("</s>")["input_ids"]
    key, closing = calls.key_tokens(ids, calls.Call("get_time", {"city": "東京"}), others, words.decode)
    assert words.decode([ids[key[0]]]).strip() == "get"
    assert [words.decode([ids[c]]) for c in closing] == ['"', ")"]
