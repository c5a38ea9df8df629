"""Bring a recipe to the present version, comments kept; also a flat file with the key names of other trainers."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from luthier.core.errors import UserError
from luthier.recipe.problems import FOREIGN
from luthier.recipe.schema import VERSION, Recipe
from luthier.recipe.source import read

_SCHEDULES = {
    "constant_with_warmup": "constant",
    "wsd": "warmup-stable-decay",
    "warmup_stable_decay": "warmup-stable-decay",
}
_REWRITTEN: dict[str, Callable[[Any], Any]] = {
    "training.schedule": lambda v: _SCHEDULES.get(v, v),
    "training.optimizer": lambda v: "adamw" if str(v).startswith(("adamw", "paged_adamw")) else v,
    "training.trackers": lambda v: (
        [] if v in ("none", None) else ["wandb"] if v == "all" else v if isinstance(v, list) else [v]
    ),
    "training.early_stopping": lambda v: v,
    "model.dtype": lambda v: {"bf16": "bfloat16", "fp32": "float32"}.get(v, v),
}


def migrate(path: Path) -> tuple[str, list[str]]:
    """The recipe's text in the present version, and one sentence per change (none where it is current).

    Raises:
        UserError: the file cannot be read, is not a recipe, or is of a later version.
    """
    read(path)  # says what is wrong with the file, with the line, before anything is changed
    yaml = YAML(typ="rt")
    yaml.preserve_quotes = True
    yaml.width = 4096
    data = yaml.load(path.read_text(encoding="utf-8-sig"))
    if not isinstance(data, CommentedMap):
        raise UserError("a recipe is a mapping of keys to values.", where=str(path))
    version = data.get("luthier", 0)
    if type(version) is not int or version < 0:
        raise UserError(f"luthier: must be the version of the recipe format, not {version!r}.", where=str(path))
    if version > VERSION:
        raise UserError(f"is of version {version}; this Luthier knows up to {VERSION}.", where=str(path))
    changes: list[str] = []
    for step in range(version, VERSION):
        changes += _STEPS[step](data)
    out = io.StringIO()
    yaml.dump(data, out)
    return out.getvalue(), changes


def _from_flat(data: CommentedMap) -> list[str]:
    """Version 0: no ``luthier`` key, perhaps the flat keys of other trainers."""
    changes: list[str] = []
    if "luthier" in data:
        data["luthier"] = 1
    else:
        data.insert(0, "luthier", 1)
    changes.append("luthier: 1 written")
    changes += _precision(data) + _batch(data)
    for key in [k for k in data if k in FOREIGN and not _is_ours(str(k), data[k])]:
        target = FOREIGN[key]
        outer, _, inner = target.partition(".")
        if inner and isinstance(data.get(outer), str):
            data[outer] = CommentedMap({"id" if outer == "model" else "train": data[outer]})
        if (inner and inner in (data.get(outer) or {})) or (not inner and outer in data and key != outer):
            changes.append(f"{key} left as it is: {target} is there already")
            continue
        value = data.pop(key)
        _put(data, target, _REWRITTEN.get(target, lambda v: v)(value))
        changes.append(f"{key} -> {target}")
    known = Recipe.model_fields
    changes += [
        f"{key} left as it is: Luthier has no such key" for key in data if key not in known and key not in FOREIGN
    ]
    return changes


def _is_ours(key: str, value: Any) -> bool:
    return key in Recipe.model_fields and isinstance(value, dict | list)


def _put(data: CommentedMap, target: str, value: Any) -> None:
    outer, _, inner = target.partition(".")
    if not inner:
        data[outer] = value
        return
    if data.get(outer) is None:
        data[outer] = CommentedMap()
    data[outer][inner] = value


def _precision(data: CommentedMap) -> list[str]:
    changes = []
    for key, precision in (("bf16", "bf16"), ("fp16", "")):
        if key in data:
            if data.pop(key) is True:
                if not precision:
                    changes.append("fp16 left out: Luthier trains in fp32 or bf16")
                    continue
                _put(data, "training.precision", precision)
                changes.append(f"{key} -> training.precision: {precision}")
            else:
                changes.append(f"{key}: false left out, it is the default")
    return changes


def _batch(data: CommentedMap) -> list[str]:
    """Others count rows per micro-batch, Luthier per optimiser step."""
    keys = ("per_device_train_batch_size", "micro_batch_size")
    key = next((k for k in keys if isinstance(data.get(k), int)), None)
    pieces = data.get("gradient_accumulation_steps", 1)
    if key is None or not isinstance(pieces, int):
        return []
    rows = data.pop(key)
    _put(data, "training.batch_rows", rows * pieces)
    return [
        f"{key}: {rows} x {pieces} micro-batches -> training.batch_rows: {rows * pieces} (rows per step, all processes)"
    ]


_STEPS: dict[int, Callable[[CommentedMap], list[str]]] = {0: _from_flat}
