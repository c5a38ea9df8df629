"""What a plan refuses before anything is loaded: conflicts, wrong tasks, files and packages that are not there."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import UserError, did_you_mean, missing_extra
from luthier.core.lazy import deferred
from luthier.core.registry import NUMBER_TASKS
from luthier.recipe.problems import RecipeError, key_text
from luthier.recipe.schema import KeyPath, Recipe

if TYPE_CHECKING:
    from luthier.recipe.plan import Choice, Plan

_WAY_OUT = {
    "gradient_checkpointing": "set training.gradient_checkpointing: false",
    "early_stopping": "set training.early_stopping: null",
    "accumulation": "set training.accumulation: 1",
    "processes": "run it in one process",
    "weighted_sum": "give it as the only objective",
}


def conflicts(made: Plan) -> None:
    """Refuse two methods, or a method and a setting, of which one forbids the other, naming both and the reason."""
    for choice in made.choices():
        own = f"{choice.method.axis}:{choice.slug}"
        for fact, reason in choice.method.conflicts.items():
            if fact in made.facts and fact != own:
                _refuse(made, choice, fact, reason)
        for fact, reason in choice.method.requires.items():
            if fact not in made.facts:
                axis, _, name = fact.partition(":")
                raise UserError(
                    f"{choice.key}: '{choice.slug}' needs the {axis} '{name}': {reason.rstrip('.')}. Add it, or "
                    f"remove '{choice.slug}'.",
                    where=choice.place,
                )


def _refuse(made: Plan, choice: Choice, fact: str, reason: str) -> None:
    kind, colon, value = fact.partition(":")
    other = next((c for c in made.choices() if f"{c.method.axis}:{c.slug}" == fact), None)
    if other is not None:
        what, way_out = f"'{other.slug}' ({other.key})", f"remove '{choice.slug}' or '{other.slug}'"
    elif kind in {"precision", "head", "sharding", "optimizer"}:
        what, way_out = f"training.{kind}: {value}", f"choose another training.{kind}"
    elif kind == "attention":
        what, way_out = f"model.attention: {value}", "choose another model.attention"
    elif colon:
        what, way_out = f"the {kind} {value}", f"remove '{choice.slug}'"
    else:
        what, way_out = fact.replace("_", " "), _WAY_OUT.get(fact, f"remove '{choice.slug}'")
    sentence = reason.strip().rstrip(".")
    raise UserError(
        f"{choice.key}: '{choice.slug}' does not go with {what}: {sentence}. Way out: {way_out}.",
        where=choice.place,
    )


def tasks(made: Plan) -> None:
    """Refuse a method that is not defined for the task."""
    for choice in made.choices():
        needs = choice.needs if choice.method.axis == "objective" else None
        tasks = choice.method.tasks or (needs.tasks if needs else ())
        if tasks and made.task not in tasks:
            raise UserError(
                f"{choice.key}: '{choice.slug}' is not defined for the task {made.task}, only for "
                f"{', '.join(tasks)}. Choose another method, or set model.task.",
                where=choice.place,
            )
        of_targets = choice.method.axis in ("objective", "transform", "selection")
        if made.task in NUMBER_TASKS and of_targets and not choice.method.numbers:
            raise UserError(
                f"{choice.key}: '{choice.slug}' is about probabilities of tokens or classes, and the targets of "
                f"{made.task} are numbers, which have none. Choose another method, such as sft, or another model.task.",
                where=choice.place,
            )
        if needs and needs.generation and made.task != "causal-lm":
            raise UserError(
                f"{choice.key}: '{choice.slug}' lets the model write text, which the task {made.task} cannot.",
                where=choice.place,
            )


def sum(made: Plan) -> None:
    """Refuse a term of a sum whose divisor depends on the model: beside other terms, or beside what a method adds."""
    adding = next((c for c in made.choices() if hasattr(c.method.target, "auxiliary")), None)
    if len(made.objective) < 2 and adding is None:
        return
    for choice in made.objective:
        if not choice.needs.fixed_weight:
            said = f"'{choice.slug}' divides by a count that depends on the model, so "
            if len(made.objective) > 1:
                said += "it cannot be one term of a weighted sum. Way out: give it as the only objective."
            elif adding is not None:
                said += (
                    f"'{adding.slug}' ({adding.key}) cannot add a term to it. Way out: remove '{adding.slug}', or "
                    "choose a fixed denominator in the objective's options."
                )
            raise UserError(f"{choice.key}: {said}", where=choice.place)


def repeats(made: Plan) -> None:
    """Refuse the same method twice in the objective or in the parameters."""
    for group in (made.objective, made.parameters):
        seen: dict[str, Choice] = {}
        for choice in group:
            if choice.slug in seen:
                raise UserError(
                    f"{choice.key}: '{choice.slug}' is there twice (first as {seen[choice.slug].key}); keep one.",
                    where=choice.place,
                )
            seen[choice.slug] = choice


def adapters(made: Plan) -> None:
    """Refuse weight operations, which read whole tensors, after a method that leaves an adapter."""
    for choice in made.parameters if made.weights else ():
        if reason := getattr(choice.method.target, "unmergeable", ""):
            op = made.weights[0]
            raise UserError(
                f"{op.key}: '{op.slug}' works on a whole model, but of '{choice.slug}' ({choice.key}): {reason}. Way "
                f"out: remove '{op.slug}'.",
                where=op.place,
            )
        if key := next((k for k, v in choice.options.items() if k.startswith("merge") and v is False), None):
            op = made.weights[0]
            raise UserError(
                f"{op.key}: '{op.slug}' works on a whole model, but '{choice.slug}' ({choice.key}) leaves an adapter. "
                f"Way out: parameters: [{{{choice.slug}: {{{key}: true}}}}].",
                where=op.place,
            )


def rows_to_choose_by(made: Plan) -> None:
    """Refuse a weight operation that chooses by a score where there are no rows to score on."""
    data = made.recipe.data
    for choice in made.weights[:1] if data.select is None and data.test is None else ():
        with deferred():
            needed = getattr(choice.build(), "needs_rows", False)
        if needed:
            raise UserError(
                f"{choice.key}: '{choice.slug}' chooses by a score on held-out rows, and there are none. Name some "
                "under data.select, or give the values it would choose.",
                where=choice.place,
            )


def files(recipe: Recipe) -> None:
    """Refuse a path that leads nowhere; a name that may be one of the hub is left to whoever opens it."""
    sources: list[tuple[KeyPath, Any]] = []
    for key in ("train", "test", "select", "keep", "template"):
        value = getattr(recipe.data, key)
        sources += [(("data", key, i), v) for i, v in enumerate(value)] if _names(value) else [(("data", key), value)]
    sources.append((("model", "id"), recipe.model.id))
    problems = []
    for path, text in sources:
        if isinstance(text, str) and _is_path(text) and not Path(text).expanduser().exists():
            message = f"{key_text(path)}: {_nothing_there(text, recipe.folder)}"
            problems.append(UserError(message, where=recipe.where(path)))
        elif isinstance(text, str) and text.startswith("memory:"):
            message = f"{key_text(path)}: these rows were given in memory from Python; give them again, or a file."
            problems.append(UserError(message, where=recipe.where(path)))
    if problems:
        raise RecipeError(problems)


def _names(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(v, str) for v in value)


def _is_path(text: str) -> bool:
    from luthier.data.sources import COMPRESSIONS, READERS

    endings = (*READERS, *COMPRESSIONS, ".zst", ".jinja")
    return text.startswith(("./", "../", "/", "~")) or text.lower().endswith(endings)


def _nothing_there(text: str, folder: Path | None) -> str:
    path = Path(text).expanduser()
    looked = [str(Path.cwd())] if not path.is_absolute() else []
    if looked and folder is not None and folder.resolve() != Path.cwd():
        looked.append(str(folder))
    parents = [path.parent, *([folder / path.parent] if looked and folder else [])]
    near = next((h for p in parents if p.is_dir() and (h := did_you_mean(path.name, sorted(os.listdir(p))))), "")
    places = f" (looked in {' and '.join(looked)})" if looked else ""
    return f"there is no '{text}'{places}.{near}"


def layout(recipe: Recipe) -> None:
    """Refuse a layout or a part of a row that does not exist."""
    if recipe.data.layout == "auto" and not recipe.data.columns:
        return
    from luthier.data.layouts import MAPPABLE, resolve_name

    try:
        resolve_name(recipe.data.layout)
    except UserError as error:
        raise UserError(f"data.layout: {error.message}", where=recipe.where(("data", "layout"))) from error
    for part in recipe.data.columns:
        if part not in MAPPABLE:
            raise UserError(
                f"data.columns.{part}: there is no such part of a row.{did_you_mean(part, MAPPABLE)} "
                f"Accepted: {', '.join(MAPPABLE)}.",
                where=recipe.where(("data", "columns", part)),
            )


_PACKAGES = {
    ("head", "liger"): ("liger_kernel", "liger-kernel"),
    ("head", "triton"): ("triton", "triton"),
    ("attention", "flash_attention_2"): ("flash_attn", "flash-attn"),
}


def packages(made: Plan) -> None:
    """Refuse a method or a setting whose optional package is not installed."""
    for choice in made.choices():
        for module in choice.method.missing:
            error = missing_extra(module, f"{choice.key}: '{choice.slug}'", choice.method.packages[module])
            raise UserError(error.message, where=choice.place)
    recipe = made.recipe
    wanted: list[tuple[KeyPath, str, str, str]] = []
    for (key, value), (module, install) in _PACKAGES.items():
        owner, place = (recipe.model, "model") if key == "attention" else (recipe.training, "training")
        if getattr(owner, key) == value:
            wanted.append(((place, key), value, module, install))
    wanted += [(("training", "trackers", i), name, name, name) for i, name in enumerate(recipe.training.trackers)]
    for path, value, module, install in wanted:
        if importlib.util.find_spec(module) is None:
            error = missing_extra(module, f"{key_text(path)}: {value}", install)
            raise UserError(error.message, where=recipe.where(path))
