"""Tokens per second, memory and overhead against transformers.Trainer, TRL and a hand-written loop, in one run.

    python bench/throughput.py [--quick] [--only 11M,50M,0.2M] [--json FILE]

Every contestant trains the same model on the same rows with the same number of threads, each in its own process, and
they take turns of a few steps, in an order that is reversed every round. The table gives medians over the rounds of
the ratio within a round, so that a slow minute of the machine does not favour anyone. Beside them stands the measured
rate of large matrix products in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    CUDA_VISIBLE_DEVICES="",
    TQDM_DISABLE="1",
    OMP_WAIT_POLICY="PASSIVE",
)

import torch
from rich.console import Console
from rich.table import Table

from contestants import Job, work
from material import SIZES, write

LABELS = {
    "luthier": "Luthier",
    "luthier bf16": "Luthier, bf16",
    "hand": "best hand-written loop",
    "hand bf16": "best hand-written loop, bf16",
    "trainer": "transformers.Trainer",
    "trl": "TRL SFTTrainer",
}
ENTRIES = {
    "11M": ("luthier", "hand", "trainer", "trl", "luthier bf16", "hand bf16"),
    "50M": ("luthier", "hand", "luthier bf16"),
    "0.2M": ("luthier", "hand", "trainer", "trl"),
}
# (steps of a turn, rounds) in full and with --quick.
ROUNDS = {"11M": ((8, 5), (3, 2)), "50M": ((4, 4), (2, 2)), "0.2M": ((40, 6), (10, 2))}
# What the project aims at; printed beside the measured values.
AIMS = {
    ("11M", "tokens/s over TRL"): "at least 7",
    ("11M", "tokens/s over Trainer"): "at least 2.5",
    ("11M", "tokens/s over hand loop"): "at least 1.3",
    ("11M", "peak memory over Trainer"): "at most 0.5",
    ("50M", "fp32 share of matrix peak"): "at least 0.75",
    ("50M", "bf16 over own fp32"): "at least 1.6",
    ("0.2M", "time of a step over hand loop"): "at most 1.1",
}


@dataclass
class Entry:
    """A contestant in its process and what it reported, the warm-up turn left out."""

    name: str
    process: Any
    pipe: Any
    loaded: float = 0.0
    turns: list[dict[str, Any]] = field(default_factory=list)

    def take_turn(self, keep: bool) -> None:
        """Let it work while all others wait."""
        self.pipe.send("go")
        reply = self._answer()
        if keep:
            self.turns.append(reply)

    def _answer(self) -> dict[str, Any]:
        while not self.pipe.poll(0.5):
            if not self.process.is_alive():
                raise SystemExit(f"{self.name} ended with exit status {self.process.exitcode}")
        return self.pipe.recv()

    def speeds(self) -> list[float]:
        """Tokens per second of every turn (padding does not count)."""
        return [sum(map(sum, t["lengths"])) / t["seconds"] for t in self.turns]

    def total_speed(self, clock: str = "seconds") -> float:
        """Tokens per second over all turns, by wall clock or by ``cpu_seconds`` of all threads."""
        return sum(sum(map(sum, t["lengths"])) for t in self.turns) / sum(t[clock] for t in self.turns)

    def milliseconds(self) -> list[float]:
        """Time of a step in every turn."""
        return [1e3 * t["seconds"] / len(t["lengths"]) for t in self.turns]

    def flops(self, size: Any) -> list[float]:
        """GFLOP/s of every turn, counting only arithmetic that cannot be avoided."""
        return [
            sum(size.flops(n, s) for n, s in zip(t["lengths"], t["supervised"], strict=True)) / t["seconds"] / 1e9
            for t in self.turns
        ]


def start(name: str, folder: Path, batch: int, steps: int, threads: int) -> Entry:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    kind, _, precision = name.partition(" ")
    job = Job(folder, batch, steps, threads, precision or "fp32")
    process = context.Process(target=work, args=(kind, job, theirs), daemon=True)
    process.start()
    entry = Entry(name, process, ours)
    entry.loaded = entry._answer()["loaded"]
    return entry


def measure(name: str, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All contestants of one model size."""
    steps, rounds = ROUNDS[name][args.quick]
    chosen = [e for e in ENTRIES[name] if not args.entries or e in args.entries]
    with tempfile.TemporaryDirectory() as place:
        folder = write(Path(place) / name, name, args.batch * steps * (rounds + 1))
        entries = [start(e, folder, args.batch, steps, args.threads) for e in (*chosen, "peak")]
        for number in range(rounds + 1):
            for entry in entries if number % 2 else reversed(entries):
                entry.take_turn(keep=number > 0)
            console.print(f"{name}: round {number} of {rounds}" + (" (warm-up)" if number == 0 else ""))
        for entry in entries:
            entry.pipe.send("stop")
            entry.process.join()
    return summary(name, entries)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def summary(name: str, entries: list[Entry]) -> dict[str, Any]:
    """Medians over the rounds, and ratios taken within each round."""
    size, by_name = SIZES[name], {e.name: e for e in entries}
    peaks = by_name.pop("peak").turns
    rows = {}
    for key, entry in by_name.items():
        peak = [p["bf16" if "bf16" in key else "fp32"] for p in peaks]
        rows[key] = {
            "tokens_per_second": entry.total_speed(),
            "tokens_per_cpu_second": entry.total_speed("cpu_seconds"),
            "tokens_per_second_by_round": entry.speeds(),
            "milliseconds_per_step": spread(entry.milliseconds()),
            "gflops": spread(entry.flops(size)),
            "share_of_matrix_peak": spread([f / p for f, p in zip(entry.flops(size), peak, strict=True)]),
            "peak_memory_mb": max(t["peak"] for t in entry.turns),
            "memory_before_training_mb": entry.loaded,
            "tokens": sum(sum(map(sum, t["lengths"])) for t in entry.turns),
            "supervised": sum(sum(t["supervised"]) for t in entry.turns),
        }
    ratios = {}

    def ratio(label: str, top: str, bottom: str, values: str = "speeds") -> None:
        if top in by_name and bottom in by_name:
            pairs = zip(getattr(by_name[top], values)(), getattr(by_name[bottom], values)(), strict=True)
            ratios[label] = spread([a / b for a, b in pairs])

    ratio("tokens/s over TRL", "luthier", "trl")
    ratio("tokens/s over Trainer", "luthier", "trainer")
    ratio("tokens/s over hand loop", "luthier", "hand")
    ratio("bf16 over own fp32", "luthier bf16", "luthier")
    ratio("bf16 over bf16 hand loop", "luthier bf16", "hand bf16")
    if name == "0.2M":
        ratio("time of a step over hand loop", "luthier", "hand", "milliseconds")
    if "luthier" in rows and "trainer" in rows:
        value = rows["luthier"]["peak_memory_mb"] / rows["trainer"]["peak_memory_mb"]
        ratios["peak memory over Trainer"] = spread([value])
    if "luthier" in rows:
        ratios["fp32 share of matrix peak"] = rows["luthier"]["share_of_matrix_peak"]
    peak = {kind: spread([p[kind] for p in peaks]) for kind in ("fp32", "bf16")}
    return {"parameters": size.parameters(), "matrix_peak_gflops": peak, "contestants": rows, "ratios": ratios}


def show(name: str, result: dict[str, Any], console: Console) -> None:
    peak = result["matrix_peak_gflops"]
    table = Table(
        title=f"{name} ({result['parameters'] / 1e6:.1f}M parameters); matrix products: "
        f"fp32 {peak['fp32']['median']:.0f}, bf16 {peak['bf16']['median']:.0f} GFLOP/s"
    )
    for column in ("", "tokens/s", "tokens/CPU s", "ms/step", "share of peak", "peak MB", "of it training"):
        table.add_column(column, justify="left" if not column else "right")
    for key, row in result["contestants"].items():
        table.add_row(
            LABELS[key],
            f"{row['tokens_per_second']:.0f}",
            f"{row['tokens_per_cpu_second']:.0f}",
            f"{row['milliseconds_per_step']['median']:.1f}",
            f"{row['share_of_matrix_peak']['median']:.0%}",
            f"{row['peak_memory_mb']:.0f}",
            f"{row['peak_memory_mb'] - row['memory_before_training_mb']:.0f}",
        )
    console.print(table)
    for label, value in result["ratios"].items():
        aim = f"   (aim: {AIMS[name, label]})" if (name, label) in AIMS else ""
        console.print(f"  {label}: {value['median']:.2f}  [{value['low']:.2f} .. {value['high']:.2f}]{aim}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few, short turns")
    parser.add_argument("--only", default="11M,50M,0.2M", help="model sizes, separated by commas")
    parser.add_argument("--entries", default="", help="contestants, separated by commas; all by default")
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of every contestant")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/throughput.json"), help="where the numbers go")
    args = parser.parse_args()
    args.entries = [e for e in args.entries.split(",") if e]
    console = Console(width=120)
    results = {name: measure(name, args, console) for name in args.only.split(",")}
    for name, result in results.items():
        show(name, result, console)
    about = {
        "threads": args.threads,
        "batch": args.batch,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"about": about, "sizes": results}, indent=2) + "\n", encoding="utf-8")
    console.print(f"numbers: {args.json}")


if __name__ == "__main__":
    main()
