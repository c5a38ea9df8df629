"""Checked rows to token ids on disk, ready to train on, with a count of everything that could go wrong unseen."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from luthier.core.errors import UserError, did_you_mean
from luthier.core.registry import NUMBER_TASKS, TOKEN_TASKS
from luthier.core.store import Store, content_hash
from luthier.data.prepared_file import Schema, Writer
from luthier.data.read import Rows, label_names, open_arrow, progress_bar, sort_labels
from luthier.data.render import Rendered, Renderer
from luthier.data.sources import dataset_hash

if TYPE_CHECKING:
    from datasets import Dataset

BATCH = 1000
NOTHING_ALLOWED = 0.10
CODE = sorted(p for p in Path(__file__).parent.glob("*.py") if p.stem not in ("inspect", "order"))


@dataclass
class PrepareReport:
    """What rendering found.

    Attributes:
        task: the task.
        rows: rows given.
        kept: rows that can be learnt from.
        truncated: rows cut at the maximal length.
        dropped: rows left out because they are longer (``truncation: drop``).
        supervised_lost: supervised tokens that cutting took away.
        refused: rows that the chat template refuses (``bad_rows: skip``).
        refusals: why, with the first such row.
        nothing_to_learn: rows without a supervised token, left out.
        unsupervised_stop: rows whose last supervised token ends no answer, so stopping is not learnt.
        doubled_bos: rows that begin with two BOS tokens.
        tokens: tokens of the kept rows.
        supervised_tokens: targets among them.
        lengths: percentiles of the row length in tokens: p50, p90, p99, max.
        longest_row: file and number of the longest row.
        examples: problem -> the first rows that have it, as ``file:row``.
        labels: class -> rows (or tags).
        stop_tokens: the tokens that end an answer.
    """

    task: str = ""
    rows: int = 0
    kept: int = 0
    truncated: int = 0
    dropped: int = 0
    supervised_lost: int = 0
    refused: int = 0
    refusals: dict[str, str] = field(default_factory=dict)
    nothing_to_learn: int = 0
    unsupervised_stop: int = 0
    doubled_bos: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    lengths: dict[str, int] = field(default_factory=dict)
    longest_row: str = ""
    examples: dict[str, list[str]] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    stop_tokens: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


class Prepared:
    """Rows ready to train on, memory-mapped.

    Attributes:
        dataset: the prepared columns as a ``datasets.Dataset``.
        rows: the canonical rows they came from.
        task: the task.
        labels: class names by index; empty where there are none.
        report: what rendering found.
        fingerprint: hash of the rows, the tokenizer, the template, the options and the code.
    """

    def __init__(
        self, dataset: Dataset, rows: Dataset, task: str, labels: list[str], report: PrepareReport, fingerprint: str
    ) -> None:
        self.dataset, self.rows, self.task, self.labels = dataset, rows, task, labels
        self.report, self.fingerprint = report, fingerprint
        self._table = dataset.data.table
        self._chunks = self._table.to_batches()
        self._starts = np.cumsum([0, *(b.num_rows for b in self._chunks)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32 tokens of each row (0 for images)."""
        return self._column("length").astype(np.int32)

    @cached_property
    def keys(self) -> list[str]:
        """Of each row, a hash of its token ids and targets."""
        return self._table.column("key").to_pylist()

    def _column(self, name: str) -> np.ndarray:
        return np.concatenate([b.column(name).to_numpy(zero_copy_only=False) for b in self._chunks])

    def fetch(self, indices: Sequence[int]) -> dict[str, list[Any]]:
        """Every column of some rows; lists of numbers are numpy views of the file, read-only.

        Args:
            indices: positions in this dataset, any order.
        """
        index = np.asarray(indices, dtype=np.int64)
        if len(index) and (index.min() < 0 or index.max() >= len(self)):
            raise IndexError(f"row {index.min() if index.min() < 0 else index.max()} of {len(self)}")
        chunk = np.searchsorted(self._starts, index, side="right") - 1
        places = list(zip(chunk.tolist(), (index - self._starts[chunk]).tolist(), strict=True))
        return {name: self._values(name, places) for name in self._table.schema.names}

    def only(self, names: Sequence[str]) -> Prepared:
        """The same rows, of which :meth:`fetch` reads these columns alone (those that are there)."""
        kept = [n for n in self._table.schema.names if n in {*names, "length", "key", "index"}]
        narrow = self.dataset.select_columns(kept)
        return Prepared(narrow, self.rows, self.task, self.labels, self.report, self.fingerprint)

    def _values(self, name: str, places: list[tuple[int, int]]) -> list[Any]:
        kind = self._table.schema.field(name)
        if pa.types.is_list(kind.type):
            return [self._numbers(name, chunk)[0][slice(*self._edges(name, chunk, at))] for chunk, at in places]
        values = [self._chunks[chunk].column(name)[at].as_py() for chunk, at in places]
        return [json.loads(v) for v in values] if kind.metadata == {b"encoding": b"json"} else values

    def _numbers(self, name: str, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        if (name, chunk) not in self._views:
            array = self._chunks[chunk].column(name)
            self._views[name, chunk] = array.values.to_numpy(), array.offsets.to_numpy()
        return self._views[name, chunk]

    def _edges(self, name: str, chunk: int, at: int) -> tuple[int, int]:
        offsets = self._numbers(name, chunk)[1]
        return int(offsets[at]), int(offsets[at + 1])

    @cached_property
    def _views(self) -> dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]:
        return {}

    def canonical(self, index: int) -> dict[str, Any]:
        """The canonical row that a prepared row came from."""
        chunk = int(np.searchsorted(self._starts, index, side="right")) - 1
        place = self._chunks[chunk].column("index")[int(index - self._starts[chunk])].as_py()
        return self.rows[place]


def prepare(
    rows: Rows | Dataset,
    renderer: Renderer,
    *,
    labels: Sequence[str] | None = None,
    columns: Sequence[str] = (),
    bad_rows: str = "error",
    cache: Path | None = None,
    progress: bool = True,
) -> Prepared:
    """Render every row once and keep the result on disk, by the hash of all that decides it.

    Args:
        rows: what :func:`luthier.data.read.read` gave, or a dataset in the canonical schema.
        renderer: the rendering path.
        labels: class names by index (those of the training data, for a test set); by default those of the rows.
        columns: further columns of the rows, taken along for objectives and rewards (null where a row has none).
        bad_rows: ``skip`` leaves out and counts rows that the chat template refuses.
        cache: the store's folder; the user's cache by default.
        progress: show a progress bar when standard error is a terminal.

    Raises:
        UserError: rows longer than the maximal length (``truncation: error``), a label that is not in ``labels``,
            no row or too few rows with something to learn, or a row that cannot be rendered.
    """
    dataset = rows.dataset if isinstance(rows, Rows) else rows
    fingerprint = rows.fingerprint if isinstance(rows, Rows) else dataset_hash(rows)
    if renderer.task in (*TOKEN_TASKS, *NUMBER_TASKS):
        labels = []
    elif labels is None:
        labels = rows.labels if isinstance(rows, Rows) else _labels(dataset)
    labels = list(labels)
    key = content_hash(fingerprint, renderer.fingerprint, labels, list(columns), bad_rows, *CODE)

    def make(folder: Path) -> None:
        maker = _Maker(renderer, labels, columns, folder, bad_rows == "skip")
        with progress_bar("Preparing", len(dataset), progress) as advance, maker.writer:
            for start, batch in _batches(dataset):
                maker.take(start, batch)
                advance(start + len(batch))
        maker.finish()

    folder = Store(cache).get_or_make("prepared", key, make)
    report = PrepareReport(**json.loads((folder / "report.json").read_text(encoding="utf-8")))
    return Prepared(open_arrow(folder / "rows.arrow", key), dataset, renderer.task, labels, report, key)


def _batches(dataset: Dataset) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    start = 0
    for table in dataset.with_format("arrow").iter(BATCH):
        batch = table.to_pylist()
        yield start, batch
        start += len(batch)


def _labels(dataset: Dataset) -> list[str]:
    found: set[str] = set()
    for table in dataset.select_columns(["label", "tags"]).with_format("arrow").iter(BATCH):
        found.update(label_names(table))
    return sort_labels(found)


class _Maker:
    """Renders batches, counts what is wrong, writes what is right."""

    def __init__(self, renderer: Renderer, labels: list[str], columns: Sequence[str], folder: Path, skip: bool) -> None:
        self.skip = skip
        self.renderer, self.task, self.folder = renderer, renderer.task, folder
        self.index_of = {name: i for i, name in enumerate(labels)}
        self.columns, self.report = list(columns), PrepareReport(task=renderer.task)
        self.writer = Writer(folder / "rows.arrow", Schema(renderer.task, self.columns))
        self.label_counts: Counter[str] = Counter()
        self.lengths: list[np.ndarray] = []
        self.longest = 0
        encoder = renderer.encoder if renderer.has_text else None
        self.bos = [encoder.bos] * 2 if encoder and encoder.bos is not None else None
        self.stops = encoder.special if encoder else set()
        if encoder:
            self.report.stop_tokens = [encoder.tokenizer.convert_ids_to_tokens(i) for i in renderer.stop_ids]
        self.over: list[tuple[int, str]] = []
        self.overs = 0

    def take(self, start: int, rows: list[dict[str, Any]]) -> None:
        """Render, check and write one batch whose first row has position ``start``."""
        self.report.rows += len(rows)
        kept = []
        for offset, (row, rendered) in enumerate(zip(rows, self.render(rows), strict=True)):
            if rendered is not None and self.keeps(row, rendered):
                kept.append((start + offset, row, rendered))
        self.report.kept += len(kept)
        if kept:
            self.lengths.append(np.array([_length(r) for _, _, r in kept], dtype=np.int32))
            self.report.supervised_tokens += sum(self.targets(row, r) for _, row, r in kept)
            self.writer.write(kept, self.index_of)

    def render(self, rows: list[dict[str, Any]]) -> Sequence[Rendered | None]:
        """The batch rendered; None for a row that cannot be, where such rows are skipped."""
        try:
            return self.renderer.render_batch(rows)
        except UserError as error:
            if not self.skip:
                raise
            if len(rows) > 1:
                return [rendered for row in rows for rendered in self.render([row])]
            self.report.refused += 1
            self.report.refusals.setdefault(error.message, f"{rows[0]['source']}:{rows[0]['row']}")
            return [None]

    def keeps(self, row: dict[str, Any], rendered: Rendered) -> bool:
        """Whether the row is to be trained on; counts why not, and what is odd about it."""
        place = f"{row['source']}:{row['row']}"
        sides = [rendered] if rendered.rejected is None else [rendered, rendered.rejected]
        over = max(side.over for side in sides)
        if over:
            if self.renderer.truncation == "error":
                self.overs += 1
                self.over = [max([*self.over, (over, place)])]
                return False
            if self.renderer.truncation == "drop":
                self.report.dropped += 1
                self.note("dropped", place)
                return False
            self.report.truncated += 1
            self.note("truncated", place)
            self.report.supervised_lost += sum(side.lost for side in sides)
        if self.task in ("sequence-classification", "image-classification"):
            self.check_label(row["label"], row, "label")
        elif self.task == "token-classification":
            for tag in row["tags"]:
                self.check_label(tag, row, "tags")
        if not all(self.targets(row, side) for side in sides):
            self.report.nothing_to_learn += 1
            self.note("nothing_to_learn", place)
            return False
        if self.bos and rendered.input_ids[:2] == self.bos:
            self.report.doubled_bos += 1
            self.note("doubled_bos", place)
        # A stop that was cut off is counted as truncated; this one was never supervised.
        if self.task == "causal-lm" and not over and rendered.input_ids[rendered.spans[-1][1] - 1] not in self.stops:
            self.report.unsupervised_stop += 1
            self.note("unsupervised_stop", place)
        longest = max(len(side.input_ids) for side in sides)
        if longest > self.longest:
            self.longest, self.report.longest_row = longest, place
        return True

    def targets(self, row: dict[str, Any], rendered: Rendered) -> int:
        if self.task == "causal-lm":
            return rendered.supervised
        if self.task == "masked-lm":
            return sum(i not in self.stops for i in rendered.input_ids)
        return len(rendered.positions) if self.task == "token-classification" else 1

    def check_label(self, label: str | None, row: dict[str, Any], column: str) -> None:
        if label not in self.index_of:
            hint = did_you_mean(str(label), self.index_of)
            shown = ", ".join(list(self.index_of)[:20])
            raise UserError(
                f"the label '{label}' is not among those of the training data.{hint} Labels: {shown}.",
                where=f"{row['source']}, row {row['row']}, field '{column}'",
            )
        self.label_counts[str(label)] += 1

    def note(self, problem: str, place: str) -> None:
        listed = self.report.examples.setdefault(problem, [])
        if len(listed) < 5:
            listed.append(place)

    def finish(self) -> None:
        """Refuse what cannot be trained on; write the report.

        Raises:
            UserError: rows are too long, or too many have nothing to learn.
        """
        report, limit = self.report, self.renderer.max_length
        if self.overs:
            over, place = self.over[0]
            raise UserError(
                f"{self.overs} of {report.rows} rows are longer than the {limit} tokens that data.max_length or the "
                f"model takes; the longest, {place}, has {over + (limit or 0)}. Set `data.truncation` to drop (leave "
                "them out) or keep_start (cut them), or raise `data.max_length` where it is below the model's limit.",
                where="data.truncation",
            )
        nothing = report.nothing_to_learn
        if nothing > NOTHING_ALLOWED * report.rows or not report.kept:
            listed = ", ".join(report.examples.get("nothing_to_learn", report.examples.get("dropped", [])))
            raise UserError(
                f"{nothing} of {report.rows} rows have nothing to learn"
                + (f" and {report.dropped} are too long" if report.dropped else "")
                + (f" and {report.refused} are refused by the chat template" if report.refused else "")
                + f" (first: {listed}): no supervised token is left"
                + (f" within max_length {limit}. Raise `data.max_length`." if limit else ". Check the template."),
                where="data",
            )
        lengths = np.concatenate(self.lengths)
        report.tokens = int(lengths.sum(dtype=np.int64))
        at = np.percentile(lengths, [50, 90, 99, 100], method="higher")
        report.lengths = dict(zip(("p50", "p90", "p99", "max"), map(int, at), strict=True))
        report.labels = dict(sorted(self.label_counts.items()))
        text = json.dumps(report.to_dict(), ensure_ascii=False)
        (self.folder / "report.json").write_text(text, encoding="utf-8")


def _length(rendered: Rendered) -> int:
    rejected = len(rendered.rejected.input_ids) if rendered.rejected else 0
    return max(len(rendered.input_ids), rejected)
