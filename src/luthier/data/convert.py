"""Validate a block of rows and bring it into the canonical schema.

Values are checked as whole Arrow columns; only rows that fail a check are looked at one by one, to say what is wrong.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from luthier.data import chats, images
from luthier.data.columns import Columns, strings
from luthier.data.formats import ROW_LIMIT_BYTES, Block
from luthier.data.layouts import SCHEMA, Layout
from luthier.data.problems import Problems

# Pairs that are written to be joined as they are; between others a newline stands where no template sets them apart.
JOINED_AS_THEY_ARE = (
    {"prompt", "input", "inputs", "source"},
    {"completion", "output", "outputs", "target", "targets"},
)
RESPONSE_HEADER = "\n\nResponse:\n"
INPUT_HEADER = "\n\nInput:\n"

Arrays = dict[str, Any]


def convert(block: Block, layout: Layout, problems: Problems) -> pa.RecordBatch:
    """The good rows of a block in the canonical schema; the bad ones go to ``problems``."""
    columns = Columns(block)
    arrays = _CONVERTERS[layout.name](columns, layout, problems)
    size = len(columns)
    arrays["row"] = pa.array(problems.numbers, pa.int64())
    arrays["source"] = _constant(block.source, size)
    if "id" in layout.optional:
        arrays["id"] = pa.array([None if v is None else str(v) for v in columns.listed(layout.optional["id"])])
    arrays["extra"] = columns.others(layout.columns)
    for name in ("text", "prompt", "completion", "rejected", "messages", "rejected_messages"):
        if name in arrays:
            long = pc.fill_null(pc.greater(pc.binary_length(arrays[name]), ROW_LIMIT_BYTES), False)
            problems.mark(long, partial(_too_long, name, arrays[name]))
    arrays["key"] = _keys(arrays, size)
    filled = [arrays[f.name].cast(f.type) if f.name in arrays else pa.nulls(size, f.type) for f in SCHEMA]
    batch = pa.RecordBatch.from_arrays(filled, schema=SCHEMA)
    return batch.filter(pa.array(~problems.bad)) if problems.bad.any() else batch


def _too_long(field: str, values: pa.Array, index: int) -> tuple[str, str, str, Any]:
    value = values[index].as_py()
    size = len(value.encode()) / 2**20
    fix = f"The limit is {ROW_LIMIT_BYTES >> 20} MB; split it into rows a model can read."
    return field, f"the row is too long ({size:.0f} MB)", fix, value[:200]


def _constant(value: str, size: int) -> pa.Array:
    return pa.array([value]).take(pa.array(np.zeros(size, dtype=np.int64)))


CONTENT = ("kind", "text", "prompt", "separator", "completion", "rejected", "system", "messages", "rejected_messages")


def _keys(arrays: Arrays, size: int) -> pa.Array:
    """A hash of what a model could see of each row: not of its number, file, id or further columns."""
    parts = [arrays[n] for n in (*CONTENT, "tools", "label") if n in arrays]
    parts += [pc.binary_join(arrays[n], "\x1e") for n in ("tokens", "tags") if n in arrays]
    if "image" in arrays:
        parts.append(arrays.pop("image_hash"))
    named = pa.array(["\x1d".join(n for n in SCHEMA.names if n in arrays)]).take(pa.array(np.zeros(size, np.int64)))
    joined = pc.binary_join_element_wise(
        named, *parts, "\x1f", null_handling="replace", null_replacement="\x00"
    ).to_pylist()
    return pa.array([hashlib.blake2b(text.encode(), digest_size=16).hexdigest() for text in joined], pa.string())


def _pair(columns: Columns, layout: Layout, problems: Problems) -> Arrays:
    prompt_column, completion_column = layout.fields["prompt"], layout.fields["completion"]
    if columns.holds_lists(prompt_column) or columns.holds_lists(completion_column):
        return chats.conversational_pair(columns, layout, problems)
    prompt = strings(columns, prompt_column, problems)
    completion = strings(columns, completion_column, problems)
    straight = prompt_column.lower() in JOINED_AS_THEY_ARE[0] and completion_column.lower() in JOINED_AS_THEY_ARE[1]
    size = len(columns)
    arrays = {"kind": _constant("pair", size), "prompt": prompt, "completion": completion}
    if not straight:
        arrays["separator"] = _constant("\n", size)
    return arrays | _system(columns, layout, problems)


def _system(columns: Columns, layout: Layout, problems: Problems) -> Arrays:
    if "system" not in layout.optional:
        return {}
    system = strings(columns, layout.optional["system"], problems, required=False)
    return {"system": pc.if_else(pc.equal(pc.utf8_trim_whitespace(system), ""), None, system)}


def _alpaca(columns: Columns, layout: Layout, problems: Problems) -> Arrays:
    instruction = strings(columns, layout.fields["prompt"], problems)
    completion = strings(columns, layout.fields["completion"], problems)
    size = len(columns)
    prompt = instruction
    if "input" in layout.optional:
        given = pc.fill_null(strings(columns, layout.optional["input"], problems, required=False), "")
        empty = pc.equal(pc.utf8_trim_whitespace(given), "")
        prompt = pc.if_else(empty, instruction, pc.binary_join_element_wise(instruction, given, INPUT_HEADER))
    arrays = {
        "kind": _constant("pair", size),
        "prompt": prompt,
        "separator": _constant(RESPONSE_HEADER, size),
        "completion": completion,
    }
    return arrays | _system(columns, layout, problems)


def _text(columns: Columns, layout: Layout, problems: Problems) -> Arrays:
    return {"kind": _constant("text", len(columns)), "text": strings(columns, layout.fields["text"], problems)}


def _classification(columns: Columns, layout: Layout, problems: Problems) -> Arrays:
    label = _labels(columns, layout.fields["label"], problems)
    return {
        "kind": _constant("classification", len(columns)),
        "text": _one_text(columns, layout, problems),
        "label": label,
    }


def _regression(columns: Columns, layout: Layout, problems: Problems) -> Arrays:
    column = layout.fields["label"]
    values = columns.listed(column)
    array = pa.array([_number(v) for v in values], pa.string())
    fix = "Write numbers, such as 2.5."
    problems.mark(array.is_null(), lambda i: (column, "the label is not a finite number", fix, values[i]))
    return {
        "kind": _constant("classification", len(columns)),
        "text": _one_text(columns, layout, problems),
        "label": array,
    }


def _number(value: Any) -> str | None:
    """A number as text that gives the same number back; None when it is none."""
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        return None
    return repr(number) if math.isfinite(number) else None


def _one_text(columns: Columns, layout: Layout, problems: Problems) -> Any:
    text = strings(columns, layout.fields["text"], problems)
    if "text2" in layout.fields:
        second = strings(columns, layout.fields["text2"], problems)
        text = pc.binary_join_element_wise(text, second, "\n")
    return text


def _label(value: Any, names: list[str] | None) -> str | None:
    """The name of a label; None when it is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value)).lower()
    if isinstance(value, int):
        if names is None:
            return str(value)
        return names[value] if 0 <= value < len(names) else None
    return value if isinstance(value, str) and value.strip() else None


def _labels(columns: Columns, column: str, problems: Problems) -> pa.Array:
    names = columns.names.get(column)
    values = columns.listed(column)
    # Labels repeat, so each distinct value is named once.
    named = {v: _label(v, names) for v in set(_hashable(values))}
    labels = [named.get(v) if _is_hashable(v) else None for v in values]
    array = pa.array(labels, pa.string())

    def word(index: int) -> tuple[str, str, str, Any]:
        value = values[index]
        if value is None:
            return column, "the label is null", "Every row needs a label.", columns.row(index)
        if value == "":
            return column, "the label is empty", "Every row needs a label.", columns.row(index)
        if names is not None:
            return column, f"the label {value} is not a class", f"Classes: 0 to {len(names) - 1}.", columns.row(index)
        return column, "the label is neither text nor a whole number", "Write class names or indices.", value

    problems.mark(array.is_null(), word)
    return array


def _is_hashable(value: Any) -> bool:
    return not isinstance(value, (list, dict))


def _hashable(values: list[Any]) -> list[Any]:
    return [v for v in values if _is_hashable(v)]


def _tags(columns: Columns, layout: Layout, problems: Problems) -> Arrays:
    token_column, tag_column = layout.fields["tokens"], layout.fields["tags"]
    tokens = _string_lists(columns, token_column, problems, None)
    tags = _string_lists(columns, tag_column, problems, columns.names.get(tag_column))
    lengths = pc.fill_null(pc.list_value_length(tokens), 0), pc.fill_null(pc.list_value_length(tags), 0)

    def word(index: int) -> tuple[str, str, str, Any]:
        counts = f"{lengths[0][index].as_py()} tokens but {lengths[1][index].as_py()} tags"
        return tag_column, counts, "Give one tag for each token.", tags[index].as_py()

    problems.mark(pc.not_equal(*lengths), word)
    problems.mark(pc.equal(lengths[0], 0), lambda i: (token_column, "there are no tokens", "", columns.row(i)))
    return {"kind": _constant("tags", len(columns)), "tokens": tokens, "tags": tags}


def _string_lists(columns: Columns, column: str, problems: Problems, names: list[str] | None) -> pa.Array:
    values = columns.listed(column)
    lists = [v if isinstance(v, list) else None for v in values]
    try:
        array = pa.array(lists, pa.list_(pa.string()))
    except (pa.ArrowException, UnicodeEncodeError):
        array = pa.array([_named(v, names) for v in lists], pa.list_(pa.string()))

    def word(index: int) -> tuple[str, str, str, Any]:
        value = values[index]
        if value is None:
            return column, "it is null", "Expected a list.", columns.row(index)
        if not isinstance(value, list):
            return column, f"it is a {type(value).__name__}, not a list", "Expected a list of text.", value
        if names is not None:
            return column, "it holds a number that is no class", f"Classes: 0 to {len(names) - 1}.", value
        return column, "an item is null or not text", "Expected a list of text or of class indices.", value

    problems.mark(array.is_null(), word)
    if array.flatten().null_count:
        parents = pc.list_parent_indices(array).to_numpy()
        mask = np.zeros(len(array), dtype=bool)
        mask[parents[array.flatten().is_null().to_numpy(zero_copy_only=False)]] = True
        problems.mark(mask, word)
        array = pa.array([None if bad else v for v, bad in zip(array.to_pylist(), mask, strict=True)], array.type)
    return array


def _named(values: list[Any] | None, names: list[str] | None) -> list[str | None] | None:
    if values is None:
        return None
    named = [_label(v, names) if isinstance(v, (str, int)) else None for v in values]
    try:
        pa.array(named, pa.string())
    except UnicodeEncodeError:
        return None
    return named


def _image(columns: Columns, layout: Layout, problems: Problems) -> Arrays:
    arrays = images.read(columns, layout.fields["image"], problems)
    label = _labels(columns, layout.fields["label"], problems)
    return {"kind": _constant("image", len(columns)), **arrays, "label": label}


_CONVERTERS: Mapping[str, Callable[[Columns, Layout, Problems], Arrays]] = {
    "pair": _pair,
    "alpaca": _alpaca,
    "chat": chats.chat,
    "preference": chats.preference,
    "text": _text,
    "classification": _classification,
    "regression": _regression,
    "tags": _tags,
    "image": _image,
}
