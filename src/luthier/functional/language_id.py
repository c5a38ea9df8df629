"""Which language a text is in, by its character n-grams, and the share of answers in the language they should be in.

A text x has the mean log-probability of its n-grams g of 1 to ``longest`` characters under each language l

    s_l(x) = 1/|G(x)| sum_g log P_l(g),   P_l(g) = (c_l(g) + a) / (C_l + a (K + 1))

and is in the language with the highest. c_l(g): how often g occurs in the texts of l; C_l: all n-grams of that length
there; K: distinct n-grams of that length in all languages; a: smoothing. Words are cut out of the text in lower case
with a space at both ends, so that beginnings and ends of words count; digits and signs tell nothing and are left out.

A naive Bayes model over the features of Cavnar and Trenkle, "N-Gram-Based Text Categorization", 1994: enough to tell
apart two languages of which some hundred sentences are there, too little to tell Norwegian from Danish.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

_WORD = re.compile(r"[^\W\d_]+")


def ngrams(text: str, longest: int) -> list[Counter[str]]:
    """How often each n-gram occurs, for n = 1 to ``longest``; empty counters where the text has no letters."""
    words = [f" {word} " for word in _WORD.findall(text.casefold())]
    # A single space is in every language.
    return [
        Counter(w[i : i + n] for w in words for i in range(len(w) - n + 1) if w[i : i + n] != " ")
        for n in range(1, longest + 1)
    ]


class LanguageIdentifier:
    """Tells apart the languages of which it was given texts.

    Args:
        texts: language -> texts in it.
        longest: longest n-gram.
        smoothing: a, added to every count.

    Raises:
        ValueError: fewer than two languages, or one without a letter.
    """

    def __init__(self, texts: Mapping[str, Iterable[str]], *, longest: int = 3, smoothing: float = 0.5) -> None:
        self.longest, self.smoothing = longest, smoothing
        self.counts: dict[str, list[Counter[str]]] = {}
        for language, some in texts.items():
            counts: list[Counter[str]] = [Counter() for _ in range(longest)]
            for text in some:
                for total, own in zip(counts, ngrams(text, longest), strict=True):
                    total.update(own)
            self.counts[language] = counts
        if len(self.counts) < 2 or not all(counts[0] for counts in self.counts.values()):
            raise ValueError("a language identifier needs texts with letters in at least two languages")
        self.totals = {language: [c.total() for c in counts] for language, counts in self.counts.items()}
        self.kinds = [len({g for counts in self.counts.values() for g in counts[n]}) for n in range(longest)]

    def scores(self, text: str, *, member: str | None = None) -> dict[str, float]:
        """Mean log-probability of the text's n-grams by language, in nats; empty for a text without letters.

        Args:
            text: the text.
            member: it was among the texts of this language, and must not speak for itself.
        """
        own = ngrams(text, self.longest)
        size = sum(c.total() for c in own)
        found: dict[str, float] = {}
        for language, counts in self.counts.items() if size else ():
            score = 0.0
            for known, total, kinds, grams in zip(counts, self.totals[language], self.kinds, own, strict=True):
                apart = language == member
                whole = total - (grams.total() if apart else 0) + self.smoothing * (kinds + 1)
                for gram, times in grams.items():
                    score += times * math.log((known[gram] - (times if apart else 0) + self.smoothing) / whole)
            found[language] = score / size
        return found

    def language(self, text: str, *, member: str | None = None) -> str | None:
        """The likeliest language; None for a text without letters, or where the best two are equal."""
        ranked = sorted(self.scores(text, member=member).items(), key=lambda item: -item[1])
        return ranked[0][0] if ranked and ranked[0][1] > ranked[1][1] else None


def fidelity(
    answers: Sequence[str], languages: Sequence[str], identify: Callable[[str], str | None]
) -> dict[str, float]:
    """Language fidelity: the share of answers in the language they should be in, by that language and in ``all``.

    Args:
        answers: texts; one in which no language is recognised counts as a failure.
        languages: the language of each prompt.
        identify: text -> language, such as :meth:`LanguageIdentifier.language`.
    """
    right = [identify(answer) == wanted for answer, wanted in zip(answers, languages, strict=True)]
    found: dict[str, float] = {}
    for name in sorted(set(languages)):
        some = [ok for ok, wanted in zip(right, languages, strict=True) if wanted == name]
        found[name] = sum(some) / len(some)
    return {**found, "all": sum(right) / len(right)} if right else found
