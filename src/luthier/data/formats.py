"""Read each file format as blocks of rows, in bounded memory and with true row numbers."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from luthier.core.errors import UserError
from luthier.data.problems import Reject, excerpt

BLOCK_BYTES = 8 << 20
ROW_LIMIT_BYTES = 16 << 20
ROWS_PER_BLOCK = 8192

COMPRESSIONS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# What decompressors raise on a damaged file.
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, OSError)
TAG = re.compile(r"^(O|[BIESLUM]-\S+)$")


@dataclass
class Block:
    """Some consecutive rows of one file.

    Attributes:
        first_row: 1-based number of the first row (a line number for line formats).
        rows: the rows.
        source: the file's name as shown to the user.
        numbers: row numbers, where they are not consecutive.
        rejects: rows that could not be read at all.
        names: class names by column, where the file declares them.
        folder: where relative image paths start.
        position: bytes of the file read so far, for the progress bar.
    """

    first_row: int
    rows: pa.RecordBatch | list[dict[str, Any]]
    source: str = ""
    numbers: Sequence[int] | None = None
    rejects: list[Reject] = field(default_factory=list)
    names: dict[str, list[str]] = field(default_factory=dict)
    folder: Path | None = None
    position: int = 0

    def __iter__(self) -> Iterator[Any]:
        """Unpacks as ``first_row, rows``."""
        return iter((self.first_row, self.rows))


class Handle:
    """A file open for reading bytes, decompressed by its suffix; damage becomes an error that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.raw = path.open("rb")
        suffix = path.suffix.lower()
        self.stream: IO[bytes] = self.raw
        if suffix in COMPRESSIONS:
            self.stream = COMPRESSIONS[suffix](self.raw)  # type: ignore[operator]
        elif suffix == ".zst":
            self.stream = pa.input_stream(self.raw, compression="zstd")

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.raw.close()

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes; empty at the end.

        Raises:
            UserError: the compressed file is truncated or damaged.
        """
        if self.stream is self.raw:
            return self.raw.read(size)
        try:
            return bytes(self.stream.read(size))
        except DAMAGED as error:
            raise UserError(
                f"the compressed file is truncated or damaged ({error}). Fetch or write it again.", where=self.path.name
            ) from error


class _Raw(io.RawIOBase):
    """A :class:`Handle` for readers that want a file object."""

    def __init__(self, handle: Handle) -> None:
        self.handle = handle

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.handle.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _check_start(start: bytes, name: str) -> None:
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError("the file is UTF-16; save it as UTF-8.", where=name)


def _too_long(name: str, number: int, size: int) -> Reject:
    fix = f"The limit is {ROW_LIMIT_BYTES >> 20} MB; split it into rows a model can read."
    return Reject(name, number, "", f"the row is too long ({size / 2**20:.0f} MB)", fix)


def _lines(handle: Handle, name: str) -> Iterator[tuple[int, list[str], list[Reject]]]:
    """Blocks of whole lines: first line number, lines (an unreadable one is empty), rejects.

    A line over the limit is skipped without ever being held in memory.
    """
    number, size = 1, 0
    pending: list[bytes] = []
    block = handle.read(BLOCK_BYTES)
    _check_start(block, name)
    block = block.removeprefix(b"\xef\xbb\xbf")
    at_end = not block
    while not at_end:
        following = handle.read(BLOCK_BYTES)
        at_end = not following
        if at_end and not block.endswith(b"\n"):
            block += b"\n"
        last = block.rfind(b"\n")
        if last < 0:
            size += len(block)
            if size > ROW_LIMIT_BYTES:
                pending.clear()
            else:
                pending.append(block)
            block = following
            continue
        first = block.find(b"\n")
        rejects: list[Reject] = []
        if size + first > ROW_LIMIT_BYTES:
            rejects.append(_too_long(name, number, size + first))
            body = block[first:last]
        else:
            body = b"".join(pending) + block[:last]
        lines = _decode(body, name, number, rejects)
        yield number, lines, rejects
        number += len(lines)
        rest = block[last + 1 :]
        pending, size = ([rest] if rest else []), len(rest)
        block = following


def _decode(body: bytes, name: str, number: int, rejects: list[Reject]) -> list[str]:
    try:
        return body.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        lines = []
        for offset, line in enumerate(body.split(b"\n")):
            try:
                lines.append(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                lines.append("")
                found = excerpt(line.decode("utf-8", "backslashreplace"))
                reason = "invalid UTF-8"
                fix = f"Byte {error.start + 1} of the line is 0x{line[error.start]:02x}; save the file as UTF-8."
                rejects.append(Reject(name, number + offset, "", reason, fix, found))
        return lines


def jsonl(path: Path) -> Iterator[Block]:
    """One JSON object per line; empty lines are passed over."""
    with Handle(path) as handle:
        for number, lines, rejects in _lines(handle, path.name):
            yield _parse_lines(path.name, number, lines, rejects, handle.raw.tell())


def _parse_lines(name: str, number: int, lines: list[str], rejects: list[Reject], position: int) -> Block:
    numbers: Sequence[int] = range(number, number + len(lines))
    if not all(lines) or not all(map(str.strip, lines)):
        kept = [i for i, line in enumerate(lines) if line.strip()]
        lines, numbers = [lines[i] for i in kept], [numbers[i] for i in kept]
    try:
        rows = list(map(json.loads, lines))
        good = set(map(type, rows)) <= {dict}
    except (ValueError, RecursionError):
        good = False
    if not good:
        rows, kept_numbers = [], []
        for line, at in zip(lines, numbers, strict=True):
            row, problem = _parse_line(line)
            if problem:
                rejects.append(Reject(name, at, "", *problem, excerpt(line)))
            else:
                rows.append(row)
                kept_numbers.append(at)
        numbers = kept_numbers
    return Block(numbers[0] if numbers else number, rows, name, numbers, rejects, position=position)


def _parse_line(line: str) -> tuple[Any, tuple[str, str] | None]:
    if "\x00" in line:
        return None, ("NUL byte in the line", f"It is character {line.index(chr(0)) + 1}; the file is damaged there.")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return None, ("not valid JSON", f"{str(error).replace('line 1 column', 'column')}; expected one object a line.")
    if not isinstance(row, dict):
        return None, (f"the line is a JSON {json_type(row)}, not an object", "Expected one {...} a line.")
    return row, None


def json_type(value: Any) -> str:
    """What JSON calls a value's type."""
    return {list: "array", str: "string", bool: "boolean", int: "number", float: "number"}.get(type(value), "null")


def text_file(path: Path, style: str = "auto") -> Iterator[Block]:
    """A text file as lines, as paragraphs between empty lines, or as tagged tokens (CoNLL columns).

    Args:
        path: the file.
        style: ``lines``, ``paragraphs``, ``tags``, or ``auto``: tags when the last column of nearly every line is a
            tag, paragraphs when at least one line in twenty is empty, else lines.
    """
    with Handle(path) as handle:
        grouped: list[str] = []
        start, tail = 1, 1
        for number, lines, rejects in _lines(handle, path.name):
            if style == "auto":
                style = _text_style(lines)
            position = handle.raw.tell()
            if style == "lines":
                numbers = [number + i for i, line in enumerate(lines) if line.strip()]
                rows = [{"text": line.rstrip("\r")} for line in lines if line.strip()]
                yield Block(numbers[0] if numbers else number, rows, path.name, numbers, rejects, position=position)
                continue
            groups: list[tuple[int, list[str]]] = []
            for at, line in enumerate(lines, number):
                if line.strip():
                    if not grouped:
                        start = at
                    grouped.append(line.rstrip("\r"))
                elif grouped:
                    groups.append((start, grouped))
                    grouped = []
            tail = number + len(lines)
            yield _grouped(path.name, style, groups, rejects, position, tail)
        if grouped:
            yield _grouped(path.name, style, [(start, grouped)], [], handle.raw.tell(), tail)


def _text_style(lines: list[str]) -> str:
    filled = [line for line in lines[:2000] if line.strip()]
    columns = [line.split() for line in filled]
    tagged = sum(len(c) >= 2 and bool(TAG.match(c[-1])) for c in columns)
    if filled and tagged >= 0.95 * len(filled):
        return "tags"
    empty = sum(not line.strip() for line in lines)
    return "paragraphs" if empty > 0.05 * len(lines) else "lines"


def _grouped(
    name: str, style: str, groups: list[tuple[int, list[str]]], rejects: list[Reject], position: int, number: int
) -> Block:
    numbers = [start for start, _ in groups]
    if style == "paragraphs":
        rows: list[dict[str, Any]] = [{"text": "\n".join(lines)} for _, lines in groups]
        return Block(numbers[0] if numbers else number, rows, name, numbers, rejects, position=position)
    rows, kept = [], []
    for start, lines in groups:
        cells = [line.split("\t") if "\t" in line else line.split() for line in lines]
        if cells[0][0] == "-DOCSTART-":
            continue
        short = next((i for i, c in enumerate(cells) if len(c) < 2), None)
        if short is not None:
            fix = "Expected a token and its tag on each line, and an empty line between sentences."
            rejects.append(Reject(name, start + short, "tags", "a token without a tag", fix, excerpt(lines[short])))
            continue
        rows.append({"tokens": [c[0].strip() for c in cells], "tags": [c[-1].strip() for c in cells]})
        kept.append(start)
    return Block(kept[0] if kept else number, rows, name, kept, rejects, position=position)


def csv_file(path: Path) -> Iterator[Block]:
    """CSV or TSV with a header; rows are counted without the header. All values are text."""
    with Handle(path) as handle:
        text = io.TextIOWrapper(
            io.BufferedReader(_Raw(handle)), encoding="utf-8-sig", errors="surrogateescape", newline=""
        )
        csv.field_size_limit(1 << 30)  # the limit of a row is checked below, with a better message
        sample = text.readline()
        if sample[:2] in ("\udcff\udcfe", "\udcfe\udcff"):
            raise UserError("the file is UTF-16; save it as UTF-8.", where=path.name)
        delimiter = max(",\t;", key=sample.count) if sample.strip() else ","
        header = next(csv.reader([sample], delimiter=delimiter), [])
        if sample.count('"') % 2:
            raise UserError("the header line has an unclosed quote.", where=f"{path.name}, line 1")
        repeated = sorted({c for c in header if c and header.count(c) > 1})
        if repeated:
            raise UserError(f"the header names {', '.join(repeated)} more than once.", where=f"{path.name}, line 1")
        # pandas writes its index as a column with an empty name.
        keep = [i for i, c in enumerate(header) if c.strip() and not c.startswith("Unnamed: ")]
        names = [header[i].strip() for i in keep]
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        rows: list[dict[str, Any]] = []
        numbers: list[int] = []
        rejects: list[Reject] = []
        number, size = 0, 0
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                number += 1
                rejects.append(Reject(path.name, number, "", f"not valid CSV ({error})", "Check the quotes."))
                continue
            if not cells:
                continue
            number += 1
            length = sum(map(len, cells))
            if length > ROW_LIMIT_BYTES:
                rejects.append(_too_long(path.name, number, length))
            elif len(cells) != len(header):
                reason = f"{len(cells)} values for {len(header)} columns"
                fix = "Quote values that hold the separator."
                rejects.append(Reject(path.name, number, "", reason, fix, excerpt(delimiter.join(cells))))
            else:
                rows.append(dict(zip(names, [cells[i] for i in keep], strict=True)))
                numbers.append(number)
                size += length
            if len(rows) >= ROWS_PER_BLOCK or size > BLOCK_BYTES:
                yield Block(numbers[0], rows, path.name, numbers, rejects, position=handle.raw.tell())
                rows, numbers, rejects, size = [], [], [], 0
        yield Block(numbers[0] if numbers else 1, rows, path.name, numbers, rejects, position=handle.raw.tell())


def parquet_file(path: Path) -> Iterator[Block]:
    """Parquet, row groups read in slices."""
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"not a readable Parquet file ({str(error).splitlines()[0]}).", where=path.name) from error
    names = class_names(file.schema_arrow.metadata or {})
    number, size = 1, path.stat().st_size
    total = max(file.metadata.num_rows, 1)
    for batch in file.iter_batches(batch_size=2048):
        position = size * (number - 1 + batch.num_rows) // total
        yield Block(number, batch, path.name, names=names, position=position)
        number += batch.num_rows


def class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Class names by column, from the features that the `datasets` library writes into a schema's metadata."""
    about = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    found = {}
    for column, feature in about.items():
        inner = feature.get("feature", feature) if isinstance(feature, dict) else {}
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel":
            found[column] = list(inner["names"])
    return found


def listed(rows: Sequence[dict[str, Any]], name: str) -> Iterator[Block]:
    """Rows that are already in memory."""
    for start in range(0, len(rows), ROWS_PER_BLOCK):
        yield Block(start + 1, list(rows[start : start + ROWS_PER_BLOCK]), name)
