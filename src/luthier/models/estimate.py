"""Memory and time of a training run, estimated from config.json and the data's lengths before any weight is loaded.

Memory, in bytes, with P weights, P_t of them trained, b bytes per weight, and a micro-batch of R rows padded to T
tokens, N of them supervised::

    weights      P b, and P_t b for a copy of the base where a reference model is asked for
    gradients    P_t b
    optimiser    8 P_t (AdamW: two moments in float32), 4 P_t (SGD with momentum)
    activations  a R T (L K + 4 I + 4 H) + 4 L R T^2, a = 4 bytes (2.4 under bf16 autocast)
                 K = 9 H + 2 H_kv + 4 I; with gradient checkpointing L K becomes L H + K and L T^2 becomes T^2
                 attention that keeps its weights (eager, or with dropout) adds 3 a L R T^2 heads
    head         the logit buffer (at most 64 MiB on a CPU, 512 MiB elsewhere, or head_chunk rows)
                 + 4 (V H + 3 N H) for the gradients it forms; an objective that is no sum over positions keeps up
                 to 256 MiB (2 GiB elsewhere) of logits more

K counts, per token, what a pre-norm decoder layer keeps for its backward pass: two norms (3 H each: input, normalised,
scaled), queries, attention output before and after reordering (3 H), keys and values (2 H_kv), and the four tensors of
a gated MLP. 4 I + 4 H are the gradients that live while one layer is walked back, T^2 the float mask of each layer.
L layers, H hidden, H_kv = H kv_heads / heads, I intermediate, V vocabulary.

Time, in seconds, is floating-point operations over (matrix peak measured here x :data:`ACHIEVED`). Per token read::

    forward      2 P_body + 2 L T H, P_body being the weights without embeddings; attention looks back T / 2 on average
    backward     the same once more to pass through, and P_t / P times once more for the weights
    checkpoint   one more forward
    head         6 V H per supervised token
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from luthier.core.rng import stream
from luthier.models.info import ModelInfo, base_folder, read_json

# Share of the matrix peak that a whole step reaches; small models reach less, so their time is underestimated.
ACHIEVED = 0.6
_BUFFER = {"cpu": 64 << 20, "cuda": 512 << 20}
_KEPT_LOGITS = {"cpu": 256 << 20, "cuda": 2 << 30}
_MOMENTS = {"adamw": 8, "sgd": 4}


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for; see the module's formula."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        """Their sum: the peak, without the interpreter and its libraries."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Estimate:
    """What a training run will take.

    Attributes:
        memory: by purpose.
        seconds: of the training steps; None where no rate was measured.
        tokens: tokens read in all steps.
        trained: number of trained weights.
        parameters: number of weights.
        largest_micro_batch: (rows, tokens per row) the memory is for.
        notes: what was assumed.
    """

    memory: Memory
    seconds: float | None
    tokens: int
    trained: int
    parameters: int
    largest_micro_batch: tuple[int, int]
    notes: tuple[str, ...] = field(default_factory=tuple)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, with the memory's total in bytes and GiB."""
        known = asdict(self)
        known["memory"] |= {"total": self.memory.total, "total_gib": round(self.memory.total / 2**30, 3)}
        return known


def training_memory(
    info: ModelInfo,
    *,
    trained: int,
    parameters: int | None = None,
    rows: int,
    length: int,
    supervised: int | None = None,
    optimizer: str = "adamw",
    weight_bytes: int = 4,
    autocast: bool = False,
    checkpointing: bool = False,
    reference: bool = False,
    positionwise: bool = True,
    head_chunk: int | None = None,
    keeps_attention: bool = False,
    device: str = "cpu",
) -> Memory:
    """The module's formula.

    Args:
        info: the model.
        trained: number of trained weights.
        parameters: number of weights with adapters; by default those of the files.
        rows: rows of the largest micro-batch.
        length: tokens per row of it.
        supervised: supervised tokens in it; by default all.
        optimizer: ``adamw`` or ``sgd``.
        weight_bytes: bytes per weight in memory.
        autocast: whether the forward pass runs in bf16.
        checkpointing: gradient checkpointing.
        reference: whether a copy of the trained weights is kept for a reference model.
        positionwise: whether the objective is a sum over positions.
        head_chunk: rows of the logit buffer; by default as many as fill it.
        keeps_attention: whether attention keeps its weights (eager, or with dropout).
        device: ``cpu`` or ``cuda``.
    """
    total = info.parameters if parameters is None else parameters
    tokens, value = rows * length, 2.4 if autocast else 4.0
    narrow = info.hidden * info.key_value_heads // max(info.heads, 1)
    wide = info.intermediate or 4 * info.hidden
    layer = 9 * info.hidden + 2 * narrow + 4 * wide
    layers = 1 if checkpointing else info.layers
    kept = layers * layer + (info.layers * info.hidden if checkpointing else 0)
    activations = value * tokens * (kept + 4 * wide + 4 * info.hidden) + 4.0 * layers * rows * length**2
    if keeps_attention:
        activations += 3 * value * layers * rows * length**2 * info.heads
    head = 0.0
    if info.vocabulary:
        found = tokens if supervised is None else supervised
        row = 4 * info.vocabulary
        buffer = min(found, head_chunk or max(_BUFFER[device] // row, 1)) * row
        head = buffer + 4.0 * (info.vocabulary * info.hidden + 3 * found * info.hidden)
        if not positionwise:
            head += min(_KEPT_LOGITS[device], found * row)
    return Memory(
        weights=weight_bytes * (total + (trained if reference else 0)),
        gradients=weight_bytes * trained,
        optimizer=_MOMENTS[optimizer] * trained,
        activations=round(activations),
        head=round(head),
    )


def step_operations(
    info: ModelInfo, *, tokens: int, supervised: int, length: float, trained_share: float, checkpointing: bool = False
) -> float:
    """Floating-point operations to train on some tokens; see the module's formula.

    Args:
        info: the model.
        tokens: tokens read.
        supervised: supervised ones among them.
        length: mean length of a row.
        trained_share: P_t / P.
        checkpointing: gradient checkpointing.
    """
    table = (info.vocabulary or 0) * info.hidden
    body = max(info.parameters - table * (1 if info.tied else 2), 0)
    forward = 2 * body + 2 * info.layers * length * info.hidden
    passes = 2 + min(trained_share, 1.0) + (1 if checkpointing else 0)
    return tokens * forward * passes + 6.0 * table * supervised


def matrix_peak(dtype: str = "float32", *, size: int = 768, seconds: float = 0.15) -> float:
    """Floating-point operations per second of a matrix product here, the best of as many as fit into ``seconds``."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 4096 if device == "cuda" else size
    a = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)
    best, stop = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < stop or not best:
        start = time.perf_counter()
        float((a @ a)[0, 0])  # reading a value waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


class _Setup:
    """What parameter methods may ask for before there is a run."""

    def __init__(self, seed: int, task: str) -> None:
        self.seed, self.task, self.processor, self.step, self.epoch = seed, task, None, 0, 0

    def rng(self, name: str, *keys: object) -> Any:
        return stream(self.seed, name, *keys)


def count_trained(info: ModelInfo, plan: Any) -> tuple[int, int, str]:
    """(trained, all, note): the weights the plan's parameter methods open, found on a model without memory.

    Where a method must see real weights, all are counted and the note says so.
    """
    import torch
    import transformers

    from luthier.models.load import AUTO_CLASSES

    config = transformers.AutoConfig.from_pretrained(base_folder(info))
    task = plan.task if plan.task in AUTO_CLASSES else info.task or "causal-lm"
    try:
        with torch.device("meta"):
            model = getattr(transformers, AUTO_CLASSES[task]).from_config(config)
        # Outside the block: methods draw random choices, which the meta device cannot.
        opened: set[str] = set()
        for choice in plan.parameters:
            model.requires_grad_(False)
            model = choice.build().apply(model, _Setup(plan.recipe.seed, task))
            opened |= {n for n, p in model.named_parameters() if p.requires_grad}
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return (
            info.parameters,
            info.parameters,
            f"all weights counted as trained: a parameter method must see real weights ({error})",
        )
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    return sum(sizes[n] for n in opened), sum(sizes.values()), ""


def _attention_dropout(info: ModelInfo) -> bool:
    """Whether attention weights are dropped in training, which needs them in memory."""
    config = read_json(base_folder(info) / "config.json")
    return any(config.get(k) for k in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"))


def largest_micro_batch(lengths: np.ndarray, training: Any) -> tuple[int, int]:
    """(rows, tokens per row) of the largest micro-batch a run can meet."""
    longest = int(lengths.max())
    if training.batch_tokens:
        per_micro = training.batch_tokens / training.accumulation
        return max(1, round(per_micro / longest)), longest
    return min(len(lengths), -(-training.batch_rows // training.accumulation)), longest


def estimate(info: ModelInfo, plan: Any, prepared: Any, steps: int, *, measure: bool = True) -> Estimate:
    """The estimate for a plan.

    Args:
        info: the model.
        plan: the plan, its task settled.
        prepared: the prepared training data (``lengths``, ``report``).
        steps: optimiser steps.
        measure: whether to measure the matrix peak (0.15 s) and give a time.
    """
    import torch

    training = plan.recipe.training
    lengths = np.asarray(prepared.lengths)
    trained, parameters, note = count_trained(info, plan)
    rows, length = largest_micro_batch(lengths, training)
    share = supervised_share(prepared)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bf16 = training.precision == "bf16" or (training.precision == "auto" and device == "cuda")
    needs = [choice.needs for choice in plan.choices()]
    memory = training_memory(
        info,
        trained=trained,
        parameters=parameters,
        rows=rows,
        length=length,
        supervised=max(1, round(rows * length * share)),
        optimizer=training.optimizer,
        weight_bytes=2 if plan.recipe.model.dtype == "bfloat16" else 4,
        autocast=bf16,
        checkpointing=training.gradient_checkpointing,
        reference=any("reference" in n.models for n in needs),
        positionwise=all(choice.needs.positionwise for choice in plan.objective),
        head_chunk=training.head_chunk,
        keeps_attention=plan.recipe.model.attention == "eager" or _attention_dropout(info),
        device=device,
    )
    per_step = training.batch_tokens or training.batch_rows * float(lengths.mean())
    tokens = round(steps * per_step)
    operations = step_operations(
        info,
        tokens=tokens,
        supervised=round(tokens * share),
        length=float(lengths.mean()),
        trained_share=trained / max(parameters, 1),
        checkpointing=training.gradient_checkpointing,
    )
    peak = matrix_peak("bfloat16" if bf16 else "float32") if measure else None
    notes = [
        "memory without the interpreter and its libraries (about 0.5 GiB)",
        f"time assumes {ACHIEVED:.0%} of the matrix peak measured now, and leaves evaluation and generation out",
    ]
    return Estimate(
        memory=memory,
        seconds=operations / (ACHIEVED * peak) if peak else None,
        tokens=tokens,
        trained=trained,
        parameters=parameters,
        largest_micro_batch=(rows, length),
        notes=tuple([*notes, note] if note else notes),
    )


def supervised_share(prepared: Any) -> float:
    """Supervised tokens over all tokens in the first 1,000 prepared rows; 1 where rows have no spans."""
    rows = prepared.fetch(list(range(min(len(prepared), 1000))))
    if "spans" not in rows:
        return 1.0
    supervised = sum(int(np.sum(np.asarray(s)[1::2] - np.asarray(s)[::2])) for s in rows["spans"])
    return supervised / max(sum(len(ids) for ids in rows["input_ids"]), 1)
