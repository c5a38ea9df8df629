"""Fine-tuning transfer: carry an old fine-tuning over to a new version of the base, without training.

    D = m'_s - m_s            fine-tuned model minus the base it came from, float64
    m = m_t + scale * D       on the target, another version of that base; stored in the target's types

Carrying on to a newer base is recycling, to an older one backporting; the result is used as it is, or as the start of
further training (``model: <folder>``). Any three checkpoints of one architecture serve: the base of the change may
itself be an instruction-tuned model. Where the fine-tuned model has more embedding rows (added tokens), the base and
the target count as having zeros there, so a new token's row is the fine-tuned one; configuration, tokenizer and chat
template are the fine-tuned model's. Where the target's tokenizer is another one, ``embeddings: skip`` leaves
embeddings, head and tokenizer as the target has them.

The record says how far the bases are apart relative to the change, and which share of the changed entries the target's
type is too coarse to show.

Paper: "Efficient Model Development through Fine-tuning Transfer", 2025, arXiv 2503.20110. Released code:
pjlintw/finetuning-transfer.

Example::

    weights:
      - finetuning-transfer: {target: models/base-v2}
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.registry import weight_op
from luthier.functional.task_vectors import difference

_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "embed_out", "lm_head", "embedding", "shared.")


def transferred(tuned: torch.Tensor, base: torch.Tensor, target: torch.Tensor, scale: float) -> torch.Tensor:
    """Target + scale * (tuned - base) in float64, flat or with equal trailing dimensions.

    Rows that base and target lack at the end count as zeros.
    """
    result = difference(tuned, base).mul_(scale)
    result[: len(target)] += target
    return result


def is_embedding(name: str) -> bool:
    """Whether a tensor has a row per token: an embedding, or the head of a language model."""
    return any(part in name for part in _EMBEDDINGS) and "position" not in name


@weight_op(
    "finetuning-transfer",
    example={"target": "lab:nano", "scale": 1.0},
    paper="Efficient Model Development through Fine-tuning Transfer, 2025, arXiv 2503.20110",
)
class FinetuningTransfer:
    """Fine-tuning transfer: add what fine-tuning changed in an old base to a new version of it."""

    needs_base, elementwise, pads_rows = True, True, True
    count, foreign, like = (1, 1), ("target",), "target"

    def __init__(
        self,
        *,
        target: Annotated[str, Field(description="the other version of the base: a folder, hub id, or lab:nano")],
        scale: Annotated[float, Field(description="factor of the change")] = 1.0,
        embeddings: Annotated[
            Literal["pad", "skip"],
            Field(description="give missing rows zeros, or leave embeddings, head and tokenizer as the target's"),
        ] = "pad",
    ) -> None:
        self.sources = {"target": target}
        self.scale, self.embeddings = scale, embeddings
        self.onto = "target" if embeddings == "skip" else "tuned"
        self.recipe: dict[str, Any] = {}

    def prepare(self, sources: Mapping[str, Any], ctx: Any) -> None:
        """Check that the three belong together.

        Raises:
            UserError: names the first tensor, token or setting that differs.
        """
        tuned, base, target = (sources[label] for label in ("tuned", "base", "target"))
        shapes = {label: sources[label].shapes() for label in ("tuned", "base", "target")}
        for name, shape in shapes["tuned"].items():
            for label in ("base", "target"):
                self._check_shape(name, shape, label, shapes[label].get(name))
        for name in shapes["target"]:
            if name not in shapes["tuned"]:
                raise UserError(f"finetuning-transfer: tensor '{name}' of the target is not in the fine-tuned model.")
        for label, source in (("base", base), ("target", target)):
            self._check_tokens(label, source.tokens(), tuned.tokens())
            for key in ("rope_parameters", "rope_scaling", "rope_theta"):
                if source.config.get(key) != tuned.config.get(key):
                    warnings.warn(
                        f"finetuning-transfer: {key} of the {label} is {source.config.get(key)}, of the fine-tuned "
                        f"model {tuned.config.get(key)}; the result has that of the {self.onto} model.",
                        stacklevel=3,
                    )
        self._sums = {"change": 0.0, "between_bases": 0.0, "changed": 0, "lost": 0}

    def _check_shape(self, name: str, shape: tuple[int, ...], label: str, other: tuple[int, ...] | None) -> None:
        if other is None:
            raise UserError(f"finetuning-transfer: tensor '{name}' of the fine-tuned model is not in the {label}.")
        skipped = self.embeddings == "skip" and is_embedding(name)
        padded = is_embedding(name) and len(other) == len(shape) and other[1:] == shape[1:] and other[0] < shape[0]
        if other != shape and not skipped and not padded:
            raise UserError(
                f"finetuning-transfer: tensor '{name}' has shape {shape} in the fine-tuned model and {other} in the "
                f"{label}; only embeddings may differ, and only by rows that the fine-tuned model has more."
            )

    def _check_tokens(self, label: str, own: dict[str, int] | None, tuned: dict[str, int] | None) -> None:
        if self.embeddings == "skip" or own is None or tuned is None:
            return
        wrong = min(((i, token) for token, i in own.items() if tuned.get(token) != i), default=None)
        if wrong is not None:
            raise UserError(
                f"finetuning-transfer: tokenizer.json of the {label} is not that of the fine-tuned model: token "
                f"{wrong[1]!r} has id {wrong[0]} there and {tuned.get(wrong[1])} here. `embeddings: skip` transfers "
                "all but embeddings and head."
            )

    def tensor(self, name: str, tensors: Mapping[str, torch.Tensor], ctx: Any) -> torch.Tensor:
        """The target's entries with the change, in the target's type."""
        tuned, base, target = (tensors[label] for label in ("tuned", "base", "target"))
        if self.embeddings == "skip" and is_embedding(name):
            return target
        result = transferred(tuned, base, target, self.scale)
        stored = result.to(target.dtype)
        self._measure(tuned, base, target, stored)
        return stored

    def _measure(self, tuned: torch.Tensor, base: torch.Tensor, target: torch.Tensor, stored: torch.Tensor) -> None:
        flat = (t.reshape(-1) for t in (tuned, base, target, stored))
        common = min(base.numel(), target.numel())
        tuned, base, target, stored = (t[:common] for t in flat)
        change, apart = difference(tuned, base), difference(target, base)
        sums, changed = self._sums, int(torch.count_nonzero(change)) if self.scale else 0
        sums["change"] += float(change @ change)
        sums["between_bases"] += float(apart @ apart)
        sums["changed"] += changed
        # What did not change is stored as it was, so every entry that moved is one that changed.
        sums["lost"] += changed - int(torch.count_nonzero(stored != target))
        self.recipe = {
            "scale": self.scale,
            "norm_of_the_change": math.sqrt(sums["change"]),
            "norm_between_the_bases": math.sqrt(sums["between_bases"]),
            "share_of_changes_lost_to_rounding": sums["lost"] / max(sums["changed"], 1),
        }
