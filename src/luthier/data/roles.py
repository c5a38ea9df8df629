"""Conversations: the roles and keys they come with, and their one canonical form."""

from __future__ import annotations

import json
from typing import Any

from luthier.core.errors import did_you_mean

ACCEPTED_ROLES = "system, user, assistant, tool (also developer, human, gpt, function and the like)"
ROLE_OF = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "ai", "chatgpt", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response"), "tool"),
}
CANONICAL = ("system", "user", "assistant", "tool")
encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class BadConversation(ValueError):
    """``BadConversation(field, reason, fix, found)``: what is wrong with one conversation."""


def normalise(value: Any, field: str) -> list[dict[str, Any]]:
    """The messages of one row with canonical roles and keys.

    Args:
        value: a list of messages in OpenAI (role, content) or ShareGPT (from, value) keys, or the JSON text of one.
        field: the column's name, for the error.

    Raises:
        BadConversation: something in it cannot be understood.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadConversation(field, "is text, but not the JSON of a list of messages", "", value) from error
    if value is None:
        raise BadConversation(field, "is null", "Expected a list of messages with role and content.", "")
    if not isinstance(value, list):
        raise BadConversation(field, "is not a list of messages", "Expected [{role: user, content: ...}, ...].", value)
    if not value:
        raise BadConversation(field, "is an empty list", "Expected at least one message of the assistant.", "")
    return [_message(message, f"{field}[{i}]") for i, message in enumerate(value)]


def _message(message: Any, field: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadConversation(field, "is not a message", "Expected {role: ..., content: ...}.", message)
    role_key = "role" if message.get("role") is not None else "from"
    content_key = "content" if "content" in message or "value" not in message else "value"
    role = message.get(role_key)
    if role is None:
        raise BadConversation(f"{field}.role", "the message has no role", f"Accepted roles: {ACCEPTED_ROLES}.", message)
    known = ROLE_OF.get(str(role).strip().lower())
    if known is None:
        fix = f"{did_you_mean(str(role).lower(), ROLE_OF).strip()} Accepted roles: {ACCEPTED_ROLES}.".strip()
        raise BadConversation(f"{field}.{role_key}", f"unknown role '{role}'", fix, message)
    content = _content(message.get(content_key), f"{field}.{content_key}")
    rest = {k: v for k, v in message.items() if k not in ("role", "from", "content", "value") and v is not None}
    if role == "function_call" and content is not None:
        rest["tool_calls"], content = _calls(content, f"{field}.{content_key}"), None
    if rest.get("tool_calls"):
        if not isinstance(rest["tool_calls"], list):
            raise BadConversation(f"{field}.tool_calls", "is not a list", "Expected a list of calls.", message)
        rest["tool_calls"] = [_with_arguments(c, f"{field}.tool_calls") for c in rest["tool_calls"]]
    if content is None and not (known == "assistant" and rest.get("tool_calls")):
        fix = "Only a message of the assistant with tool_calls may have no content."
        raise BadConversation(f"{field}.{content_key}", "the content is null", fix, message)
    if content is not None and not content.strip() and known == "assistant" and not rest.get("tool_calls"):
        raise BadConversation(f"{field}.{content_key}", "the assistant's content is empty", "Give an answer.", message)
    if content is not None and "\x00" in content:
        raise BadConversation(f"{field}.{content_key}", "NUL character in the text", "Remove it.", content)
    return {"role": known, "content": content, **rest} if content is not None else {"role": known, **rest}


def _content(content: Any, field: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list):
        if all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content):
            return "".join(p["text"] for p in content)
        raise BadConversation(field, "has parts that are not text", "Only {type: text, text: ...} parts fit.", content)
    raise BadConversation(field, f"is a {type(content).__name__}, not text", "Write it as text.", content)


def _calls(content: str, field: str) -> list[dict[str, Any]]:
    try:
        calls = json.loads(content)
    except ValueError as error:
        raise BadConversation(field, "the function call is not JSON", "Expected {name, arguments}.", content) from error
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]


def _with_arguments(call: Any, field: str) -> dict[str, Any]:
    """The call with its arguments as an object: some files write them as JSON text, which templates would quote."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not function.get("name"):
        raise BadConversation(field, "a tool call has no name", "Expected {function: {name, arguments}}.", call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            fix = "Expected the JSON of an object."
            raise BadConversation(field, "the arguments of a tool call are not JSON", fix, arguments) from error
    function = {**function, "arguments": {} if arguments is None else arguments}
    return {**call, "function": function} if "function" in call else {"type": "function", "function": function}


def check_answerable(messages: list[dict[str, Any]], field: str) -> None:
    """Some message must be the assistant's, and must come after something.

    Raises:
        BadConversation: there is nothing to learn from it.
    """
    if not any(m["role"] == "assistant" and m.get("weight", 1) for m in messages):
        raise BadConversation(field, "no message of the assistant, so nothing to learn", "Add the answer.", messages)


def tools_json(value: Any) -> str | None:
    """The JSON text of a list of tool schemas; None for none.

    Raises:
        BadConversation: it is not a list of objects.
    """
    if value is None or value in ("", []):
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadConversation(
                "tools", "is text, but not JSON", "Expected a list of tool schemas.", value
            ) from error
    if not isinstance(value, list) or not all(isinstance(t, dict) for t in value):
        raise BadConversation("tools", "is not a list of tool schemas", "Expected [{...}, ...].", value)
    return encode(value) if value else None
