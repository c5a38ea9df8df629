"""The plan of a recipe: names resolved to methods, options checked, impossible combinations refused.

Nothing is loaded: method files are imported with torch deferred, of a local model only ``config.json`` is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from luthier.core import registry
from luthier.core.errors import UserError
from luthier.core.lazy import deferred
from luthier.recipe import checks
from luthier.recipe.load import found, has, method_name
from luthier.recipe.problems import explain, key_text
from luthier.recipe.schema import KeyPath, Recipe

if TYPE_CHECKING:
    from luthier.core.protocols import Needs


@dataclass(frozen=True)
class Choice:
    """A method of the recipe with its options, validated and complete.

    Attributes:
        method: the registered method.
        options: every option with its value.
        weight: the factor of a term of the objective.
        where: the place in the recipe (``file:line``), or its key.
        key: the key in the recipe, such as ``objective[1]``.
    """

    method: registry.Method
    options: dict[str, Any]
    weight: float = 1.0
    where: str = ""
    key: str = ""

    @property
    def place(self) -> str | None:
        """The line of the recipe file, or None for a recipe made in Python."""
        return self.where if self.where != self.key else None

    @property
    def slug(self) -> str:
        """The method's name."""
        return self.method.slug

    def build(self) -> Any:
        """The method with its options: an instance, or the function with options bound."""
        return self.method.build(self.options)

    @property
    def needs(self) -> Needs:
        """What the method asks of the engine; the default where it says nothing."""
        with deferred():
            from luthier.core.protocols import Needs

            declared = getattr(self.method.target, "needs", None)
            # `needs` as a property depends on the options, so only an instance can tell.
            if declared is not None and not isinstance(declared, Needs):
                declared = self.build().needs
        return declared if declared is not None else Needs()


@dataclass
class Plan:
    """A recipe whose methods are known to exist, to have valid options and to go together.

    Attributes:
        recipe: the recipe.
        objective: the terms of the loss; one, or several summed by their weights.
        transforms, selection, parameters, stages, weights, decoding, analysis, procedure, verifier: the methods of
            the other axes.
        task: the task, or ``auto`` where only the loaded model will tell (then call :meth:`settle_task`).
        facts: what methods may conflict with: ``<axis>:<slug>``, ``task:<name>``, ``processes``, ``precision:bf16``...
    """

    recipe: Recipe
    objective: list[Choice]
    transforms: list[Choice]
    selection: Choice | None
    parameters: list[Choice]
    stages: list[Choice]
    weights: list[Choice]
    decoding: Choice
    analysis: list[Choice]
    procedure: Choice
    verifier: Choice | None = None
    task: str = "auto"
    facts: set[str] = field(default_factory=set)

    def choices(self) -> list[Choice]:
        """Every method of the plan."""
        single = [c for c in (self.selection, self.verifier) if c is not None]
        return [
            *self.objective,
            *self.transforms,
            *single,
            *self.parameters,
            *self.stages,
            *self.weights,
            self.decoding,
            *self.analysis,
            self.procedure,
        ]

    def settle_task(self, task: str) -> None:
        """Set the task once the model has told it, and check again what depends on it.

        Raises:
            UserError: a method of the plan is not defined for the task.
        """
        self.task = task
        self.facts = {f for f in self.facts if not f.startswith("task:")} | {f"task:{task}"}
        checks.conflicts(self)  # first: they tell the reason
        checks.tasks(self)

    def to_dict(self) -> dict[str, Any]:
        """JSON values: the methods by axis with their options, the task and the facts."""

        def one(choice: Choice) -> dict[str, Any]:
            shown = choice.method.options.model_construct(**choice.options).model_dump(mode="json", warnings=False)
            extra = {"weight": choice.weight} if choice.method.axis == "objective" else {}
            return {"name": choice.slug, "options": shown, **extra}

        return {
            "task": self.task,
            "procedure": one(self.procedure),
            "objective": [one(c) for c in self.objective],
            "transforms": [one(c) for c in self.transforms],
            "selection": one(self.selection) if self.selection else None,
            "parameters": [one(c) for c in self.parameters],
            "stages": [one(c) for c in self.stages],
            "weights": [one(c) for c in self.weights],
            "decoding": one(self.decoding),
            "verifier": one(self.verifier) if self.verifier else None,
            "analysis": [one(c) for c in self.analysis],
            "facts": sorted(self.facts),
        }


def plan(recipe: Recipe) -> Plan:
    """The plan of a recipe.

    Raises:
        UserError: an unknown method or option, a value out of bounds, a combination that cannot work, a file that is
            not there or a package that is not installed; with the line of the recipe.
    """
    made = Plan(
        recipe=recipe,
        objective=_many(recipe, "objective", ("objective",), recipe.objective),
        transforms=_many(recipe, "transform", ("transforms",), recipe.transforms),
        selection=_optional(recipe, "selection", ("selection",), recipe.selection),
        parameters=_many(recipe, "parameters", ("parameters",), recipe.parameters),
        stages=_many(recipe, "data", ("data", "stages"), recipe.data.stages),
        weights=_many(recipe, "weights", ("weights",), recipe.weights),
        decoding=_choice(recipe, "decoding", ("decoding",), recipe.decoding),
        analysis=_many(recipe, "analysis", ("analysis",), recipe.analysis),
        procedure=_choice(recipe, "procedure", ("procedure",), recipe.procedure),
        verifier=_optional(recipe, "reward", ("data", "verifier"), recipe.data.verifier),
        task=_task(recipe),
    )
    made.facts = _facts(made)
    checks.files(recipe)
    checks.layout(recipe)
    checks.packages(made)
    checks.sum(made)
    checks.repeats(made)
    checks.adapters(made)
    checks.rows_to_choose_by(made)
    checks.conflicts(made)  # first: they tell the reason
    if made.task != "auto":
        checks.tasks(made)
    return made


def _many(recipe: Recipe, axis: str, path: KeyPath, specs: list[Any]) -> list[Choice]:
    # A single method may stand in the file without the list around it; its keys then have no index.
    indexed = any(p[: len(path)] == path and p[len(path) : len(path) + 1] == (0,) for p in recipe._places)
    alone = len(specs) == 1 and not indexed
    return [_choice(recipe, axis, path if alone else (*path, i), spec) for i, spec in enumerate(specs)]


def _optional(recipe: Recipe, axis: str, path: KeyPath, spec: Any) -> Choice | None:
    return None if spec is None else _choice(recipe, axis, path, spec)


def _choice(recipe: Recipe, axis: str, path: KeyPath, spec: Any) -> Choice:
    name = method_name(spec)
    options = {} if isinstance(spec, str) else spec[name] or {}
    weight = 1.0 if isinstance(spec, str) or len(spec) == 1 else float(spec.get("weight", 1.0))
    where = recipe.where(path)
    method = _method(recipe, axis, name, key_text(path), where)
    inside: KeyPath = (*path, name)
    return Choice(
        method=method,
        options=method_options(method, options, path=inside, where=recipe.where),
        weight=weight,
        where=where or key_text(path),
        key=key_text(path),
    )


def _method(recipe: Recipe, axis: str, name: str, key: str, where: str | None) -> registry.Method:
    file, colon, attribute = name.rpartition(":")
    if colon and file.endswith(".py"):
        name = f"{found(file, recipe.folder)}:{attribute}"
    try:
        return registry.get(axis, name)
    except UserError as error:
        raise UserError(f"{key}: {error}", where=where) from error


def choice_of(axis: str, spec: Any) -> Choice:
    """A method written as a recipe writes it, where it stands in an option of another method.

    Raises:
        UserError: there is no such method, or its options are wrong.
    """
    if not isinstance(spec, str) and (not isinstance(spec, Mapping) or len(spec) != 1):
        raise UserError(f"a {axis} is a name, or a mapping from its name to its options, not {spec!r}.")
    name = method_name(spec)
    method = registry.get(axis, name)
    options = {} if isinstance(spec, str) else spec[name] or {}
    return Choice(method=method, options=method_options(method, options, path=(name,)), key=name)


def method_options(
    method: registry.Method,
    options: Mapping[str, Any],
    *,
    path: KeyPath = (),
    where: Callable[[KeyPath], str | None] = lambda _: None,
) -> dict[str, Any]:
    """Every option of a method with its value, checked against its signature and by the method itself.

    Args:
        method: the method.
        options: what was written.
        path: the key path of the options, for the error.
        where: the place of a key path, for the error.

    Raises:
        UserError: an unknown option, a wrong type, a value out of bounds, or options that do not go together.
    """
    schema = method.options
    try:
        # YAML has no tuples, enums or paths: JSON's rules let a list or a text stand for them, and nothing else.
        try:
            text = json.dumps(options)
        except TypeError:
            checked = schema.model_validate(dict(options))
        else:
            checked = schema.model_validate_json(text)
    except ValidationError as error:
        raise explain(error, schema, where, prefix=path, known=lambda p: has(options, p[len(path) :])) from None
    values = {name: getattr(checked, name) for name in schema.model_fields}
    if not method.is_function:
        # A class checks in its constructor what one option cannot tell alone.
        try:
            method.build(values)
        except UserError as error:
            # The path ends with the method's name, which its message may begin with.
            said = str(error).removeprefix(f"{method.slug}: ")
            raise UserError(f"{key_text(path)}: {said}" if path else said, where=where(path)) from error
    return values


def _task(recipe: Recipe) -> str:
    if recipe.model.task != "auto":
        return recipe.model.task
    if recipe.model.id.startswith("lab:"):
        from luthier.lab.bases import MAKINGS

        making = MAKINGS.get(recipe.model.id.removeprefix("lab:"))
        return making.task if making is not None else "auto"
    if not Path(recipe.model.id).expanduser().is_dir():
        return "auto"
    from luthier.models.info import inspect

    try:
        return inspect(recipe.model.id).task or "auto"
    except UserError as error:
        raise UserError(f"model: {error}", where=recipe.where(("model", "id"))) from error


def _facts(made: Plan) -> set[str]:
    training = made.recipe.training
    facts = {f"{c.method.axis}:{c.slug}" for c in made.choices()}
    if made.task != "auto":
        facts.add(f"task:{made.task}")
    if training.precision != "auto":
        facts.add(f"precision:{training.precision}")
    if training.head != "auto":
        facts.add(f"head:{training.head}")
    if training.sharding != "none":
        facts.add(f"sharding:{training.sharding}")
    if made.recipe.model.attention != "auto":
        facts.add(f"attention:{made.recipe.model.attention}")
    facts.add(f"optimizer:{training.optimizer}")
    switches = {
        "gradient_checkpointing": training.gradient_checkpointing,
        "early_stopping": training.early_stopping is not None,
        "accumulation": training.accumulation > 1,
        "processes": int(os.environ.get("WORLD_SIZE", "1")) > 1,
        "weighted_sum": len(made.objective) > 1,
        "reference": any("reference" in c.needs.models for c in made.objective),
        "generation": any(c.needs.generation for c in made.objective),
    }
    return facts | {name for name, on in switches.items() if on}
