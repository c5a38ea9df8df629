"""Answers in text: the reference of a row, the last number, the chosen letter, JSON and code inside prose."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_FENCE = re.compile(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)


def column(row: Mapping[str, Any], name: str) -> Any:
    """A value of a canonical row: from its further columns (``extra``, JSON), else a column of that name; or None."""
    extra = row.get("extra") or {}
    if isinstance(extra, str):
        extra = json.loads(extra)
    value = extra.get(name)
    return row.get(name) if value is None else value


def reference(row: Mapping[str, Any], name: str = "answer") -> Any:
    """What a row's answer should be: its column ``name``, else its completion, else its last assistant message.

    Returns:
        Text or another JSON value; None where the row has none of them.
    """
    value = column(row, name)
    if value is None:
        value = row.get("completion")
    if value is None and row.get("messages"):
        messages = row["messages"]
        messages = json.loads(messages) if isinstance(messages, str) else messages
        said = [m.get("content") for m in messages if m.get("role") == "assistant"]
        value = said[-1] if said else None
    return value


def reference_texts(row: Mapping[str, Any], name: str = "answer") -> list[str]:
    """The accepted answers of a row as texts: one, or several where the value is a list."""
    value = reference(row, name)
    values = value if isinstance(value, list) else [value]
    return [v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values if v is not None]


def normalise(text: str) -> str:
    """Text without case, punctuation, English articles and surplus space (as SQuAD's scorer), after Unicode NFKC."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = "".join(c for c in text if not unicodedata.category(c).startswith("P"))
    return " ".join(_ARTICLES.sub(" ", text).split())


def boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}``, braces balanced; None without a whole one."""
    for start in reversed([m.end() for m in re.finditer(r"\\f?boxed\s*\{", text)]):
        depth = 1
        for index in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if depth == 0:
                return text[start:index]
    return None


_NUMBER = re.compile(
    r"""(?<![\w.])(?P<sign>[-+])?[ ]?[$€£¥]?[ ]?(?P<sign_after>-)?
        (?:\\[dt]?frac\{(?P<top>-?\d+)\}\{(?P<bottom>\d+)\}
        |(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)
         (?:[eE](?P<power>[+-]?\d{1,3})(?!\w)|[ ]?/[ ]?(?P<under>\d+)(?![\d/]))?)""",
    re.VERBOSE,
)
_PHRASE = re.compile(r"answer\s*(?:is|was|:|=)\s*", re.IGNORECASE)
_LONGEST_NUMBER = 400


def numbers(text: str) -> list[Fraction]:
    """The numbers of a text, in order, exactly: ``1,234.5``, ``-3``, ``$7``, ``3/4``, ``1.5e3``, LaTeX fractions.

    Units and percent signs are passed over; a number of more than 400 characters is not one.
    """
    for written, plain in (("−", "-"), ("{,}", ","), ("\\,", ""), ("\\!", ""), ("\\$", "$"), ("**", " ")):
        text = text.replace(written, plain)
    # Binary operators are no signs: "48-24" holds 48 and 24.
    text = re.sub(r"(?<=[\d)])([-+=*x×])(?=[\d($.])", r" \1 ", text)
    found = []
    for match in _NUMBER.finditer(text):
        if len(match[0]) > _LONGEST_NUMBER:
            continue
        under = match["bottom"] or match["under"] or "1"
        if int(under) == 0:
            continue
        value = Fraction((match["top"] or match["digits"]).replace(",", "")) / int(under)
        value *= Fraction(10) ** int(match["power"] or 0)
        spaced = match["sign"] and match[0][len(match["sign"]) : len(match["sign"]) + 1] == " "
        negative = (match["sign"] == "-" and not spaced) != (match["sign_after"] == "-")
        found.append(-value if negative else value)
    return found


def final_number(text: str) -> Fraction | None:
    r"""The number a text gives as its answer, or None.

    In this order: after the first ``####`` (as in GSM8K), in the last ``\boxed{}``, after the last "answer is" or
    "answer:", and otherwise the last number.
    """
    if (mark := text.find("####")) >= 0 and (found := numbers(text[mark + 4 :].lstrip().split("\n", 1)[0])):
        return found[0]
    if (inside := boxed(text)) is not None and (found := numbers(inside)):
        return found[-1]
    for phrase in reversed(list(_PHRASE.finditer(text))):
        if found := numbers(text[phrase.end() :].split("\n", 1)[0]):
            return found[0]
    found = numbers(text)
    return found[-1] if found else None


def choices(row: Mapping[str, Any], name: str = "choices") -> dict[str, str]:
    """The choices of a row, label -> text: from a list (labels A, B, ...), or ``{"label": [...], "text": [...]}``."""
    value = column(row, name)
    if isinstance(value, Mapping):
        return {str(k): str(v) for k, v in zip(value["label"], value["text"], strict=True)}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return {chr(ord("A") + index): str(text) for index, text in enumerate(value)}
    return {}


def chosen_label(text: str, labels: Sequence[str], texts: Mapping[str, str] | None = None) -> str | None:
    r"""The label a text chooses, or None where it names none or several.

    In this order: in the last ``\boxed{}``; after the last "answer is" or "answer:"; a text that begins with a label
    (``B``, ``(B)``, ``B.``, ``B: ...``); a text that is one of the choices; the only label in brackets; the only label
    standing alone as a capital letter (``A`` before a small letter is an article, ``I`` a pronoun).
    """
    one = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    alone = re.compile(rf"\s*(?:the\s+)?(?:option|choice)?\s*[\s(\[*\"'`]*({one})(?![\w'])", re.IGNORECASE)
    exact = {label.casefold(): label for label in labels}

    def at_start(part: str, article: str) -> str | None:
        match = alone.match(part)
        if match is None:
            return None
        # "a dog" names a dog and not choice A; a capital inside a sentence is no article.
        if match[1] in article and match[0].strip() == match[1] and re.match(r"[ ]+[a-z]", part[match.end() :]):
            return None
        return exact[match[1].casefold()]

    inside = boxed(text)
    if inside is not None and (label := at_start(re.sub(r"\\text\w*\{|\}", " ", inside), "AaIi")):
        return label
    for phrase in reversed(list(_PHRASE.finditer(text))):
        if label := at_start(text[phrase.end() :], "ai" if phrase[0].rstrip()[-1].isalpha() else "AaIi"):
            return label
    begins = re.compile(rf"\s*[(\[*]*({one})(?=[)\].:,*]|\s*$|\s*\n)", re.IGNORECASE).match(text)
    if begins:
        return exact[begins[1].casefold()]
    same = [label for label, choice in (texts or {}).items() if normalise(choice) == normalise(text)]
    if len(same) == 1:
        return same[0]
    for pattern in (rf"[(\[]({one})[)\]]", rf"(?<![\w'])({one})(?![\w'])(?!\s+[a-z])"):
        named = {label for label in re.findall(pattern, text) if label != "I" or pattern.startswith("[")}
        if len(named) == 1:
            return named.pop()
    return None


def code_blocks(text: str, languages: Sequence[str] = ()) -> list[str]:
    """The fenced blocks of a text, only those of ``languages`` where it has any; an unclosed last fence counts."""
    blocks = [(m[1].casefold(), m[2]) for m in _FENCE.finditer(text)]
    wanted = [body for language, body in blocks if language in languages]
    return wanted or [body for language, body in blocks]


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def parse_json(text: str) -> Any:
    """The JSON value of a text: the whole text, its first fenced block, or the first object or array in it.

    Raises:
        ValueError: there is none, or it nests too deeply.
    """
    blocks = code_blocks(text, ("json",))
    decoder = json.JSONDecoder(parse_constant=_no_constant)
    try:
        for candidate in (text, *blocks[:1]):
            try:
                return json.loads(candidate, parse_constant=_no_constant)
            except ValueError:
                continue
        for match in re.finditer(r"[{\[]", text):
            try:
                return decoder.raw_decode(text, match.start())[0]
            except ValueError:
                continue
    except RecursionError as error:
        raise ValueError("the JSON nests too deeply") from error
    raise ValueError("there is no JSON in the text")
