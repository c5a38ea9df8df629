"""The extension points and the values that pass between them.

Tensors carry their shape as a suffix: B examples of a batch, T tokens of a row, N supervised positions of a batch,
V vocabulary (or classes), H hidden size, C a chunk of the N positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch

from luthier.core.errors import LuthierError

if TYPE_CHECKING:
    from datasets import Dataset

Unit = Literal["token", "sequence", "batch"]
# Name -> (sum, weight): plain tensors or floats, no graph.
Metrics = dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class Needs:
    """What a method asks of the engine and of the data; checked before any weight is loaded.

    Attributes:
        statistics: what the head computes per supervised position, the cheapest that serves: any of ``logp``,
            ``entropy``, ``top1``, ``top1_logp``, ``collision`` (the sum of squared probabilities).
        positionwise: the loss is a sum of terms that each depend on one position; the head then forms its
            gradient in the same pass as the loss.
        vocabulary: the method calls ``out.over_vocabulary``.
        hidden: the method calls ``out.hidden``.
        models: further models by name, such as ``reference`` (the base as it was before training).
        columns: dataset columns that must reach the batch.
        generation: the method lets the model write during training.
        tasks: the tasks for which it is defined; empty means all.
        fixed_weight: ``Loss.weight`` is a function of the batch alone (not of the model), so that the method may be
            one term of a weighted sum.
    """

    statistics: tuple[str, ...] = ("logp",)
    positionwise: bool = False
    vocabulary: bool = False
    hidden: bool = False
    models: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    generation: bool = False
    tasks: tuple[str, ...] = ()
    fixed_weight: bool = True


@dataclass
class Batch:
    """One micro-batch. ``target_N`` is made when the batch is collated and no transform of the inputs touches it.

    Attributes:
        inputs: what the model takes (``input_ids`` [B, T], ``attention_mask`` [B, T], ``pixel_values``, ...).
        position_N: int64, which row of the flattened hidden states ([B*T, H] or [B, H]) predicts each target.
        target_N: int64 token ids or class indices; float32 where targets are numbers.
        weight_N: float32 weight of each position; 1 by default.
        sequence_N: int64, which example of the batch a position belongs to.
        row_B: int64, row numbers in the prepared data.
        columns: dataset columns asked for by ``Needs.columns``; lists of length B, or tensors named ``*_N``. Of a
            boolean tensor ``<group>_N`` that a transform adds, the plain loss inside the group is logged.
        keys_B: content hash of each row, under which scores are cached; None once a transform changed the inputs.
        adjustable_BT: bool [B, T], token positions a transform may corrupt (no padding, no special tokens but the
            end token); None where the task has no tokens.
        supervised_BT: bool [B, T], token positions that are targets; None where the task has none.
        part_of: for a batch cut by :meth:`positions`, the batch it was cut from and where its positions stand there.
    """

    inputs: dict[str, torch.Tensor]
    position_N: torch.Tensor
    target_N: torch.Tensor
    weight_N: torch.Tensor
    sequence_N: torch.Tensor
    row_B: torch.Tensor
    columns: dict[str, Any] = field(default_factory=dict)
    keys_B: list[str] | None = None
    adjustable_BT: torch.Tensor | None = None
    supervised_BT: torch.Tensor | None = None
    part_of: tuple[Batch, torch.Tensor] | None = None

    @property
    def examples(self) -> int:
        """B."""
        return int(self.row_B.numel())

    def with_inputs(self, **inputs: torch.Tensor) -> Batch:
        """A copy with some model inputs replaced; cached scores no longer apply to it."""
        return replace(self, inputs={**self.inputs, **inputs}, keys_B=None, part_of=None)

    def with_weights(self, weight_N: torch.Tensor) -> Batch:
        """A copy with other position weights."""
        return replace(self, weight_N=weight_N)

    def positions(self, index_C: torch.Tensor) -> Batch:
        """The same batch restricted to some supervised positions (inputs untouched)."""
        columns = {k: v[index_C] if k.endswith("_N") else v for k, v in self.columns.items()}
        return replace(
            self,
            position_N=self.position_N[index_C],
            target_N=self.target_N[index_C],
            weight_N=self.weight_N[index_C],
            sequence_N=self.sequence_N[index_C],
            columns=columns,
            part_of=(self, index_C) if self.part_of is None else (self.part_of[0], self.part_of[1][index_C]),
        )

    def every_token(self) -> Batch:
        """The same rows with a position at every real token instead of at the targets; padding is left out.

        The hidden state at position n is that of token n itself. ``target_N`` is the next token (the token itself at
        the end of a row) and serves no loss; columns named ``*_N`` are dropped.
        """
        ids_BT, mask_BT = self.inputs["input_ids"], self.inputs["attention_mask"].bool()
        example_N, token_N = torch.nonzero(mask_BT, as_tuple=True)
        width = ids_BT.shape[1]
        last_N = token_N + 1 >= mask_BT.sum(1)[example_N]
        return replace(
            self,
            position_N=example_N * width + token_N,
            target_N=ids_BT[example_N, torch.where(last_N, token_N, (token_N + 1).clamp(max=width - 1))],
            weight_N=torch.ones_like(example_N, dtype=torch.float32),
            sequence_N=example_N,
            columns={k: v for k, v in self.columns.items() if not k.endswith("_N")},
            keys_B=None,
            part_of=None,
        )

    def take(self, index_b: torch.Tensor, weight_b: torch.Tensor | None = None) -> Batch:
        """The batch of some of its examples, in the given order, position weights multiplied by ``weight_b``.

        Args:
            index_b: int64 indices into the B examples, no repeats.
            weight_b: one factor per chosen example; 1 when absent.
        """
        rows = self.row_B.numel()
        # A position's hidden row is example * width + offset, where width is T for tokens and 1 for examples.
        width = next((v.shape[1] for k, v in self.inputs.items() if k == "input_ids" and v.dim() == 2), 1)
        per_token = self.supervised_BT is not None
        device = self.sequence_N.device
        index_b = index_b.to(device)
        new_of_old = torch.full((rows,), -1, dtype=torch.long, device=device)
        new_of_old[index_b] = torch.arange(index_b.numel(), device=device)
        new_N = new_of_old[self.sequence_N]
        kept = torch.nonzero(new_N >= 0).squeeze(1)
        part = self.positions(kept)
        step = width if per_token else 1
        part.position_N = part.position_N + (new_N[kept] - part.sequence_N) * step
        part.sequence_N = new_N[kept]
        if weight_b is not None:
            part.weight_N = part.weight_N * weight_b.to(part.weight_N)[part.sequence_N]
        order = index_b.tolist()
        return replace(
            part,
            part_of=None,
            inputs={k: v[index_b] for k, v in self.inputs.items()},
            row_B=self.row_B[index_b],
            columns={
                k: v if k.endswith("_N") else (v[index_b] if isinstance(v, torch.Tensor) else [v[i] for i in order])
                for k, v in part.columns.items()
            },
            keys_B=None if self.keys_B is None else [self.keys_B[i] for i in order],
            adjustable_BT=None if self.adjustable_BT is None else self.adjustable_BT[index_b],
            supervised_BT=None if self.supervised_BT is None else self.supervised_BT[index_b],
        )


class Outputs(Protocol):
    """What a forward pass gives, flat over the N supervised positions. Statistics are float32 and computed on use."""

    @property
    def logp_N(self) -> torch.Tensor:
        """Log-probability of the target."""

    @property
    def entropy_N(self) -> torch.Tensor:
        """Entropy of the prediction, in nats (no gradient)."""

    @property
    def top1_N(self) -> torch.Tensor:
        """int64, the most likely token or class."""

    @property
    def top1_logp_N(self) -> torch.Tensor:
        """Log-probability of the most likely token or class (no gradient)."""

    @property
    def collision_N(self) -> torch.Tensor:
        """Sum of squared probabilities (no gradient), for the Brier score."""

    @property
    def sequence_N(self) -> torch.Tensor:
        """int64, which example of the batch."""

    def hidden(self, layer: int = -1) -> torch.Tensor:
        """[N, H] hidden states at the supervised positions; -1 is what the output embedding takes."""

    def exit(self, layer: int) -> Outputs:
        """The outputs of the sub-model that ends after block ``layer`` (1 is the first): same final norm, same head.

        ``needs.hidden`` must be set. The last block's exit is the model itself.
        """

    def over_vocabulary(self, fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """``fn(logits_CV, index_C) -> [C]`` or ``[C, ...]`` applied chunk by chunk; the results joined to N.

        Differentiable: logits are recomputed chunk by chunk in the backward pass, so no N x V tensor lives.
        """

    def numbers(self) -> torch.Tensor:
        """[N] predictions, where targets are numbers; ``logp_N`` is then minus the squared error and all there is."""

    def plain(self, batch: Batch) -> dict[str, tuple[Any, Any]]:
        """What is logged beside any loss, name -> (sum, weight): plain NLL and the mean probability of the target."""

    def positionwise(self, batch: Batch, loss: Callable[[Outputs, Batch], Loss]) -> Loss:
        """``loss(outputs, part)`` summed over chunks of the batch, its gradient formed while their logits are there.

        For an objective that is not positionwise as a whole, but holds a part that is: what ``needs.positionwise``
        promises must hold for ``loss``. The backward pass can go through the result once.
        """


@dataclass
class Loss:
    """An un-normalised loss; the engine divides by the weight of the whole optimiser step over all ranks.

    Attributes:
        sum: scalar tensor with a graph, a sum and never a mean.
        weight: what the sum is divided by in the end: tokens, sequences, or another count.
        unit: what the weight counts.
        metrics: name -> (sum, weight), averaged by the engine over the step; plain tensors or floats, no graph.
    """

    sum: torch.Tensor
    weight: torch.Tensor | float
    unit: Unit = "token"
    metrics: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def plus(self, term: Loss, totals: Mapping[str, float], label: str, factor: float = 1.0) -> Loss:
        """This loss and ``factor`` times another, of which each ends as a mean over its own unit.

        Args:
            term: the loss to add; its metrics come along under ``<label>/``.
            totals: the counts of the whole step by unit (``ctx.totals``); they must have both units.
            label: what the term is called.
            factor: its weight.
        """
        for unit in (self.unit, term.unit):
            if unit not in totals:
                raise LuthierError(f"'{label}' adds to a loss that counts in '{unit}', of which there is no total.")
        scaled = term.sum * (factor * totals[self.unit] / max(totals[term.unit], 1e-12))
        own = {
            f"{label}/loss": (term.sum.detach(), term.weight),
            **{f"{label}/{k}": v for k, v in term.metrics.items()},
        }
        return Loss(self.sum + scaled, self.weight, self.unit, {**self.metrics, **own})


@dataclass(frozen=True)
class Completion:
    """What was written for one prompt.

    Attributes:
        text: without special tokens.
        token_ids: the stop token included; empty where the writer tells no tokens.
        finished: whether it stopped by itself.
        token_logp: log-probability of each token at the temperature it was drawn at, before any truncation; empty where
            the writer tells none. It does not count when completions are compared.
    """

    text: str
    token_ids: tuple[int, ...]
    finished: bool
    token_logp: tuple[float, ...] = field(default=(), compare=False)

    @property
    def logp(self) -> float | None:
        """Log-probability of the whole, where it is known."""
        return sum(self.token_logp) if self.token_logp else None


@dataclass(frozen=True)
class Table:
    """The result of an analysis: rows of JSON-able values, one unit and one direction per column."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    units: Mapping[str, str] = field(default_factory=dict)
    direction: Mapping[str, Literal["higher", "lower"]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Artefact:
    """What a procedure leaves: the live model and what is known about it.

    ``notes`` are sentences that whoever reads the run's numbers must know; they go wherever these are shown.
    """

    model: Any
    metrics: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    notes: tuple[str, ...] = ()


class Context(Protocol):
    """What a method gets at run time. No method imports the engine."""

    seed: int
    step: int
    total_steps: int | None
    total_epochs: int
    epoch: int
    task: Any
    processor: Any
    device: torch.device
    totals: dict[str, float]
    model: Any
    learning_rate: float
    grad_factor: float
    optimizer: Any

    def loss(self, batch: Batch) -> Loss:
        """The recipe's objective on a micro-batch of the step, with a graph."""

    def forward(
        self,
        batch: Batch,
        model: str = "policy",
        *,
        grad: bool | None = None,
        parameters: Mapping[str, torch.Tensor] | None = None,
    ) -> Outputs:
        """A forward pass of the policy, the ``reference`` or another named model.

        Args:
            batch: the micro-batch.
            model: ``policy``, ``reference``, or a name the recipe gives.
            grad: whether to build a graph; by default yes for the policy in training, no for others.
            parameters: tensors by name used instead of the model's own (perturbed weights); gradients flow into them.
        """

    def generate(self, prompts: Sequence[Any], *, samples: int = 1, **options: Any) -> list[list[Completion]]:
        """Let the policy write ``samples`` completions per prompt (token id lists or rendered rows)."""

    def render(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """A batch of canonical rows made on the way (negatives, rewrites), by the run's own rendering path."""

    def output_layer(self) -> tuple[torch.Tensor, torch.Tensor | None, float]:
        """The policy's output embedding: (weight_VH, bias_V or None, factor on the logits)."""

    def score(self, dataset: Any, model: str = "policy") -> Any:
        """Target log-probabilities of every row of a prepared dataset, cached on disk by row and model hash."""

    def rng(self, name: str, *keys: object) -> torch.Generator:
        """A generator of the named stream (``init``, ``data``, ``noise``, ``rollout``), a pure function of its keys.

        Without keys the current step, micro-batch and rank are the keys.
        """

    def log(self, **values: float) -> None:
        """Values to show and keep beside the step's metrics."""


class Hooks(Protocol):
    """What any method of a training run (objective, transform, selector, parameters) may have besides its own calls.

    All are optional; a method defines those it uses.

    Attributes:
        needs: what it asks of the engine and of the data.
        repeats: how many optimiser steps in a row have the same rows; 1 when absent.
    """

    needs: Needs
    repeats: int

    def check_data(self, dataset: Any) -> None:
        """Before any weight is loaded: refuse prepared training rows that lack what the method reads from them."""

    def prepare_model(self, model: Any, processor: Any) -> None:
        """Before parameters are opened: change the model's vocabulary or modules."""

    def prepare(self, ctx: Context, dataset: Any) -> None:
        """Before the first step, or before a resumed one loads :meth:`load`: look at the prepared training rows."""

    def counts(self, batch: Batch, ctx: Context) -> dict[str, float]:
        """What the loss divides by, of a micro-batch; ``ctx.totals`` has the sums over the whole step and all ranks."""

    def auxiliary(self, model: Any, batch: Batch, ctx: Context) -> Loss:
        """A term to add to the objective's loss of a micro-batch, divided by its own count (see ``ctx.totals``).

        Called when the objective has run the model and before the backward pass. What a module of the model computed on
        the way it keeps itself, but not while the forward pass is only repeated for gradient checkpointing
        (:func:`luthier.functional.recording.recording`). The objective's own count must be a function of the batch.
        """

    def before_step(self, batches: Sequence[Batch], ctx: Context) -> None:
        """Before the first forward pass of a step, of which ``batches`` are this rank's micro-batches.

        What is trained may change here (``requires_grad``); the optimiser is then rebuilt. Moments of a tensor that
        comes back are kept where ``ctx.optimizer.state`` holds them at that moment.
        """

    def update(self, model: Any, ctx: Context) -> None:
        """After clipping and before the optimiser's step: a method with an update rule of its own applies it here.

        It moves its tensors at ``ctx.learning_rate`` and takes their gradients away (``grad = None``), so that the
        optimiser leaves them alone; what it remembers belongs in :meth:`state`. ``ctx.grad_factor`` is what the summed
        gradients of the step were multiplied by.
        """

    def groups(self, model: Any) -> list[dict[str, Any]]:
        """Optimiser groups over modules that it added and opened itself, beside those of the parameter methods."""

    def record(self) -> Any:
        """JSON to keep in the run's ``methods.json``: what was drawn, chosen or found."""

    def delta(self, model: Any) -> tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]:
        """After training and before ``export``: what it changed, to be kept in the run's ``delta/``.

        Differences by tensor name (:mod:`luthier.functional.differences`), and full values of tensors the base has not.
        """

    def finish_model(self, model: Any, processor: Any) -> None:
        """After training, before the model is saved: undo what only training needed."""

    def state(self) -> dict[str, Any]:
        """JSON values and tensors to keep in a checkpoint."""

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""


@runtime_checkable
class Objective(Protocol):
    """A training loss. ``needs`` may be a class attribute or a property of the options."""

    needs: Needs

    def loss(self, out: Outputs, batch: Batch, ctx: Context) -> Loss:
        """The un-normalised loss of a micro-batch; with ``needs.positionwise`` also called on part of its positions."""


@runtime_checkable
class Transform(Protocol):
    """Changes a batch before the forward pass: corrupts inputs, sets weights, relabels."""

    def __call__(self, batch: Batch, ctx: Context) -> Batch:
        """The changed batch; the given one is left as it is."""


@runtime_checkable
class Selector(Protocol):
    """Online batch selection. The engine offers ``oversample`` times the rows of a step."""

    oversample: int

    def select(self, batch: Batch, ctx: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """``(index_b, weight_b)``: the chosen examples of the offered batch and their weights."""


class Parameters(Protocol):
    """What is trained and how it is parameterised. The engine first freezes all; ``apply`` opens its claim."""

    def apply(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Set ``requires_grad`` (and add adapters); return the model to train. Deterministic in the ``init`` stream.

        A procedure may tell more in ``ctx.given[slug]``; ``ctx.stage`` counts the trainings of the run.
        """

    def groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """Optimiser groups over what it opened, ``lr_scale`` and ``weight_decay`` being optional keys of each."""

    def on_grad(self, model: torch.nn.Module, ctx: Context) -> None:
        """After the gradients of a step are complete and before clipping."""

    def on_step(self, model: torch.nn.Module, ctx: Context) -> None:
        """After the optimiser step."""

    def state(self) -> dict[str, Any]:
        """JSON values and tensors to keep in a checkpoint."""

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""

    def export(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model to save: one that plain transformers (or peft) opens."""


class DataStage(Protocol):
    """Selects, scores, cleans, synthesises, reformats or reorders canonical rows; cached by content.

    A stage that reads more than the rows and its options (other models, files) also has ``reads(ctx) -> list[str]``,
    hashes of what it reads; when one of them changes, the stage runs again.
    """

    def run(self, dataset: Dataset, ctx: Any) -> Dataset:
        """The new rows."""


class Reward(Protocol):
    """A verifier, judge or text metric."""

    def __call__(self, rows: Sequence[Mapping[str, Any]], completions: Sequence[str], ctx: Any) -> list[float | None]:
        """One score per completion, None where it cannot be judged."""


class Source(Protocol):
    """The weights of one model, read when asked for.

    Attributes:
        base_fingerprint: hash of the base it was fine-tuned from, where that is recorded.
        config: its configuration.
    """

    base_fingerprint: str | None
    config: Mapping[str, Any]

    def names(self) -> list[str]:
        """Names of its tensors."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor."""

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor."""

    def piece(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Entries ``start`` to ``stop`` of a tensor in row order, flat; fewer where the tensor ends before."""

    def tokens(self) -> dict[str, int] | None:
        """Token -> id of its tokenizer; None where there is none that can be read."""


class WeightOp(Protocol):
    """Merging and editing of weights, tensor by tensor over lazily read shards.

    All but ``tensor`` is optional. The sources are ``tuned``, the first model or the result of the operation before;
    ``base``, where there is one; and the further models by label. Floating-point tensors only: others are ``tuned``'s.

    Attributes:
        needs_base: it reads the base, which must have the models' tensors; a head that only one model has is kept.
        needs_rows: it chooses by a score on held-out rows.
        count: the smallest and the largest number of models besides the base and foreign ones (None: any).
        sources: label -> place of further models that the recipe's options name.
        elementwise: each entry of the result depends on that entry of the sources alone (and on what ``prepare``
            found), so that ``tensor`` may be given flat pieces of all tensors, in order; ``ctx.start`` is the first
            one's place.
        pads_rows: sources may have fewer rows of a tensor than ``tuned``, and other tokenizers; the operation checks.
        foreign: labels of sources that may come from another base.
        like: the label whose types the result is stored in, by default ``tuned``.
        onto: the label whose tensor names, shapes, configuration and tokenizer the result has, by default ``tuned``.
        recipe: JSON about what was chosen and found, kept beside the result.
    """

    def prepare(self, sources: Mapping[str, Source], ctx: Any) -> None:
        """An optional first pass over the sources for statistics, choices and checks."""

    def tensor(self, name: str, tensors: Mapping[str, torch.Tensor], ctx: Any) -> torch.Tensor:
        """The new tensor (or piece) from those of the sources, in any floating-point type."""


class Decoder(Protocol):
    """An inference-time technique."""

    def generate(self, model: Any, prompts: Sequence[Sequence[int]], ctx: Any) -> list[Completion]:
        """One completion per prompt of token ids, in order."""


class Analysis(Protocol):
    """Looks at finished runs."""

    def run(self, runs: Iterable[Any], ctx: Any) -> Table:
        """A table with units, directions, n and confidence intervals."""


class Procedure(Protocol):
    """A multi-stage method in plain Python."""

    def __call__(self, ctx: Any) -> Artefact:
        """Run the stages and return the result."""
