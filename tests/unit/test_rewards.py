"""Verifiers against answers judged by hand."""

from __future__ import annotations

import json
import sys
import time
from fractions import Fraction
from typing import Any

import pytest
from pydantic import ValidationError

from luthier.core import registry
from luthier.core.errors import UserError
from luthier.functional import answers


def score(slug: str, completion: str, row: dict[str, Any], **options: Any) -> float | None:
    """One verdict, with the further columns as the canonical row holds them: JSON text."""
    canonical = {k: row.pop(k) for k in ("prompt", "completion", "messages") if k in row}
    verifier = registry.get("reward", slug).build(options)
    return verifier([{**canonical, "extra": json.dumps(row)}], [completion], None)[0]


def test_all_are_registered_and_strict() -> None:
    found = {"exact", "normalised", "numeric", "choice", "json", "regex", "python-tests"}
    assert found <= set(registry.names("reward"))
    for slug in found:
        with pytest.raises(ValidationError):
            registry.get("reward", slug).build({"no_such_option": 1})
        assert registry.get("reward", slug).title


def test_the_reference_is_the_answer_then_the_completion_then_the_last_reply() -> None:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Paris"}]
    assert score("exact", "Paris", {"answer": "Paris", "completion": "It is Paris."}) == 1.0
    assert score("exact", "It is Paris.", {"completion": "It is Paris."}) == 1.0
    assert score("exact", "Paris", {"messages": json.dumps(chat)}) == 1.0
    assert score("exact", "72", {"answer": 72}) == 1.0
    assert score("exact", "b", {"answer": ["a", "b"]}) == 1.0
    assert score("exact", "x", {}) is None
    assert score("exact", "x", {"target": "x"}, answer="target") == 1.0


def test_exact() -> None:
    assert score("exact", " Paris\n", {"answer": "Paris"}) == 1.0
    assert score("exact", " Paris", {"answer": "Paris"}, strip=False) == 0.0
    assert score("exact", "paris", {"answer": "Paris"}) == 0.0
    assert score("exact", "", {"answer": "Paris"}) == 0.0


def test_normalised() -> None:
    assert score("normalised", "the  Eiffel-Tower!", {"answer": "Eiffel Tower"}) == 0.0  # the hyphen is taken away
    assert score("normalised", "The  Eiffel Tower!", {"answer": "eiffel tower"}) == 1.0
    assert score("normalised", "ｐａｒｉｓ", {"answer": "Paris"}) == 1.0
    assert score("normalised", "STRASSE", {"answer": "straße"}) == 1.0
    assert score("normalised", "It is Paris, in France.", {"answer": "Paris"}) == 0.0
    assert score("normalised", "It is Paris, in France.", {"answer": "Paris"}, contained=True) == 1.0
    assert score("normalised", "Comparison", {"answer": "paris"}, contained=True) == 0.0
    assert score("normalised", "x", {"answer": "The ..."}) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("72", [72]),
        ("-3.50 and +4", [Fraction(-7, 2), 4]),
        ("$1,234,567.25", [Fraction(123456725, 100)]),
        ("-$5 or $-5", [-5, -5]),
        ("1,2,3", [1, 2, 3]),
        ("12,3456", [12, 3456]),
        ("48-24=24", [48, 24, 24]),
        ("3/4 of 8", [Fraction(3, 4), 8]),
        (r"\frac{3}{4} and \dfrac{-1}{2}", [Fraction(3, 4), Fraction(-1, 2)]),
        ("1.5e3 6e-2", [1500, Fraction(3, 50)]),
        ("−7", [-7]),
        ("1{,}000", [1000]),
        ("x2 y3", []),
        ("it is 5.", [5]),
        (".5", [Fraction(1, 2)]),
        ("20%", [20]),
        ("3/0", []),
        ("24hours", [24]),
        ("9" * 5000, []),
    ],
)
def test_numbers(text: str, expected: list[Fraction]) -> None:
    assert answers.numbers(text) == expected


GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 altogether.\n#### 72"


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        ("#### 72", 1.0),
        ("She sold 48 in April.\n#### 72\nQuestion: and 5 more?\n#### 77", 1.0),
        ("#### $72.00 dollars in 2 months", 1.0),
        ("The answer is 72.", 1.0),
        ("The answer is: **72** clips over 2 months", 1.0),
        (r"so \boxed{72} after 2 steps", 1.0),
        (r"so \boxed{\frac{144}{2}} clips", 1.0),
        ("48 + 24 = 72", 1.0),
        ("#### 72,000", 0.0),
        ("#### 73", 0.0),
        ("I do not know", 0.0),
        ("", 0.0),
        ("72 or 73", 0.0),
    ],
)
def test_numeric_on_gsm8k(completion: str, verdict: float) -> None:
    assert score("numeric", completion, {"completion": GSM8K}) == verdict


def test_numeric_tolerance_and_missing_reference() -> None:
    assert score("numeric", "0.333333", {"answer": "1/3"}) == 0.0
    assert score("numeric", "0.3333333", {"answer": "1/3"}) == 1.0
    assert score("numeric", "0.33", {"answer": "1/3"}, tolerance=0.02) == 1.0
    assert score("numeric", "0.30", {"answer": "1/3"}, tolerance=0.02) == 0.0
    assert score("numeric", "1e999", {"answer": "5"}) == 0.0
    assert score("numeric", "0", {"answer": "0"}) == 1.0
    assert score("numeric", "5", {"answer": "five"}) is None
    assert score("numeric", "5", {"answer": 5}) == 1.0


@pytest.mark.parametrize(
    ("completion", "label"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("b.", "B"),
        ("B) Paris", "B"),
        ("**B**", "B"),
        ("The answer is (B).", "B"),
        ("Answer: B", "B"),
        ("A is wrong, C is wrong. The correct answer is B because of that.", "B"),
        ("The answer is A because of that.", "A"),
        ("The answer is a large city.", None),
        (r"\boxed{\text{C}}", "C"),
        ("paris!", "B"),
        ("Of (A) and (B) both hold", None),
        ("I would choose D", "D"),
        ("A dog and I went home", None),
        ("", None),
    ],
)
def test_chosen_label(completion: str, label: str | None) -> None:
    texts = {"A": "Rome", "B": "Paris", "C": "Oslo", "D": "Bonn"}
    assert answers.chosen_label(completion, list(texts), texts) == label


def test_choice() -> None:
    cities = {"choices": ["Rome", "Paris", "Oslo"]}
    assert score("choice", "B", {"answer": "B", **cities}) == 1.0
    assert score("choice", "B", {"answer": 1, **cities}) == 1.0
    assert score("choice", "(A)", {"answer": 1, **cities}) == 0.0
    assert score("choice", "Paris", {"answer": "B", **cities}) == 1.0
    assert score("choice", "B", {"answer": "Paris", **cities}) == 1.0
    assert score("choice", "D", {"answer": "B", **cities}) == 0.0
    assert score("choice", "2", {"answer": "2", "choices": {"label": ["1", "2"], "text": ["x", "y"]}}) == 1.0
    assert score("choice", "F", {"answer": "F"}) is None
    assert score("choice", "F", {"answer": "F"}, labels="EFG") == 1.0
    assert score("choice", "A or B", {"answer": "A"}) == 0.0


def test_json() -> None:
    wanted = {"name": "add", "arguments": {"a": 1, "b": [2, 3]}}
    same = '{"arguments": {"b": [2, 3.0], "a": 1}, "name": "add"}'
    assert score("json", same, {"answer": wanted}) == 1.0
    assert score("json", same, {"answer": json.dumps(wanted)}) == 1.0
    assert score("json", f"Here it is:\n```json\n{same}\n```\nDone.", {"answer": wanted}) == 1.0
    assert score("json", f"I call {same} now", {"answer": wanted}) == 1.0
    assert score("json", same[:-1], {"answer": wanted}) == 0.0
    more = same[:-1] + ', "id": 7}'
    assert score("json", more, {"answer": wanted}) == 0.0
    assert score("json", more, {"answer": wanted}, match="subset") == 1.0
    assert score("json", '{"name": "add"}', {"answer": wanted}, match="subset") == 0.0
    assert score("json", "[3, 2]", {"answer": [2, 3]}) == 0.0
    assert score("json", "true", {"answer": "1"}) == 0.0
    assert score("json", '{"a": NaN}', {}, match="valid") == 0.0
    assert score("json", '{"a": null}', {}, match="valid") == 1.0
    assert score("json", "{}", {}) is None
    assert score("json", "{}", {"answer": "no JSON here"}) is None
    assert score("json", "[" * 200_000, {"answer": "[]"}) == 0.0
    assert score("json", "1" * 10_000, {"answer": "1"}) == 0.0


def test_regex() -> None:
    date = r"\d{4}-\d{2}-\d{2}"
    assert score("regex", "on 2024-05-06", {}, pattern=date) == 1.0
    assert score("regex", "on 2024-05-06", {}, pattern=date, whole=True) == 0.0
    assert score("regex", " 2024-05-06\n", {}, pattern=date, whole=True) == 1.0
    assert score("regex", "abc", {"pattern": "^a.c$"}) == 1.0
    assert score("regex", "a\nc", {"pattern": "^a.c$"}) == 1.0
    assert score("regex", "abc", {}) is None
    with pytest.raises(UserError, match=r"column pattern.*not a regular expression"):
        score("regex", "abc", {"pattern": "("})
    with pytest.raises(UserError, match="option pattern"):
        score("regex", "abc", {}, pattern="(")


def test_regex_that_would_take_for_ever() -> None:
    before = time.monotonic()
    assert score("regex", "a" * 40 + "b", {}, pattern=r"(a|a|aa)+$", whole=True, seconds=0.1) is None
    assert time.monotonic() - before < 5


MBPP = {
    "test_setup_code": "import math",
    "test_list": ["assert area(1) == math.pi", "assert area(0) == 0"],
}
HUMANEVAL = {"test": "def check(candidate):\n    assert candidate(2) == 4\n", "entry_point": "square"}


@pytest.mark.skipif(sys.platform != "linux", reason="no sandbox on this system")
def test_python_tests() -> None:
    right = "import math\ndef area(r):\n    return math.pi * r * r\n"
    assert score("python-tests", right, dict(MBPP)) == 1.0
    assert score("python-tests", f"Here:\n```python\n{right}```\nIt works.", dict(MBPP)) == 1.0
    assert score("python-tests", "def area(r):\n    return r", dict(MBPP)) == 0.0
    assert score("python-tests", "I cannot", dict(MBPP)) == 0.0
    assert score("python-tests", "import sys\nsys.exit(0)", dict(MBPP)) == 0.0
    prompt = "def square(x):\n"
    assert score("python-tests", "    return x * x\n", {"prompt": prompt, **HUMANEVAL}, with_prompt=True) == 1.0
    assert score("python-tests", "    return x + 1\n", {"prompt": prompt, **HUMANEVAL}, with_prompt=True) == 0.0
    assert score("python-tests", "x = 3", {"tests": "assert x == 3"}) == 1.0
    assert score("python-tests", "x = 3", {}) is None
    assert score("python-tests", "while True: pass", {"tests": "pass"}, cpu_seconds=1) == 0.0


@pytest.mark.skipif(sys.platform != "linux", reason="no sandbox on this system")
def test_python_tests_keep_the_order_of_rows() -> None:
    verifier = registry.get("reward", "python-tests").build({"workers": 2})
    rows = [{"extra": json.dumps({"tests": f"assert x == {n}"})} for n in range(3)] + [{"extra": "{}"}]
    assert verifier(rows, ["x = 0", "x = 0", "x = 2", "x = 3"], None) == [1.0, 0.0, 1.0, None]
