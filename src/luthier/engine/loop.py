"""The step loop: select, transform, forward, objective, backward, divide once, clip, step.

A loss is a sum; it is divided by the weight of the whole optimiser step over all micro-batches and ranks, so neither
accumulation nor the number of processes changes the trajectory.
"""

from __future__ import annotations

import math
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luthier.core.errors import LuthierError
from luthier.core.metrics_file import Metrics
from luthier.core.protocols import Batch, Loss
from luthier.core.rng import derive_seed
from luthier.core.store import write_json
from luthier.engine import checkpoint
from luthier.engine.optimizer import (
    clip,
    gradient_norm,
    gradients,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    rebuild,
    schedule_factor,
    set_learning_rate,
)
from luthier.engine.order import DataOrder, split
from luthier.engine.session import Session

Evaluate = Callable[[], dict[str, float]]
Watch = Callable[[Session], dict[str, float]]
Observe = Callable[[str, dict[str, Any]], None]
Around = Callable[[int], AbstractContextManager[Any]]


class Interrupted(LuthierError):
    """The run was asked to stop (SIGTERM or Ctrl-C), saved itself and ended."""


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Within the block the first SIGTERM or Ctrl-C is only noted; a second one acts as usual."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(number, before[signal.Signals(number)])

    try:
        before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: signals are someone else's
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Trainer:
    """Trains a session's policy on prepared rows.

    Args:
        session: the model and its methods.
        data: prepared rows (``fetch``, ``lengths``, ``keys``, ``len``).
        training: the ``training`` section of a recipe.
        folder: the run's folder; None keeps nothing on disk.
        evaluate: called every ``eval_steps``; its ``loss`` decides early stopping and the best checkpoint.
        watch: what it measures stands beside the loss of every logged step.
        observe: receives ``(event, values)`` for ``step``, ``evaluation`` and ``checkpoint``.
        around: ``around(step)``, a context that each step runs in, counted from 0 (counting, profiling).
    """

    def __init__(
        self,
        session: Session,
        data: Any,
        training: Any,
        *,
        folder: Path | None = None,
        evaluate: Evaluate | None = None,
        watch: Watch | None = None,
        observe: Observe | None = None,
        around: Around | None = None,
    ) -> None:
        self.session, self.data, self.training, self.folder = session, data, training, folder
        self.evaluate, self.watch, self.observe = evaluate, watch, observe or (lambda event, values: None)
        self.around = around or (lambda step: nullcontext())
        self.order = DataOrder(
            data.lengths,
            seed=session.seed,
            batch_rows=None if training.batch_tokens else training.batch_rows,
            batch_tokens=training.batch_tokens,
            buckets=training.buckets,
            oversample=session.stack.oversample,
            repeats=session.stack.repeats,
        )
        session.total_steps = self.total = self.order.steps(training.epochs, training.max_steps)
        session.total_epochs = self.order.locate(self.total - 1)[0] + 1
        session.stack.call("prepare", session, data)
        session.processes.shard_again(session.module)
        self.optimizer = session.optimizer = make_optimizer(session.model, session.stack, training)
        self._parameters = list(session.model.parameters())
        self._opened = [p.requires_grad for p in self._parameters]
        self.best: float | None = None
        self.evaluations_without_gain = 0
        self.seen = {"tokens": 0, "supervised": 0, "rows": 0, "seconds": 0.0}
        self._metrics: Metrics | None = None
        self._saved = -1
        self._since: dict[str, list[float]] = {}

    # -- one step

    def _select(self, rows: np.ndarray) -> tuple[np.ndarray, torch.Tensor | None]:
        """The rows of a step that online selection keeps, and their weights.

        Every rank scores all offered rows, so the choice depends neither on the accumulation nor on the processes.
        """
        session = self.session
        if session.stack.selector is None:
            return rows, None
        session.micro = 0
        batch = session.task.collate(self.data.fetch(rows), rows, session.stack.needs.columns)
        index_b, weight_b = session.stack.selector.select(session.to_device(batch), session)
        return rows[index_b.cpu().numpy()], weight_b

    def _micro_batches(self, offered: np.ndarray) -> Iterator[Batch]:
        """This rank's micro-batches of a step, selected and transformed."""
        session, world = self.session, self.session.processes.world
        rows, weight_b = self._select(offered)
        pieces = split(np.arange(len(rows)), self.order.lengths[rows], self.training.accumulation * world)
        for micro in range(self.training.accumulation):
            session.micro = micro
            piece = pieces[micro * world + session.processes.rank]
            empty = len(piece) == 0
            index_B = rows[:1] if empty else rows[piece]
            batch = session.task.collate(self.data.fetch(index_B), index_B, session.stack.needs.columns)
            batch = session.to_device(batch)
            if hasattr(session.task, "vary"):
                batch = session.task.vary(batch, session)
            if empty:  # every rank must take part in every backward pass
                batch = batch.with_weights(torch.zeros_like(batch.weight_N))
            elif weight_b is not None:
                batch = batch.with_weights(batch.weight_N * weight_b.to(batch.weight_N)[piece][batch.sequence_N])
            for transform in session.stack.transforms:
                batch = transform(batch, session)
            yield batch

    def _guard(self, total: float, batches: list[Batch]) -> None:
        """Stop before a step that is not finite, leaving the ids of its rows."""
        if math.isfinite(total):
            return
        session = self.session
        rows = [int(r) for b in batches for r in b.row_B]
        note = f"the loss of step {session.step + 1} is {total}"
        if self.folder is not None:
            path = self.folder / f"not-finite-step-{session.step + 1}-rank-{session.processes.rank}.json"
            known = [self.data.describe(r) if hasattr(self.data, "describe") else {"row": r} for r in rows]
            write_json(path, {"step": session.step + 1, "prepared_rows": rows, "rows": known})
            note += f"; the ids of its rows are in {path}"
        raise LuthierError(
            f"{note}. The model has not been changed by it. Lower training.learning_rate, set training.max_grad_norm, "
            "use precision fp32, or look at those rows."
        )

    def _step(self) -> None:
        session, training = self.session, self.training
        session.epoch, rows = self.order.rows(session.step)
        batches = list(self._micro_batches(rows))
        counts = session.stack.counts(batches, session)
        session.totals = dict(zip(counts, session.processes.sum(list(counts.values())), strict=True))
        rate = training.learning_rate * schedule_factor(training.schedule, session.step, self.total, training.warmup)
        session.learning_rate = rate
        session.stack.call("before_step", batches, session)
        self._reopen()
        set_learning_rate(self.optimizer, rate)
        losses: list[Loss] = []
        for micro, batch in enumerate(batches):
            session.micro = micro
            _seed_dropout(session, micro)
            with session.processes.last_backward(session.module, micro == len(batches) - 1):
                loss = session.loss(batch)
                losses.append(Loss(loss.sum.detach(), loss.weight, loss.unit, loss.metrics))
                loss.sum.backward()
        value, weight = session.processes.sum([sum(float(x.sum) for x in losses), sum(float(x.weight) for x in losses)])
        self._guard(value, batches)
        grads = gradients(self.optimizer)
        # DDP and FSDP average over ranks; the loss is divided by the weight of the whole step instead.
        session.grad_factor = session.processes.world / weight if weight > 0 else 0.0
        torch._foreach_mul_(grads, session.grad_factor)
        for method in session.stack.parameters:
            method.on_grad(session.model, session)
        norm = gradient_norm(grads)
        self._guard(norm, batches)
        clip(grads, norm, training.max_grad_norm)
        session.stack.call("update", session.model, session)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for method in session.stack.parameters:
            method.on_step(session.model, session)
        self._reopen()
        session.step += 1
        self._record(losses, batches, value, weight, norm, rate)

    def _reopen(self) -> None:
        """Rebuild the optimiser where a method has changed what is trained."""
        opened = [p.requires_grad for p in self._parameters]
        if opened != self._opened:
            self._opened, session = opened, self.session
            self.optimizer = session.optimizer = rebuild(self.optimizer, session.model, session.stack, self.training)

    def _record(
        self, losses: list[Loss], batches: list[Batch], value: float, weight: float, norm: float, rate: float
    ) -> None:
        """Keep sums of the step's metrics until the next logged step."""

        def add(name: str, amount: float, count: float) -> None:
            slot = self._since.setdefault(name, [0.0, 0.0])
            slot[0] += amount
            slot[1] += count

        add("loss", value, weight)
        add("grad_norm", norm, 1.0)
        for loss in losses:
            for name, (amount, count) in loss.metrics.items():
                add(name, float(amount), float(count))
        for name, amount in self.session.logged.items():
            add(name, amount, 1.0)
        self.session.logged = {}
        tokens = sum(_tokens(b) for b in batches)
        self._since.setdefault("learning_rate", [rate, 1.0])[0] = rate
        self.seen["tokens"] += tokens
        self.seen["supervised"] += sum(int(b.target_N.numel()) for b in batches)
        self.seen["rows"] += sum(b.examples for b in batches)

    def _log(self, seconds: float, before: dict[str, float]) -> dict[str, Any]:
        """The metrics since the last logged step, over all ranks; ``loss`` is already a sum over ranks."""
        session = self.session
        done = {k: self.seen[k] - before[k] for k in ("tokens", "supervised")} | {"rows": self.seen["rows"]}
        gathered = session.processes.gather((self._since, done))
        record: dict[str, Any] = {"step": session.step, "epoch": self._epoch(), "split": "train"}
        for name in dict.fromkeys(n for part, _ in gathered for n in part):
            amount = sum(part[name][0] for part, _ in gathered if name in part)
            count = sum(part[name][1] for part, _ in gathered if name in part)
            record[name] = amount / count if count else 0.0
        record["rows"] = sum(c["rows"] for _, c in gathered)  # seen so far
        for name in ("tokens", "supervised"):
            record[name] = sum(c[name] for _, c in gathered)
            record[f"{name}_per_second"] = record[name] / max(seconds, 1e-9)
        self._since = {}
        return record

    def _epoch(self) -> float:
        epoch, inside = self.order.locate(self.session.step)
        return epoch + inside / max(len(self.order.epoch(epoch)), 1)

    # -- checkpoints

    def _names(self) -> dict[int, str]:
        return {id(p): n for n, p in self.session.model.named_parameters()}

    def save(self, *, best: bool = False) -> None:
        """Write a checkpoint (all ranks take part, the main one writes)."""
        if self.folder is None:
            return
        session, processes = self.session, self.session.processes
        model = {n: processes.whole(p.detach()) for n, p in session.model.named_parameters() if p.requires_grad}
        model |= {f"{n}::buffer": b.detach() for n, b in _persistent_buffers(session.model).items()}
        optimizer = {k: processes.whole(v) for k, v in optimizer_state(self.optimizer, self._names()).items()}
        if processes.main:
            path = checkpoint.save(
                self.folder / "checkpoints",
                session.step,
                model=model,
                optimizer=optimizer,
                state={
                    "methods": session.stack.state(),
                    "best": self.best,
                    "evaluations_without_gain": self.evaluations_without_gain,
                    "seen": self.seen,
                    "since": self._since,
                    "total_steps": self.total,
                },
                keep=self.training.keep_checkpoints,
                best=best,
            )
            self.observe("checkpoint", {"step": session.step, "path": str(path), "best": best})
        self._saved = session.step
        session.close()
        processes.barrier()

    def load(self, path: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            LuthierError: it is damaged, or was made by another recipe.
        """
        session, processes = self.session, self.session.processes
        model, optimizer, state = checkpoint.load(path)
        if state["total_steps"] != self.total:
            raise LuthierError(
                f"{path} belongs to a run of {state['total_steps']} steps, this one has {self.total}: the data or the "
                "training section changed. Resume with the recipe kept in the run's folder, or choose another output."
            )
        session.stack.load(state["methods"])  # may change what is trained
        own = dict(session.model.named_parameters())
        buffers = {f"{n}::buffer": b for n, b in _persistent_buffers(session.model).items()}
        if {n for n, p in own.items() if p.requires_grad} | set(buffers) != set(model):
            raise LuthierError(f"{path} trains other tensors than this recipe: resume with the same recipe.")
        with torch.no_grad():
            for name, value in model.items():
                target = own[name] if name in own else buffers[name]
                target.copy_(processes.like(value, target))
        self.optimizer = session.optimizer = make_optimizer(session.model, session.stack, self.training)
        self._opened = [p.requires_grad for p in self._parameters]
        load_optimizer_state(self.optimizer, self._names(), optimizer, processes.like)
        session.step = self._saved = state["step"]
        self.best, self.evaluations_without_gain = state["best"], state["evaluations_without_gain"]
        self.seen, self._since = state["seen"], state["since"]

    # -- the loop

    def _measured(self) -> dict[str, float]:
        """Evaluate, log and tell; what follows from it is the caller's."""
        assert self.evaluate is not None
        self.session.model.eval()
        values = self.evaluate()
        self.session.model.train()
        record = {"step": self.session.step, "epoch": self._epoch(), "split": "eval", **values}
        if self._metrics is not None:
            self._metrics.write(record)
        self.observe("evaluation", record)
        return values

    def _evaluate(self) -> bool:
        """Run the evaluation; True when early stopping says stop."""
        values = self._measured()
        early = self.training.early_stopping
        gained = self.best is None or values["loss"] < self.best - (early.min_delta if early else 0.0)
        if gained:
            self.best, self.evaluations_without_gain = values["loss"], 0
        else:
            self.evaluations_without_gain += 1
        self.save(best=gained)
        return early is not None and self.evaluations_without_gain >= early.patience

    def run(self, *, resume: bool = False, until: int | None = None) -> dict[str, Any]:
        """Train to the end; returns totals.

        Args:
            resume: continue from the newest checkpoint of the folder, if there is one.
            until: evaluate after this step and stop as if asked to, with a checkpoint; the schedule is that of the
                whole run.

        Raises:
            Interrupted: the process was asked to stop; a checkpoint was written.
            LuthierError: the loss or a gradient was not finite.
        """
        session, training = self.session, self.training
        if resume and self.folder is not None and (newest := checkpoint.latest(self.folder / "checkpoints")):
            self.load(newest)
        if self.folder is not None and session.processes.main:
            self._metrics = Metrics(self.folder / "metrics.jsonl", session.step)
        session.model.train()
        end = self.total if until is None else min(until, self.total)
        before, mark = dict(self.seen), time.perf_counter()
        done = training.early_stopping is not None and self.evaluations_without_gain >= training.early_stopping.patience
        try:
            with _stop_signals() as asked_to_stop:
                while session.step < end and not done:
                    with self.around(session.step):
                        self._step()
                    last = session.step == self.total
                    if session.step % training.log_steps == 0 or last:
                        now = time.perf_counter()
                        record = self._log(now - mark, before) | (self.watch(session) if self.watch else {})
                        self.seen["seconds"] += now - mark
                        before, mark = dict(self.seen), now
                        if self._metrics is not None:
                            self._metrics.write(record)
                        self.observe("step", record)
                    else:
                        self.observe("tick", {"step": session.step})
                    if self.evaluate and training.eval_steps and session.step % training.eval_steps == 0:
                        done = self._evaluate()
                    elif training.save_steps and session.step % training.save_steps == 0:
                        self.save()
                    if session.processes.sum([float(asked_to_stop())])[0] > 0:
                        break
                if self.evaluate and until is not None and session.step == end:
                    self._measured()
        finally:
            session.close()
            if self._metrics is not None:
                self._metrics.close()
        if self._saved != session.step:  # what follows (measuring, saving) may be interrupted too
            self.save()
        if session.step < self.total and not done:
            raise Interrupted(f"stopped as asked after step {session.step} of {self.total}; continue with --resume.")
        session.model.eval()
        counted = ("tokens", "supervised", "rows")
        seen = dict(zip(counted, session.processes.sum([float(self.seen[k]) for k in counted]), strict=True))
        return {
            "steps": session.step,
            "total_steps": self.total,
            "stopped_early": done,
            **{k: int(v) for k, v in seen.items()},
            "seconds": self.seen["seconds"],
            "trainable_parameters": sum(p.numel() for p in self._parameters if p.requires_grad),
            "parameters": sum(p.numel() for p in self._parameters),
            "peak_memory_bytes": peak_memory(session.device),
        }


def _tokens(batch: Batch) -> int:
    """Real tokens of a batch; examples where there are none."""
    mask = batch.inputs.get("attention_mask")
    return batch.examples if mask is None else int(mask.sum())


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: of the process on a CPU, of torch's allocator on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _seed_dropout(session: Session, micro: int) -> None:
    """Dropout draws from torch's global generator; seeded here it is a function of (seed, step, micro, rank).

    ``torch.manual_seed`` would do the same at a millisecond a call, for it also visits every device type.
    """
    seed = derive_seed(session.seed, "dropout", session.step, micro, session.processes.rank)
    torch.default_generator.manual_seed(seed)
    if session.device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to the model's state, such as batch-norm statistics."""
    kept = set(model.state_dict().keys())
    return {n: b for n, b in model.named_buffers() if n in kept}
