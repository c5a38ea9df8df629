"""Differences of programs against masks worked out by hand, edit scripts against a plain recursion, and the mutations."""

from __future__ import annotations

import difflib
import random
from functools import cache

import pytest

from luthier.functional.code_differences import differences, edits, overlapping, similarity
from luthier.functional.code_mutations import KINDS, mutations, parses

GOOD = "def f(a, b):\n    # the sum\n    c = 1\n    print(c)\n    return a + b\n"


def marked(text, places):
    """The text with a dot at every character that is not marked."""
    return "".join(c if i in set(places) else c if c == "\n" else "." for i, c in enumerate(text))


def test_one_operator_in_a_program_of_five_lines():
    wrong = GOOD.replace("a + b", "a - b")
    good_side, wrong_side = differences(GOOD, wrong)
    assert marked(GOOD, good_side.lines) == "............\n.............\n.........\n............\n....return.a.+.b\n"
    assert [(i, GOOD[i]) for i in good_side.characters] == [(GOOD.index("+"), "+")]
    assert marked(wrong, wrong_side.lines) == "............\n.............\n.........\n............\n....return.a.-.b\n"
    assert wrong_side.characters == [wrong.index("a - b") + 2]


def test_identical_code_and_differences_in_comments_and_spacing_have_no_mark():
    nothing = (
        GOOD.replace("# the sum", "# another").replace("c = 1", "c=1  # one").replace("\n    print", "\n\n    print")
    )
    for other in (GOOD, nothing, GOOD.replace("\n", "\r\n")):
        for side in differences(GOOD, other):
            assert (side.lines, side.characters) == ([], [])


def test_a_line_that_only_one_side_has_marks_it_there_and_the_edges_of_the_gap_here():
    wrong = GOOD.replace("    print(c)\n", "    a = c\n    print(c)\n")
    good_side, wrong_side = differences(GOOD, wrong)
    assert good_side.lines == []
    # The end of the line before, the beginning of the line after; the comment line says nothing.
    assert good_side.characters == [GOOD.index("1"), GOOD.index("print")]
    at = wrong.index("a = c")
    assert wrong_side.lines == wrong_side.characters == [at, at + 2, at + 4]
    again = differences(wrong, GOOD)
    assert (again[0], again[1]) == (wrong_side, good_side)


def test_an_insertion_within_a_line_marks_its_neighbours_and_white_space_counts_in_strings_alone():
    good_side, wrong_side = differences("if a < b: pass", "if a <= b: pass")
    assert (good_side.characters, wrong_side.characters) == ([5, 7], [6])
    good_side, wrong_side = differences("x = 'a b'", "x = 'ab'")
    assert len(good_side.lines) == 6
    assert (good_side.characters, wrong_side.characters) == ([], [5, 6])
    assert differences("a  b", "a b", "text")[0].lines == []
    assert differences("a # b", "a # c", "text")[0].characters == [4]


def test_code_that_is_no_python_is_compared_as_text():
    good_side, wrong_side = differences("x = (1 +\n2)", "x = (1 +\n'3")
    assert good_side.characters == [9, 10]
    assert wrong_side.characters == [9, 10]


def test_strings_over_several_lines_belong_to_their_lines():
    good = 'x = """one\n# two\nthree"""\n'
    good_side, _ = differences(good, good.replace("# two", "# twx"))
    assert [good[i] for i in good_side.lines] == ["#", "t", "w", "o"]
    assert [good[i] for i in good_side.characters] == ["o"]


def test_more_than_two_hundred_like_lines_hide_no_difference():
    # difflib takes a line that is often there for junk unless it is told not to.
    lines = ["x = x + 1"] * 300
    good = "\n".join(lines)
    wrong = "\n".join([*lines[:150], "x = x - 1", *lines[151:]])
    good_side, wrong_side = differences(good, wrong)
    assert len(good_side.characters) == len(wrong_side.characters) == 1
    assert wrong[wrong_side.characters[0]] == "-"


def test_edit_scripts_are_shortest():
    @cache
    def distance(a, b):
        if not a or not b:
            return len(a) + len(b)
        if a[-1] == b[-1]:
            return distance(a[:-1], b[:-1])
        return 1 + min(distance(a[:-1], b), distance(a, b[:-1]), distance(a[:-1], b[:-1]))

    rng = random.Random(3)
    for _ in range(200):
        a, b = ("".join(rng.choices("abc", k=rng.randrange(1, 8))) for _ in range(2))
        in_a, in_b = edits(a, b)
        assert (not in_a and not in_b) == (a == b)
        if len(a) == len(b) == distance(a, b):
            assert in_a == in_b == set(range(len(a)))
        # Touched places are the edits and the neighbours of insertions.
        assert max(len(in_a), len(in_b)) <= 2 * distance(a, b)
    assert edits("abcd", "axcd") == ({1}, {1})
    assert edits("abc", "abxc") == ({1, 2}, {2})
    assert edits("abc", "ac") == ({1}, {0, 1})
    assert edits("kitten", "sitting") == ({0, 4, 5}, {0, 4, 6})


def test_similarity_is_the_ratio_of_difflib():
    for a, b in (("abcdef", "abXdef"), ("return a+b", "return a-b"), (GOOD, GOOD.replace("print(c)", "")), ("", "ab")):
        assert similarity(a, b) == pytest.approx(difflib.SequenceMatcher(None, a, b, autojunk=False).ratio())
    assert similarity("a\nb\nc", "a\nx\nc", "lines") == pytest.approx(2 / 3)
    assert similarity("", "") == 1.0


def test_tokens_over_characters():
    spans = [(0, 3), (3, 3), (3, 5), (5, 9), (7, 9)]
    assert overlapping(spans, [4]) == [2]
    assert overlapping(spans, [0, 8]) == [0, 3, 4]
    assert overlapping(spans, []) == []
    assert overlapping(spans, [20]) == []


# -- mutations

SOURCE = '''def area(w, h, round_up=False):
    """Of a rectangle."""
    é = "ü"; total = w * h
    if w < 0 or not h:
        return max(0, total)
    total += 1
    if round_up: total = 2
    return total if w in (1, h) else f"{w + h}"'''


def kinds_of(source, **options):
    found = {}
    for m in mutations(source, **options):
        found.setdefault(m.kind, []).append((source[m.start : m.end], m.text))
    return found


def test_every_kind_of_fault_stands_where_it_should():
    found = kinds_of(SOURCE)
    assert set(found) == set(KINDS)
    assert found["comparison"] == [("<", "<="), ("<", ">"), ("in", "not in")]
    assert found["arithmetic"] == [("*", "+"), ("+=", "-=")]
    assert ("0", "1") in found["constant"]
    assert ("0", "-1") not in found["constant"]
    assert {("2", "1"), ("2", "3")} <= set(found["constant"])
    assert ("w < 0 or not h", "not (w < 0 or not h)") in found["boolean"]
    assert {("or", "and"), ("not h", "h"), ("False", "True")} <= set(found["boolean"])
    assert ("0, total", "total, 0") in found["arguments"]
    assert ("    total += 1\n", "") in found["statement"]
    assert ("total = 2", "pass") in found["statement"]
    assert ("total = w * h", "pass") in found["statement"]
    assert ('\n    return total if w in (1, h) else f"{w + h}"', "") in found["statement"]
    assert {("w", "h"), ("h", "w"), ("h", "round_up")} <= set(found["variable"])
    assert not any('"""' in text for text, _ in found["statement"])


def test_every_fault_parses_and_changes_the_source_from_where_it_may():
    for source in (SOURCE, SOURCE.replace("\n", "\r\n")):
        for m in mutations(source):
            assert parses(m.apply(source))
            assert m.apply(source) != source
    start = SOURCE.index("total += 1")
    assert {m.start >= start for m in mutations(SOURCE, start=start)} == {True}
    assert {m.kind for m in mutations(SOURCE, kinds=["constant", "boolean"])} == {"constant", "boolean"}


def test_names_of_a_comprehension_and_of_inner_functions_stay_within():
    source = "def f(a, b):\n    def g(c):\n        return c\n    return [x + a for x in b]"
    assert sorted(set(kinds_of(source, kinds=["variable"])["variable"])) == [("a", "b"), ("b", "a")]


def test_what_does_not_parse_is_said():
    assert not parses("def f(:")
    assert not parses("x = '\0'")
    with pytest.raises(SyntaxError):
        mutations("def f(:")
