"""The language identifier against probabilities worked out by hand, and language fidelity."""

from __future__ import annotations

import math

import pytest

from luthier.functional.language_id import LanguageIdentifier, fidelity, ngrams


def test_ngrams_have_the_ends_of_words_and_nothing_but_letters():
    one, two, three = ngrams("Ab, 12 ab! B_b", 3)
    assert one == {"a": 2, "b": 4}
    assert two == {" a": 2, "ab": 2, "b ": 4, " b": 2}
    assert three == {" ab": 2, "ab ": 2, " b ": 2}
    assert ngrams("12.5%", 2) == [{}, {}]


def test_scores_against_hand_worked_probabilities():
    # Letters: u has a a b (3), v has b c (2); 3 kinds in all, so each denominator gains 0.5 * 4.
    found = LanguageIdentifier({"u": ["a a b"], "v": ["b c"]}, longest=1).scores("ab a")
    assert found["u"] == pytest.approx((2 * math.log(2.5 / 5) + math.log(1.5 / 5)) / 3)
    assert found["v"] == pytest.approx((2 * math.log(0.5 / 4) + math.log(1.5 / 4)) / 3)
    identifier = LanguageIdentifier({"u": ["a a b"], "v": ["b c"]}, longest=1)
    assert identifier.language("ab a") == "u"
    # Without itself "a" leaves a, b of two letters in u.
    own = identifier.scores("a", member="u")
    assert own["u"] == pytest.approx(math.log(1.5 / 4))
    assert own["v"] == pytest.approx(math.log(0.5 / 4))
    # Of two pairs: " b" and "b ", each once in the two of v with 6 kinds (" a", "a ", " b", "b ", " c", "c ").
    pairs = LanguageIdentifier({"u": ["a a b"], "v": ["b c"]}, longest=2).scores("b")
    assert pairs["v"] == pytest.approx((math.log(1.5 / 4) + 2 * math.log(1.5 / (4 + 3.5))) / 3)


def test_texts_without_letters_and_ties_are_in_no_language():
    identifier = LanguageIdentifier({"u": ["a"], "v": ["b"]})
    assert identifier.scores("12 + 5") == {}
    assert identifier.language("12 + 5") is None
    assert identifier.language("zz") is None
    with pytest.raises(ValueError, match="at least two languages"):
        LanguageIdentifier({"u": ["a"]})
    with pytest.raises(ValueError, match="at least two languages"):
        LanguageIdentifier({"u": ["a"], "v": ["1"]})


def test_two_languages_of_few_sentences_are_told_apart():
    english = ["where does the doctor live", "the cat is in the house", "what is the colour of the bread"]
    german = ["wo wohnt der Arzt", "die Katze ist in dem Haus", "welche Farbe hat das Brot"]
    identifier = LanguageIdentifier({"en": english, "de": german})
    assert identifier.language("the house of the doctor") == "en"
    assert identifier.language("das Haus der Katze") == "de"


def test_fidelity_counts_by_the_language_of_the_prompt():
    said = {"a": "u", "b": "v", "?": None}.get
    found = fidelity(["a", "b", "a", "?"], ["u", "u", "v", "v"], said)
    assert found == {"u": 0.5, "v": 0.0, "all": 0.25}
    assert fidelity([], [], said) == {}
