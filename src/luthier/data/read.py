"""Read, check and keep every row: from any source to one memory-mapped dataset in the canonical schema."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from luthier.core.errors import UserError, did_you_mean
from luthier.core.registry import NUMBER_TASKS, TOKEN_TASKS
from luthier.core.store import Store, content_hash
from luthier.data.convert import convert
from luthier.data.formats import Block
from luthier.data.layouts import (
    SCHEMA,
    STYLES,
    TASK_LAYOUTS,
    Layout,
    check_mapping,
    detect,
    no_layout,
    resolve_name,
)
from luthier.data.problems import Problems, Reject
from luthier.data.sources import open_source

if TYPE_CHECKING:
    from datasets import Dataset

KEPT_REJECTS = 20
CODE = sorted(p for p in Path(__file__).parent.glob("*.py") if p.stem not in ("render", "prepare", "inspect", "order"))


@dataclass
class ReadReport:
    """What reading found.

    Attributes:
        source: the name of what was read.
        layouts: file -> its layout and columns, in words.
        rows: good rows.
        rejected: reason -> number of rows left out.
        examples: the first rejected rows, in words.
        duplicated_ids: ids that more than one row has.
        duplicated_rows: rows whose content an earlier row already has.
        reject_file: where the rejected rows are listed; empty when there are none.
        stages: data stages run on the rows, each with the number of rows it left.
    """

    source: str = ""
    layouts: dict[str, str] = field(default_factory=dict)
    rows: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    duplicated_ids: int = 0
    duplicated_rows: int = 0
    reject_file: str = ""
    stages: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


@dataclass
class Rows:
    """Checked rows.

    Attributes:
        dataset: a memory-mapped dataset in the canonical schema (`luthier.data.layouts.SCHEMA`).
        layout: the layout of the first file.
        labels: sorted names of classes or tags; empty where there are none.
        report: what reading found.
        fingerprint: hash of the content and of the reading options.
    """

    dataset: Dataset
    layout: str
    labels: list[str]
    report: ReadReport
    fingerprint: str

    def __len__(self) -> int:
        return len(self.dataset)


@contextmanager
def progress_bar(title: str, total: int | None, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar on standard error; gives a function that takes how much is done in all."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not shown or not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)


def read(
    spec: Any,
    *,
    task: str = "causal-lm",
    layout: str = "auto",
    columns: Mapping[str, str] | None = None,
    bad_rows: str = "error",
    limit: int | None = None,
    reject_file: Path | None = None,
    base: Path | None = None,
    split: str = "train",
    cache: Path | None = None,
    progress: bool = True,
) -> Rows:
    """Read a source, check every row, and keep the rows on disk in the canonical schema.

    Args:
        spec: what :func:`luthier.data.sources.open_source` takes.
        task: the task, which decides the layouts that are looked for.
        layout: ``auto``, or one of :data:`luthier.data.layouts.NAMES`.
        columns: part -> column, where names are not recognised, such as ``{prompt: problem_text}``.
        bad_rows: ``error`` refuses the source at the first bad row; ``skip`` leaves bad rows out and lists them.
        limit: keep only the first rows.
        reject_file: where ``skip`` lists rejected rows with reasons, as JSON lines; beside the cached rows by default.
        base: the folder that relative paths start from.
        split: which split of a hub dataset, lab task or folder.
        cache: the store's folder; the user's cache by default.
        progress: show a progress bar when standard error is a terminal.

    Raises:
        UserError: no such source, unknown columns, mixed layouts, or a bad row; it names file, row and field.
    """
    if task not in TASK_LAYOUTS:
        hint = did_you_mean(task, TASK_LAYOUTS)
        raise UserError(f"unknown task '{task}'.{hint} Accepted: {', '.join(TASK_LAYOUTS)}.", where="model.task")
    if bad_rows not in ("error", "skip"):
        raise UserError(f"unknown value '{bad_rows}'. Accepted: error, skip.", where="data.bad_rows")
    name = resolve_name(layout, task)
    source = open_source(spec, base=base, split=split, style=STYLES.get(layout, "auto"))
    options = {"task": task, "layout": layout, "columns": dict(columns or {}), "bad_rows": bad_rows, "limit": limit}
    # Paths of images depend on where the file lies, so the folder belongs to the key for that task alone.
    place = str(base or Path.cwd()) + str(spec) if task == "image-classification" else ""
    key = content_hash(source.fingerprint(), options, place, *CODE)
    store = Store(cache)

    def make(folder: Path) -> None:
        reader = _Reader(task, name, dict(columns or {}), bad_rows, limit, folder)
        with reader, progress_bar(f"Checking {source.name}", source.size, progress) as advance:
            for block in source.batches():
                if not reader.take(block):
                    break
                advance(block.position)
        reader.finish(source.name)

    folder = store.get_or_make("rows", key, make)
    return _open(folder, key, reject_file)


def _open(folder: Path, key: str, reject_file: Path | None) -> Rows:
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    report = ReadReport(**about["report"])
    if report.rejected:
        listed = folder / "rejects.jsonl"
        if reject_file is not None:
            reject_file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(listed, reject_file)
        report.reject_file = str(reject_file or listed)
    dataset = open_arrow(folder / "rows.arrow", key)
    return Rows(dataset, about["layout"], about["labels"], report, key)


def open_arrow(path: Path, fingerprint: str) -> Dataset:
    """A memory-mapped dataset over an Arrow stream file."""
    from datasets import Dataset
    from datasets.table import MemoryMappedTable

    return Dataset(MemoryMappedTable.from_file(str(path)), fingerprint=fingerprint)


class _Reader:
    """Takes blocks, writes good rows, keeps count of the others."""

    def __init__(
        self, task: str, layout: str, mapping: dict[str, str], bad_rows: str, limit: int | None, folder: Path
    ) -> None:
        self.task, self.layout, self.mapping = task, layout, mapping
        self.skip, self.limit = bad_rows == "skip", limit
        self.sink = pa.OSFile(str(folder / "rows.arrow"), "wb")
        self.writer = pa.ipc.new_stream(self.sink, SCHEMA)
        self.rejects = (folder / "rejects.jsonl").open("w", encoding="utf-8")
        self.folder, self.report = folder, ReadReport()
        self.counts: Counter[str] = Counter()
        self.first: list[Reject] = []
        self.labels: set[str] = set()
        self.ids: list[np.ndarray] = []
        self.keys: list[np.ndarray] = []
        self.source, self.found, self.first_row, self.name = "", None, 0, ""  # type: str, Layout | None, int, str
        self.seen = 0

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.close()
        self.sink.close()
        self.rejects.close()

    def take(self, block: Block) -> bool:
        """Check and write a block; False once the limit is reached."""
        numbers = np.asarray(
            block.numbers if block.numbers is not None else range(block.first_row, block.first_row + len(block.rows)),
            dtype=np.int64,
        )
        self.seen += len(numbers) + len(block.rejects)
        for reject in block.rejects:
            self.reject(reject)
        if not len(numbers):
            return True
        problems = Problems(block.source, numbers)
        self.settle(block, numbers, problems)
        assert self.found is not None
        batch = convert(block, self.found, problems)
        for reject in sorted(problems.rejects, key=lambda r: r.row):
            self.reject(reject)
        if self.limit is not None:
            batch = batch.slice(0, self.limit - self.report.rows)
        self.writer.write_batch(batch)
        self.report.rows += batch.num_rows
        self.note(batch)
        return self.limit is None or self.report.rows < self.limit

    def settle(self, block: Block, numbers: np.ndarray, problems: Problems) -> None:
        """Decide the file's layout at its first block; later blocks, and every row, must agree with it."""
        if block.source != self.source:
            self.source, self.found = block.source, None
        if isinstance(block.rows, pa.RecordBatch):
            if self.found is None:
                names = block.rows.schema.names
                present = [c for c in names if block.rows.column(c).null_count < block.rows.num_rows]
                self.decide(present, names, block.source, int(numbers[0]))
            self.mixed_nulls(block, problems)
            return
        sets = list(map(tuple, block.rows))
        distinct = dict.fromkeys(sets)
        if self.found is None:
            filled = {k for row in block.rows for k, v in row.items() if v is not None}
            known = [s for s in distinct if self.detect([c for c in s if c in filled])]
            chosen = known[0] if known else next(iter(distinct))
            self.decide(
                [c for c in chosen if c in filled], list(chosen), block.source, int(numbers[sets.index(chosen)])
            )
        assert self.found is not None
        for columns in distinct:
            other = self.detect(columns)
            if other is not None and dict(other.fields) != dict(self.found.fields):
                # A column that only some rows have may itself suggest another layout; what counts is the file's own.
                if set(self.found.fields.values()) <= set(columns):
                    continue
                for index in [i for i, s in enumerate(sets) if s == columns]:
                    self.mixed(index, other, problems)
        self.mixed_nulls(block, problems)

    def mixed(self, index: int, other: Layout, problems: Problems) -> None:
        assert self.found is not None
        fix = (
            f"Row {self.first_row} has the layout {self.found.describe()}, row {problems.numbers[index]} "
            f"{other.describe()}: put each layout in a file of its own."
        )
        problems.add(index, "", "mixed layouts in one file", fix)

    def mixed_nulls(self, block: Block, problems: Problems) -> None:
        """A row whose own column is null while another layout's are filled belongs to that other layout."""
        assert self.found is not None
        column = next(iter(self.found.fields.values()))
        if isinstance(block.rows, pa.RecordBatch):
            null = pc.indices_nonzero(block.rows.column(column).is_null()).to_pylist()
        else:
            null = [i for i, row in enumerate(block.rows) if row.get(column) is None]
        for index in null:
            row = block.rows[index] if isinstance(block.rows, list) else block.rows.slice(index, 1).to_pylist()[0]
            other = self.detect([k for k, v in row.items() if v is not None])
            if other is not None and dict(other.fields) != dict(self.found.fields):
                self.mixed(index, other, problems)

    def detect(self, columns: Any) -> Layout | None:
        mapping = {p: c for p, c in self.mapping.items() if c in columns}
        return detect(columns, self.task, self.layout, mapping)

    def decide(self, filled: list[str], columns: list[str], source: str, row: int) -> None:
        check_mapping(self.mapping, columns, source)
        self.found = self.detect(filled) or self.detect(columns)
        if self.found is None:
            raise no_layout(columns, self.task, self.layout, self.mapping, f"{source}, row {row}")
        self.first_row = row
        self.report.layouts[source] = self.found.describe()
        self.name = self.name or self.found.name

    def reject(self, reject: Reject) -> None:
        self.counts[reject.reason] += 1
        if len(self.first) < KEPT_REJECTS:
            self.first.append(reject)
        self.rejects.write(json.dumps(asdict(reject), ensure_ascii=True) + "\n")

    def note(self, batch: pa.RecordBatch) -> None:
        """Keep 8 bytes of each id and key, to count those that repeat."""
        keys = batch.column("key")
        self.keys.append(_short(keys.to_pylist()))
        ids = batch.column("id").drop_null()
        if len(ids):
            import hashlib

            self.ids.append(_short([hashlib.blake2b(i.encode(), digest_size=8).hexdigest() for i in ids.to_pylist()]))
        if self.task not in (*TOKEN_TASKS, *NUMBER_TASKS):
            self.labels |= label_names(batch)

    def finish(self, source: str) -> None:
        """Write what was found, once the files are closed.

        Raises:
            UserError: a row was bad (unless bad rows are skipped), or no row is left.
        """
        bad = sum(self.counts.values())
        if bad and not self.skip:
            raise self.first[0].error(bad - 1)
        if not self.report.rows:
            if bad:
                raise UserError(f"all {bad} rows are bad; the first: {self.first[0].error()}", where=source)
            raise UserError("there are no rows in it.", where=source)
        self.report.source, self.report.rejected = source, dict(self.counts.most_common())
        self.report.examples = [asdict(r) for r in self.first]
        self.report.duplicated_ids = _repeated(self.ids)[0]
        self.report.duplicated_rows = _repeated(self.keys)[1]
        about = {"report": self.report.to_dict(), "layout": self.name, "labels": sort_labels(self.labels)}
        (self.folder / "about.json").write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")


def label_names(table: pa.RecordBatch | pa.Table) -> set[str]:
    """The classes and tags in some canonical rows."""
    columns = [pc.drop_null(table.column("label")), pc.list_flatten(table.column("tags"))]
    return {name for column in columns for name in pc.unique(column).to_pylist()}


def sort_labels(names: Iterable[str]) -> list[str]:
    """Numbers by value, then words: the order that gives classes their indices."""
    return sorted(names, key=lambda s: (0, int(s), s) if s.lstrip("-").isdecimal() else (1, 0, s))


def _short(digests: list[str]) -> np.ndarray:
    return np.array([int(d[:16], 16) for d in digests], dtype=np.uint64)


def _repeated(parts: list[np.ndarray]) -> tuple[int, int]:
    """How many distinct values occur more than once, and how many occurrences are repeats."""
    if not parts:
        return 0, 0
    _, counts = np.unique(np.concatenate(parts), return_counts=True)
    return int((counts > 1).sum()), int((counts - 1).sum())
