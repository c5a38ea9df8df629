"""JSON files that are not JSON lines: an array of objects, or an object that holds one."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luthier.core.errors import UserError
from luthier.data.formats import (
    BLOCK_BYTES,
    ROW_LIMIT_BYTES,
    ROWS_PER_BLOCK,
    Block,
    Handle,
    json_type,
    jsonl,
    listed,
)
from luthier.data.problems import Reject, excerpt

SEPARATORS = " \t\r\n,"


def json_file(path: Path) -> Iterator[Block]:
    """A JSON array of objects (streamed), an object with one list of objects, or JSON lines under another name."""
    with Handle(path) as handle:
        start = handle.read(1 << 16)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError("the file is UTF-16; save it as UTF-8.", where=path.name)
    text = start.decode("utf-8", "ignore").lstrip("\ufeff").lstrip()
    if text.startswith("["):
        yield from _array(path)
    elif text and _is_document(text):
        yield from _document(path)
    else:
        yield from jsonl(path)


def _is_document(text: str) -> bool:
    """Whether the file is one object: the first line is not an object of its own, or is one that holds the rows."""
    first, _, rest = text.partition("\n")
    try:
        value = json.loads(first)
    except ValueError:
        return True
    return not rest.strip() and isinstance(value, dict) and bool(_lists(value))


def _lists(value: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {k: v for k, v in value.items() if isinstance(v, list) and v and all(isinstance(r, dict) for r in v)}


def _document(path: Path) -> Iterator[Block]:
    with Handle(path) as handle:
        data = b"".join(iter(lambda: handle.read(BLOCK_BYTES), b""))
    try:
        value = json.loads(data)
    except UnicodeDecodeError as error:
        raise UserError(f"invalid UTF-8 at byte {error.start + 1}; save the file as UTF-8.", where=path.name) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON: {error}.", where=path.name) from error
    lists = _lists(value) if isinstance(value, dict) else {}
    if len(lists) != 1:
        found = f"lists of objects under: {', '.join(lists)}" if lists else f"it holds {excerpt(value)}"
        raise UserError(
            f"a JSON file must hold an array of objects, or one object with exactly one list of objects; {found}. "
            "Write the rows as JSON lines.",
            where=path.name,
        )
    yield from listed(next(iter(lists.values())), path.name)


class _Window:
    """The part of a JSON text that is being parsed, refilled from the file; the rest is never in memory."""

    def __init__(self, handle: Handle) -> None:
        self.handle, self.text, self.at, self.ended = handle, "", 0, False
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode

    def fill(self) -> None:
        """Drop what was parsed and append the next bytes."""
        data = self.handle.read(BLOCK_BYTES)
        self.ended = not data
        self.text, self.at = self.text[self.at :] + self._decode(data, self.ended), 0

    def peek(self) -> str:
        """The next character that is no separator; empty at the end of the file."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in SEPARATORS:
                self.at += 1
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.fill()


def _array(path: Path) -> Iterator[Block]:
    decoder = json.JSONDecoder()
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    rejects: list[Reject] = []
    number = 0
    with Handle(path) as handle:
        window = _Window(handle)
        try:
            window.peek()
            window.at += 1  # the bracket
            while (character := window.peek()) not in ("]", ""):
                number += 1
                value, window.at = _element(decoder, window, character)
                if isinstance(value, dict):
                    rows.append(value)
                    numbers.append(number)
                else:
                    reason = f"the element is a JSON {json_type(value)}, not an object"
                    rejects.append(Reject(path.name, number, "", reason, "Expected {...}.", excerpt(value)))
                if len(rows) >= ROWS_PER_BLOCK:
                    yield Block(numbers[0], rows, path.name, numbers, rejects, position=handle.raw.tell())
                    rows, numbers, rejects = [], [], []
        except UnicodeDecodeError as error:
            raise UserError(
                "invalid UTF-8; save the file as UTF-8.", where=f"{path.name}, after row {number}"
            ) from error
        except (ValueError, RecursionError) as error:
            found = excerpt(window.text[window.at : window.at + 200])
            raise UserError(
                f"not valid JSON, or the file is cut off ({error}). Found: {found}.", where=f"{path.name}, row {number}"
            ) from error
        if not character:
            raise UserError("the JSON array is cut off: it has no closing bracket.", where=f"{path.name}, row {number}")
        yield Block(numbers[0] if numbers else 1, rows, path.name, numbers, rejects, position=handle.raw.tell())


def _element(decoder: json.JSONDecoder, window: _Window, character: str) -> tuple[Any, int]:
    """The next element and where it ends; reads on while it is not whole."""
    while True:
        try:
            value, end = decoder.raw_decode(window.text, window.at)
        except ValueError:
            if window.ended or len(window.text) - window.at > ROW_LIMIT_BYTES:
                raise
        else:
            # A number that touches the end of the window may go on in the next bytes.
            if end < len(window.text) or window.ended or character in '{["':
                return value, end
        window.fill()
