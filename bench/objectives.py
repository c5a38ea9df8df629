"""What each objective, transform and selection costs, as a ratio to plain SFT in one run.

    python bench/objectives.py [--quick] [--only anchored-sft,uds] [--json FILE]

The model of 11M parameters with a vocabulary of 32,000, fp32, the same rows for all. Every entry is a recipe, and its
training is the one of ``luthier train``: plan, data stages, base model, methods, step loop. Each works in a process of
its own, and they take turns of a few steps in an order that is reversed every round; more than a machine holds at once
work in groups, each with its own plain SFT. What is compared is the time that the given rows take once, so a method
that makes more rows of them, or trains on a share of those it is offered, is measured by the same rule. The table gives
medians over the rounds of the ratio within a round, and the peak memory of each process over that of plain SFT.
References that are scored row by row are measured in the first epoch, in which nothing of them is known yet;
``anchored-sft`` with a cache has scored all rows before its first step.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from contestants import LEARNING_RATE, Job, Turns
from material import write
from objective_rows import WRITERS
from throughput import Entry as Contestant
from throughput import spread

SIZE = "11M"
# (steps of a turn, rounds) in full and with --quick.
ROUNDS = ((6, 4), (3, 2))
MEMORY_AIM = 1.3
# The axis of each section of a recipe.
AXES = {"objective": "objective", "transforms": "transform", "selection": "selection"}


@dataclass(frozen=True)
class Entry:
    """One line of the table.

    Attributes:
        name: how it is called; its first word is the slug, which ``--only`` knows too.
        sections: sections of the recipe.
        aim: the largest ratio to plain SFT the project aims at; below 1 is written as 1.
        rows: the kind of rows, a name of ``objective_rows.WRITERS``.
    """

    name: str
    sections: dict[str, Any]
    aim: float | None = None
    rows: str = "pairs"

    @property
    def slug(self) -> str:
        """The method's name in recipes."""
        return self.name.split()[0]

    def methods(self) -> Iterator[tuple[str, str]]:
        """(axis, slug) of every method it names."""
        for key, axis in AXES.items():
            chosen = self.sections.get(key, [])
            for method in chosen if isinstance(chosen, list) else [chosen]:
                yield axis, method if isinstance(method, str) else next(iter(method))

    def recipe(self, job: Job) -> dict[str, Any]:
        """The whole recipe; the learning rate is constant, so that every step is like the others."""
        rows = job.folder / f"{self.rows}.jsonl"
        model = {"id": str(job.folder / "model"), "task": WRITERS[self.rows].task}
        return {
            "model": model,
            "data": {"train": str(rows), "keep": "none", **WRITERS[self.rows].data},
            "training": {
                "epochs": 10_000.0,
                "batch_rows": job.batch,
                "learning_rate": LEARNING_RATE,
                "schedule": "constant",
                "warmup": 0.0,
                "precision": job.precision,
                "threads": job.threads,
                "log_steps": 10,
            },
            "output": str(job.folder / "runs" / self.name.replace(" ", "-")),
            **self.sections,
        }


def loss(slug: str, **options: Any) -> dict[str, Any]:
    return {"objective": {slug: options}}


ENTRIES = (
    Entry("beyond-log-likelihood", loss("beyond-log-likelihood"), 1.05),
    Entry("masked-thought", {"transforms": [{"masked-thought": {"rate_schedule": "constant"}}]}, 1.05),
    Entry("tl-training", loss("tl-training"), 1.05, "tools"),
    Entry("fault-aware-ft static", loss("fault-aware-ft", mode="static"), 1.05, "variants"),
    Entry("fault-aware-ft dynamic", loss("fault-aware-ft"), rows="variants"),
    Entry("one-token-rollout", loss("one-token-rollout"), 1.15),
    Entry("anchored-sft cached", loss("anchored-sft", cache_top_k=64), 1.15),
    Entry("anchored-sft exact", loss("anchored-sft"), 1.6),
    Entry("dynamic-ft", loss("dynamic-ft")),
    Entry("sorted-ft 2 exits", loss("sorted-ft", exits=[2, 4]), 1.35),
    Entry("sorted-ft 4 exits", loss("sorted-ft", exits=[1, 2, 3, 4]), 2.05),
    Entry("learning-from-undesirable lora", loss("learning-from-undesirable"), 2.2),
    Entry("learning-from-undesirable steer", loss("learning-from-undesirable", aux="steer"), 2.2),
    Entry("discriminative-ft", loss("discriminative-ft", resample_per_epoch=False)),
    Entry("uds keep 1/4", {"selection": {"uds": {"keep_fraction": 0.25}}}, 1.0),
    Entry("uds keep 1/2", {"selection": {"uds": {"keep_fraction": 0.5}}}, 1.0),
    Entry("preference-oriented-sft", loss("preference-oriented-sft")),
    Entry("cross-lingual-optimization", loss("cross-lingual-optimization")),
    Entry("glue-bag-of-tricks", loss("glue-bag-of-tricks"), rows="labels"),
)  # fmt: skip


class Seat(Turns):
    """A contestant's side of the rounds; it also tells what was read and planned."""

    def __init__(self, pipe: Connection, steps: int) -> None:
        super().__init__(pipe, steps)
        self.about: dict[str, Any] = {}

    def ready(self) -> None:
        """Everything is loaded; wait for the first turn."""
        self.loaded = self.peak()
        self.pipe.send({"loaded": self.loaded, **self.about})
        self._wait()


def train(entry: Entry, job: Job, seat: Seat) -> None:
    """What ``luthier train`` does from the plan to the last step, without measuring before and after."""
    from luthier.engine import loop
    from luthier.models.load import inspect, load_processor
    from luthier.runs import setup
    from luthier.runs.api import plan_of
    from luthier.runs.workshop import Workshop, open_model

    class Trainer(loop.Trainer):
        """The run's own step loop, which takes turns with those of the others."""

        def run(self, *, resume: bool = False) -> dict[str, Any]:
            shown, before = self.observe, [0]

            def observe(event: str, values: dict[str, Any]) -> None:
                shown(event, values)
                if event in ("step", "tick"):
                    rows = self.order.rows(self.session.step - 1)[1]
                    supervised, before[0] = self.seen["supervised"] - before[0], self.seen["supervised"]
                    seat.step(self.order.lengths[rows].tolist(), supervised)

            self.observe = observe
            seat.ready()
            return super().run(resume=resume)

    plan = plan_of(entry.recipe(job))
    setup.settings(plan)
    info = inspect(plan.recipe.model.id)
    plan.settle_task(plan.recipe.model.task)
    processor = load_processor(info.folder, plan.task)
    output = Path(plan.recipe.output)
    data = setup.load_data(plan, processor, plan.task, folder=output, keep=False)
    prepared = data.train.prepared
    seat.about = {
        "rows": len(prepared),
        "tokens": int(prepared.lengths.sum()),
        "reference": "reference" in plan.facts,
    }
    loop.Trainer = Trainer  # type: ignore[misc]
    Workshop(plan, data, open_model(plan, data.labels), output).train(data.train)


def work(entry: Entry, job: Job, pipe: Connection) -> None:
    """The body of an entry's process."""
    import logging
    import os
    import warnings

    from luthier.core.errors import LuthierError

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    os.environ["LUTHIER_CACHE"] = str(job.folder / "cache")  # nothing an earlier run has scored may be found
    torch.set_num_threads(job.threads)
    try:
        train(entry, job, Seat(pipe, job.steps_per_turn))
    except LuthierError as error:
        pipe.send({"refused": str(error)})


@dataclass
class Group:
    """Entries on one kind of rows that work side by side with plain SFT."""

    rows: str
    entries: list[Entry]
    running: dict[str, Contestant] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def run(self, job: Job, rounds: int, say: Any) -> None:
        """Start them, let them take turns, end them."""
        context = multiprocessing.get_context("spawn")
        for entry in (Entry("sft", loss("sft"), rows=self.rows), *self.entries):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(entry, job, theirs), daemon=True)
            process.start()
            contestant = Contestant(entry.name, process, ours)
            told = contestant._answer()
            if "refused" in told:
                self.refused[entry.name] = told["refused"]
                process.join()
                say(f"{entry.name}: refused: {told['refused']}")
                continue
            contestant.loaded = told["loaded"]
            self.running[entry.name], self.about[entry.name] = contestant, told
        for number in range(rounds + 1):
            everyone = list(self.running.values())
            for contestant in everyone if number % 2 else reversed(everyone):
                contestant.take_turn(keep=number > 0)
            say(f"{', '.join(self.running)}: round {number} of {rounds}" + (" (warm-up)" if number == 0 else ""))
        for contestant in self.running.values():
            contestant.pipe.send("stop")
            contestant.process.join()

    def results(self) -> Iterator[dict[str, Any]]:
        """One record for each entry, plain SFT first."""
        plain = self.running["sft"]
        plain_seconds, plain_peak = self.seconds("sft"), max(t["peak"] for t in plain.turns)
        for entry in (Entry("sft", loss("sft"), rows=self.rows), *self.entries):
            record = asdict(entry)
            if entry.name in self.refused:
                yield record | {"refused": self.refused[entry.name]}
                continue
            contestant, about = self.running[entry.name], self.about[entry.name]
            peak = max(t["peak"] for t in contestant.turns)
            ratios = [a / b for a, b in zip(self.seconds(entry.name), plain_seconds, strict=True)]
            yield record | {
                "ratio": spread(ratios),
                "milliseconds_per_step": spread(contestant.milliseconds()),
                "peak_memory_mb": peak,
                "memory_before_training_mb": contestant.loaded,
                "memory_ratio": peak / plain_peak,
                "reference": about["reference"],
                "rows_of_an_epoch": about["rows"],
                "tokens_of_an_epoch": about["tokens"],
                "tokens": sum(sum(map(sum, t["lengths"])) for t in contestant.turns),
                "supervised": sum(sum(t["supervised"]) for t in contestant.turns),
            }

    def seconds(self, name: str) -> list[float]:
        """In every round, the time all rows would take once at the speed of that turn."""
        tokens = self.about[name]["tokens"]
        return [tokens / speed for speed in self.running[name].speeds()]


def chosen(names: list[str]) -> tuple[list[Entry], list[Entry]]:
    """The entries asked for that can run, and those of which a method is not registered."""
    from luthier.core import registry

    wanted = [e for e in ENTRIES if not names or e.slug in names or e.name in names]
    if unknown := [n for n in names if not any(n in (e.slug, e.name) for e in ENTRIES)]:
        raise SystemExit(
            f"no such entry: {', '.join(unknown)}. Known: {', '.join(dict.fromkeys(e.slug for e in ENTRIES))}"
        )
    there = [e for e in wanted if all(slug in registry.names(axis) for axis, slug in e.methods())]
    return there, [e for e in wanted if e not in there]


def grouped(entries: list[Entry], together: int) -> list[Group]:
    """Entries on the same rows, at most ``together`` beside plain SFT, as evenly as can be."""
    groups = []
    for kind in dict.fromkeys(e.rows for e in entries):
        alike = [e for e in entries if e.rows == kind]
        count = -(-len(alike) // together)
        groups += [Group(kind, alike[i::count]) for i in range(count)]
    return groups


def show(records: list[dict[str, Any]], missing: list[Entry], console: Console) -> None:
    table = Table(title="Time of all rows and peak memory, as ratios to plain SFT")
    for column in ("", "time", "", "aim", "memory", "ms/step", "peak MB", "of it training", ""):
        table.add_column(column, justify="left" if not column else "right")
    for record in records:
        if "refused" in record:
            table.add_row(record["name"], *[""] * 7, f"refused: {record['refused']}")
            continue
        ratio, aim = record["ratio"], record["aim"]
        missed = [text for text, holds in (("time", _missed(record)), ("memory", _too_large(record))) if holds]
        notes = [f"missed: {' and '.join(missed)}"] if missed else []
        notes += ["a reference is resident"] if record["reference"] else []
        notes += [f"on rows of {record['rows']}"] if record["name"] == "sft" else []
        table.add_row(
            record["name"],
            f"{ratio['median']:.2f}",
            f"[{ratio['low']:.2f} .. {ratio['high']:.2f}]".replace("[", r"\["),
            "" if aim is None else f"{aim:.2f}",
            f"{record['memory_ratio']:.2f}",
            f"{record['milliseconds_per_step']['median']:.0f}",
            f"{record['peak_memory_mb']:.0f}",
            f"{record['peak_memory_mb'] - record['memory_before_training_mb']:.0f}",
            "; ".join(notes),
        )
    for entry in missing:
        table.add_row(entry.name, *[""] * 7, "not registered")
    console.print(table)


def _missed(record: dict[str, Any]) -> bool:
    return record["aim"] is not None and record["ratio"]["median"] > record["aim"]


def _too_large(record: dict[str, Any]) -> bool:
    return not record["reference"] and record["memory_ratio"] > MEMORY_AIM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few, short turns")
    parser.add_argument("--only", default="", help="entries by name or slug, separated by commas; all by default")
    parser.add_argument("--together", type=int, default=6, help="entries at a time beside plain SFT, bounded by memory")
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of every process")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/objectives.json"), help="where the numbers go")
    args = parser.parse_args()
    console = Console(width=140)
    steps, rounds = ROUNDS[args.quick]
    entries, missing = chosen([n.strip() for n in args.only.split(",") if n.strip()])
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = write(Path(place) / SIZE, SIZE, args.batch * steps * (rounds + 1))
        job = Job(folder, args.batch, steps, args.threads)
        for group in grouped(entries, args.together):
            WRITERS[group.rows](group.rows, folder)
            group.run(job, rounds, console.print)
            records += group.results()
    show(records, missing, console)
    about = {
        "threads": args.threads,
        "batch": args.batch,
        "steps_of_a_turn": steps,
        "rounds": rounds,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"about": about, "entries": records, "not_registered": [e.name for e in missing]}, indent=2)
    args.json.write_text(text + "\n", encoding="utf-8")
    console.print(f"numbers: {args.json}")
    if any("refused" in record for record in records):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
