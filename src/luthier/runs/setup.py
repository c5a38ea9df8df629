"""From a plan to the things a run works with: rows, renderer, prepared data, the model and its methods."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from luthier.core.errors import UserError
from luthier.engine.stack import Stack, WeightedSum, as_objective
from luthier.recipe.plan import choice_of
from luthier.runs.stages import run_stage

# General text, and tasks that are judged: what most pretrained models can do a little of.
KEEP = ("lab:text", "lab:arithmetic?difficulty=1&n=64")
SANDBOXED = "python-tests"
TELLS_NOTHING = ("data", "input", "test", "train", "valid", "validation")


@dataclass
class Source:
    """One data source, read and prepared.

    Attributes:
        name: how it is called in reports.
        rows: canonical rows (validated).
        prepared: token ids and supervised spans.
    """

    name: str
    rows: Any
    prepared: Any


@dataclass
class Data:
    """The data of a run.

    Attributes:
        train: what a procedure trains on.
        test: held-out rows of the target task, for the final numbers.
        select: held-out rows for choices made on the way (early stopping, weight operations); ``test`` when absent.
        keep: material on which forgetting is measured.
    """

    train: Any
    test: Source | None = None
    select: Source | None = None
    keep: list[Source] = field(default_factory=list)
    renderer: Any = None
    labels: tuple[str, ...] = ()

    def report(self) -> dict[str, Any]:
        """What was found in each source, as JSON."""

        def one(source: Source) -> dict[str, Any]:
            return {
                "name": source.name,
                "layout": source.rows.layout,
                "read": source.rows.report.to_dict(),
                "prepared": source.prepared.report.to_dict(),
            }

        found: dict[str, Any] = {"train": one(self.train)}
        for name in ("test", "select"):
            if source := getattr(self, name):
                found[name] = one(source)
        found["keep"] = [one(s) for s in self.keep]
        return found


def keep_sources(plan: Any, task: str) -> list[str]:
    """Where forgetting is measured: the sources of the recipe, or the default for its model."""
    chosen = plan.recipe.data.keep
    if chosen is None:
        return []
    if chosen != "default":
        return list(chosen)
    if task != "causal-lm":
        return []  # a classifier has no general material of its own task; name some under data.keep
    return ["lab:mixture"] if plan.recipe.model.id.startswith("lab:") else list(KEEP)


def read_rows(plan: Any, spec: Any, *, split: str, limit: int | None, task: str, folder: Path | None = None) -> Any:
    """Validated canonical rows of a source."""
    from luthier.data.read import read

    data = plan.recipe.data
    own = split != "keep"
    return read(
        spec,
        task=task,
        layout=data.layout if own else "auto",
        columns=dict(data.columns) if own else None,
        bad_rows=data.bad_rows,
        limit=limit,
        reject_file=None if folder is None else folder / f"rejected-{split}.jsonl",
        split="train" if split == "train" else "test",
    )


def load_data(plan: Any, processor: Any, task: str, *, folder: Path | None = None, keep: bool = True) -> Data:
    """Read, check, select and prepare every source; nothing here needs the model's weights.

    Raises:
        UserError: a bad row (with file, row number and field), or data that cannot teach anything.
    """
    from luthier.data.prepare import prepare
    from luthier.data.render import Renderer
    from luthier.models.load import inspect

    recipe = plan.recipe
    data = recipe.data
    train = read_rows(plan, data.train, split="train", limit=data.limit, task=task, folder=folder)
    longest = data.max_length or inspect(recipe.model.id, revision=recipe.model.revision).max_length
    check_length(plan)
    options = {"template": data.template, "system": data.system, "thinking": data.thinking}
    renderer = Renderer(processor, task=task, max_length=longest, truncation=data.truncation, **options)
    for stage in plan.stages:
        train = run_stage(train, stage, plan, renderer, folder)
    labels = tuple(train.labels or ())
    columns = tuple(dict.fromkeys(c for choice in plan.choices() for c in choice.needs.columns))
    made = Data(
        train=Source("train", train, prepare(train, renderer, labels=labels, columns=columns, bad_rows=data.bad_rows)),
        renderer=renderer,
        labels=labels,
    )
    check_columns(plan, made.train.prepared)
    for name in ("test", "select"):
        if (spec := getattr(data, name)) is None:
            continue
        rows = read_rows(plan, spec, split=name, limit=data.test_limit or recipe.evaluation.limit, task=task)
        if unknown := sorted(set(rows.labels or ()) - set(labels)):
            raise UserError(
                f"data.{name} has labels that data.train has not: {', '.join(unknown[:5])}. Use the same label names."
            )
        setattr(made, name, Source(name, rows, prepare(rows, renderer, labels=labels, columns=columns)))
    if keep:
        # Material on which forgetting is measured may be longer than the model reads: its start is enough.
        cutting = Renderer(processor, task=task, max_length=longest, truncation="keep_start", **options)
        for spec in keep_sources(plan, task):
            rows = read_rows(plan, spec, split="keep", limit=data.keep_limit or recipe.evaluation.limit, task=task)
            name = source_name(spec)
            name = str(spec) if any(source.name == name for source in made.keep) else name
            made.keep.append(Source(name, rows, prepare(rows, cutting, labels=labels)))
    return made


def check_columns(plan: Any, prepared: Any) -> None:
    """Let every method of the training look at the prepared rows for what it reads from them.

    Raises:
        UserError: a method cannot be trained on them.
    """
    for choice in (*plan.objective, *plan.transforms, *filter(None, [plan.selection]), *plan.parameters):
        if hasattr(built := choice.build(), "check_data"):
            built.check_data(prepared)


def check_length(plan: Any) -> str:
    """A remark where rows may be longer than what the model was made for; empty where they may not.

    Raises:
        UserError: the model has no positions for so many tokens.
    """
    from luthier.models.load import inspect

    model, wanted = plan.recipe.model, plan.recipe.data.max_length
    info = inspect(model.id, revision=model.revision)
    if not wanted or not info.max_length or wanted <= info.max_length:
        return ""
    if not info.rotary:
        raise UserError(
            f"data.max_length: the model has positions for {info.max_length:,} tokens, not for {wanted:,}. Set it to "
            f"{info.max_length} or less, with `data.truncation` for rows that are longer.",
            where=plan.recipe.where(("data", "max_length")),
        )
    return f"data.max_length is {wanted:,}, but the model was made for {info.max_length:,} tokens"


def source_name(spec: Any) -> str:
    """A short name for reports: the lab task, or the file's name (its folder's where the file's tells nothing)."""
    if not isinstance(spec, str | Path):
        return "rows"
    if str(spec).startswith("lab:"):
        return str(spec)
    path = Path(spec)
    return path.parent.name if path.stem in TELLS_NOTHING and path.parent.name else path.stem


def quieten() -> None:
    """No progress bars and announcements of other libraries."""
    import warnings

    from transformers.utils import logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.disable_progress_bar()
    # What transformers announces to its callers, peft among them; the user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def settings(plan: Any) -> None:
    """Threads, and what the process keeps in memory."""
    import torch

    from luthier.core.memory import few_products, keep_pages

    quieten()
    keep_pages()
    few_products()
    if plan.recipe.training.threads:
        torch.set_num_threads(plan.recipe.training.threads)


def require_tools(plan: Any) -> None:
    """Refuse at once what would fail only while measuring: a sandbox that cannot be closed on this machine."""
    if plan.verifier is not None and plan.verifier.slug == SANDBOXED:
        from luthier.evaluation import sandbox

        sandbox.check()


def precision(plan: Any) -> str:
    """``auto`` is fp32 on a CPU and bf16 on a GPU that has it."""
    import torch

    chosen = plan.recipe.training.precision
    if chosen != "auto":
        return chosen
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"


def build_stack(plan: Any, *, plain: bool = False) -> Stack:
    """The methods of a plan, built with their options and named for the checkpoint.

    ``plain``: its parameter methods under the plain loss, without transforms and selection.
    """
    if plain:
        plan = replace(plan, objective=[choice_of("objective", "sft")], transforms=[], selection=None)
    named: dict[str, Any] = {}

    def make(choice: Any) -> Any:
        built = choice.build()
        built = as_objective(built) if choice.method.axis == "objective" else built
        label, number = f"{choice.method.axis}:{choice.slug}", 2
        while label in named:
            label, number = f"{choice.method.axis}:{choice.slug}#{number}", number + 1
        named[label] = built
        return built

    parts = [(c.slug, make(c), c.weight) for c in plan.objective]
    alone = len(parts) == 1 and parts[0][2] == 1.0
    return Stack(
        objective=parts[0][1] if alone else WeightedSum(parts),
        transforms=[make(c) for c in plan.transforms],
        selector=make(plan.selection) if plan.selection else None,
        parameters=[make(c) for c in plan.parameters],
        named=named,
    )


def decoder_options(plan: Any) -> dict[str, Any]:
    """Those of the recipe's decoder, writing no more than ``evaluation.max_new_tokens``."""
    options = dict(plan.decoding.options)
    if "max_new_tokens" in options:
        options["max_new_tokens"] = min(options["max_new_tokens"], plan.recipe.evaluation.max_new_tokens)
    return options
