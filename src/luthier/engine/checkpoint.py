"""Checkpoints: written aside, synced, renamed; checksums verified on load; safetensors and JSON only.

``checkpoints/step-00000100/`` holds the trained tensors, the optimiser's, the methods' state and ``state.json``.
``last`` and ``best`` are relative links, so a moved folder still resumes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from luthier.core.errors import LuthierError
from luthier.core.store import atomic_folder

FORMAT = 1


def _digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def pack(value: Any, tensors: dict[str, torch.Tensor], path: str = "") -> Any:
    """JSON-able copy of a nested state; tensors move into ``tensors`` under their path."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().contiguous()
        return {"$tensor": path}
    if isinstance(value, dict):
        return {str(k): pack(v, tensors, f"{path}/{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [pack(v, tensors, f"{path}/{i}") for i, v in enumerate(value)]
    return value


def unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of :func:`pack` (tuples come back as lists)."""
    if isinstance(value, dict):
        if set(value) == {"$tensor"}:
            return tensors[value["$tensor"]]
        return {k: unpack(v, tensors) for k, v in value.items()}
    return [unpack(v, tensors) for v in value] if isinstance(value, list) else value


def _link(folder: Path, name: str, target: str) -> None:
    aside = folder / f".{name}.new"
    aside.unlink(missing_ok=True)
    aside.symlink_to(target, target_is_directory=True)
    os.replace(aside, folder / name)


def save(
    folder: Path,
    step: int,
    *,
    model: dict[str, torch.Tensor],
    optimizer: dict[str, torch.Tensor],
    state: dict[str, Any],
    keep: int,
    best: bool = False,
) -> Path:
    """Write the checkpoint of a step, point ``last`` (and ``best``) at it and rotate the older ones away.

    Args:
        folder: the run's ``checkpoints`` folder.
        step: optimiser steps done.
        model: trained tensors by name.
        optimizer: optimiser tensors by name.
        state: everything else; may hold tensors anywhere.
        keep: how many checkpoints stay; the best one always does.
        best: whether this is the best so far.
    """
    name = f"step-{step:08d}"
    with atomic_folder(folder / name) as aside:
        tensors: dict[str, torch.Tensor] = {}
        plain = pack(state, tensors)
        for file, content in (("model", model), ("optimizer", optimizer), ("methods", tensors)):
            save_file({k: v.detach().cpu().contiguous() for k, v in content.items()}, aside / f"{file}.safetensors")
        (aside / "state.json").write_text(json.dumps({"format": FORMAT, "step": step, **plain}, indent=1))
        sums = {p.name: _digest(p) for p in sorted(aside.iterdir())}
        (aside / "checksums.json").write_text(json.dumps(sums, indent=1))
    _link(folder, "last", name)
    if best:
        _link(folder, "best", name)
    kept = {os.readlink(folder / link) for link in ("last", "best") if (folder / link).is_symlink()}
    for old in sorted(folder.glob("step-*"))[:-keep]:
        if old.name not in kept:
            shutil.rmtree(old)
    return folder / name


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None. Folders left half-written by a kill have other names and are ignored."""
    found = sorted(p for p in folder.glob("step-*") if (p / "checksums.json").exists())
    return found[-1] if found else None


def load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """(trained tensors, optimiser tensors, state) of a checkpoint, after verifying its checksums.

    Raises:
        LuthierError: a file is missing or damaged.
    """
    sums = json.loads((path / "checksums.json").read_text())
    for name, wanted in sums.items():
        if not (path / name).is_file() or _digest(path / name) != wanted:
            raise LuthierError(
                f"{path / name} is missing or damaged (its checksum differs). Delete {path} to resume from the "
                "checkpoint before it."
            )
    state = json.loads((path / "state.json").read_text())
    if state["format"] != FORMAT:
        raise LuthierError(f"{path} has format {state['format']}; this version reads {FORMAT}.")
    tensors = load_file(path / "methods.safetensors")
    return load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors"), unpack(state, tensors)
