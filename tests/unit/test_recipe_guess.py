"""``init``: what is guessed from the first rows, and that what is written is a valid recipe."""

from __future__ import annotations

import json

import pytest

from luthier.core.errors import UserError
from luthier.recipe.guess import beside, guess, look
from luthier.recipe.load import load
from luthier.recipe.schema import Recipe
from luthier.recipe.source import parse


def rows(path, entries):
    path.write_text("".join(json.dumps(e) + "\n" for e in entries))
    return str(path)


def written(text):
    return load(parse(text, "guess")[0])


@pytest.mark.parametrize(
    ("row", "task", "layout"),
    [
        ({"question": "1+1?", "answer": "2"}, "auto", "pair (prompt=question, completion=answer)"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "auto",
            "chat (messages)",
        ),
        ({"instruction": "a", "input": "b", "output": "c"}, "auto", "alpaca (prompt=instruction"),
        ({"text": "a sentence"}, "auto", "text (text)"),
        ({"text": "a sentence", "label": "good"}, "sequence-classification", "classification (text, label)"),
        ({"tokens": ["a"], "ner_tags": ["O"]}, "token-classification", "tags (tokens, tags=ner_tags)"),
    ],
)
def test_layout_and_task(tmp_path, row, task, layout):
    data = rows(tmp_path / "rows.jsonl", [row] * 3)
    guessed = guess("lab:nano", data)
    recipe = written(guessed.text)
    assert recipe.model.task == task
    assert layout in guessed.text
    assert "3 rows" in guessed.text
    assert recipe.data.train == data
    assert recipe.data.test is None
    assert recipe.output == "runs/rows-sft"


def test_every_key_of_the_recipe_is_there_and_explained(tmp_path):
    text = guess("lab:nano", rows(tmp_path / "rows.jsonl", [{"text": "a"}])).text
    for key, field in Recipe.model_fields.items():
        assert f"{key}:" in text
        inner = getattr(field.annotation, "model_fields", {}) if key != "model" else {}
        for name, about in inner.items():
            line = next(line for line in text.splitlines() if line.strip().lstrip("# ").startswith(f"{name}:"))
            assert "#" in line.lstrip(" #")
            assert about.description
    assert "cosine, linear, constant, warmup-stable-decay" in text


def test_commented_keys_are_at_their_defaults(tmp_path):
    """Uncommenting every line changes nothing."""
    text = guess("lab:nano", rows(tmp_path / "rows.jsonl", [{"text": "a"}]), test=str(tmp_path / "rows.jsonl")).text
    lines = text.splitlines()[2:]
    exclusive = ("  # batch_tokens", "  # keep_limit")
    opened = [
        line.replace("# ", "", 1) if line.lstrip().startswith("# ") and not line.startswith(exclusive) else line
        for line in lines
    ]
    assert written("\n".join(opened)).model_dump() == written(text).model_dump()


@pytest.mark.parametrize(
    ("train", "test", "found"),
    [
        ("train.jsonl", "test.jsonl", True),
        ("gsm8k_train.jsonl", "gsm8k_test.jsonl", True),
        ("train-00.jsonl", "validation-00.jsonl", True),
        ("train.jsonl", "dev.jsonl", True),
        ("constraint.jsonl", "constest.jsonl", False),
        ("rows.jsonl", "test.jsonl", False),
    ],
)
def test_held_out_rows_are_found_by_name(tmp_path, train, test, found):
    data = rows(tmp_path / train, [{"text": "a"}])
    rows(tmp_path / test, [{"text": "b"}])
    assert beside(data) == (str(tmp_path / test) if found else None)


def test_the_lab_has_its_own_test_rows():
    assert beside("lab:arithmetic") == "lab:arithmetic"


def test_starting_points_follow_size_and_parameters(tmp_path):
    few = rows(tmp_path / "few.jsonl", [{"text": "a"}] * 10)
    assert written(guess("lab:nano", few).text).training.epochs == 3
    assert written(guess("lab:nano", few).text).training.learning_rate == 5e-4
    many = rows(tmp_path / "many.jsonl", [{"text": "a"}] * 6000)
    assert written(guess("lab:nano", many).text).training.epochs == 1


def test_counts_of_large_files_are_estimated(tmp_path, monkeypatch):
    monkeypatch.setattr("luthier.data.formats.BLOCK_BYTES", 1 << 14)
    data = rows(tmp_path / "large.jsonl", [{"text": "x" * 100, "n": i} for i in range(20_000)])
    seen = look(data)
    assert len(seen.rows) <= 500
    assert not seen.exact
    assert abs(seen.count - 20_000) < 1_000
    monkeypatch.setattr("luthier.data.formats.BLOCK_BYTES", 1 << 20)
    assert (look(data).count, look(data).exact) == (20_000, True)


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        ("lab:nano", "nothing.jsonl", "nothing.jsonl"),
        ("./nowhere", "rows.jsonl", "nowhere"),
        ("lab:nano", "odd.jsonl", "Accepted layouts"),
        ("lab:nano", "empty.jsonl", "empty"),
    ],
)
def test_what_cannot_be_guessed(tmp_path, monkeypatch, model, data, words):
    monkeypatch.chdir(tmp_path)
    rows(tmp_path / "rows.jsonl", [{"text": "a"}])
    rows(tmp_path / "odd.jsonl", [{"alpha": 1, "beta": 2}])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match=words):
        guess(model, data)


def test_an_unknown_method_is_refused(tmp_path):
    data = rows(tmp_path / "rows.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match=r"unknown objective 'sftt'\. Did you mean 'sft'"):
        guess("lab:nano", data, objective="sftt")
