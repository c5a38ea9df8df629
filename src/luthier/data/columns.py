"""The columns of a block, whether it came as Arrow or as row dicts, and the checks of a text column."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from luthier.data.formats import Block
from luthier.data.problems import Problems

_encode = json.JSONEncoder(default=lambda value: f"<{type(value).__name__}>").encode


def plain(value: Any) -> Any:
    """A nested Arrow value without the nulls that Arrow adds for keys which other rows have."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if v is not None}
    return [plain(v) for v in value] if isinstance(value, list) else value


class Columns:
    """Access by column to a block of rows."""

    def __init__(self, block: Block) -> None:
        self.names, self.folder = block.names, block.folder
        self._batch = block.rows if isinstance(block.rows, pa.RecordBatch) else None
        self._rows = block.rows if isinstance(block.rows, list) else []
        self._lists: dict[str, list[Any]] = {}

    def __len__(self) -> int:
        return len(self._rows) if self._batch is None else self._batch.num_rows

    def listed(self, column: str) -> list[Any]:
        """The column's values as Python objects; None where a row has no such column."""
        if column not in self._lists:
            if self._batch is None:
                self._lists[column] = [row.get(column) for row in self._rows]
            elif column in self._batch.schema.names:
                array = self._batch.column(column)
                values = array.to_pylist()
                self._lists[column] = [plain(v) for v in values] if pa.types.is_nested(array.type) else values
            else:
                self._lists[column] = [None] * len(self)
        return self._lists[column]

    def text_array(self, column: str) -> pa.Array | None:
        """The column as an Arrow string array; None when some value is not text."""
        if self._batch is not None and column in self._batch.schema.names:
            array = self._batch.column(column)
            kind = array.type.value_type if pa.types.is_dictionary(array.type) else array.type
            if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
                return array.cast(pa.string())
        try:
            return pa.array(self.listed(column), pa.string())
        except (pa.ArrowException, UnicodeEncodeError):
            return None

    def holds_lists(self, column: str) -> bool:
        """Whether the column's first value that is there is a list."""
        if self._batch is not None and column in self._batch.schema.names:
            return pa.types.is_list(self._batch.schema.field(column).type)
        return isinstance(next((v for v in self.listed(column) if v is not None), None), list)

    def row(self, index: int) -> Any:
        """One whole row, for an error's excerpt."""
        return self._rows[index] if self._batch is None else plain(self._batch.slice(index, 1).to_pylist()[0])

    def others(self, used: set[str]) -> pa.Array:
        """Each row's further columns as a JSON object."""
        if self._batch is not None:
            rest = [c for c in self._batch.schema.names if c not in used]
            lists = [self.listed(c) for c in rest]
            if not rest:
                return pa.array(["{}"] * len(self), pa.string())
            rows = [dict(zip(rest, values, strict=True)) for values in zip(*lists, strict=True)]
            return pa.array([_encode(row) for row in rows], pa.string())
        if not any(row.keys() - used for row in self._rows):
            return pa.array(["{}"] * len(self), pa.string())
        return pa.array([_encode({k: v for k, v in r.items() if k not in used}) for r in self._rows], pa.string())


def strings(columns: Columns, column: str, problems: Problems, *, required: bool = True) -> pa.Array:
    """A checked text column: text everywhere, nothing null or blank (where ``required``), no NUL characters."""
    array = columns.text_array(column)
    if array is None:
        values = [_text_or_problem(v, i, column, problems) for i, v in enumerate(columns.listed(column))]
        array = pa.array(values, pa.string())
    if required:
        missing = "is null or missing"
        problems.mark(array.is_null(), lambda i: (column, missing, "Expected text.", columns.row(i)))
        blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(array), ""), False)
        problems.mark(blank, lambda i: (column, "is empty", "Expected text.", columns.row(i)))
    nul = pc.fill_null(pc.match_substring(array, "\x00"), False)
    problems.mark(nul, lambda i: (column, "NUL character in the text", "Remove it.", array[i].as_py()))
    return array


def _text_or_problem(value: Any, index: int, column: str, problems: Problems) -> str | None:
    if value is not None and not isinstance(value, str):
        fix = "Write it as text, in quotes." if isinstance(value, (int, float)) else "Expected text."
        problems.add(index, column, f"is {_kind(value)}, not text", fix, value)
        return None
    if value is not None:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            code = ord(value[error.start])
            # Readers keep undecodable bytes as lone surrogates in this range.
            reason = "invalid UTF-8" if 0xDC80 <= code <= 0xDCFF else "half of a surrogate pair"
            problems.add(index, column, reason, "Save the file as valid UTF-8.", value)
            return None
    return value


def _kind(value: Any) -> str:
    known = {bool: "a boolean", int: "a number", float: "a number", dict: "an object", list: "a list"}
    return known.get(type(value), type(value).__name__)
