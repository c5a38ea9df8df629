"""What each way of choosing parameters costs, as ratios to full fine-tuning and to LoRA in one run.

    python bench/parameters.py [--quick] [--only half-ft,spiel] [--json FILE]

Time of all rows and peak memory are measured as in ``objectives.py``: every entry is a recipe in a process of its own,
on the same rows, and they take turns. Beside them stand what no clock tells: the operations of a step of
``green-trainer`` as torch counts them against full fine-tuning on the same rows, bytes that ``spiel`` trains and
remembers at several budgets against those of AdamW over the model, and the forward pass of exported models against the
base's, one after the other in turns.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from contestants import Job
from material import write
from objective_rows import WRITERS
from objectives import ROUNDS, Entry, Group, grouped, loss
from throughput import spread

SIZE = "11M"
FLOPS_TOLERANCE = 0.05
SHARES = (0.4, 0.6, 0.8)
DENSITIES = (0.005, 0.01, 0.02)
COUNTED_STEPS = 3
# A merged model is a plain model: this is the noise of its clock.
INFERENCE_AIM = 1.05


@dataclass(frozen=True)
class Space(Entry):
    """A parameter space; its first word is the slug."""

    def methods(self) -> Iterator[tuple[str, str]]:
        """(axis, slug) of what it names."""
        yield "parameters", self.slug


def space(name: str, aim: float | None = None, **options: Any) -> Space:
    return Space(name, {"parameters": [{name.split()[0]: options}], **loss("sft")}, aim)


LORA = space("lora", rank=16)
ENTRIES = (
    space("half-ft", 0.85, embeddings="freeze"),
    space("half-ft embeddings trained", 0.85),
    space("spiel ag", 1.25, density=0.01),
    space("spiel ma", 1.25, algorithm="ma", density=0.01),
    *(space(f"green-trainer {share}", flops=share) for share in SHARES),
    space("composable-sparse-ft", proportion=0.05),
)


def plan_for(entry: Entry, job: Job, **training: Any) -> Any:
    """The plan of an entry, with attention written as plain products so that they can be counted."""
    from luthier.runs import setup
    from luthier.runs.api import plan_of

    recipe = entry.recipe(job)
    recipe["model"]["attention"] = "eager"
    recipe["training"] |= {"epochs": 1.0, **training}
    plan = plan_of(recipe)
    setup.settings(plan)
    plan.settle_task(plan.recipe.model.task)
    return plan


def operations(entry: Entry, job: Job) -> tuple[float, dict[str, Any]]:
    """Operations of some steps after the first one, whose probe is not a step, and what the method recorded."""
    from torch.utils.flop_counter import FlopCounterMode

    from luthier.engine import loop
    from luthier.models.load import inspect, load_processor
    from luthier.runs import setup
    from luthier.runs.run import Workshop, open_model

    plan = plan_for(entry, job, max_steps=1 + COUNTED_STEPS)
    processor = load_processor(inspect(plan.recipe.model.id).folder, plan.task)
    output = Path(plan.recipe.output + "-operations")
    data = setup.load_data(plan, processor, plan.task, folder=output, keep=False)
    counter, step = FlopCounterMode(display=False), loop.Trainer._step

    def counted(self: Any) -> None:
        if self.session.step == 0:
            step(self)
        else:
            with counter:
                step(self)

    total = 0.0

    def summed(self: Any) -> None:
        nonlocal total
        counted(self)
        # The counter starts anew whenever it is entered.
        total += counter.get_total_flops() if self.session.step > 1 else 0.0

    loop.Trainer._step = summed  # type: ignore[method-assign]
    try:
        Workshop(plan, data, open_model(plan, data.labels), output).train(data.train)
    finally:
        loop.Trainer._step = step  # type: ignore[method-assign]
    record = json.loads((output / "methods.json").read_text()) if (output / "methods.json").exists() else {}
    return total, record


def budgets(entries: list[Entry], job: Job) -> list[dict[str, Any]]:
    """For every share of operations asked of ``green-trainer``: what it took."""
    wanted = [e for e in entries if e.slug == "green-trainer"]
    if not wanted:
        return []
    whole, _ = operations(space("full"), job)
    found = []
    for entry in wanted:
        taken, record = operations(entry, job)
        asked = entry.sections["parameters"][0]["green-trainer"]["flops"]
        predicted = record["parameters:green-trainer"]["choices"][0]["flops_share"]
        found.append({"asked": asked, "measured": taken / whole, "predicted": predicted})
    return found


def memory(job: Job) -> dict[str, Any]:
    """Bytes trained and remembered: by ``spiel`` at several budgets, and by AdamW over the whole model."""
    from luthier.core import registry
    from luthier.engine.stack import Setup
    from luthier.models.load import load

    found = []
    for algorithm in ("ag", "ma"):
        for density in DENSITIES:
            model = load(job.folder / "model", task="causal-lm").model.requires_grad_(False)
            method = registry.get("parameters", "spiel").build({"algorithm": algorithm, "density": density})
            method.apply(model, Setup(seed=0, task="causal-lm", processor=None))
            found.append({"algorithm": algorithm, "density": density, "weights": sum(method.sizes), **method.bytes()})
    parameters = sum(p.numel() for p in load(job.folder / "model", task="causal-lm").model.parameters())
    return {"spiel": found, "full": {"weights": parameters, "deltas": 4 * parameters, "optimizer": 8 * parameters}}


@torch.no_grad()
def inference(job: Job, repeats: int) -> dict[str, float]:
    """Time of a forward pass of what ``spiel`` exports over that of the base, in turns; median and range."""
    from luthier.core import registry
    from luthier.engine.stack import Setup
    from luthier.models.load import load

    base = load(job.folder / "model", task="causal-lm").model.eval()
    method = registry.get("parameters", "spiel").build({})
    own = load(job.folder / "model", task="causal-lm").model.requires_grad_(False)
    merged = method.export(method.apply(own, Setup(seed=0, task="causal-lm", processor=None))).eval()
    ids = torch.randint(3, base.config.vocab_size, (4, 128), generator=torch.Generator().manual_seed(0))

    def seconds(model: Any) -> float:
        begin = time.perf_counter()
        model(input_ids=ids, use_cache=False)
        return time.perf_counter() - begin

    for model in (base, merged):
        seconds(model)
    return spread([seconds(merged) / seconds(base) for _ in range(repeats)])


def over_lora(group: Group) -> dict[str, dict[str, float]]:
    """Time of every entry as a ratio to LoRA within each round."""
    if "lora" not in group.running:
        return {}
    plain = group.seconds("lora")
    return {n: spread([a / b for a, b in zip(group.seconds(n), plain, strict=True)]) for n in group.running}


def show(result: dict[str, Any], console: Console) -> None:
    table = Table(title="Time of all rows and peak memory, as ratios to full fine-tuning and to LoRA")
    for column in ("", "over full", "", "aim", "over lora", "memory", "ms/step", ""):
        table.add_column(column, justify="left" if not column else "right")
    for record in result["entries"]:
        if "refused" in record:
            table.add_row(record["name"], *[""] * 6, f"refused: {record['refused']}")
            continue
        ratio, aim, lora = record["ratio"], record["aim"], record.get("over_lora")
        table.add_row(
            "full (sft)" if record["name"] == "sft" else record["name"],
            f"{ratio['median']:.2f}",
            f"\\[{ratio['low']:.2f} .. {ratio['high']:.2f}]",
            "" if aim is None else f"{aim:.2f}",
            "" if lora is None else f"{lora['median']:.2f}",
            f"{record['memory_ratio']:.2f}",
            f"{record['milliseconds_per_step']['median']:.0f}",
            "missed: time" if aim is not None and ratio["median"] > aim else "",
        )
    console.print(table)
    for line in result["operations"]:
        far = abs(line["measured"] / line["asked"] - 1) > FLOPS_TOLERANCE
        told = f"asked {line['asked']:.2f}, counted {line['measured']:.3f}, predicted {line['predicted']:.3f}"
        console.print(f"green-trainer: share of the operations {told}{'  missed' if far else ''}")
    for line in result["memory"].get("spiel", []):
        console.print(
            f"spiel {line['algorithm']} density {line['density']}: {line['weights']:,} weights, "
            f"{line['deltas'] / 2**20:.2f} MB trained, {line['optimizer'] / 2**20:.2f} MB remembered"
        )
    if (found := result["inference"]) is not None:
        late = "  missed" if found["median"] > INFERENCE_AIM else ""
        console.print(f"merged inference over the base: {found['median']:.3f}{late}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few, short turns")
    parser.add_argument("--only", default="", help="entries by name or slug, separated by commas; all by default")
    parser.add_argument("--together", type=int, default=4, help="entries at a time beside full and LoRA")
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of every process")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/parameters.json"), help="where the numbers go")
    args = parser.parse_args()
    console = Console(width=140)
    steps, rounds = ROUNDS[args.quick]
    names = [n.strip() for n in args.only.split(",") if n.strip()]
    entries: list[Entry] = [e for e in ENTRIES if not names or e.slug in names or e.name in names]
    if not entries:
        raise SystemExit(f"no such entry. Known: {', '.join(dict.fromkeys(e.slug for e in ENTRIES))}")
    result: dict[str, Any] = {"entries": []}
    with tempfile.TemporaryDirectory() as place:
        folder = write(Path(place) / SIZE, SIZE, args.batch * steps * (rounds + 1))
        job = Job(folder, args.batch, steps, args.threads)
        WRITERS["pairs"]("pairs", folder)
        for group in grouped(entries, args.together):
            group.entries.insert(0, LORA)
            group.run(job, rounds, console.print)
            lora = over_lora(group)
            result["entries"] += [{**r, "over_lora": lora.get(r["name"])} for r in group.results()]
        torch.set_num_threads(args.threads)
        slugs = {e.slug for e in entries}
        result["operations"] = budgets(entries, job)
        result["memory"] = memory(job) if "spiel" in slugs else {}
        result["inference"] = inference(job, 3 if args.quick else 11) if "spiel" in slugs else None
    show(result, console)
    result["about"] = {
        "threads": args.threads,
        "batch": args.batch,
        "steps_of_a_turn": steps,
        "rounds": rounds,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(f"numbers: {args.json}")
    if any("refused" in record for record in result["entries"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
