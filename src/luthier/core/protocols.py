"""The extension points, and the values that pass between them (:mod:`luthier.core.values`).

Tensors carry their shape as a suffix: B examples of a batch, T tokens of a row, N supervised positions of a batch,
V vocabulary (or classes), H hidden size, C a chunk of the N positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from luthier.core.values import Artefact, Batch, Completion, Loss, Metrics, Needs, Table, Unit

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "Analysis",
    "Artefact",
    "Batch",
    "Completion",
    "Context",
    "DataStage",
    "Decoder",
    "Hooks",
    "Loss",
    "Metrics",
    "Needs",
    "Objective",
    "Outputs",
    "Parameters",
    "Procedure",
    "Reward",
    "Selector",
    "Source",
    "Table",
    "Transform",
    "Unit",
    "WeightOp",
]


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
