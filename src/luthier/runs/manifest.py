"""``manifest.json``: what is needed to say exactly what ran, and to run it again."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from luthier import __version__
from luthier.core.store import content_hash, write_json
from luthier.models.info import read_json

_PACKAGES = ("torch", "transformers", "tokenizers", "peft", "accelerate", "datasets", "safetensors", "numpy", "pyarrow")
FILE = "manifest.json"


def versions() -> dict[str, str]:
    """Versions of Luthier, Python and the packages that decide numbers; absent packages are left out."""
    found = {"luthier": __version__, "python": platform.python_version()}
    return found | {name: known for name in _PACKAGES if (known := _version(name))}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor_name() -> str:
    """The processor as the system calls it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def hardware() -> dict[str, Any]:
    """Operating system, processor, usable cores, memory in GiB, accelerators with their memory in GiB."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    accelerators = [
        {"name": p.name, "memory_gib": round(p.total_memory / 2**30, 1)}
        for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory / 2**30, 1),
        "accelerators": accelerators,
    }


def _sources(data: Any) -> dict[str, Any]:
    """Facts that tell the data of a run apart from any other: by source its rows and content hash."""
    if data is None or isinstance(data, Mapping):
        return dict(data or {})
    sources = {"train": data.train, "test": data.test, **{f"keep: {s.name}": s for s in data.keep}}
    return {
        name: {
            "layout": str(source.rows.layout),
            "rows": len(source.prepared),
            "fingerprint": source.rows.fingerprint,
        }
        for name, source in sources.items()
        if source is not None
    }


def write_manifest(folder: str | Path, plan: Any, loaded: Any, data: Any = None, **more: Any) -> Path:
    """Write the manifest at the start of a run.

    Args:
        folder: the run's folder.
        plan: the plan, for its recipe and methods.
        loaded: the opened base model (:class:`luthier.models.load.Loaded`).
        data: the run's data (:class:`luthier.runs.setup.Data`), or JSON-able facts about it.
        more: further JSON-able entries.

    Returns:
        The file.
    """
    recipe = (
        plan.recipe.model_dump(mode="json", fallback=str) if hasattr(plan.recipe, "model_dump") else dict(plan.recipe)
    )
    file = Path(folder) / FILE
    model = loaded.model
    parameters = [p for _, p in model.named_parameters()] if model is not None else []
    write_json(
        file,
        {
            "luthier": 1,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "arguments": sys.argv[1:],
            "seed": recipe.get("seed"),
            "recipe_hash": content_hash(recipe),
            "model": {
                "id": loaded.id,
                "task": loaded.task,
                "fingerprint": loaded.fingerprint,
                "parameters": sum(p.numel() for p in parameters),
                "labels": list(loaded.labels),
                "notes": list(loaded.notes),
            },
            "data": _sources(data),
            "methods": {c.method.axis + ":" + c.method.slug: c.options for c in plan.choices()},
            "versions": versions(),
            "hardware": hardware(),
            **more,
        },
    )
    return file


def finish_manifest(folder: str | Path, notes: Sequence[str] = (), **result: Any) -> Path:
    """Add the end of a run to its manifest: when, what came out (steps, tokens, seconds, peak memory), what to know."""
    file = Path(folder) / FILE
    end = {"finished": datetime.now(UTC).isoformat(timespec="seconds"), "result": result, "notes": list(notes)}
    write_json(file, {**read_json(file), **end})
    return file
