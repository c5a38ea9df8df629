"""The contestants: each trains the same model on the same rows in a process of its own, and works only at its turn.

A contestant calls ``turns.step(lengths, supervised)`` after every optimiser step. The turns end a process when the
rounds are over, so peak memory is its own, and contestants alternate within seconds, so that drift of the machine
meets all alike.
"""

from __future__ import annotations

import os
import resource
import time
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Job:
    """What a contestant is to do."""

    folder: Path
    batch: int
    steps_per_turn: int
    threads: int
    precision: str = "fp32"


class Turns:
    """The contestant's side of the rounds."""

    def __init__(self, pipe: Connection, steps: int) -> None:
        self.pipe, self.steps = pipe, steps
        self.lengths: list[list[int]] = []
        self.supervised: list[int] = []
        self.loaded = 0.0
        self.begin = self.begin_cpu = 0.0

    @staticmethod
    def peak() -> float:
        """Largest resident memory so far, in MB."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def ready(self) -> None:
        """Everything is loaded; wait for the first turn."""
        self.loaded = self.peak()
        self.pipe.send({"loaded": self.loaded})
        self._wait()

    def _wait(self) -> None:
        if self.pipe.recv() == "stop":
            os._exit(0)  # trainers offer no clean way out of their loops
        self.begin, self.begin_cpu = time.perf_counter(), time.process_time()

    def step(self, lengths: list[int], supervised: int) -> None:
        """One optimiser step is done."""
        self.lengths.append(lengths)
        self.supervised.append(supervised)
        if len(self.lengths) == self.steps:
            self.pipe.send(
                {
                    "seconds": time.perf_counter() - self.begin,
                    "cpu_seconds": time.process_time() - self.begin_cpu,
                    "lengths": self.lengths,
                    "supervised": self.supervised,
                    "peak": self.peak(),
                }
            )
            self.lengths, self.supervised = [], []
            self._wait()


def _model(job: Job) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(job.folder / "model", dtype="float32")


def _tokenized(job: Job) -> list[dict[str, Any]]:
    """Rows as input_ids and labels; the prompt is not supervised."""
    import json

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.folder / "model")
    rows = []
    for line in (job.folder / "rows.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    return rows


def _padded(rows: list[dict[str, Any]]) -> dict[str, Any]:
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.tensor(r["input_ids"]) for r in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence([torch.tensor(r["labels"]) for r in rows], batch_first=True, padding_value=-100),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
    }


def _counts(batch: dict[str, Any]) -> tuple[list[int], int]:
    return batch["attention_mask"].sum(1).tolist(), int((batch["labels"][:, 1:] != -100).sum())


def hand(job: Job, turns: Turns) -> None:
    """The best loop written by hand: supervised positions alone, buckets of like lengths, fused AdamW."""
    import torch

    model, rows = _model(job).train(), _tokenized(job)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(0)
    turns.ready()
    while True:
        order = sorted(torch.randperm(len(rows), generator=generator).tolist(), key=lambda i: len(rows[i]["input_ids"]))
        starts = torch.randperm(len(rows) // job.batch, generator=generator) * job.batch
        for start in starts.tolist():
            batch = _padded([rows[i] for i in order[start : start + job.batch]])
            with torch.autocast("cpu", torch.bfloat16, enabled=job.precision == "bf16"):
                states = model.model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
                wanted = batch["labels"][:, 1:] != -100
                logits = model.lm_head(states.last_hidden_state[:, :-1][wanted])
            loss = torch.nn.functional.cross_entropy(logits.float(), batch["labels"][:, 1:][wanted])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
            turns.step(*_counts(batch))


def _arguments(job: Job) -> dict[str, Any]:
    return {
        "output_dir": str(job.folder / "out"),
        "per_device_train_batch_size": job.batch,
        "num_train_epochs": 10_000,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1_000_000,
        "dataloader_drop_last": True,
        "use_cpu": True,
        "bf16": job.precision == "bf16",
        "gradient_checkpointing": False,
    }


def _with_turns(trainer: Any, turns: Turns) -> None:
    """Count in the collator, report at the end of each step (a trainer fetches batches ahead), then train."""
    from transformers import TrainerCallback

    collate, seen = trainer.data_collator, deque()

    def counting(rows: Any) -> Any:
        batch = collate(rows)
        seen.append(_counts(batch))
        return batch

    class AtTheEndOfAStep(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            turns.step(*seen.popleft())

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if not turns.begin:
                turns.ready()

    trainer.data_collator = counting
    trainer.add_callback(AtTheEndOfAStep())
    trainer.train()


def hf_trainer(job: Job, turns: Turns) -> None:
    """transformers.Trainer with its defaults, the prompt masked by labels."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    trainer = Trainer(
        _model(job),
        TrainingArguments(**_arguments(job)),
        train_dataset=Dataset.from_list(_tokenized(job)),
        data_collator=_padded,
    )
    _with_turns(trainer, turns)


def trl(job: Job, turns: Turns) -> None:
    """TRL's SFTTrainer on prompt/completion rows, full precision, no gradient checkpointing."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = load_dataset(
        "json", data_files=str(job.folder / "rows.jsonl"), split="train", cache_dir=str(job.folder / "hf")
    )
    trainer = SFTTrainer(
        model=_model(job),
        args=SFTConfig(**_arguments(job), packing=False),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(job.folder / "model"),
    )
    _with_turns(trainer, turns)


def luthier(job: Job, turns: Turns) -> None:
    """Luthier's engine as ``luthier train`` runs it, on the same file of rows."""
    from luthier.engine.distributed import Processes
    from luthier.engine.loop import Trainer
    from luthier.engine.optimizer import open_parameters
    from luthier.engine.session import Session
    from luthier.engine.stack import Setup
    from luthier.evaluation.divergence import DivergenceFromBase
    from luthier.models.load import load
    from luthier.runs import setup
    from luthier.runs.api import plan_of
    from luthier.tasks import get_task

    plan = plan_of(
        model=str(job.folder / "model"),
        data={"train": str(job.folder / "rows.jsonl"), "keep": None},
        training={
            "epochs": 10_000.0,
            "batch_rows": job.batch,
            "learning_rate": LEARNING_RATE,
            "schedule": "constant",
            "warmup": 0.0,
            "precision": job.precision,
            "threads": job.threads,
            "log_steps": 10,
        },
    )
    setup.settings(plan)
    loaded = load(job.folder / "model")
    data = setup.load_data(plan, loaded.processor, loaded.task, keep=False)
    stack = setup.build_stack(plan)
    task = get_task(loaded.task, loaded.processor)
    prepared = data.train.prepared
    alone = Session(model=loaded.model, task=task, processor=loaded.processor, stack=stack, precision=job.precision)
    watch = DivergenceFromBase(alone, prepared)
    model = open_parameters(loaded.model, stack, Setup(seed=0, task=task, processor=loaded.processor))
    session = Session(
        model=model, task=task, processor=loaded.processor, stack=stack, processes=Processes(), precision=job.precision
    )
    trainer = Trainer(session, prepared, plan.recipe.training, watch=watch, observe=lambda event, values: after(event))

    before = [0]

    def after(event: str) -> None:
        if event in ("step", "tick"):
            lengths = trainer.order.lengths[trainer.order.rows(session.step - 1)[1]].tolist()
            supervised, before[0] = trainer.seen["supervised"] - before[0], trainer.seen["supervised"]
            turns.step(lengths, supervised)

    turns.ready()
    trainer.run()


def peak(job: Job, turns: Turns) -> None:
    """Not a contestant: the largest rate of matrix products this machine gives, measured in the same rounds."""
    import torch

    turns.pipe.send({"loaded": turns.peak()})
    left = torch.randn(2048, 2048)
    kinds = {"fp32": left, "bf16": left.bfloat16()}
    while True:
        turns._wait()
        rates = {}
        for name, matrix in kinds.items():
            out, times = torch.empty_like(matrix), []
            for _ in range(4):
                begin = time.perf_counter()
                torch.mm(matrix, matrix, out=out)
                times.append(time.perf_counter() - begin)
            rates[name] = 2 * 2048**3 / min(times) / 1e9
        turns.pipe.send(rates)


CONTESTANTS = {"luthier": luthier, "hand": hand, "trainer": hf_trainer, "trl": trl, "peak": peak}


def work(name: str, job: Job, pipe: Connection) -> None:
    """The body of a contestant's process."""
    import logging
    import warnings

    import torch

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(job.threads)
    CONTESTANTS[name](job, Turns(pipe, job.steps_per_turn))
