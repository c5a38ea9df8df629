"""Layouts as they are found in the wild become one canonical schema."""

import json

import pytest

from luthier.data.layouts import SCHEMA, detect
from luthier.data.read import read

PIPELINES = [
    ("prompt completion", "pair", {"prompt": "prompt", "completion": "completion"}),
    ("question answer", "pair", {"prompt": "question", "completion": "answer"}),
    ("Question Answer", "pair", {"prompt": "Question", "completion": "Answer"}),
    ("id prompt answer fact question", "pair", {"prompt": "prompt", "completion": "answer"}),
    ("prompt completion answer skill", "pair", {"prompt": "prompt", "completion": "completion"}),
    ("instruction response", "pair", {"prompt": "instruction", "completion": "response"}),
    ("query response", "pair", {"prompt": "query", "completion": "response"}),
    ("text code task_id test_list", "pair", {"prompt": "text", "completion": "code"}),
    ("article highlights", "pair", {"prompt": "article", "completion": "highlights"}),
    ("instruction input output", "alpaca", {"prompt": "instruction", "completion": "output"}),
    ("instruction output", "alpaca", {"prompt": "instruction", "completion": "output"}),
    ("instruction context response category", "alpaca", {"prompt": "instruction", "completion": "response"}),
    ("messages source", "chat", {"messages": "messages"}),
    ("conversations tools system", "chat", {"messages": "conversations"}),
    ("prompt chosen rejected", "preference", {"chosen": "chosen", "rejected": "rejected"}),
    ("text url source", "text", {"text": "text"}),
    ("story", "text", {"text": "story"}),
]


@pytest.mark.parametrize(("columns", "name", "fields"), PIPELINES)
def test_columns_are_recognised(columns, name, fields):
    found = detect(columns.split(), "causal-lm")
    assert (found.name, dict(found.fields)) == (name, fields)


@pytest.mark.parametrize(
    ("columns", "task", "fields"),
    [
        ("text label", "sequence-classification", {"text": "text", "label": "label"}),
        ("sentence label idx", "sequence-classification", {"text": "sentence", "label": "label"}),
        ("premise hypothesis label", "sequence-classification", {"text": "premise", "text2": "hypothesis"}),
        ("review sentiment", "sequence-classification", {"text": "review", "label": "sentiment"}),
        ("id tokens pos_tags chunk_tags ner_tags", "token-classification", {"tokens": "tokens", "tags": "ner_tags"}),
        ("words labels", "token-classification", {"tokens": "words", "tags": "labels"}),
        ("img label", "image-classification", {"image": "img", "label": "label"}),
    ],
)
def test_columns_of_other_tasks(columns, task, fields):
    assert fields.items() <= dict(detect(columns.split(), task).fields).items()


def canonical(tmp_path, *rows, **options):
    found = read(list(rows), cache=tmp_path / "cache", progress=False, **options)
    assert found.dataset.features.arrow_schema.names == SCHEMA.names
    return found.dataset[0]


def test_named_columns(tmp_path):
    row = canonical(
        tmp_path, {"frage": "a", "antwort": "b", "n": 1}, columns={"prompt": "frage", "completion": "antwort"}
    )
    assert (row["kind"], row["prompt"], row["completion"]) == ("pair", "a", "b")
    assert json.loads(row["extra"]) == {"n": 1}


def test_named_columns_win_over_the_files_own(tmp_path):
    row = canonical(tmp_path, {"prompt": "no", "completion": "b", "task": "yes"}, columns={"prompt": "task"})
    assert row["prompt"] == "yes"
    assert json.loads(row["extra"]) == {"prompt": "no"}


def test_pairs_are_joined_as_they_are_only_where_they_are_made_for_it(tmp_path):
    assert canonical(tmp_path, {"prompt": "2+2=", "completion": "4"})["separator"] is None
    assert canonical(tmp_path, {"question": "2+2?", "answer": "4"})["separator"] == "\n"


def test_alpaca(tmp_path):
    row = canonical(tmp_path, {"instruction": "Add.", "input": "2 and 2", "output": "4"})
    assert row["prompt"] == "Add.\n\nInput:\n2 and 2"
    assert row["separator"] + row["completion"] == "\n\nResponse:\n4"
    assert canonical(tmp_path, {"instruction": "Add.", "input": "", "output": "4"})["prompt"] == "Add."
    assert canonical(tmp_path, {"instruction": "Add.", "input": None, "output": "4"})["prompt"] == "Add."


def test_sharegpt_keys_and_system(tmp_path):
    row = canonical(
        tmp_path,
        {
            "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}],
            "system": "Be kind.",
            "tools": '[{"name": "f"}]',
        },
    )
    assert json.loads(row["messages"]) == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
    ]
    assert json.loads(row["tools"]) == [{"name": "f"}]


def test_openai_parts_tools_and_developer(tmp_path):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = canonical(
        tmp_path,
        {
            "messages": [
                {"role": "developer", "content": "Be kind."},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "function", "content": "7"},
                {"role": "assistant", "content": "seven"},
            ]
        },
    )
    messages = json.loads(row["messages"])
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[1]["content"] == "ab"
    assert messages[2]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert "content" not in messages[2]


def test_tool_calls_are_normalised_even_beside_good_rows(tmp_path):
    plain = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    call = {"function": {"name": "f", "arguments": "{}"}}
    calling = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [call]}]
    }
    found = read([plain, calling], cache=tmp_path / "cache", progress=False)
    assert json.loads(found.dataset[0]["messages"]) == plain["messages"]
    assert json.loads(found.dataset[1]["messages"])[1]["tool_calls"][0]["function"]["arguments"] == {}


def test_sharegpt_function_calls(tmp_path):
    turns = [("human", "hi"), ("function_call", '{"name": "f", "arguments": {}}'), ("observation", "7"), ("gpt", "x")]
    row = canonical(tmp_path, {"conversations": [{"from": a, "value": b} for a, b in turns]})
    messages = json.loads(row["messages"])
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]


def test_messages_as_json_text(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert json.loads(canonical(tmp_path, {"messages": json.dumps(messages)})["messages"]) == messages


def test_parquet_messages_lose_the_nulls_of_other_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "x"}]},
        {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet", cache=tmp_path / "cache", progress=False)
    assert [json.loads(m) for m in found.dataset["messages"]] == [r["messages"] for r in rows]


def test_conversational_prompt_and_completion_learn_only_the_completion(tmp_path):
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    row = canonical(tmp_path, {"prompt": said, "completion": [{"role": "assistant", "content": "d"}]})
    assert row["kind"] == "chat"
    assert [m.get("weight") for m in json.loads(row["messages"])] == [None, 0, None, None]


def test_preferences(tmp_path):
    row = canonical(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"})
    assert (row["kind"], row["prompt"], row["completion"], row["rejected"]) == ("preference", "a", "b", "c")
    talk = "\n\nHuman: hi\n\nAssistant:"
    row = canonical(tmp_path, {"chosen": talk + " hello", "rejected": talk + " go away"})
    assert (row["prompt"], row["completion"], row["rejected"]) == (talk, " hello", " go away")
    ask = {"role": "user", "content": "a"}
    good, bad = {"role": "assistant", "content": "b"}, {"role": "assistant", "content": "c"}
    for spec in (
        {"chosen": [ask, good], "rejected": [ask, bad]},
        {"prompt": "a", "chosen": [ask, good], "rejected": [ask, bad]},
        {"prompt": [ask], "chosen": [good], "rejected": [bad]},
    ):
        row = canonical(tmp_path, spec)
        assert json.loads(row["messages"]) == [ask, good]
        assert json.loads(row["rejected_messages"]) == [ask, bad]


def test_the_key_is_of_what_a_model_can_see(tmp_path):
    def key(**row):
        return canonical(tmp_path, row)["key"]

    first = key(prompt="a", completion="b", id="1", note="x")
    assert first == key(prompt="a", completion="b", id="2", note="y")
    assert first != key(prompt="a", completion="c")
    assert first != key(prompt="ab", completion="b")
    assert len(first) == 32


def test_two_texts_are_joined_by_a_newline(tmp_path):
    row = canonical(tmp_path, {"premise": "a", "hypothesis": "b", "label": 1}, task="sequence-classification")
    assert (row["text"], row["label"]) == ("a\nb", "1")


def test_optional_columns_may_be_missing_in_some_rows(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d", "answer": "e"}]
    found = read(rows, cache=tmp_path / "cache", progress=False)
    assert found.dataset["completion"][:] == ["b", "d"]
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "input": "x", "output": "b"}]
    assert len(read(rows, cache=tmp_path / "cache", progress=False)) == 2
