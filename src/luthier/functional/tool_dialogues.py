"""Conversations with tool calls: their calls and tools, results that are errors, and the key tokens of their turns.

Source: "TL-Training: A Task-Feature-Based Framework for Training Large Language Models in Tool Use", EMNLP 2025, arXiv
2412.15495.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from luthier.core.errors import UserError
from luthier.core.own_code import function_of
from luthier.functional.discriminative import place
from luthier.functional.key_tokens import CLOSING_TOKENS, KEY_TOKENS
from luthier.functional.tool_calls import (
    Call,
    Tool,
    call_in,
    key_tokens,
    name_span,
    read_call,
    read_tools,
    render_call,
    stubs,
    token_at,
)

Row = dict[str, Any]
Message = dict[str, Any]

ERROR_PATTERNS = (
    "is not defined",
    "positional argument",
    "unexpected keyword",
    "'related_searches'",
    "ConnectionError",
    '"error":',
    "not supported",
    "Invalid API call",
    "Response error",
    "Object of type SerpResults is not JSON serializable",
    "400 Client Error",
    "'error'",
    "slice indices must be integers or None or have an __index__ method",
    "connection error",
)
_OTHER = re.compile(r"[^a-zA-Z0-9\u4e00-\u9fa5]")


# -- errors


def reduced(text: str) -> str:
    """Letters, digits and Chinese characters of a text, in lower case."""
    return _OTHER.sub("", text).lower()


class ErrorTest:
    """Which of some patterns a result contains, both reduced.

    Raises:
        UserError: nothing is left of a pattern, which would be in every result.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        # Some of the paper's patterns are the same once they are reduced.
        self.patterns = {reduced(pattern): f"'{pattern}'" for pattern in reversed(patterns)}
        if "" in self.patterns:
            raise UserError(
                f"tl-training: of the pattern {self.patterns['']} no letter or digit is left, so every result would be "
                "an error. Remove it, or use is_error."
            )

    def __call__(self, result: str) -> list[str]:
        """The patterns found; none where the result is no error."""
        said = reduced(result)
        return [shown for pattern, shown in self.patterns.items() if pattern in said]


class _OwnTest(ErrorTest):
    """The user's own function of a result's text."""

    def __init__(self, function: Callable[[str], bool], name: str) -> None:
        self.function, self.name = function, name

    def __call__(self, result: str) -> list[str]:
        return [self.name] if self.function(result) else []


def load_test(reference: str) -> ErrorTest:
    """The user's own test, named ``path/to/file.py:name`` or ``module:name``.

    Raises:
        UserError: there is no such file, module or function.
    """
    return _OwnTest(function_of(reference, "tl-training: is_error"), reference.rpartition(":")[2])


# -- dialogues


class Dialogue:
    """A canonical chat row with its calls read.

    Attributes:
        messages: as in the row.
        tools: the offered tools.
        tools_json: their schemas as they came; None where the row has none.
        calls: for each message the call that it makes, or None.

    Raises:
        ValueError: the tools cannot be read.
    """

    def __init__(self, row: Row) -> None:
        self.messages: list[Message] = json.loads(row["messages"])
        self.from_system = False
        self.tools_json = json.loads(row["tools"]) if row.get("tools") else self._told_by_system()
        self.tools: list[Tool] = read_tools(self.tools_json or [])
        self.calls: list[Call | None] = []
        self._problems: dict[int, str] = {}
        for index, message in enumerate(self.messages):
            try:
                self.calls.append(self._call(message))
            except ValueError as error:
                self.calls.append(None)
                self._problems[index] = str(error)

    def _told_by_system(self) -> Any:
        """The JSON list of tools that a system message is."""
        first = self.messages[0]
        if first["role"] != "system" or not (first.get("content") or "").lstrip().startswith("["):
            return None
        try:
            found = json.loads(first["content"])
        except ValueError:
            return None
        self.from_system = isinstance(found, list) and bool(found)
        return found if self.from_system else None

    def _call(self, message: Message) -> Call | None:
        if message["role"] != "assistant":
            return None
        calls = message.get("tool_calls") or []
        if len(calls) > 1:
            raise ValueError(f"it makes {len(calls)} calls at once, and a turn is one call; split them into turns")
        return read_call(calls[0]) if calls else call_in(message.get("content") or "", self.tools)

    def turns(self) -> list[int]:
        """The messages of the assistant, by number."""
        return [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]

    def problem(self, turn: int) -> str | None:
        """Why a turn's call cannot be learnt; None where it can, or where the turn makes none."""
        call = self.calls[turn]
        if turn in self._problems or call is None:
            return self._problems.get(turn)
        if not self.tools:
            return f"it calls '{call.name}', and the row has no tools (a column 'tools' with their JSON schemas)"
        if call.name not in [tool.name for tool in self.tools]:
            return f"it calls '{call.name}', which is not among the row's tools"
        return None

    def as_python(self, result_role: str, system: str | None) -> list[Message]:
        """The messages with tools as stubs in the system message and calls as ``name(argument=json)``.

        Args:
            result_role: the role of tool results.
            system: the run's system prompt, for dialogues that have none.
        """
        first = self.messages[0] if self.messages[0]["role"] == "system" else None
        own = "" if self.from_system else (first or {}).get("content") or system or ""
        told = "\n\n".join(text for text in (own, stubs(self.tools)) if text)
        written = [{"role": "system", "content": told}] if told else []
        for message, call in list(zip(self.messages, self.calls, strict=True))[1 if first else 0 :]:
            role, content = message["role"], message.get("content") or ""
            if call is not None:
                prose = f"{content.rstrip()}\n" if message.get("tool_calls") and content.strip() else ""
                content = prose + render_call(call)
            elif message.get("tool_calls"):
                # A call that cannot be read is still part of what was said.
                content = "\n".join([content, json.dumps(message["tool_calls"], ensure_ascii=False)]).strip()
            written.append({"role": result_role if role == "tool" else role, "content": content})
        return written


# -- key tokens


class KeyTokens:
    """Finds the key tokens of rendered turns.

    Other tools' names are written into the same turn and rendered by the same path: their tokens are comparable.

    Args:
        renderer: the run's rendering path.
        processor: the tokenizer.
        rendering: ``python`` or ``template``.
    """

    def __init__(self, renderer: Any, processor: Any, rendering: str) -> None:
        self.renderer, self.processor, self.rendering = renderer, processor, rendering
        self._names: dict[tuple[str, str], list[int]] = {}

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, special ones included."""
        return self.processor.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def add(self, made: Sequence[tuple[Row, Sequence[Call | None], Dialogue]]) -> list[Row]:
        """The rows with the places of key and closing tokens in ``extra``.

        Args:
            made: rows, the calls of their learnt turns in order (None for plain text), and their dialogues.

        Raises:
            UserError: the template does not set the turns apart, or does not write a call's name.
        """
        rendered = self.renderer.render_batch([row for row, _, _ in made])
        return [
            self._with_places(row, calls, dialogue, found)
            for (row, calls, dialogue), found in zip(made, rendered, strict=True)
        ]

    def _with_places(self, row: Row, calls: Sequence[Call | None], dialogue: Dialogue, rendered: Any) -> Row:
        if len(rendered.spans) != len(calls) and not rendered.over:
            raise UserError(
                f"the chat template gives {len(rendered.spans)} spans to learn where {len(calls)} turns are chosen. "
                "Use layout: per_turn, or another data.template.",
                where=place(row),
            )
        messages = json.loads(row["messages"])
        turns = [m for m in messages if m["role"] == "assistant" and m["weight"]]
        keys: list[int] = []
        closing: list[int] = []
        for (start, end), call, message in zip(rendered.spans, calls, turns, strict=False):
            if call is None:
                continue
            ids = rendered.input_ids[start:end]
            others = [self._other(message, call, tool.name, row) for tool in dialogue.tools if tool.name != call.name]
            found = key_tokens(ids, call, others, self.decode)
            if found is None and not rendered.over:
                raise UserError(
                    f"the tokens do not spell the call of '{call.name}', so its key tokens cannot be found. Use a "
                    "tokenizer that keeps text as it is, or another data.template.",
                    where=place(row),
                )
            if found is not None:
                keys += [start + k for k in found[0]]
                closing += [start + c for c in found[1]]
        extra = {**json.loads(row["extra"] or "{}"), KEY_TOKENS: keys, CLOSING_TOKENS: closing}
        return {**row, "extra": json.dumps(extra, ensure_ascii=False)}

    def _other(self, message: Message, call: Call, name: str, row: Row) -> list[int]:
        """The tokens from the name on, had the turn called another tool."""
        content = message.get("content") or ""
        if self.rendering == "python":
            before = content[: len(content) - len(render_call(call))]
            said: Message = {"role": "assistant", "content": before + render_call(Call(name, {}))}
        else:
            before = content
            (made,) = message["tool_calls"] if message.get("tool_calls") else (None,)
            if made is None:
                span = name_span(content, call.name)
                assert span is not None
                said = {"role": "assistant", "content": content[: span[0]] + name + content[span[1] :]}
            else:
                function = {**made.get("function", made), "name": name}
                said = {**message, "tool_calls": [{**made, "function": function} if "function" in made else function]}
        if (before, name) not in self._names:
            turn = {k: v for k, v in said.items() if k != "weight"}
            short = {**row, "messages": json.dumps([{"role": "user", "content": "-"}, turn], ensure_ascii=False)}
            (found,) = self.renderer.render_batch([short])
            ids = found.input_ids[slice(*found.spans[0])] if found.spans else []
            span = name_span(self.decode(ids), name)
            if span is None:
                raise UserError(f"the chat template does not write the name of the tool '{name}'.", where=place(row))
            self._names[before, name] = ids[token_at(ids, span[0], self.decode) :]
        return self._names[before, name]
