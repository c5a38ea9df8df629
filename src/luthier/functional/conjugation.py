"""Conjugations: transform a prompt so that it needs the same skill in another surface, and the answer back.

    answer(x) = T_inv( model( T(x) ) )

An ``invertible`` conjugation has an exact inverse on the texts it is made for (:func:`round_trip_failures` lists the
others); a ``verbatim`` one has none, and answers go back by a table of the answers that may come
(:func:`with_answers`).

Source: "Understanding Catastrophic Forgetting in Language Models via Implicit Inference", ICLR 2024, arXiv 2309.10105.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from luthier.core.errors import UserError, did_you_mean
from luthier.core.own_code import function_of

Array = NDArray[np.float64]
Text = Callable[[str], str]
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_LEET = str.maketrans("aeiostAEIOST", "431057431057")
_SWAPPED = str.maketrans(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def _same(text: str) -> str:
    return text


@dataclass(frozen=True)
class Conjugation:
    """A transform of prompts and the way back for answers.

    Attributes:
        name: what tables call it.
        apply: T.
        invert: T_inv; of a verbatim one the identity until :func:`with_answers` gives it a table.
        kind: ``invertible`` or ``verbatim``.
    """

    name: str
    apply: Text
    invert: Text = _same
    kind: Literal["invertible", "verbatim"] = "verbatim"


IDENTITY = Conjugation("identity", _same, _same, "invertible")


def composed(parts: Sequence[Conjugation]) -> Conjugation:
    """The first, then the second and so on; the inverses the other way round."""
    if len(parts) == 1:
        return parts[0]

    def apply(text: str) -> str:
        for part in parts:
            text = part.apply(text)
        return text

    def invert(text: str) -> str:
        for part in reversed(parts):
            text = part.invert(text)
        return text

    exact = all(part.kind == "invertible" for part in parts)
    return Conjugation(" + ".join(p.name for p in parts), apply, invert, "invertible" if exact else "verbatim")


def with_answers(conjugation: Conjugation, answers: Sequence[str]) -> Conjugation:
    """A verbatim conjugation whose inverse maps a text that begins with T(answer) to the answer, the longest first.

    White space before it does not count; other texts stay as they are. An invertible one is returned as it is.

    Raises:
        ValueError: T makes one text of two answers.
    """
    if conjugation.kind == "invertible":
        return conjugation
    table: dict[str, str] = {}
    for answer in answers:
        if (other := table.setdefault(conjugation.apply(answer).strip(), answer)).strip() != answer.strip():
            raise ValueError(f"{conjugation.name} makes one text of the answers {other!r} and {answer!r}")
    longest = sorted(table, key=len, reverse=True)

    def invert(text: str) -> str:
        return next((table[t] for t in longest if t and text.lstrip().startswith(t)), text)

    return Conjugation(conjugation.name, conjugation.apply, invert, "verbatim")


def round_trip_failures(conjugation: Conjugation, texts: Sequence[str]) -> list[str]:
    """The texts that an invertible conjugation does not give back."""
    if conjugation.kind == "verbatim":
        return []
    return [t for t in texts if conjugation.invert(conjugation.apply(t)) != t]


# -- the built-in transforms


def leetspeak(text: str) -> str:
    """A e i o s t as 4 3 1 0 5 7."""
    return text.translate(_LEET)


def pig_latin(text: str) -> str:
    """Each word's leading consonants to its end, with "ay"; "way" behind words that begin with a vowel."""

    def word(match: re.Match[str]) -> str:
        w = match[0]
        head = len(w) - len(w.lstrip("bcdfghjklmnpqrstvwxyzBCDFGHJKLMNPQRSTVWXYZ"))
        if head == 0 or head == len(w):
            return w + ("way" if head == 0 else "ay")
        made = w[head:] + w[:head].lower() + "ay"
        return made[0].upper() + made[1:] if w[0].isupper() else made

    return re.sub(r"[A-Za-z]+", word, text)


def rot13(text: str) -> str:
    """Each letter thirteen places on; its own inverse."""
    return codecs.encode(text, "rot13")


def unspaced(text: str) -> str:
    """The inverse of letter spacing: one space behind each character is taken away."""
    return re.sub(r"(.)(?: |$)", r"\1", text, flags=re.DOTALL)


def digit_words(text: str) -> str:
    """Each digit as a word, those of one number joined by hyphens: 75 as seven-five."""
    return re.sub(r"[0-9]+", lambda m: "-".join(DIGITS[int(d)] for d in m[0]), text)


def worded_digits(text: str) -> str:
    """The inverse of :func:`digit_words`."""
    one = "|".join(DIGITS)
    return re.sub(
        rf"\b(?:{one})(?:-(?:{one}))*\b", lambda m: "".join(str(DIGITS.index(w)) for w in m[0].split("-")), text
    )


def scaled_numbers(text: str, factor: Fraction) -> str:
    """Each number times a factor; decimals where they end, else rounded to ten places."""

    def number(match: re.Match[str]) -> str:
        value = Fraction(match[0]) * factor
        if value.denominator == 1:
            return str(value.numerator)
        return f"{float(value):.10f}".rstrip("0").rstrip(".")

    return _NUMBER.sub(number, text)


def dictionary(name: str, words: Mapping[str, str]) -> Conjugation:
    """Word by word by a table; an initial capital is kept.

    Raises:
        ValueError: two words have one translation.
    """
    back = {v.lower(): k.lower() for k, v in words.items()}
    if len(back) < len(words):
        raise ValueError(f"{name}: two words have one translation, so answers could not be translated back")

    def by(table: Mapping[str, str]) -> Text:
        lower = {k.lower(): v for k, v in table.items()}

        def word(match: re.Match[str]) -> str:
            w = match[0]
            new = lower.get(w.lower(), w)
            return new[:1].upper() + new[1:] if w[0].isupper() else new

        return lambda text: re.sub(r"[^\W\d_]+", word, text)

    return Conjugation(name, by(words), by(back), "invertible")


def wrapper(template: str) -> Conjugation:
    """The prompt inside a text with the slot ``{prompt}``; answers lose the same text where they have it.

    Raises:
        ValueError: the template has not one slot.
    """
    if template.count("{prompt}") != 1:
        raise ValueError(f"the wrapper {template!r} needs the slot {{prompt}} once")
    before, after = template.split("{prompt}")

    def invert(text: str) -> str:
        return text.removeprefix(before).removesuffix(after) if text.startswith(before) else text

    return Conjugation(f"wrapper {template!r}", lambda text: before + text + after, invert, "invertible")


BUILT_IN: dict[str, Conjugation] = {
    c.name: c
    for c in (
        IDENTITY,
        Conjugation("leetspeak", leetspeak),
        Conjugation("pig-latin", pig_latin),
        Conjugation("rot13", rot13, rot13, "invertible"),
        Conjugation("letter-spacing", " ".join, unspaced, "invertible"),
        Conjugation("swap-case", lambda t: t.translate(_SWAPPED), lambda t: t.translate(_SWAPPED), "invertible"),
        Conjugation("digit-words", digit_words, worded_digits, "invertible"),
    )
}


def _one(spec: str | Mapping[str, Any]) -> Conjugation:
    if isinstance(spec, str):
        if spec not in BUILT_IN:
            raise UserError(
                f"unknown transform '{spec}'.{did_you_mean(spec, BUILT_IN)} Accepted: {', '.join(BUILT_IN)}, or one of "
                "{scale: NUMBER}, {wrapper: TEXT}, {words: TABLE}, {functions: [APPLY, INVERT]}."
            )
        return BUILT_IN[spec]
    if len(spec) != 1:
        raise UserError(f"a transform is a name or has one key; {sorted(spec)} are {len(spec)}.")
    ((key, value),) = spec.items()
    try:
        if key == "scale":
            s = Fraction(str(value))
            if s <= 0:
                raise ValueError("scale must be above 0")
            return Conjugation(
                f"scale {value}", lambda t: scaled_numbers(t, s), lambda t: scaled_numbers(t, 1 / s), "invertible"
            )
        if key == "wrapper":
            return wrapper(str(value))
        if key == "words":
            return dictionary("words", dict(value))
    except (ValueError, TypeError) as error:
        raise UserError(f"transform {key}: {error}.") from None
    if key == "functions" and isinstance(value, list) and len(value) in (1, 2):
        made = [function_of(str(v), "functions") for v in value]
        return Conjugation(str(value[0]), made[0], made[-1] if len(made) == 2 else _same,
                           "invertible" if len(made) == 2 else "verbatim")  # fmt: skip
    raise UserError(f"unknown transform {{{key}: ...}}. Accepted: scale, wrapper, words, functions (one or two names).")


def conjugation(spec: str | Mapping[str, Any] | Sequence[Any]) -> Conjugation:
    """A conjugation by name, by a mapping with its option, or by a list of these, applied in that order.

    Raises:
        UserError: no such transform, or an option that does not fit.
    """
    if isinstance(spec, str | Mapping):
        return _one(spec)
    if not spec:
        raise UserError("a transform has no parts; name one, or identity.")
    return composed([_one(part) for part in spec])


# -- the diagnosis


@dataclass(frozen=True)
class Recovery:
    """How much of a capability comes back under a transform.

    Attributes:
        chosen: the transform chosen on the dev items; None where the base keeps too little under all of them.
        index: 1 less the share of the forgetting that is left; None without forgetting.
        low: lower end of its interval, minus infinity where it is unbounded.
        high: upper end.
        verdict: ``suppressed`` (low above 0.25), ``lost`` (high below 0.25) or ``unclear``.
    """

    chosen: str | None
    index: float | None
    low: float
    high: float
    verdict: Literal["suppressed", "lost", "unclear"]


def recovery(
    base: Mapping[str, ArrayLike],
    tuned: Mapping[str, ArrayLike],
    dev: ArrayLike,
    *,
    keeps: float = 0.5,
    n_boot: int = 2000,
    confidence: float = 0.95,
    limit: float = 0.25,
    seed: int = 0,
) -> Recovery:
    """The recovery index of one capability, ``1 - forgetting(t*) / forgetting(identity)``.

    t* has the smallest forgetting on the dev items, among transforms under which the base keeps at least ``keeps`` of
    its accuracy there: under one that neither model can read, nothing could be forgotten. Index and interval (items
    resampled, the same for both models and both transforms) are of the other items.

    Args:
        base: scores [N] of the base in [0, 1] by transform, ``identity`` among them.
        tuned: those of the tuned model.
        dev: bool [N], items that choose.
        keeps: see above.
        n_boot: resamples.
        confidence: of the interval.
        limit: of the verdict.
        seed: of the resamples.
    """
    b, f = ({t: np.asarray(v, np.float64) for t, v in some.items()} for some in (base, tuned))
    dev_N = np.asarray(dev, bool)
    unclear = (-np.inf, np.inf, "unclear")
    least = keeps * b["identity"][dev_N].mean()
    able = [t for t in b if t != "identity" and b[t][dev_N].mean() >= least]
    if not able:
        return Recovery(None, None, *unclear)  # type: ignore[arg-type]
    chosen = min(able, key=lambda t: float((b[t] - f[t])[dev_N].mean()))
    gap_N2 = np.stack([(b[t] - f[t])[~dev_N] for t in (chosen, "identity")], 1)
    left, all_ = gap_N2.mean(0)
    if all_ <= 0:
        return Recovery(chosen, None, *unclear)  # type: ignore[arg-type]
    rng = np.random.default_rng(seed)
    drawn_S2 = np.stack([gap_N2[rng.integers(0, len(gap_N2), len(gap_N2))].mean(0) for _ in range(n_boot)])
    known_S = drawn_S2[:, 1] > 0
    index_S = 1 - np.divide(drawn_S2[:, 0], drawn_S2[:, 1], out=np.zeros(n_boot), where=known_S)
    # A resample without forgetting says nothing; it counts against both ends.
    tail = 0.5 - confidence / 2
    low = float(np.quantile(np.where(known_S, index_S, -np.inf), tail, method="lower"))
    high = float(np.quantile(np.where(known_S, index_S, np.inf), 1 - tail, method="higher"))
    verdict: Any = "suppressed" if low > limit else "lost" if high < limit else "unclear"
    return Recovery(chosen, float(1 - left / all_), low, high, verdict)
