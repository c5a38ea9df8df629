"""Options in words, from the JSON schema that pydantic makes of a model: types, defaults and what is accepted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
    "minLength": "length from",
    "maxLength": "length to",
    "minItems": "items from",
    "maxItems": "items to",
    "multipleOf": "multiple of",
    "pattern": "pattern",
}
_KINDS = {"integer": "int", "number": "float", "string": "text", "boolean": "bool", "array": "list"}


def type_of(about: Mapping[str, Any]) -> str:
    """The type of a property of a JSON schema, such as ``list of text`` or ``int | null``."""
    if "anyOf" in about:
        return " | ".join(type_of(part) for part in about["anyOf"])
    if "enum" in about or "const" in about:
        return "choice"
    if "$ref" in about:
        return str(about["$ref"]).rpartition("/")[2]
    text = _KINDS.get(about.get("type", ""), about.get("type", "any"))
    inner = about.get("items")
    return f"{text} of {type_of(inner)}" if text == "list" and isinstance(inner, dict) and inner else text


def accepted(about: Mapping[str, Any]) -> str:
    """What a property accepts beyond its type: the words of a choice, or bounds."""
    if "enum" in about:
        return ", ".join(map(str, about["enum"]))
    if "const" in about:
        return str(about["const"])
    if "anyOf" in about:
        return "; ".join(text for part in about["anyOf"] if (text := accepted(part)))
    inner = about.get("items")
    if isinstance(inner, dict) and "enum" in inner:
        return accepted(inner)
    return ", ".join(f"{words} {about[key]}" for key, words in _BOUNDS.items() if key in about)


def literal(value: Any) -> str:
    """A default as it would be written in YAML."""
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)
