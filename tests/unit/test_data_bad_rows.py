"""Every kind of bad data gives one line with file, row, field, an excerpt and the way out, before any model is loaded."""

import gzip
import json

import pytest

from luthier.core.errors import UserError
from luthier.data.read import read

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
PAIR = {"prompt": "What is 2+2?", "completion": "4"}


def lines(path, *rows):
    path.write_text("".join(json.dumps(r) + "\n" if not isinstance(r, str) else r + "\n" for r in rows))
    return path


def error(path, **options):
    with pytest.raises(UserError) as caught:
        read(path, cache=path.parent / "cache", progress=False, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 1000
    assert path.name in text or "data" in text or "model" in text
    return text


def messages(*pairs):
    return {"messages": [{"role": r, "content": c} for r, c in pairs]}


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([GOOD, {"messages": None}], ["row 2", "'messages'", "is null"]),
        ([GOOD, GOOD, {"messages": []}], ["row 3", "'messages'", "is an empty list"]),
        ([{"foo": "a", "bar": "b"}], ["row 1", "columns (foo, bar)", "data.columns"]),
        ([{"text": "fine"}, {"text": None}], ["row 2", "'text'", "is null or missing"]),
        ([GOOD, messages(("user", "hi"), ("assistant", None))], ["row 2", "messages[1].content", "content is null"]),
        ([GOOD, messages(("user", "hi"), ("asistant", "x"))], ["row 2", "unknown role 'asistant'", "'assistant'?"]),
        ([{"text": "fine"}, {"text": "  \n"}], ["row 2", "'text'", "is empty"]),
        ([PAIR, {"prompt": "x", "completion": ""}], ["row 2", "'completion'", "is empty"]),
        ([GOOD, messages(("user", "hi"), ("user", "again"))], ["row 2", "no message of the assistant"]),
        ([GOOD, messages(("user", "hi"), ("assistant", " "))], ["row 2", "assistant's content is empty"]),
        ([PAIR, {"prompt": "only"}], ["row 2", "'completion'", "is null or missing"]),
        ([PAIR, {"prompt": "x", "completion": 5}], ["row 2", "'completion'", "is a number", "Found: 5"]),
        ([PAIR, {"prompt": "x", "completion": "a\x00b"}], ["row 2", "NUL character", r"a\x00b"]),
        ([PAIR, '{"prompt": "x", "completion": "\\ud800"}'], ["row 2", "half of a surrogate pair"]),
        ([PAIR, "[1, 2]"], ["row 2", "JSON array, not an object"]),
        ([PAIR, '{"prompt": "x", '], ["row 2", "not valid JSON", "one object a line"]),
        ([PAIR, GOOD], ["row 2", "mixed layouts", "Row 1", "chat (messages)"]),
        ([PAIR, {**GOOD, "prompt": None, "completion": None}], ["row 2", "mixed layouts"]),
        ([GOOD, {"messages": "not json"}], ["row 2", "not the JSON of a list"]),
        ([GOOD, {"messages": [{"content": "x"}]}], ["row 2", "has no role"]),
        ([GOOD, {"messages": ["hi"]}], ["row 2", "messages[0]", "not a message"]),
        (
            [GOOD, messages(("user", [{"type": "image", "image": "x"}]), ("assistant", "y"))],
            ["row 2", "parts that are not text"],
        ),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}], ["row 1", "chosen and rejected are the same"]),
        ([{"chosen": "b", "rejected": "c"}], ["row 1", "there is no prompt"]),
    ],
)
def test_a_bad_row_is_named(tmp_path, rows, parts):
    text = error(lines(tmp_path / "rows.jsonl", *rows))
    assert "rows.jsonl, row" in text
    for part in parts:
        assert part in text, text


def test_the_error_names_field_excerpt_layouts_and_how_many_more(tmp_path):
    text = error(lines(tmp_path / "rows.jsonl", PAIR, {"prompt": "x" * 500, "completion": ""}, {"prompt": "y"}))
    assert "rows.jsonl, row 2, field 'completion': is empty." in text
    assert "Accepted layouts: prompt/completion" in text
    assert "1 more row is bad too" in text
    assert "xxx..." in text
    assert "data.bad_rows: skip" in text


def test_line_numbers_count_empty_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(PAIR) + "\n\n\n" + json.dumps({"prompt": "x"}) + "\n")
    assert "row 4" in error(path)


def test_invalid_utf8(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(PAIR).encode() + b'\n{"prompt": "caf\xe9", "completion": "x"}\n')
    text = error(path)
    assert "row 2" in text
    assert "invalid UTF-8" in text
    assert "0xe9" in text


def test_invalid_utf8_in_csv(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"prompt,completion\na,b\ncaf\xe9,d\n")
    text = error(path)
    assert "row 2, field 'prompt': invalid UTF-8" in text


def test_utf16_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(PAIR).encode("utf-16"))
    assert "UTF-16" in error(path)


def test_a_row_of_50_megabytes(tmp_path):
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        file.write(json.dumps(PAIR) + "\n")
        file.write(json.dumps({"prompt": "x" * 50_000_000, "completion": "y"}) + "\n")
        file.write(json.dumps(PAIR) + "\n")
    text = error(path)
    assert "row 2: the row is too long (48 MB)" in text
    rows = read(path, cache=tmp_path / "cache", bad_rows="skip", progress=False)
    assert rows.dataset["row"][:] == [1, 3]


def test_nul_bytes(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(PAIR).encode() + b'\n{"prompt": "a\x00", "completion": "b"}\n')
    assert "row 2: NUL byte in the line" in error(path)


def test_an_empty_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.touch()
    assert error(path) == "rows.jsonl: the file is empty."
    path.write_text("\n\n")
    assert "there are no rows in it" in error(path)


def test_a_folder_without_data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "notes.docx").write_text("x")
    assert "the folder holds no data" in error(folder)


def test_no_such_file_with_a_near_name(tmp_path):
    lines(tmp_path / "train.jsonl", PAIR)
    assert "Did you mean 'train.jsonl'?" in error(tmp_path / "trian.jsonl")


def test_an_unknown_kind_of_file(tmp_path):
    path = tmp_path / "rows.xlsx"
    path.write_bytes(b"PK")
    assert "'.xlsx' cannot be read" in error(path)


def test_a_truncated_gzip(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    data = gzip.compress(("\n".join(json.dumps({**PAIR, "n": i}) for i in range(5000))).encode())
    path.write_bytes(data[: len(data) // 2])
    assert "truncated or damaged" in error(path)
    path.write_bytes(b"not gzip at all")
    assert "truncated or damaged" in error(path)


def test_a_damaged_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 nonsense")
    assert "not a readable Parquet file" in error(path)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("prompt,completion\na,b\nc\n", "row 2: 1 values for 2 columns"),
        ("prompt,prompt\na,b\n", "names prompt more than once"),
        ('prompt,completion\na,"b\n', "not valid CSV"),
    ],
)
def test_bad_csv(tmp_path, text, part):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    assert part in error(path)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('[{"prompt": "a", "completion": "b"}, {"prompt": "c"', "row 2: not valid JSON, or the file is cut off"),
        ('[{"prompt": "a", "completion": "b"}', "no closing bracket"),
        ('[{"prompt": "a", "completion": "b"}, 7]', "row 2: the element is a JSON number"),
        ('{\n"version": 1}', "exactly one list of objects"),
        ('{"prompt": ', "not valid JSON"),
    ],
)
def test_bad_json(tmp_path, text, part):
    path = tmp_path / "rows.json"
    path.write_text(text)
    assert part in error(path)


def test_an_image_that_is_not_one(tmp_path):
    pytest.importorskip("PIL")
    (tmp_path / "a.png").write_bytes(b"GIF?? no")
    path = lines(tmp_path / "rows.jsonl", {"image": "a.png", "label": "cat"})
    assert "row 1, field 'image': the file is not an image" in error(path, task="image-classification")
    path = lines(tmp_path / "more.jsonl", {"image": "b.png", "label": "cat"})
    assert "the image file does not exist" in error(path, task="image-classification")


def test_a_truncated_image(tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.effect_noise((64, 64), 50).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    path = lines(tmp_path / "rows.jsonl", {"image": "a.png", "label": "cat"})
    assert "the image is damaged" in error(path, task="image-classification")


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ([{"tokens": ["a", "b"], "tags": ["O"]}], "2 tokens but 1 tags"),
        ([{"tokens": [], "tags": []}], "there are no tokens"),
        ([{"tokens": ["a", None], "tags": ["O", "O"]}], "an item is null or not text"),
        ([{"tokens": "a b", "tags": ["O", "O"]}], "is a str, not a list"),
    ],
)
def test_bad_tags(tmp_path, rows, part):
    assert part in error(lines(tmp_path / "rows.jsonl", *rows), task="token-classification")


def test_bad_labels(tmp_path):
    path = lines(tmp_path / "rows.jsonl", {"text": "a", "label": "x"}, {"text": "b", "label": None})
    assert "row 2, field 'label': the label is null" in error(path, task="sequence-classification")
    path = lines(tmp_path / "more.jsonl", {"text": "a", "label": 0.5})
    assert "neither text nor a whole number" in error(path, task="sequence-classification")


def test_a_token_without_a_tag_names_its_line(tmp_path):
    path = tmp_path / "ner.conll"
    path.write_text("Kim B-PER\nleft O\n\nNairobi B-LOC\nbroken\n\n")
    text = error(path, task="token-classification")
    assert "row 5" in text
    assert "a token without a tag" in text


def test_skip_writes_the_reject_file(tmp_path):
    rows = [PAIR, {"prompt": "x"}, {"prompt": "y", "completion": ""}, "{broken", {"prompt": "z", "completion": ""}]
    path, rejected = lines(tmp_path / "rows.jsonl", *rows), tmp_path / "out" / "rejects.jsonl"
    for _ in range(2):  # the second reading comes from the cache and writes the file again
        rejected.unlink(missing_ok=True)
        found = read(path, bad_rows="skip", reject_file=rejected, cache=tmp_path / "cache", progress=False)
        assert len(found) == 1
        assert found.report.rejected == {"is empty": 2, "is null or missing": 1, "not valid JSON": 1}
        listed = [json.loads(line) for line in rejected.read_text().splitlines()]
        assert sorted(r["row"] for r in listed) == [2, 3, 4, 5]
        assert {r["source"] for r in listed} == {"rows.jsonl"}
        assert all(r["reason"] for r in listed)
        assert found.report.reject_file == str(rejected)


def test_skip_keeps_the_first_layout_of_a_mixed_file(tmp_path):
    path = lines(tmp_path / "rows.jsonl", PAIR, GOOD, PAIR)
    found = read(path, bad_rows="skip", cache=tmp_path / "cache", progress=False)
    assert found.dataset["row"][:] == [1, 3]
    assert found.report.rejected == {"mixed layouts in one file": 1}


def test_skip_does_not_hide_that_every_row_is_bad(tmp_path):
    text = error(lines(tmp_path / "rows.jsonl", {"prompt": "x", "completion": ""}), bad_rows="skip")
    assert "all 1 rows are bad" in text


def test_duplicates_are_counted(tmp_path):
    rows = [{**PAIR, "id": "a"}, {**PAIR, "id": "a"}, {"prompt": "other", "completion": "b", "id": "c"}]
    found = read(lines(tmp_path / "rows.jsonl", *rows), cache=tmp_path / "cache", progress=False)
    assert found.report.duplicated_ids == 1
    assert found.report.duplicated_rows == 1


def test_bad_options_are_named(tmp_path):
    path = lines(tmp_path / "rows.jsonl", {"q": "a", "a": "b"})
    assert "Did you mean 'messages'?" in error(path, layout="mesages")
    assert "Did you mean 'prompt'?" in error(path, columns={"promt": "q"})
    assert "no column 'qq'" in error(path, columns={"prompt": "qq"})
    assert "Accepted: error, skip" in error(path, bad_rows="drop")
    assert "Did you mean 'causal-lm'?" in error(path, task="causal_lm")


def test_labelled_text_for_a_causal_model_says_what_to_do(tmp_path):
    text = error(lines(tmp_path / "rows.jsonl", {"text": "fine film", "label": "good"}))
    assert "set `model.task: sequence-classification`, or `data.layout: text`" in text
    path = tmp_path / "rows.jsonl"
    assert read(path, layout="text", cache=tmp_path / "cache", progress=False).dataset["text"][:] == ["fine film"]
    assert "not one for the task causal-lm" in error(path, layout="tags")
