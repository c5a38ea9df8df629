"""Where rows come from: files, folders, hub datasets, the lab, and what is already in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from luthier.core.errors import UserError, did_you_mean
from luthier.core.store import content_hash
from luthier.data.formats import (
    COMPRESSIONS,
    Block,
    csv_file,
    jsonl,
    listed,
    parquet_file,
    text_file,
)
from luthier.data.json_files import json_file

if TYPE_CHECKING:
    from datasets import Dataset

READERS: dict[str, Callable[[Path], Iterator[Block]]] = {
    ".jsonl": jsonl,
    ".ndjson": jsonl,
    ".json": json_file,
    ".csv": csv_file,
    ".tsv": csv_file,
    ".parquet": parquet_file,
    ".pq": parquet_file,
    ".txt": text_file,
    ".text": text_file,
    ".conll": partial(text_file, style="tags"),
    ".bio": partial(text_file, style="tags"),
    ".iob": partial(text_file, style="tags"),
}
IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval"),
    "validation": ("validation", "valid", "val", "dev"),
}
ACCEPTED = "a file (.jsonl .json .csv .tsv .parquet .txt, also .gz), a folder of such files or of images, a hub \
dataset, or lab:<task>"


class Source:
    """Something that yields blocks of rows.

    Args:
        name: how it is called in reports.
        blocks: makes a fresh iterator over the blocks.
        fingerprint: computes the hash of the content.
        size: bytes on disk, for the progress bar; None when unknown.
    """

    def __init__(
        self,
        name: str,
        blocks: Callable[[], Iterator[Block]],
        fingerprint: Callable[[], str],
        size: int | None = None,
    ) -> None:
        self.name, self.size = name, size
        self._blocks, self._fingerprint = blocks, fingerprint

    def batches(self) -> Iterator[Block]:
        """Blocks of rows, each unpacking as ``(first_row_number, rows)``; memory is bounded by one block."""
        return self._blocks()

    def fingerprint(self) -> str:
        """A hash of the content: the same bytes give the same hash wherever they lie."""
        return self._fingerprint()


def open_source(spec: Any, *, base: Path | None = None, split: str = "train", style: str = "auto") -> Source:
    """The source that a specification names.

    Args:
        spec: a path, a hub dataset name, ``lab:<task>?key=value``, a list of row dicts or of paths, a
            ``datasets.Dataset`` or ``DatasetDict``.
        base: the folder that relative paths start from; the current one by default.
        split: which split of a hub dataset, a lab task, or a folder with files named after splits.
        style: how a .txt file is cut into rows: ``lines``, ``paragraphs``, ``tags`` or ``auto``.

    Raises:
        UserError: there is no such thing, or it is of no known kind.
    """
    if isinstance(spec, (list, tuple)):
        if spec and all(isinstance(s, (str, Path)) for s in spec):
            return _joined([open_source(s, base=base, split=split, style=style) for s in spec])
        if not all(isinstance(row, dict) for row in spec):
            raise UserError("a list as data must hold row dicts (or paths).", where="data")
        rows = list(spec)
        return Source("rows", lambda: listed(rows, "rows"), lambda: content_hash("rows", rows))
    if not isinstance(spec, (str, Path)):
        return _dataset(spec, split)
    text = str(spec)
    if text.startswith("lab:"):
        return _lab(text, split)
    path = Path(text).expanduser()
    path = path if path.is_absolute() or base is None else base / path
    if path.is_dir():
        return _folder(path, split, style)
    if path.is_file():
        return _file(path, style)
    if _looks_like_a_path(text):
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"there is no such file or folder.{did_you_mean(path.name, near)}", where=text)
    return _hub(text, split)


def _looks_like_a_path(text: str) -> bool:
    suffix = Path(text).suffix.lower()
    known = suffix in READERS or suffix in COMPRESSIONS or suffix in IMAGES or suffix == ".zst"
    return known or text.startswith((".", "/", "~")) or text.endswith("/") or text.count("/") > 1


def _format(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes]
    while suffixes and (suffixes[-1] in COMPRESSIONS or suffixes[-1] == ".zst"):
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _file(path: Path, style: str) -> Source:
    kind = _format(path)
    if kind not in READERS:
        raise UserError(f"files of type '{kind or 'none'}' cannot be read. Accepted: {ACCEPTED}.", where=path.name)
    if not os.access(path, os.R_OK):
        raise UserError("the file may not be read (its permissions).", where=str(path))
    if path.stat().st_size == 0:
        raise UserError("the file is empty.", where=path.name)
    reader = partial(text_file, style=style) if READERS[kind] is text_file else READERS[kind]

    def blocks() -> Iterator[Block]:
        for block in reader(path):
            block.folder = path.parent
            yield block

    return Source(path.name, blocks, lambda: content_hash(path.name, style, path), path.stat().st_size)


def _joined(parts: Sequence[Source], name: str | None = None) -> Source:
    def blocks() -> Iterator[Block]:
        done = 0
        for part in parts:
            for block in part.batches():
                block.position += done
                yield block
            done += part.size or 0

    sizes = [p.size for p in parts]
    return Source(
        name or ", ".join(p.name for p in parts),
        blocks,
        lambda: content_hash(*[p.fingerprint() for p in parts]),
        None if None in sizes else sum(s or 0 for s in sizes),
    )


def _folder(path: Path, split: str, style: str) -> Source:
    """The files of a folder; where names tell splits apart, only those of the wanted one."""
    words = SPLITS.get(split, (split,))
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        from datasets import load_from_disk

        return _dataset(load_from_disk(str(path)), split, path.name)
    for word in words:
        if (path / word).is_dir():
            return _folder(path / word, split, style)
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    data = [p for p in files if _format(p) in READERS and p.stem.lower() not in ("readme", "license", "citation")]
    if data:
        every = {w for group in SPLITS.values() for w in group}
        named = [p for p in data if every & set(_words(p))]
        chosen = [p for p in data if set(words) & set(_words(p))] if named else data
        if not chosen:
            raise UserError(
                f"no file for split '{split}' (found: {', '.join(p.name for p in data[:8])}). Name the file.",
                where=str(path),
            )
        return _joined([_file(p, style) for p in chosen], path.name)
    images = [p for p in files if p.suffix.lower() in IMAGES]
    if not images:
        raise UserError(f"the folder holds no data. Accepted: {ACCEPTED}.", where=str(path))
    loose = next((p for p in images if p.parent == path), None)
    if loose is not None:
        raise UserError(
            "an image folder holds one folder of images for each class, but this image has no class folder.",
            where=str(loose),
        )
    rows = [{"image": str(p), "label": p.relative_to(path).parts[0]} for p in images]
    return Source(path.name, lambda: listed(rows, path.name), lambda: content_hash("images", *images))


def _words(path: Path) -> list[str]:
    return path.name.lower().replace("-", ".").replace("_", ".").split(".")


def _lab(text: str, split: str) -> Source:
    from luthier import lab

    name, _, query = text.removeprefix("lab:").partition("?")
    options: dict[str, Any] = {}
    for key, value in parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)):
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    split = options.pop("split", split)
    rows = lab.dataset(name, split="train" if split == "train" else "test", **options)
    return Source(text, lambda: listed(rows, text), lambda: content_hash("lab", rows))


def _hub(name: str, split: str) -> Source:
    from datasets import load_dataset

    repository, _, config = name.partition(":")
    try:
        loaded = load_dataset(repository, config or None, split=split)
    # The hub client raises many kinds of errors; all mean that the name cannot be had.
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"there is no such file, and as a hub dataset it cannot be loaded ({type(error).__name__}: {line}). "
            f"Accepted: {ACCEPTED}.",
            where=name,
        ) from error
    return _dataset(loaded, split, name)


def _dataset(value: Any, split: str, name: str = "dataset") -> Source:
    from datasets import ClassLabel, Dataset, DatasetDict, Image
    from datasets import Sequence as Repeated

    if isinstance(value, DatasetDict):
        chosen = next((w for w in SPLITS.get(split, (split,)) if w in value), None)
        if chosen is None:
            raise UserError(f"has no split '{split}'; it has: {', '.join(value)}.", where=name)
        value = value[chosen]
    if not isinstance(value, Dataset):
        raise UserError(f"cannot read data from a {type(value).__name__}. Accepted: {ACCEPTED}.", where="data")
    names = {}
    for column, feature in value.features.items():
        inner = getattr(feature, "feature", feature) if isinstance(feature, Repeated) else feature
        if isinstance(inner, ClassLabel):
            names[column] = list(inner.names)
        if isinstance(feature, Image):
            value = value.cast_column(column, Image(decode=False))

    def blocks() -> Iterator[Block]:
        number = 1
        for table in value.with_format("arrow").iter(2048):
            for batch in table.combine_chunks().to_batches():
                yield Block(number, batch, name, names=names)
                number += batch.num_rows

    return Source(name, blocks, partial(dataset_hash, value))


def dataset_hash(value: Dataset, columns: Sequence[str] | None = None) -> str:
    """A hash of a dataset's rows (of some columns), whatever it is called and wherever it is cached."""
    import hashlib

    digest = hashlib.sha256()
    view = value.select_columns(list(columns)) if columns else value
    for table in view.with_format("arrow").iter(4096):
        for batch in table.combine_chunks().to_batches():
            # Serialising writes exactly the rows of the slice, whatever buffers they lie in.
            digest.update(batch.replace_schema_metadata(None).serialize())
    return digest.hexdigest()[:32]
