"""Classifiers: one supervised position per example (sequences, images) or per word (tokens)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from luthier.core.protocols import Batch
from luthier.tasks.base import ROW_WEIGHT, Encoded, carried, pad, row_weights


def pooled(state: torch.Tensor, batch: Batch) -> torch.Tensor:
    """One vector per example: the mean of a layer over its real tokens (or patches)."""
    mask = batch.inputs.get("attention_mask")
    if mask is None or mask.shape != state.shape[:2]:
        return state.flatten(1, -2).mean(1)
    weight = mask.to(state)[..., None]
    return (state * weight).sum(1) / weight.sum(1).clamp(min=1)


class _PerExample:
    """One label per example."""

    name = ""
    reads: tuple[str, ...] = ()

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def _targets(self, labels: Any) -> torch.Tensor:
        return torch.as_tensor(np.asarray(labels), dtype=torch.long)

    def _batch(self, inputs: dict[str, torch.Tensor], rows: Mapping[str, Any], index_B: Any, columns: Any) -> Batch:
        target_N = self._targets(rows["label"])
        return Batch(
            inputs=inputs,
            position_N=torch.arange(target_N.numel()),
            target_N=target_N,
            weight_N=row_weights(rows, torch.arange(target_N.numel())),
            sequence_N=torch.arange(target_N.numel()),
            row_B=torch.as_tensor(np.asarray(index_B), dtype=torch.long),
            columns=carried(rows, columns),
            keys_B=list(rows["key"]) if "key" in rows else None,
        )

    def encode(self, model: torch.nn.Module, batch: Batch, *, hidden: bool = False) -> Encoded:
        """The model's own logits, one row per example."""
        out = model(**batch.inputs, output_hidden_states=hidden)
        layers = (lambda index: pooled(out.hidden_states[index], batch)) if hidden else None
        return Encoded(logits_NV=out.logits, layers=layers)


class SequenceClassification(_PerExample):
    """One class per text."""

    name = "sequence-classification"
    reads: tuple[str, ...] = ("input_ids", "label", ROW_WEIGHT)

    def collate(self, rows: Mapping[str, Sequence[Any]], index_B: Any, columns: Sequence[str] = ()) -> Batch:
        """Rows of ``input_ids`` and ``label``."""
        ids_BT, mask_BT = pad(rows["input_ids"], getattr(self.processor, "pad_token_id", None) or 0)
        return self._batch({"input_ids": ids_BT, "attention_mask": mask_BT.long()}, rows, index_B, columns)


class ImageClassification(_PerExample):
    """One class per picture."""

    name = "image-classification"
    reads: tuple[str, ...] = ("image", "label", ROW_WEIGHT)

    def collate(self, rows: Mapping[str, Sequence[Any]], index_B: Any, columns: Sequence[str] = ()) -> Batch:
        """Rows of ``image`` (path or bytes) and ``label``; pictures are decoded here."""
        from PIL import Image

        images = [
            Image.open(io.BytesIO(i["bytes"]) if i.get("bytes") else i["path"]).convert("RGB") for i in rows["image"]
        ]
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        return self._batch({"pixel_values": pixels}, rows, index_B, columns)


class TokenClassification:
    """One tag per word, at its first sub-token."""

    name = "token-classification"
    reads: tuple[str, ...] = ("input_ids", "positions", "tags", ROW_WEIGHT)

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def collate(self, rows: Mapping[str, Sequence[Any]], index_B: Any, columns: Sequence[str] = ()) -> Batch:
        """Rows of ``input_ids``, ``positions`` (first sub-token of each word) and ``tags``."""
        ids_BT, mask_BT = pad(rows["input_ids"], getattr(self.processor, "pad_token_id", None) or 0)
        width = ids_BT.shape[1]
        counts = torch.tensor([len(p) for p in rows["positions"]])
        sequence_N = torch.arange(len(counts)).repeat_interleave(counts)
        token_N = torch.from_numpy(np.concatenate([np.asarray(p, dtype=np.int64) for p in rows["positions"]]))
        supervised_BT = torch.zeros_like(mask_BT)
        supervised_BT[sequence_N, token_N] = True
        return Batch(
            inputs={"input_ids": ids_BT, "attention_mask": mask_BT.long()},
            position_N=sequence_N * width + token_N,
            target_N=torch.from_numpy(np.concatenate([np.asarray(t, dtype=np.int64) for t in rows["tags"]])),
            weight_N=row_weights(rows, sequence_N),
            sequence_N=sequence_N,
            row_B=torch.as_tensor(np.asarray(index_B), dtype=torch.long),
            columns=carried(rows, columns),
            keys_B=list(rows["key"]) if "key" in rows else None,
            supervised_BT=supervised_BT,
        )

    def encode(self, model: torch.nn.Module, batch: Batch, *, hidden: bool = False) -> Encoded:
        """The model's logits gathered at the first sub-token of each word."""
        out = model(**batch.inputs, output_hidden_states=hidden)

        def at_positions(state: torch.Tensor) -> torch.Tensor:
            return state.reshape(-1, state.shape[-1]).index_select(0, batch.position_N)

        layers = (lambda index: at_positions(out.hidden_states[index])) if hidden else None
        return Encoded(logits_NV=at_positions(out.logits), layers=layers)
