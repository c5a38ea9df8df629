"""Save a model so that plain transformers (or plain peft, for an adapter) opens it without Luthier.

The folder is whole or absent. Tied embeddings are tied in config.json exactly when they are one tensor in memory, the
generation settings pass transformers' own validation and know the tokenizer's stop token, and the cache is on.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.core.store import atomic_folder, write_json
from luthier.models.info import read_json
from luthier.models.quiet import quiet

# What Luthier remembers about a model beside the files of transformers and peft, which ignore it.
RECORD = "luthier.json"
# Settings of generation that only sampling reads; transformers refuses to save them beside do_sample: false.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def save(
    model: Any,
    processor: Any,
    folder: str | Path,
    *,
    dtype: str | None = None,
    task: str | None = None,
    labels: Sequence[str] = (),
    base_fingerprint: str | None = None,
    prompts: dict[str, Any] | None = None,
    state: dict[str, Any] | None = None,
) -> Path:
    """Save a model, or the adapter of a ``peft.PeftModel``, with its tokenizer or image processor.

    Args:
        model: a transformers or peft model; its generation settings are put in order.
        processor: saved beside it; None to leave it out.
        folder: replaced as a whole.
        dtype: ``float32``, ``bfloat16`` or ``float16``; by default as in memory.
        task: recorded with an adapter, whose own files do not always tell.
        labels: recorded with an adapter.
        base_fingerprint: recorded with an adapter, so that it is not opened on another base.
        prompts: how prompts were written in training, where the tokenizer alone does not tell
            (:attr:`luthier.data.render.Renderer.prompts`); recorded, so that generation writes them alike.
        state: the whole state dict, where the parameters in memory are only parts (sharded training).

    Returns:
        The folder.
    """
    folder = Path(folder)
    about: dict[str, Any] = {"prompts": prompts}
    with atomic_folder(folder) as aside:
        if hasattr(model, "peft_config"):
            write_adapter(model, aside, state=state)
            about |= {"task": task, "labels": list(labels), "base_fingerprint": base_fingerprint}
        else:
            write_model(model, processor, aside, dtype=dtype, state=state)
        if about := {k: v for k, v in about.items() if v}:
            write_json(aside / RECORD, about)
        if processor is not None:
            write_processor(processor, aside)
    return folder


def write_model(
    model: Any, processor: Any, folder: Path, *, dtype: str | None = None, state: dict[str, Any] | None = None
) -> None:
    """Write configuration and weights into an existing folder."""
    import torch

    put_generation_in_order(model, processor)
    if (tied := _tied(model)) is not None:
        model.config.tie_word_embeddings = tied
    if dtype is not None:
        kind = getattr(torch, dtype)
        # One cast per storage, so that tied tensors stay one.
        cast: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}
        whole, state = model.state_dict() if state is None else state, {}
        for name, tensor in whole.items():
            key = (tensor.data_ptr(), tuple(tensor.shape))
            if key not in cast:
                cast[key] = tensor.to(kind) if tensor.is_floating_point() else tensor
            state[name] = cast[key]
    with quiet():
        model.save_pretrained(folder, state_dict=state)
    config = read_json(folder / "config.json")
    if dtype is not None:
        config["dtype"] = dtype
    if "use_cache" in config:
        config["use_cache"] = True
    write_json(folder / "config.json", config)
    _readable(folder, "config.json")


def write_adapter(model: Any, folder: Path, *, state: dict[str, Any] | None = None) -> None:
    """Write a peft adapter into an existing folder."""
    model.save_pretrained(folder, state_dict=state)
    # peft's own card template would stand where the run's card belongs.
    (folder / "README.md").unlink(missing_ok=True)
    _readable(folder, "adapter_config.json")


def _readable(folder: Path, like: str) -> None:
    """Give weight files the mode of another file; safetensors makes them readable by their owner alone."""
    mode = (folder / like).stat().st_mode
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


def write_processor(processor: Any, folder: Path) -> None:
    """Write a tokenizer or image processor; padding and truncation of the last call are not part of a tokenizer."""
    backend = getattr(processor, "backend_tokenizer", None)
    if backend is not None:
        backend.no_padding()
        backend.no_truncation()
    processor.save_pretrained(folder)


def prompts_of(folder: Path) -> dict[str, Any]:
    """How prompts were written when the model was trained; empty where nothing is recorded."""
    found: dict[str, Any] = read_json(file).get("prompts", {}) if (file := folder / RECORD).is_file() else {}
    return found


def put_generation_in_order(model: Any, processor: Any) -> None:
    """Make the model's generation settings valid, and let them stop at the tokenizer's end token."""
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    settings = copy.deepcopy(settings)
    if settings.do_sample is not True:
        for name in _SAMPLING:
            setattr(settings, name, None)
    eos = getattr(processor, "eos_token_id", None)
    if eos is not None:
        stops = settings.eos_token_id
        known = stops if isinstance(stops, list) else [] if stops is None else [stops]
        if eos not in known:
            settings.eos_token_id = [*known, eos] if known else eos
        pad = getattr(processor, "pad_token_id", None)
        settings.pad_token_id = pad if pad is not None else eos
        bos = getattr(processor, "bos_token_id", None)
        settings.bos_token_id = bos if bos is not None else settings.bos_token_id
    settings.use_cache = True
    model.generation_config = settings


def _tied(model: Any) -> bool | None:
    """Whether input and output embedding are one parameter; None for models without the two."""
    if not hasattr(model.config, "tie_word_embeddings"):
        return None
    pair = [getattr(m, "weight", None) for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    return None if pair[0] is None or pair[1] is None else pair[0] is pair[1]
