"""Weight operations: piece by piece from shards to shards, after a training or on models that are already there."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from luthier.core.errors import UserError
from luthier.core.protocols import Batch, Outputs
from luthier.core.store import atomic_folder, write_json
from luthier.functional.task_vectors import PIECE
from luthier.models.info import read_json, resolve
from luthier.models.shards import ShardWriter
from luthier.models.sources import ModelSource, check_models
from luthier.runs.measure import batches, quick_loss


class WeightContext:
    """What a weight operation may ask: the models it began with, and scores on held-out rows where there are rows.

    Attributes:
        models: label -> source of the fine-tuned models before any operation.
        start: place of the first entry of the pieces that ``tensor`` is given.

    Args:
        models: see above.
        shop: a run, with its rows; None where there are none.
        model: a model of the right architecture, whose weights are replaced as needed.
    """

    def __init__(self, models: Mapping[str, Any], shop: Any = None, model: Any = None) -> None:
        self.models, self.start, self.model, self._shop = models, 0, model, shop
        if shop is not None:
            self.seed, self.device = shop.seed, shop.processes.device
            self.session = shop.session(model)

    @property
    def shop(self) -> Any:
        """The run."""
        if self._shop is None:
            raise UserError(
                "this operation chooses by a score on held-out rows: name a recipe with data (--rows recipe.yaml), or "
                "give the values it would choose."
            )
        return self._shop

    @property
    def _rows(self) -> Any:
        source = self.shop.data.select or self.shop.data.test
        if source is None:
            raise UserError(
                "this weight operation chooses by a score on held-out rows: name some under data.select (or data.test)."
            )
        return source.prepared

    def batches(self) -> Iterator[Batch]:
        """Held-out batches."""
        rows = self._rows
        return batches(self.session, rows, self.shop.plan.recipe.evaluation.batch_rows)

    def _quick(self, tensors: Mapping[str, torch.Tensor], rows: Any) -> dict[str, float]:
        own = self.model.state_dict()
        with torch.no_grad():
            for name in tensors:
                own[name].copy_(tensors[name])
        return quick_loss(self.session, rows, self.shop.plan.recipe.evaluation.batch_rows)

    def evaluate(self, tensors: Mapping[str, torch.Tensor]) -> float:
        """Accuracy of the model with these weights on held-out rows; for language models the negative loss."""
        found = self._quick(tensors, self._rows)
        return found.get("accuracy", -found["loss"])

    def accuracy(self, tensors: Mapping[str, torch.Tensor]) -> float:
        """Accuracy on held-out rows, for language models that of the next token."""
        return _accuracy(self._quick(tensors, self._rows))

    def controls(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """The same on each source of ``data.keep``."""
        return {source.name: _accuracy(self._quick(tensors, source.prepared)) for source in self.shop.data.keep}

    def forward(self, batch: Batch, *, parameters: Mapping[str, torch.Tensor], grad: bool = True) -> Outputs:
        """A forward pass under other weights."""
        return self.session.forward(batch, grad=grad, parameters=parameters)


def _accuracy(found: Mapping[str, float]) -> float:
    return found["accuracy"] if "accuracy" in found else found["token_accuracy"]


# Called with the tensor's name and how many there are.
Observer = Callable[[str, int], None]


def combine(
    op: Any,
    slug: str,
    sources: Mapping[str, ModelSource],
    ctx: WeightContext,
    folder: Path,
    *,
    dtype: str | None = None,
    observe: Observer | None = None,
) -> None:
    """Run one operation over its sources and write the result, with configuration and tokenizer, into a folder.

    A few pieces of each source are in memory at a time; whole tensors only where the operation is not elementwise.

    Args:
        op: the operation, built.
        slug: its name, for errors.
        sources: ``tuned``, ``base`` where there is one, and the further models by label.
        ctx: what it may ask.
        folder: an existing, empty folder.
        dtype: type of the result's floating-point tensors; by default those of the operation's ``like``.
        observe: told of every tensor.

    Raises:
        UserError: the sources do not fit together or do not suffice, or a tensor has values that are not finite.
    """
    # What glibc was once given back decides how much it keeps: without this every piece is mapped and zeroed anew.
    torch.empty(31 << 20, dtype=torch.uint8)
    foreign = tuple(getattr(op, "foreign", ()))
    models = {label: source for label, source in sources.items() if label != "base"}
    _check_count(op, slug, [label for label in models if label not in foreign], "base" in sources)
    takes_base = getattr(op, "needs_base", False) or len(models) == 1
    pads = getattr(op, "pads_rows", False)
    check_models(
        {source.label: source for source in models.values()},
        sources.get("base"),
        against_base=takes_base,
        combines_base=getattr(op, "needs_base", False),
        foreign=[models[label].label for label in foreign],
        pads_rows=pads,
    )
    if hasattr(op, "prepare"):
        op.prepare(sources, ctx)
    onto, like = sources[getattr(op, "onto", "tuned")], sources[getattr(op, "like", "tuned")]
    shapes, known = onto.shapes(), set(like.names())
    layout = {}
    for name in onto.names():
        kind = (like if name in known else onto).dtype(name)
        layout[name] = (getattr(torch, dtype) if dtype and kind.is_floating_point else kind, shapes[name])
    names = {label: set(source.names()) for label, source in sources.items()}
    # A head that the base has not: there is no change to work on.
    alone = "base" in sources and getattr(op, "needs_base", False)
    with ShardWriter(folder, layout) as writer:
        for name in writer.names:
            there = {label: source for label, source in sources.items() if name in names[label]}
            plain = not layout[name][0].is_floating_point or (alone and name not in names["base"])
            total = math.prod(shapes[name])
            for piece in _pieces(op, name, {"onto": onto} if plain else there, total, ctx):
                for label, tensor in piece.items():
                    _finite(name, tensor, (sources.get(label) or onto).folder)
                made = piece["onto"] if plain else _call(op, name, piece, ctx)
                _finite(name, made, None)
                writer.write(name, made.to(layout[name][0]))
            if observe:
                observe(name, len(layout))
    _copy_files(onto, folder, dtype or str(max(layout.values(), key=lambda k: math.prod(k[1]))[0]).split(".")[-1])


def _check_count(op: Any, slug: str, labels: list[str], base: bool) -> None:
    least, most = getattr(op, "count", (1, None))
    if len(labels) < least or (most is not None and len(labels) > most):
        wanted = f"{least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
        hint = " Combine them first, by an operation before it." if most is not None and len(labels) > most else ""
        raise UserError(f"{slug} takes {wanted} model{'s' * (wanted != '1')}, not {len(labels)}.{hint}")
    if getattr(op, "needs_base", False) and not base:
        raise UserError(f"{slug} works on what fine-tuning changed: name the base that the models come from (--base).")


def _pieces(
    op: Any, name: str, sources: Mapping[str, ModelSource], total: int, ctx: WeightContext
) -> Iterator[dict[str, torch.Tensor]]:
    if not getattr(op, "elementwise", False) and "onto" not in sources:
        ctx.start = 0
        yield {label: source.tensor(name) for label, source in sources.items()}
        return
    for start in range(0, max(total, 1), PIECE):
        ctx.start = start
        yield {label: source.piece(name, start, start + PIECE) for label, source in sources.items()}


def _call(op: Any, name: str, piece: dict[str, torch.Tensor], ctx: WeightContext) -> torch.Tensor:
    made: torch.Tensor = op.tensor(name, piece, ctx) if hasattr(op, "tensor") else op(name, piece, ctx)
    return made


def _finite(name: str, tensor: torch.Tensor, folder: Path | None) -> None:
    """Refuse NaN and infinities, by a sum first: it reads the numbers once and allocates nothing."""
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        return
    if not math.isfinite(float(tensor.sum(dtype=torch.float32))) and not bool(torch.isfinite(tensor).all()):
        if folder is None:
            raise UserError(f"tensor '{name}' of the result holds NaN or infinite values; nothing was written.")
        raise UserError(f"tensor '{name}' holds NaN or infinite values; nothing was written.", where=str(folder))


def _copy_files(source: ModelSource, folder: Path, dtype: str) -> None:
    """Configuration, tokenizer and record of a model; weights, cards and manifests stay behind."""
    for file in source.folder.iterdir():
        weights = file.suffix in (".safetensors", ".bin") or file.name.endswith(".index.json")
        if file.is_file() and not weights and file.name not in ("README.md", "manifest.json"):
            shutil.copyfile(file, folder / file.name)
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        config.pop("torch_dtype", None)
        write_json(folder / "config.json", {**config, "dtype": dtype})


def chain(
    ops: Sequence[tuple[str, Any]],
    tuned: Mapping[str, ModelSource],
    base: ModelSource | None,
    context: Callable[[Mapping[str, ModelSource], Path], WeightContext],
    folder: Path,
    *,
    dtype: str | None = None,
    observe: Callable[[str], Observer | None] = lambda slug: None,
) -> list[dict[str, Any]]:
    """Operations one after the other: the first combines the models, each next one takes the result before it.

    Args:
        ops: (name, built operation).
        tuned: label -> the models; the first is called ``tuned`` by the operations.
        base: what they come from, if known.
        context: makes the context from the models so far and the folder of the one that is ``tuned``.
        folder: an existing, empty folder for the result.
        dtype: type of the result.
        observe: gives the observer of an operation.

    Returns:
        What each operation has to record.
    """
    first, *others = tuned.items()
    models, further, current = dict(tuned), dict(others), first[1]
    records = []
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".weights-") as aside:
        for number, (slug, op) in enumerate(ops, 1):
            named = {label: ModelSource(resolve(place), place) for label, place in getattr(op, "sources", {}).items()}
            foreign = getattr(op, "foreign", ())
            models |= {label: source for label, source in named.items() if label not in foreign}
            sources = {**({"base": base} if base is not None else {}), "tuned": current, **further, **named}
            last = number == len(ops)
            made = folder if last else Path(aside) / str(number)
            made.mkdir(exist_ok=True)
            ctx = context(models, current.folder)
            combine(op, slug, sources, ctx, made, dtype=dtype if last else None, observe=observe(slug))
            records.append({"op": slug, **getattr(op, "recipe", {})})
            current, further = ModelSource(made, f"the result of {slug}"), {}
    return records


def apply_weights(plan: Any, shop: Any, folder: Path) -> Any:
    """Run the recipe's weight operations on ``folder/model`` in order; the trained weights stay in ``model-trained``.

    Returns:
        The resulting model, opened.

    Raises:
        UserError: the run left an adapter, or an operation's sources do not fit.
    """
    from luthier.models.load import load

    target = folder / "model"
    if (target / "adapter_config.json").exists():
        raise UserError(
            "weight operations work on whole models, and this run left an adapter: merge it first "
            "(parameters: [{lora: {merge: true}}]) or leave `weights` out."
        )
    trained = folder / "model-trained"
    if not trained.exists():
        shutil.copytree(target, trained)

    def context(models: Mapping[str, ModelSource], tuned: Path) -> WeightContext:
        return WeightContext(models, shop, load(tuned, task=plan.task).model)

    base = ModelSource(shop.loaded.base or shop.loaded.folder)
    ops = [(choice.slug, choice.build()) for choice in plan.weights]
    with atomic_folder(target) as made:
        records = chain(ops, {"tuned": ModelSource(trained)}, base, context, made)
    for record in records:
        write_json(folder / f"weights-{record['op']}.json", {k: v for k, v in record.items() if k != "op"})
    return load(target, task=plan.task).model
