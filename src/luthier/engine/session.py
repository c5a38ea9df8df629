"""A model in training, as the methods see it: the run-time :class:`luthier.core.protocols.Context`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from luthier.core import rng as streams
from luthier.core.errors import LuthierError, UserError
from luthier.core.protocols import Batch, Completion, Loss, Outputs
from luthier.engine.distributed import Processes
from luthier.engine.head import Head, LogitsOutputs
from luthier.engine.reference import ReferenceOutputs, ReferenceScores
from luthier.engine.stack import Stack
from luthier.tasks.base import Encoded, Task
from luthier.tasks.causal_lm import output_scale, tied_gradient_by_rows, underlying
from luthier.tasks.regression import NumberOutputs

Decode = Callable[..., list[list[Completion]]]


class TaskModule(torch.nn.Module):
    """The model with its task: what DDP and FSDP wrap, so that every forward pass of training goes through them."""

    def __init__(self, model: torch.nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self.task = task

    def forward(self, batch: Batch, hidden: bool, consume: Callable[[Encoded], Any]) -> Any:
        """Encode the batch and hand it to ``consume`` while sharded weights are whole."""
        return consume(self.task.encode(self.model, batch, hidden=hidden))


class Session:
    """The policy, its references and the current position in the run.

    Args:
        model: the model to train, already prepared by the parameter methods.
        task: its task.
        processor: tokenizer or image processor.
        stack: the methods.
        processes: the process group (or its absence).
        seed: the run's seed.
        precision: ``fp32`` or ``bf16`` (autocast; weights and optimiser stay in float32).
        head_chunk: positions per chunk of the head; None lets the head choose.
        head_backend: ``auto``, ``torch``, ``liger`` or ``triton``.
        fingerprint: content hash of the base weights, under which reference scores are cached.
        models: further models by name.
        decode: how to generate, given by whoever builds the session.
        render: how to make a batch of canonical rows, likewise.
        wrap: put the model under DDP or FSDP where there are several processes; not for evaluation alone.
    """

    def __init__(
        self,
        *,
        model: torch.nn.Module,
        task: Task,
        processor: Any,
        stack: Stack,
        processes: Processes | None = None,
        seed: int = 0,
        precision: str = "fp32",
        head_chunk: int | None = None,
        head_backend: str = "auto",
        fingerprint: str = "",
        models: Mapping[str, torch.nn.Module] | None = None,
        decode: Decode | None = None,
        render: Callable[[Sequence[Mapping[str, Any]]], Batch] | None = None,
        wrap: bool = True,
    ) -> None:
        self.processes = processes or Processes.single()
        self.task, self.processor, self.stack, self.seed = task, processor, stack, seed
        self.precision, self.head_chunk, self.head_backend = precision, head_chunk, head_backend
        self.device = self.processes.device
        self.step, self.epoch, self.micro = 0, 0, 0
        self.total_steps: int | None = None
        self.total_epochs = 1
        self.totals: dict[str, float] = {}
        self.learning_rate, self.grad_factor = 0.0, 1.0
        self.optimizer: Any = None
        self.logged: dict[str, float] = {}
        self.model: Any = model.to(self.device)
        self._models = {name: m.to(self.device).eval().requires_grad_(False) for name, m in (models or {}).items()}
        self._scores: ReferenceScores | None = None
        self._encoded_of: Batch | None = None
        self._encoded: dict[str, Encoded] = {}
        self._decode, self._render = decode, render
        needed = stack.needs
        for name in needed.models:
            if name == "reference":
                self._make_reference(fingerprint)
            elif name not in self._models:
                raise UserError(f"a method needs the model '{name}', and the recipe names none.")
        module = TaskModule(self.model, task)
        self.module = self.processes.wrap(module) if wrap else module

    def _make_reference(self, fingerprint: str) -> None:
        """Adapters switched off where the base is frozen beneath them; otherwise a frozen copy."""
        adapters_only = hasattr(self.model, "disable_adapter") and all(
            "lora_" in n or "modules_to_save" in n for n, p in self.model.named_parameters() if p.requires_grad
        )
        if not adapters_only and "reference" not in self._models:
            self._models["reference"] = copy.deepcopy(self.model).eval().requires_grad_(False)
        if fingerprint:
            self._scores = ReferenceScores(fingerprint, options=f"{self.task.name}/{self.precision}")

    # -- forward passes

    def autocast(self) -> Any:
        """The run's precision as a context manager."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def head(self, encoded: Encoded) -> Head:
        """The log-prob head over the output embedding of an encoded batch."""
        assert encoded.weight_VH is not None
        return Head(
            encoded.weight_VH,
            encoded.bias_V,
            scale=encoded.scale,
            softcap=encoded.softcap,
            chunk=self.head_chunk,
            backend=self.head_backend,
        )

    def outputs(self, encoded: Encoded, batch: Batch, statistics: tuple[str, ...]) -> Outputs:
        """Flat outputs of an encoded batch."""
        if encoded.logits_NV is not None:
            return LogitsOutputs(encoded.logits_NV, batch.target_N, batch.sequence_N, layers=encoded.layers)
        if encoded.number_N is not None:
            return NumberOutputs(encoded.number_N, batch.target_N, batch.sequence_N, layers=encoded.layers)
        assert encoded.hidden_NH is not None
        head = self.head(encoded)

        def at(hidden_NH: torch.Tensor) -> Any:
            made = head.outputs(
                hidden_NH, batch.target_N, batch.sequence_N, statistics=statistics, layers=encoded.layers
            )
            made.form = partial(head.positionwise, hidden_NH, statistics=statistics)
            return made

        made = at(encoded.hidden_NH)
        if (exits := encoded.exits) is not None:
            made.exits = lambda layer: at(exits(layer))
        return made

    @contextmanager
    def _acting(self, model: str, grad: bool = False) -> Iterator[torch.nn.Module]:
        if model == "policy":
            # Without a gradient a process runs by itself: another one may have no row of this step.
            yield self.module if grad or self.processes.sharded else TaskModule(self.model, self.task)
        elif model in self._models:
            yield TaskModule(self._models[model], self.task)
        elif model == "reference" and hasattr(self.model, "disable_adapter"):
            was_training = self.model.training
            self.model.eval()
            try:
                with self.model.disable_adapter():
                    yield TaskModule(self.model, self.task)
            finally:
                self.model.train(was_training)
        else:
            raise LuthierError(f"there is no model '{model}' in this run: the method must declare it in needs.models.")

    def forward(
        self,
        batch: Batch,
        model: str = "policy",
        *,
        grad: bool | None = None,
        parameters: Mapping[str, torch.Tensor] | None = None,
    ) -> Outputs:
        """A forward pass; see :meth:`luthier.core.protocols.Context.forward`."""
        needs = self.stack.needs
        with_grad = (model == "policy") if grad is None else grad
        if parameters is not None and self.processes.sharded:
            raise UserError("perturbed weights are not available under training.sharding: fsdp2; use ddp.")
        if model == "policy" or with_grad or parameters is not None:
            return self._forward(batch, model, with_grad, parameters, needs.statistics)
        # A positionwise objective asks chunk by chunk: a frozen model reads the inputs once for all of them.
        whole, index_C = batch.part_of if batch.part_of is not None else (batch, None)
        scores = self._scores if model == "reference" else None
        if index_C is None:
            compute = partial(self._forward, batch, model, False, None)
            return compute() if scores is None else ReferenceOutputs(batch, scores, compute)

        def of_whole() -> Outputs:
            return self.outputs(self._frozen(whole, model), whole, ("logp",))

        def of_part() -> Outputs:
            return self.outputs(self._frozen(whole, model).at(index_C), batch, needs.statistics)

        return of_part() if scores is None else ReferenceOutputs(whole, scores, of_whole, (index_C, of_part))

    def _frozen(self, batch: Batch, model: str) -> Encoded:
        """A frozen model's forward pass over a whole batch, kept while its parts are asked for."""
        if self._encoded_of is not batch:
            self._encoded_of, self._encoded = batch, {}
        if model not in self._encoded:
            with self._acting(model) as module, torch.no_grad(), self.autocast():
                self._encoded[model] = module(batch, False, lambda encoded: encoded)
        return self._encoded[model]

    def _forward(
        self,
        batch: Batch,
        model: str,
        grad: bool,
        parameters: Mapping[str, torch.Tensor] | None,
        statistics: tuple[str, ...] = ("logp",),
    ) -> Outputs:
        hidden = self.stack.needs.hidden
        graph = grad and torch.is_grad_enabled()
        with self._acting(model, graph) as module, torch.set_grad_enabled(graph), self.autocast():

            def consume(encoded: Encoded) -> Outputs:
                return self.outputs(encoded, batch, statistics)

            if parameters is None:
                return module(batch, hidden, consume)
            named = {f"model.{name}": value for name, value in parameters.items()}
            return torch.func.functional_call(module, named, (batch, hidden, consume))

    def loss(self, batch: Batch) -> Loss:
        """The objective on a micro-batch, with plain NLL and mean target probability measured beside it."""
        # DDP and FSDP take no gradients by rows.
        by_rows = self.task.name == "causal-lm" and self.processes.world == 1
        with tied_gradient_by_rows(self.model) if by_rows else nullcontext():
            return self._loss(batch)

    def _loss(self, batch: Batch) -> Loss:
        objective = self.stack.objective

        def measured(out: Outputs, part: Batch) -> Loss:
            loss = objective.loss(out, part, self)
            with torch.no_grad():
                loss.metrics |= out.plain(part)
            return loss

        if not objective.needs.positionwise:
            return self.stack.complete(measured(self.forward(batch), batch), batch, self)

        def consume(encoded: Encoded) -> Loss:
            if encoded.hidden_NH is None:
                return measured(self.outputs(encoded, batch, objective.needs.statistics), batch)
            return self.head(encoded).positionwise(
                encoded.hidden_NH, batch, measured, statistics=objective.needs.statistics
            )

        with self.autocast():
            loss = self.module(batch, self.stack.needs.hidden, consume)
        self._encoded_of, self._encoded = None, {}
        return self.stack.complete(loss, batch, self)

    @torch.no_grad()
    def evaluate_batch(self, batch: Batch, statistics: tuple[str, ...]) -> Outputs:
        """A forward pass without gradient giving the statistics asked for; the caller sets evaluation mode."""
        batch = self.to_device(batch)
        with self.autocast():
            return self.module(batch, False, lambda encoded: self.outputs(encoded, batch, statistics))

    # -- the rest of the context

    def to_device(self, batch: Batch) -> Batch:
        """The batch on the run's device."""
        if self.device.type == "cpu":
            return batch
        moved = copy.copy(batch)
        moved.inputs = {k: v.to(self.device, non_blocking=True) for k, v in batch.inputs.items()}
        for name, value in vars(batch).items():
            if isinstance(value, torch.Tensor):
                setattr(moved, name, value.to(self.device, non_blocking=True))
        moved.columns = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in batch.columns.items()}
        return moved

    def rng(self, name: str, *keys: object) -> torch.Generator:
        """A generator of the named stream; without keys, of this step, micro-batch and rank."""
        return streams.stream(self.seed, name, *(keys or (self.step, self.micro, self.processes.rank)))

    def log(self, **values: float) -> None:
        """Keep values beside the step's metrics; the last one of a step counts."""
        self.logged.update({k: float(v) for k, v in values.items()})

    def generate(self, prompts: Sequence[Any], *, samples: int = 1, **options: Any) -> list[list[Completion]]:
        """Completions of the policy, ``samples`` for each prompt."""
        if self._decode is None:
            raise LuthierError("this session was built without a decoder.")
        return self._decode(self, prompts, samples=samples, **options)

    def render(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """A batch of canonical rows made on the way."""
        if self._render is None:
            raise LuthierError("this session was built without a renderer.")
        return self.to_device(self._render(rows))

    def output_layer(self) -> tuple[torch.Tensor, torch.Tensor | None, float]:
        """The policy's output embedding, its bias, and the factor on the logits."""
        base = underlying(self.model)
        layer = base.get_output_embeddings()
        return layer.weight, layer.bias, output_scale(base.config)[0]

    def score(self, dataset: Any, model: str = "policy") -> list[torch.Tensor]:
        """Target log-probabilities of every row of a prepared dataset, one tensor per row."""
        was_training = self.model.training
        self.model.eval()
        found: list[torch.Tensor] = []
        try:
            with torch.no_grad():
                for start in range(0, len(dataset), 32):
                    index_B = list(range(start, min(start + 32, len(dataset))))
                    batch = self.to_device(self.task.collate(dataset.fetch(index_B), index_B))
                    logp_N = self.forward(batch, model, grad=False).logp_N.cpu()
                    counts = torch.bincount(batch.sequence_N.cpu(), minlength=len(index_B)).tolist()
                    found += list(logp_N.split(counts))
        finally:
            self.model.train(was_training)
        return found

    def close(self) -> None:
        """Write what is still in memory: reference scores."""
        if self._scores is not None:
            self._scores.flush()
