"""The Arrow file of prepared rows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from luthier.data.layouts import IMAGE_TYPE, SCHEMA
from luthier.data.render import Rendered

INTS = pa.list_(pa.int32())
OF_TASK: dict[str, list[tuple[str, pa.DataType]]] = {
    "causal-lm": [("input_ids", INTS), ("spans", INTS), ("rejected_ids", INTS), ("rejected_spans", INTS)],
    "masked-lm": [("input_ids", INTS)],
    "sequence-classification": [("input_ids", INTS), ("label", pa.int32())],
    "sequence-regression": [("input_ids", INTS), ("label", pa.float32())],
    "token-classification": [("input_ids", INTS), ("positions", INTS), ("tags", INTS)],
    "image-classification": [("image", IMAGE_TYPE), ("label", pa.int32())],
}
COMMON = [("length", pa.int32()), ("key", pa.string()), ("row", pa.int64()), ("source", pa.string())]


class Schema:
    """The columns of a task's prepared rows.

    ``index`` is the place of the canonical row. Further columns asked for by methods are JSON text.
    """

    def __init__(self, task: str, columns: list[str]) -> None:
        self.task = task
        fields = [*OF_TASK[task], *COMMON, ("index", pa.int64())]
        taken = {name for name, _ in fields}
        self.columns = [c for c in columns if c not in taken]
        extra = [pa.field(c, pa.string(), metadata={"encoding": "json"}) for c in self.columns]
        self.arrow = pa.schema([pa.field(n, t) for n, t in fields] + extra)


class Writer:
    """Writes batches of rendered rows to an Arrow stream file."""

    def __init__(self, path: Path, schema: Schema) -> None:
        self.schema = schema
        self._sink = pa.OSFile(str(path), "wb")
        self._stream = pa.ipc.new_stream(self._sink, schema.arrow)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._sink.close()

    def write(self, kept: list[tuple[int, dict[str, Any], Rendered]], index_of: dict[str, int]) -> None:
        """Append rows given as (place of the canonical row, canonical row, rendered)."""
        task, rendered, rows = self.schema.task, [r for _, _, r in kept], [row for _, row, _ in kept]
        arrays: dict[str, Any] = {
            "length": [max(len(r.input_ids), len(r.rejected.input_ids) if r.rejected else 0) for r in rendered],
            "row": [row["row"] for row in rows],
            "source": [row["source"] for row in rows],
            "index": [index for index, _, _ in kept],
        }
        if task != "image-classification":
            arrays["input_ids"] = [r.input_ids for r in rendered]
        if task == "causal-lm":
            arrays["spans"] = [_flat(r.spans) for r in rendered]
            arrays["rejected_ids"] = [r.rejected.input_ids if r.rejected else None for r in rendered]
            arrays["rejected_spans"] = [_flat(r.rejected.spans) if r.rejected else None for r in rendered]
        elif task == "token-classification":
            arrays["positions"] = [r.positions for r in rendered]
            arrays["tags"] = [
                [index_of[row["tags"][w]] for w in r.words] for row, r in zip(rows, rendered, strict=True)
            ]
        elif task == "sequence-regression":
            arrays["label"] = [float(row["label"]) for row in rows]
        elif task != "masked-lm":
            arrays["label"] = [index_of[row["label"]] for row in rows]
        if task == "image-classification":
            arrays["image"] = [row["image"] for row in rows]
            arrays["key"] = [row["key"] for row in rows]
        else:
            names = [n for n, _ in OF_TASK[task]]
            columns = [arrays[n] for n in names]
            arrays["key"] = [_key(values) for values in zip(*columns, strict=True)]
        for column in self.schema.columns:
            arrays[column] = [json.dumps(value_of(row, column), ensure_ascii=False) for row in rows]
        batch = [pa.array(arrays[f.name], f.type) for f in self.schema.arrow]
        self._stream.write_batch(pa.RecordBatch.from_arrays(batch, schema=self.schema.arrow))


def _flat(spans: list[tuple[int, int]]) -> list[int]:
    return [edge for span in spans for edge in span]


def _key(values: tuple[Any, ...]) -> str:
    """A hash of what the model is trained on in a row: scores of a model are cached under it."""
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        kind = np.float64 if isinstance(value, float) else np.int32
        digest.update(np.asarray([] if value is None else value, dtype=kind).tobytes() + b"\x1e")
    return digest.hexdigest()


def value_of(row: dict[str, Any], column: str) -> Any:
    """A named column of a canonical row, from the schema's own or from its further columns; None where absent."""
    if column in SCHEMA.names:
        return row[column]
    return json.loads(row["extra"] or "{}").get(column)
