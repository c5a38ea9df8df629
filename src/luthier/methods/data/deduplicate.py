"""Remove repeated rows: exact copies, or near-duplicates by MinHash.

    exact   equal content
    near    estimated Jaccard similarity of character n-grams >= threshold with a row kept before

Of several duplicates the first row stays. ``normalise`` (NFKC, lower case, single spaces) is only for the comparison;
rows that stay are unchanged. Two rows with different labels or tags are never duplicates. Near-duplicate search is by
locality-sensitive bands of the signatures, so its cost grows with the rows, not with the pairs; the estimate has a
standard deviation of sqrt(J (1 - J) / permutations). Short rows that differ in one number resemble each other: use
``exact`` for such data, or a higher threshold.

Source: "On the resemblance and containment of documents", Broder, 1997; for its effect on language models
"Deduplicating Training Data Makes Language Models Better", 2021, arXiv 2107.06499.

Example::

    data:
      train: rows.jsonl
      stages:
        - deduplicate: {mode: near, threshold: 0.8}
"""

from __future__ import annotations

import hashlib
import logging
import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from luthier.core.errors import UserError, did_you_mean
from luthier.core.registry import data_stage
from luthier.functional.minhash import NearDuplicates, signatures

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("luthier")

TEXTS = ("system", "text", "prompt", "completion", "rejected", "messages", "rejected_messages", "tools", "tokens")
LABELS = ("label", "tags")
BATCH_ROWS = 1000


def normalised(text: str) -> str:
    """NFKC, lower case, runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else "\x1e".join(str(v) for v in value)


def _digest(parts: Sequence[bytes]) -> bytes:
    # Lengths are hashed with the parts, so that moving text from one column to the next makes another row.
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


@data_stage(
    "deduplicate",
    example={"mode": "exact"},
    paper="Deduplicating Training Data Makes Language Models Better, 2021, arXiv 2107.06499",
)
class Deduplicate:
    """Remove repeated rows: exact copies, or near-duplicates found by MinHash."""

    def __init__(
        self,
        *,
        mode: Annotated[Literal["exact", "near"], Field(description="equal rows, or similar ones too")] = "exact",
        threshold: Annotated[float, Field(gt=0, le=1, description="near: smallest Jaccard similarity")] = 0.8,
        ngram: Annotated[int, Field(ge=1, le=64, description="near: characters per piece of text")] = 5,
        permutations: Annotated[int, Field(ge=16, le=1024, description="near: length of the signatures")] = 128,
        columns: Annotated[
            list[str] | None,
            Field(min_length=1, description="canonical columns to compare; by default all content of a row"),
        ] = None,
        normalise: Annotated[bool, Field(description="ignore case, white space and Unicode variants")] = False,
        seed: Annotated[int, Field(ge=0, description="seed of the hash functions")] = 0,
    ) -> None:
        accepted = (*TEXTS, *LABELS, "image")
        for name in columns or ():
            if name not in accepted:
                raise UserError(
                    f"deduplicate: unknown column '{name}'.{did_you_mean(name, accepted)} "
                    f"Accepted: {', '.join(accepted)}."
                )
        if mode == "near" and columns and not set(columns) & set(TEXTS):
            raise UserError("deduplicate: mode: near compares text; add a text column to columns, or use mode: exact.")
        self.mode, self.threshold, self.ngram, self.permutations = mode, threshold, ngram, permutations
        self.columns, self.normalise, self.seed = columns, normalise, seed
        # Counts of the last run.
        self.removed = {"exact": 0, "near": 0}

    def run(self, dataset: Dataset, ctx: Any) -> Dataset:
        """The rows that are not duplicates of an earlier one, in order.

        Raises:
            UserError: near-duplicates were asked for, and no row has text.
        """
        keep = self.keep(dataset)
        logger.info(
            "deduplicate: %d of %d rows stay (%d exact, %d near duplicates removed)",
            *(len(keep), len(dataset), self.removed["exact"], self.removed["near"]),
        )
        return dataset if len(keep) == len(dataset) else dataset.select(keep)

    def keep(self, dataset: Dataset) -> np.ndarray:
        """Indices (int64) of the rows that stay."""
        self.removed = {"exact": 0, "near": 0}
        near = NearDuplicates(self.threshold, self.permutations) if self.mode == "near" else None
        seen: set[bytes] = set()
        kept: list[int] = []
        any_text = False
        start = 0
        for texts, labels, images in self._batches(dataset):
            fresh: list[int] = []
            for i, (text, label, image) in enumerate(zip(texts, labels, images, strict=True)):
                key = _digest([*(t.encode() for t in (*text, *label)), image])
                if key in seen:
                    self.removed["exact"] += 1
                else:
                    seen.add(key)
                    fresh.append(i)
            if near is None:
                kept += [start + i for i in fresh]
            else:
                joined = ["\n".join(t for t in texts[i] if t) for i in fresh]
                any_text = any_text or any(joined)
                found = signatures(joined, n=self.ngram, permutations=self.permutations, seed=self.seed)
                for i, whole, signature_P in zip(fresh, joined, found, strict=True):
                    group = _digest([*(t.encode() for t in labels[i]), images[i]])
                    # Rows without text have nothing in common but their emptiness.
                    if not whole or near.add(signature_P, group):
                        kept.append(start + i)
                    else:
                        self.removed["near"] += 1
            start += len(texts)
        if near is not None and start and not any_text:
            raise UserError("deduplicate: mode: near compares text, and these rows have none; use mode: exact.")
        return np.asarray(kept, dtype=np.int64)

    def _batches(self, dataset: Dataset) -> Iterator[tuple[list[tuple[str, ...]], list[tuple[str, ...]], list[bytes]]]:
        """(texts, labels, image bytes) of each row, a thousand rows at a time."""
        wanted = [c for c in (self.columns or (*TEXTS, *LABELS, "image")) if c in dataset.column_names]
        text_columns = [c for c in wanted if c in TEXTS]
        label_columns = [c for c in dataset.column_names if c in LABELS]
        chosen = list(dict.fromkeys([*wanted, *label_columns]))
        clean = normalised if self.normalise else str
        for table in dataset.select_columns(chosen).with_format("arrow").iter(batch_size=BATCH_ROWS):
            rows = len(table)
            columns = {name: table.column(name).to_pylist() for name in chosen}
            texts = [tuple(clean(_as_text(columns[c][i])) for c in text_columns) for i in range(rows)]
            labels = [tuple(_as_text(columns[c][i]) for c in label_columns) for i in range(rows)]
            images = [_image(columns["image"][i]) if "image" in wanted else b"" for i in range(rows)]
            yield texts, labels, images


def _image(value: Any) -> bytes:
    """What identifies an image: the hash of its bytes, else its path."""
    if not value:
        return b""
    if value.get("bytes"):
        return hashlib.blake2b(value["bytes"], digest_size=16).digest()
    return str(value.get("path") or "").encode()
