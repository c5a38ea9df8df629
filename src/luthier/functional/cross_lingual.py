"""The same prompt and answer in two languages: the rows, what must not be translated, and what tells a bad translation.

A canonical row is a pair or a conversation of one question and one answer. It is in one language and carries what the
preference needs of the other in three further columns:

    prompt_language   language of the row's own prompt and answer: ``target`` (also where it is absent) or ``english``
    other_answer      the same answer in the other language, which is the rejected one
    english_prompt    of a target row that stands for both directions: the English prompt, to which ``other_answer`` is
                      the chosen answer and the row's own answer the rejected one
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from luthier.core.store import content_hash

TARGET, ENGLISH = "target", "english"
PROMPT_LANGUAGE, OTHER_ANSWER, ENGLISH_PROMPT = "prompt_language", "other_answer", "english_prompt"
# Which of several target languages an example is in.
TARGET_LANGUAGE = "target_language"

# Code in fences and in ticks, addresses, tags, and the placeholders of templates and format strings.
_KEPT = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]+`|https?://[^\s<>\"]+|\{\{.*?\}\}|\$?\{\w[\w.:]*\}|%\(\w+\)[sdf]|%[sdf]\b"
    r"|</?[A-Za-z][^<>\n]*>",
    re.DOTALL,
)
_LINES = re.compile(r"(\n+)")


class Turn(NamedTuple):
    """One question and its answer."""

    prompt: str
    answer: str


class Preference(NamedTuple):
    """One direction of an example: to a prompt in a language the answer in it is preferred to the other one."""

    direction: str
    prompt: str
    chosen: str
    rejected: str


def turn_of(row: Mapping[str, Any]) -> Turn | None:
    """Question and answer of a row; None for one that is not a single question with a single answer."""
    if row["kind"] == "pair":
        return Turn(row["prompt"], row["completion"])
    if row["kind"] != "chat":
        return None
    messages = [m for m in json.loads(row["messages"]) if m["role"] != "system"]
    plain = all(isinstance(m.get("content"), str) and not m.get("tool_calls") for m in messages)
    if not plain or [m["role"] for m in messages] != ["user", "assistant"]:
        return None
    return Turn(messages[0]["content"], messages[1]["content"])


def with_turn(row: Mapping[str, Any], prompt: str, answer: str) -> dict[str, Any]:
    """A copy of the row with another question and answer; a system message stays."""
    if row["kind"] == "pair":
        return {**row, "prompt": prompt, "completion": answer}
    before = [m for m in json.loads(row["messages"]) if m["role"] == "system"]
    messages = [*before, {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {**row, "messages": json.dumps(messages, ensure_ascii=False)}


def paired_rows(row: Mapping[str, Any], english: Turn, target: Turn, *, together: bool) -> list[dict[str, Any]]:
    """The rows of one example: one target row that stands for both directions, or one row for each direction."""

    def made(own: Turn, language: str, other: Turn) -> dict[str, Any]:
        further = {PROMPT_LANGUAGE: language, OTHER_ANSWER: other.answer}
        if together:
            further[ENGLISH_PROMPT] = other.prompt
        extra = json.dumps({**json.loads(row.get("extra") or "{}"), **further}, ensure_ascii=False)
        # The old key stands for the English text.
        return {**with_turn(row, *own), "extra": extra, "key": content_hash(row.get("key"), language, *own, other)}

    rows = [made(target, TARGET, english)]
    return rows if together else [*rows, made(english, ENGLISH, target)]


def preferences(
    row: Mapping[str, Any], language: str | None, other: str, english_prompt: str | None
) -> list[Preference]:
    """The preference rows that a row stands for: its own, and of a target row with an English prompt that one too."""
    own = turn_of(row)
    assert own is not None
    found = [Preference(language or TARGET, own.prompt, own.answer, other)]
    if english_prompt is not None:
        found.append(Preference(ENGLISH, english_prompt, other, own.answer))
    return found


# -- translation


def kept_parts(text: str) -> Counter[str]:
    """Code, addresses, tags and placeholders of a text, which a translation must hold unchanged."""
    return Counter(_KEPT.findall(text))


def pieces(text: str) -> list[tuple[str, bool]]:
    """The text cut into (piece, to be translated); joined they are the text.

    Line breaks, white space at the ends of lines and all parts without a letter stay as they are too.
    """
    found: list[tuple[str, bool]] = []
    at = 0
    for match in [*_KEPT.finditer(text), None]:
        end = len(text) if match is None else match.start()
        for line in _LINES.split(text[at:end]):
            core = line.strip()
            if not any(c.isalpha() for c in core):
                found.append((line, False))
                continue
            start = line.index(core)
            found += [(line[:start], False), (core, True), (line[start + len(core) :], False)]
        if match is not None:
            found.append((match.group(), False))
            at = match.end()
    return [(piece, open_) for piece, open_ in found if piece]


def translated(texts: Sequence[str], translate: Callable[[list[str]], Sequence[str]]) -> list[str]:
    """Each text in the other language, translated around what must stay; equal pieces are translated once.

    Raises:
        ValueError: ``translate`` gives another number of texts than it got, or something that is no text.
    """
    cut = [pieces(text) for text in texts]
    wanted = list(dict.fromkeys(piece for some in cut for piece, open_ in some if open_))
    given = list(translate(wanted)) if wanted else []
    if len(given) != len(wanted) or not all(isinstance(text, str) for text in given):
        raise ValueError(f"gave {len(given)} texts for {len(wanted)}; it must give one text for each, in order")
    known = dict(zip(wanted, given, strict=True))
    return ["".join(known[piece] if open_ else piece for piece, open_ in some) for some in cut]


def word_by_word(dictionary: Mapping[str, str]) -> Callable[[list[str]], list[str]]:
    """A translator that looks every word up; one that is not there stays. An initial capital is carried over."""
    word = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")

    def look_up(match: re.Match[str]) -> str:
        found = match.group()
        if found in dictionary:
            return dictionary[found]
        other = dictionary.get(found.casefold(), found)
        return other[:1].upper() + other[1:] if found[:1].isupper() else other

    return lambda texts: [word.sub(look_up, text) for text in texts]


def fault(english: Turn, target: Turn, shortest: float, longest: float) -> str | None:
    """What is wrong with a translation as far as two texts tell; None for nothing.

    Args:
        english: the turn in English.
        target: its translation.
        shortest: least length of a translation over that of the English text, in characters.
        longest: the largest.
    """
    for part, (old, new) in {
        "prompt": (english.prompt, target.prompt),
        "answer": (english.answer, target.answer),
    }.items():
        if not new.strip():
            return f"empty {part}"
        if old.strip() == new.strip():
            return f"same {part} in both languages"
        if not shortest <= len(new.strip()) / max(len(old.strip()), 1) <= longest:
            return f"length of the {part}"
        if kept_parts(old) != kept_parts(new):
            return f"changed code or placeholder in the {part}"
    return None


def listed(reasons: Iterable[str]) -> str:
    """``12 same answer in both languages, 3 empty answer``, the most frequent first."""
    return ", ".join(f"{count} {reason}" for reason, count in Counter(reasons).most_common())
