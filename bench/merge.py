"""What merging costs: speed against a plain copy of the inputs, and peak memory, on generated checkpoints.

    python bench/merge.py [--gigabytes 4] [--only ties,slerp] [--folder FOLDER] [--json FILE]

A base and two models of random float32 weights, laid out as a Llama with an embedding of a quarter of it, are written,
and deleted at the end. Every operation works in a process of its own, and before it the files that it reads are copied;
both begin with files that are not in the page cache, and end when what they wrote is on the disk. The ratio is the
copy's time over the merge's, so 1 is as fast as a copy. Peak memory is the growth of the process's resident set over
what it had after its imports and a small merge, against two copies of the largest tensor and 200 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from luthier.models.shards import Shards, ShardWriter

AIM, MEMORY = 0.7, 200e6
# Operation -> (models, whether the base is read, options).
OPERATIONS: dict[str, tuple[tuple[str, ...], bool, dict[str, Any]]] = {
    "model-soups": (("a", "b"), False, {}),
    "task-arithmetic": (("a", "b"), True, {}),
    "lines": (("a",), True, {"alpha": 0.3}),
    "slerp": (("a", "b"), False, {}),
    "dare": (("a", "b"), True, {}),
    "ties": (("a", "b"), True, {}),
    "finetuning-transfer": (("a",), True, {"target": "b"}),
}
WORKER = """
import json, resource, sys, time
import luthier.runs.merging, torch
from luthier.runs.api import merge
given = json.loads(sys.argv[1])
torch.set_num_threads(given.pop("threads"))
merge(given["small"], given["folder"] + "-small", op="slerp")  # what is imported on the way is not merging
del given["small"]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, started = peak(), time.perf_counter()
merge(given.pop("models"), given.pop("folder"), **given)
print(json.dumps({"seconds": time.perf_counter() - started, "peak": peak() - before}))
"""


def layout(gigabytes: float) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, types and shapes of a model of about that size."""
    hidden, layers = 4096, 8
    rows = int(gigabytes * 1e9 / 4 / 4 / hidden)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, hidden)}
    rest = gigabytes * 1e9 / 4 * 3 / 4 / layers
    inner = int(rest / 2 / 3 / hidden)
    for i in range(layers):
        shapes |= {f"model.layers.{i}.mlp.{n}_proj.weight": (inner, hidden) for n in ("gate", "up", "down")}
        side = int((rest / 2 / 4) ** 0.5)
        shapes |= {f"model.layers.{i}.self_attn.{n}_proj.weight": (side, side) for n in "qkvo"}
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (hidden,)
    return {name: (torch.float32, shape) for name, shape in shapes.items()}


def generate(folder: Path, gigabytes: float, seed: int) -> None:
    """A folder with random weights; one block of numbers is rolled along, because drawing billions takes minutes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    plan = layout(gigabytes)
    block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(seed))
    with ShardWriter(folder, plan) as writer:
        for name in writer.names:
            left = torch.Size(plan[name][1]).numel()
            while left:
                writer.write(name, block[: min(left, len(block))])
                left -= min(left, len(block))
    sync(folder)


def sync(folder: Path) -> None:
    """Wait until a folder's files are on the disk, and let go of their pages."""
    for file in folder.rglob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def copy(inputs: list[Path], aside: Path) -> float:
    """Seconds that a plain copy of the inputs takes until it is on the disk."""
    for folder in inputs:
        sync(folder)
    started = time.perf_counter()
    for folder in inputs:
        shutil.copytree(folder, aside / folder.name)
        for file in (aside / folder.name).iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(aside)
    return seconds


def measure(name: str, root: Path, threads: int) -> dict[str, Any]:
    """One operation beside a copy of what it reads."""
    models, with_base, options = OPERATIONS[name]
    options = {k: str(root / v) if k == "target" else v for k, v in options.items()}
    inputs = [root / m for m in models] + [root / "base"] * with_base
    inputs += [Path(options["target"])] if "target" in options else []
    (root / "aside").mkdir()
    copied = copy(inputs, root / "aside")
    for folder in inputs:
        sync(folder)
    given = {
        "small": [str(root / "small-a"), str(root / "small-b")],
        "models": [str(root / m) for m in models],
        "folder": str(root / "merged"),
        "op": {name: options},
        "base": str(root / "base") if with_base else None,
        "threads": threads,
    }
    done = subprocess.run([sys.executable, "-c", WORKER, json.dumps(given)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    for made in ("merged", "merged-small"):
        shutil.rmtree(root / made)
    read = sum(Shards(folder).nbytes for folder in inputs)
    return {"op": name, "bytes_read": read, "copy_seconds": copied, **found, "ratio": copied / found["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of each checkpoint")
    parser.add_argument("--only", help="operations, separated by commas")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made; default: the temporary folder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    place = arguments.folder or Path(tempfile.gettempdir())
    needed = 8 * arguments.gigabytes * 1e9
    if (free := shutil.disk_usage(place).free) < needed:
        sys.exit(f"needs {needed / 1e9:.0f} GB on {place}, where {free / 1e9:.0f} are free")
    chosen = arguments.only.split(",") if arguments.only else list(OPERATIONS)
    with tempfile.TemporaryDirectory(dir=place, prefix="luthier-bench-") as name:
        root = Path(name)
        for seed, model in enumerate(("base", "a", "b")):
            generate(root / model, arguments.gigabytes, seed)
            generate(root / f"small-{model}", 0.01, seed)
        shards = Shards(root / "base")
        largest = max(info.nbytes for info in shards.header.values())
        entries = [measure(op, root, arguments.threads) for op in chosen]
        limit = 2 * largest + MEMORY
    table = Table("operation", "read GB", "copy s", "merge s", "speed / copy", "peak MB", title="merging", box=None)
    for entry in entries:
        table.add_row(
            entry["op"],
            f"{entry['bytes_read'] / 1e9:.1f}",
            f"{entry['copy_seconds']:.1f}",
            f"{entry['seconds']:.1f}",
            f"{entry['ratio']:.2f}{'' if entry['ratio'] >= AIM else ' *'}",
            f"{entry['peak'] / 1e6:.0f}",
        )
    console = Console(width=100)
    console.print(table)
    console.print(f"aim: {AIM} of a copy's speed (* misses it); peak at most {limit / 1e6:,.0f} MB")
    if arguments.json:
        about = {"gigabytes": arguments.gigabytes, "threads": arguments.threads, "largest_tensor": largest}
        found = {"about": {**about, "memory_limit": limit, "aim": AIM}, "entries": entries}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
