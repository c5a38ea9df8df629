"""Merge a peft adapter into its base, and prove on probe prompts that nothing changed.

The logits of the adapted model are compared with those of the merged model as it opens again from disk; when they
differ by more than rounding explains, nothing is left behind. Where the adapter changes one of two tied embeddings, the
two are untied first: merging into the shared tensor would change the other one as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from luthier.core.errors import LuthierError, UserError
from luthier.core.rng import stream
from luthier.core.store import atomic_folder, write_json
from luthier.functional.adapters import quantized, untie
from luthier.models.load import Loaded, load
from luthier.models.save import RECORD, prompts_of, write_model, write_processor

PROBES = (
    "Once upon a time, there was",
    "Question: what is 12 + 30? Answer:",
    "The capital of France is",
    "def add(a, b):\n    return",
    "1, 2, 3, 4,",
)
# Largest accepted difference relative to the largest logit, by the type the merged weights are stored in.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


@dataclass(frozen=True)
class MergeReport:
    """What merging did, measured.

    Attributes:
        folder: the merged model.
        probes: number of probe inputs.
        max_difference: largest absolute difference of a logit between adapter and merged model.
        max_logit: largest absolute logit of the adapted model.
        tolerance: the largest difference that would have been accepted.
        same_top1: share of probe positions with the same most likely token (or class).
        adapter_effect: largest absolute difference of a logit between base and adapted model, for scale.
        untied: whether input and output embedding had to be separated.
    """

    folder: str
    probes: int
    max_difference: float
    max_logit: float
    tolerance: float
    same_top1: float
    adapter_effect: float
    untied: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def merge(
    adapter: str | Path,
    folder: str | Path,
    *,
    dtype: str = "float32",
    tolerance: float | None = None,
    probes: Sequence[str] = PROBES,
) -> MergeReport:
    """Merge the adapter in a folder into its base and save the result as a plain model.

    Args:
        adapter: a peft adapter folder.
        folder: where the merged model goes; replaced as a whole, and left as it was when the check fails.
        dtype: type the merged weights are stored in.
        tolerance: accepted difference relative to the largest logit; by default by ``dtype``.
        probes: texts to compare on; sequences of random tokens are always added.

    Raises:
        UserError: no adapter, or an adapter that cannot be merged (prompt tuning, a quantised base).
        LuthierError: the merged model differs; the message says by how much.
    """
    if dtype not in _TOLERANCE:
        raise UserError(f"unknown dtype '{dtype}'. Accepted: {', '.join(_TOLERANCE)}.")
    loaded = load(adapter)
    if loaded.base is None:
        raise UserError("is a whole model, not an adapter: there is nothing to merge.", where=str(adapter))
    return merge_loaded(loaded, Path(folder), dtype=dtype, tolerance=tolerance, probes=probes)


@torch.no_grad()
def merge_loaded(
    loaded: Loaded,
    folder: Path,
    *,
    dtype: str = "float32",
    tolerance: float | None = None,
    probes: Sequence[str] = PROBES,
) -> MergeReport:
    """As :func:`merge`, for an adapter already opened; the opened model is consumed."""
    model = loaded.model
    _check_mergeable(model, str(loaded.folder))
    inputs = probe_inputs(loaded, probes)
    adapted = _logits(model, inputs)
    with model.disable_adapter():
        effect = _difference(adapted, _logits(model, inputs))
    untied = untie(model)
    merged = model.merge_and_unload(safe_merge=True)
    limit = _TOLERANCE[dtype] if tolerance is None else tolerance
    largest = max(float(x.abs().max()) for x in adapted)
    with atomic_folder(folder) as aside:
        write_model(merged, loaded.processor, aside, dtype=dtype)
        write_processor(loaded.processor, aside)
        if prompts := prompts_of(loaded.folder):
            write_json(aside / RECORD, {"prompts": prompts})
        del merged, model
        loaded.model = None
        again = load(aside, task=loaded.task)
        found = _logits(again.model, inputs)
        difference = _difference(adapted, found)
        agreement = [(a.argmax(-1) == b.argmax(-1)).float().mean() for a, b in zip(adapted, found, strict=True)]
        # Not `difference > limit`: a NaN must not pass.
        if not difference <= limit * max(1.0, largest):
            raise LuthierError(
                "the merged model differs from the adapter on probe prompts: largest logit difference "
                f"{difference:.3g}, accepted {limit * max(1.0, largest):.3g}. Nothing was written to {folder}; keep "
                "using the adapter, or merge in float32."
            )
    return MergeReport(
        folder=str(folder),
        probes=len(inputs),
        max_difference=difference,
        max_logit=largest,
        tolerance=limit * max(1.0, largest),
        same_top1=float(torch.stack(agreement).mean()),
        adapter_effect=effect,
        untied=untied,
    )


def _check_mergeable(model: Any, where: str) -> None:
    if not hasattr(model, "merge_and_unload"):
        kind = next(iter(model.peft_config.values())).peft_type
        raise UserError(
            f"an adapter of type {getattr(kind, 'value', kind)} cannot be merged into weights.", where=where
        )
    if reason := getattr(model.base_model, "unmergeable", ""):
        raise UserError(f"{reason} There is nothing to merge; keep using the adapter.", where=where)
    if quantized(model):
        raise UserError(
            "its base is quantised, and merging into quantised weights changes them; name the unquantised base as "
            "base_model_name_or_path in adapter_config.json.",
            where=where,
        )


def probe_inputs(loaded: Loaded, probes: Sequence[str]) -> list[dict[str, torch.Tensor]]:
    """Model inputs to compare two models on: the probe texts and four random token sequences, or random pictures."""
    draw = stream(0, "probe")
    if loaded.task == "image-classification":
        size = loaded.model.config.image_size
        channels = getattr(loaded.model.config, "num_channels", 3)
        sides = (size, size) if isinstance(size, int) else tuple(size)
        return [{"pixel_values": torch.randn(1, channels, *sides, generator=draw)} for _ in range(4)]
    vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
    texts = [loaded.processor(text, return_tensors="pt").input_ids[:, :64] for text in probes]
    drawn = [torch.randint(vocabulary, (1, 32), generator=draw) for _ in range(4)]
    return [{"input_ids": ids} for ids in (*texts, *drawn) if ids.numel()]


def _logits(model: Any, inputs: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    extra = {"use_cache": False} if "input_ids" in inputs[0] and hasattr(model.config, "use_cache") else {}
    return [model.eval()(**item, **extra).logits.float() for item in inputs]


def _difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))
