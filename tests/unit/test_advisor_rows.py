"""Findings about rows, where what is planted is known exactly."""

from __future__ import annotations

import pytest

from luthier.advisor import rows
from luthier.data.read import read

TALE = (
    "The river ran past the old mill, and the miller's daughter counted the sacks of flour that stood beside the door "
    "while her brother mended the wheel, number {} in a long line of wheels that the water had broken over the years."
)


def dataset(entries, task="causal-lm"):
    return read(entries, task=task).dataset


def pairs(count):
    return [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(count)]


def test_exact_duplicates_are_counted_exactly():
    made = dataset([*pairs(90), *pairs(7), *pairs(3)])
    exact, near = rows.duplicates(made)
    assert (exact.value, exact.n, exact.low, exact.high) == (0.1, 100, 0.1, 0.1)
    assert exact.sentence == "10 of 100 rows (10.0%) repeat an earlier row word for word."
    assert near.value is None
    assert near.sentence.startswith("not measured: fewer than two rows")


def test_near_duplicates_among_the_long_rows_only():
    long = [{"prompt": TALE.format(i) if i < 5 else f"{i} " * 120, "completion": str(i)} for i in range(20)]
    _, near = rows.duplicates(dataset([*long, *pairs(30)]))
    # Five tales of which four resemble the first; the repeated numbers resemble only themselves.
    assert near.n == 20
    assert near.value == pytest.approx(4 / 20)


def test_contradictions_count_every_row_of_a_question_with_several_answers():
    made = dataset([*pairs(6), {"prompt": "question 1", "completion": "another"}, *pairs(1)])
    found = rows.contradictions(made)
    assert (found.value, found.n) == (2 / 8, 8)


def test_rows_without_an_answer_cannot_contradict():
    assert rows.contradictions(dataset([{"text": "a"}, {"text": "b"}])).value is None


def test_leaks_word_for_word_and_by_pieces():
    train = dataset([{"prompt": TALE.format(i), "completion": "x"} if i == 0 else pairs(30)[i] for i in range(30)])
    copied = {"prompt": "  Question 3 ", "completion": "answer 3"}
    changed = {"prompt": TALE.format(17), "completion": "y"}
    fresh = {"prompt": "nothing of the kind has been asked in any of those rows before", "completion": "z"}
    exact, near = rows.leaks(train, dataset([copied, changed, fresh]))
    assert (exact.value, exact.n) == (pytest.approx(1 / 3), 3)
    # "question 3" is shorter than a piece; of the two long rows the changed tale is a leak.
    assert (near.value, near.n) == (0.5, 2)


def test_without_test_rows_nothing_is_claimed():
    assert all(f.value is None and "no test rows" in f.sentence for f in rows.leaks(dataset(pairs(3)), None))


def test_balance_of_classes_answers_and_tags():
    labelled = [{"text": f"t{i}", "label": "rare" if i == 0 else "usual"} for i in range(20)]
    largest, rarest = rows.balance(dataset(labelled, "sequence-classification"), "sequence-classification")
    assert (largest.value, largest.n, rarest.value) == (0.95, 20, 1.0)
    assert "'usual'" in largest.sentence
    (answers,) = rows.balance(dataset([{"prompt": str(i), "completion": "yes"} for i in range(4)]), "causal-lm")
    assert answers.value == 1.0
    tagged = [{"tokens": ["a", "b", "c"], "tags": ["O", "O", "X"]}] * 2
    largest, rarest = rows.balance(dataset(tagged, "token-classification"), "token-classification")
    assert (largest.value, largest.n, rarest.value) == (pytest.approx(2 / 3), 6, 2.0)


def test_conversations_are_compared_as_a_whole():
    chat = [{"messages": [{"role": "user", "content": c}, {"role": "assistant", "content": "yes"}]} for c in "aba"]
    exact, _ = rows.duplicates(dataset(chat))
    assert exact.value == pytest.approx(1 / 3)
    assert rows.contradictions(dataset(chat)).value is None


def report(**changes):
    made = {
        "rows": 100, "kept": 90, "truncated": 0, "dropped": 6, "supervised_tokens": 900, "tokens": 2000,
        "nothing_to_learn": 4, "unsupervised_stop": 0, "doubled_bos": 0, "lengths": {"p50": 20, "max": 64},
    }  # fmt: skip
    return made | changes


def test_lengths_templates_and_size_come_from_what_check_counts():
    half, lost = rows.lengths(report(), 64)
    assert (half.value, lost.value) == (20.0, 0.06)
    bad = rows.template_problems(report(unsupervised_stop=2), 10)
    assert bad.value == pytest.approx((4 + 2 + 10) / 110)
    assert "4 have no supervised token" in bad.sentence
    assert "10 cannot be read" in bad.sentence
    assert rows.template_problems(report(nothing_to_learn=0), 0).value == 0.0
    # 900 supervised tokens for 18,000 parameters: 50 for every thousand.
    assert rows.size(report(), 18_000).value == 50.0
    assert rows.row_count(report()).value == 90.0
