"""``luthier doctor``: what is installed, what the machine has, and what would hinder a run. It writes nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from luthier.cli import common

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

# Shown when Luthier runs from its source and has no metadata of its own.
CORE = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers", "pyarrow", "pydantic")
# module -> (what it is for, what to install)
OPTIONAL = {
    "liger_kernel": ("training.head: liger", "luthier[liger]"),
    "triton": ("training.head: triton", "triton"),
    "flash_attn": ("model.attention: flash_attention_2", "flash-attn"),
    "lm_eval": ("evaluate --harness", "luthier[harness]"),
    "torchvision": ("faster image processing", "luthier[vision]"),
    "vllm": ("generation on GPUs", "luthier[vllm]"),
    "ray": ("trials on many machines", "luthier[cluster]"),
    "fastapi": ("serving", "luthier[serve]"),
    "bm25s": ("retrieval methods", "luthier[retrieval]"),
    "sentence_transformers": ("retrieval methods", "luthier[retrieval]"),
    "faiss": ("retrieval methods", "luthier[retrieval]"),
    "tensorboard": ("training.trackers: tensorboard", "tensorboard"),
    "wandb": ("training.trackers: wandb", "wandb"),
    "trackio": ("training.trackers: trackio", "trackio"),
}
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE", "LUTHIER_CACHE", "XDG_CACHE_HOME")


def doctor(as_json: common.Json = False) -> None:
    """Show versions, hardware, torch threads, the cache folder and optional packages; writes nothing."""
    sys.dont_write_bytecode = True
    facts = examine()
    common.emit(facts, as_json, lambda out: _human(out, facts))
    if facts["problems"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Everything the command shows, as JSON values; ``problems`` is empty on a machine that can train."""
    from luthier import __version__

    problems: list[str] = []
    required = _required()
    packages = {name: _version(name) for name in required}
    for name, accepted in required.items():
        have = packages[name]
        if have is None:
            problems.append(f"{name} is not installed: pip install '{name}{accepted}'")
        elif not accepted.contains(have, prereleases=True):
            problems.append(f"{name} is {have}, needed is {accepted}: pip install '{name}{accepted}'")
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        problems.append(f"Python {platform.python_version()} is outside 3.11 to 3.13")
    hardware = _hardware()
    torch_facts = _torch() if packages["torch"] else {}
    cores = hardware["cores usable"]
    if torch_facts.get("threads", 0) > cores:
        problems.append(f"torch uses {torch_facts['threads']} threads on {cores} cores: set OMP_NUM_THREADS={cores}")
    cache = _cache()
    if not cache["writable"]:
        problems.append(f"the cache folder {cache['folder']} cannot be written: set LUTHIER_CACHE to another")
    if cache["free GB"] < 2:
        problems.append(f"only {cache['free GB']} GB are free at the cache folder {cache['folder']}")
    optional = {
        module: {"installed": importlib.util.find_spec(module) is not None, "for": purpose, "install": install}
        for module, (purpose, install) in OPTIONAL.items()
    }
    return {
        "luthier": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "hardware": hardware,
        "torch": torch_facts,
        "cache": cache,
        "optional": optional,
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "problems": problems,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _required() -> dict[str, SpecifierSet]:
    """Package -> accepted versions, as Luthier's own metadata says."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    if _version("luthier") is None:
        return {name: SpecifierSet() for name in CORE}
    every = [Requirement(text) for text in importlib.metadata.requires("luthier") or ()]
    return {r.name: r.specifier for r in every if r.marker is None or r.marker.evaluate({"extra": ""})}


def _hardware() -> dict[str, Any]:
    import psutil

    from luthier.runs.manifest import processor_name

    memory = psutil.virtual_memory()
    limit = _limit("/sys/fs/cgroup/memory.max")
    total = min(memory.total, limit) if limit else memory.total
    return {
        "processor": processor_name(),
        "cores": os.cpu_count() or 1,
        "cores usable": _cores(),
        "memory GB": round(total / 1e9, 1),
        "memory free GB": round(min(memory.available, total) / 1e9, 1),
        "disk free GB here": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
    }


def _limit(file: str) -> int | None:
    """A limit of the container, None where there is none."""
    path = Path(file)
    text = path.read_text(encoding="ascii").split()[0] if path.is_file() else "max"
    return int(text) if text.isdigit() else None


def _cores() -> int:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _limit("/sys/fs/cgroup/cpu.max")
    if quota is None:
        return allowed
    period = int(Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()[1])
    return max(1, min(allowed, quota // period))


def _torch() -> dict[str, Any]:
    import torch

    devices = [
        {
            "name": torch.cuda.get_device_name(i),
            "memory GB": round(torch.cuda.get_device_properties(i).total_memory / 1e9, 1),
            "bf16": torch.cuda.is_bf16_supported(),
        }
        for i in range(torch.cuda.device_count())
    ]
    return {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "mkl": torch.backends.mkl.is_available(),
        "cuda": torch.version.cuda,
        "devices": devices or "CPU only",
    }


def _cache() -> dict[str, Any]:
    from luthier.core.store import cache_folder

    folder = cache_folder()
    there = folder
    while not there.exists():
        there = there.parent
    return {
        "folder": str(folder),
        "exists": folder.is_dir(),
        "writable": os.access(there, os.W_OK),
        "free GB": round(shutil.disk_usage(there).free / 1e9, 1),
    }


def _human(out: Any, facts: dict[str, Any]) -> None:
    shown = {k: v for k, v in facts.items() if k not in {"environment", "optional", "problems"}}
    common.show_tree(out, shown)
    out.print("[bold]environment[/bold]")
    for name, value in facts["environment"].items():
        out.print(f"  {name}={value}", markup=False, soft_wrap=True)
    out.print("[bold]optional packages[/bold]")
    for module, about in facts["optional"].items():
        state = "installed" if about["installed"] else f"not installed: pip install '{about['install']}'"
        out.print(f"  {module:<22}{about['for']:<36}{state}", markup=False, soft_wrap=True)
    out.print()
    for problem in facts["problems"]:
        out.print(f"problem: {problem}", markup=False, soft_wrap=True)
    if not facts["problems"]:
        out.print("No problem found.")
