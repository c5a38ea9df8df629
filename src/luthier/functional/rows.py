"""Canonical rows as procedures change them: those of a source, with other texts, with further columns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def prepared_rows(source: Any) -> Any:
    """The canonical rows of a source that were prepared, in their order."""
    return source.rows.dataset.select(source.prepared.fetch(range(len(source.prepared)))["index"])


def replaced(rows: Any, **columns: Sequence[str | None]) -> Any:
    """Rows with other values in some columns of text, held in memory."""
    import pyarrow as pa
    from datasets import Dataset

    table = rows.with_format("arrow")[:]
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(place), pa.array(values, table.schema.field(place).type))
    return Dataset(table)


def with_columns(rows: Any, further: Sequence[dict[str, Any]]) -> Any:
    """Canonical rows with further columns, which stand in ``extra``."""
    old = [json.loads(text or "{}") for text in rows["extra"]]
    return replaced(rows, extra=[json.dumps({**o, **f}, ensure_ascii=False) for o, f in zip(old, further, strict=True)])
