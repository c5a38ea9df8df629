"""The registry of methods: registration is a decorator, the signature is the option schema.

A method is a class whose ``__init__`` takes keyword-only options, or a function: leading positional parameters are what
the extension point passes, keyword-only parameters are options. Bounds are pydantic's, in the annotation::

    rate_max: Annotated[float, Field(ge=0, le=1, description="largest corruption rate")] = 0.4

Discovery walks ``luthier/methods/<axis>/`` and the entry-point group ``luthier.methods``. Names are read from the
files' text, so a misspelt method is reported without importing any of them.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from luthier.core.errors import UserError, did_you_mean
from luthier.core.lazy import deferred
from luthier.core.own_code import module_of

if TYPE_CHECKING:
    from pydantic import BaseModel

# Tasks whose targets are tokens of a vocabulary, so that rows need no label.
TOKEN_TASKS = ("causal-lm", "masked-lm")
# Tasks whose targets are numbers, so that nothing has a probability.
NUMBER_TASKS = ("sequence-regression",)
AXES = {
    "objective": "objectives",
    "transform": "transforms",
    "selection": "selection",
    "parameters": "parameters",
    "data": "data",
    "reward": "rewards",
    "weights": "weights",
    "decoding": "decoding",
    "analysis": "analysis",
    "procedure": "procedures",
}
ENTRY_POINTS = "luthier.methods"

T = TypeVar("T", bound=Callable[..., Any])


@dataclass(frozen=True)
class Method:
    """One registered method.

    Attributes:
        axis: a key of :data:`AXES`.
        slug: its name in recipes.
        target: the class or function.
        identity: options under which it changes nothing (the contract suite compares the run with plain SFT);
            None where the method has no such setting.
        example: options for the contract suite, small enough for a tiny model.
        conflicts: fact about the recipe -> reason. Facts are ``<axis>:<slug>``, ``task:<name>``,
            ``gradient_checkpointing``, ``processes``, ``precision:bf16`` and the like.
        requires: fact about the recipe -> reason; without the fact it is refused.
        beside: a fact of ``requires`` -> options of that method for the contract suite, where its own do not serve.
        tasks: tasks for which it is defined; empty means all.
        numbers: whether it is also defined where targets are numbers; most objectives, transforms and selections
            speak of probabilities.
        packages: optional packages it cannot do without: module -> what pip installs it as.
        paper: title, year and arXiv number, for lists and pages.
    """

    axis: str
    slug: str
    target: Any
    identity: Mapping[str, Any] | None = None
    example: Mapping[str, Any] = field(default_factory=dict)
    conflicts: Mapping[str, str] = field(default_factory=dict)
    requires: Mapping[str, str] = field(default_factory=dict)
    beside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    numbers: bool = False
    packages: Mapping[str, str] = field(default_factory=dict)
    paper: str = ""

    @property
    def missing(self) -> list[str]:
        """Those of its packages that are not installed."""
        return [module for module in self.packages if importlib.util.find_spec(module) is None]

    @property
    def title(self) -> str:
        """The first sentence of the docstring."""
        return (inspect.getdoc(self.target) or "").split("\n\n")[0].replace("\n", " ").strip()

    @property
    def is_function(self) -> bool:
        """Whether the method is the simple, function form."""
        return not inspect.isclass(self.target)

    @cached_property
    def options(self) -> type[BaseModel]:
        """The option schema, made from the signature; unknown options are refused."""
        from pydantic import ConfigDict, create_model

        call = self.target if self.is_function else self.target.__init__
        # Only the options are resolved: tensor annotations of the leading parameters may name unloaded modules.
        wanted = [p for p in inspect.signature(call).parameters.values() if p.kind is p.KEYWORD_ONLY]
        scope = {**vars(typing), **vars(sys.modules[self.target.__module__])}
        fields: dict[str, Any] = {}
        for parameter in wanted:
            kind = parameter.annotation
            if isinstance(kind, str):
                kind = eval(kind, scope)
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[parameter.name] = (kind, default)
        return create_model(
            f"{self.slug} options",
            __config__=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()),
            **fields,
        )

    def build(self, options: Mapping[str, Any] | None = None) -> Any:
        """The method with its options validated: an instance, or for a function the function with options bound."""
        checked = self.options.model_validate(dict(options or {}))
        values = {name: getattr(checked, name) for name in type(checked).model_fields}
        if not self.is_function:
            return self.target(**values)
        from functools import partial

        return partial(self.target, **values)


_METHODS: dict[tuple[str, str], Method] = {}


def _register(axis: str, slug: str, **about: Any) -> Callable[[T], T]:
    def decorate(target: T) -> T:
        _METHODS[axis, slug] = Method(axis=axis, slug=slug, target=target, **about)
        return target

    return decorate


def objective(slug: str, **about: Any) -> Callable[[T], T]:
    """Register an objective: a class with ``needs`` and ``loss``, or ``f(logp_N, weight_N, *, options) -> loss_N``."""
    return _register("objective", slug, **about)


def transform(slug: str, **about: Any) -> Callable[[T], T]:
    """Register a batch transform: a callable class, or ``f(batch, ctx, *, options) -> batch``."""
    return _register("transform", slug, **about)


def selection(slug: str, **about: Any) -> Callable[[T], T]:
    """Register an online selector."""
    return _register("selection", slug, **about)


def parameters(slug: str, **about: Any) -> Callable[[T], T]:
    """Register a parameter space."""
    return _register("parameters", slug, **about)


def data_stage(slug: str, **about: Any) -> Callable[[T], T]:
    """Register a data stage: a class with ``run``, or ``f(dataset, ctx, *, options) -> dataset``."""
    return _register("data", slug, **about)


def reward(slug: str, **about: Any) -> Callable[[T], T]:
    """Register a reward: ``f(rows, completions, ctx, *, options) -> list[float | None]``, or a callable class."""
    return _register("reward", slug, **about)


def weight_op(slug: str, **about: Any) -> Callable[[T], T]:
    """Register a weight operation: a class, or ``f(name, tensors, ctx, *, options) -> tensor``."""
    return _register("weights", slug, **about)


def decoder(slug: str, **about: Any) -> Callable[[T], T]:
    """Register a decoder."""
    return _register("decoding", slug, **about)


def analysis(slug: str, **about: Any) -> Callable[[T], T]:
    """Register an analysis."""
    return _register("analysis", slug, **about)


def procedure(slug: str, **about: Any) -> Callable[[T], T]:
    """Register a procedure: ``f(ctx, *, options) -> Artefact``."""
    return _register("procedure", slug, **about)


_DECORATORS = {
    "objective": "objective",
    "transform": "transform",
    "selection": "selection",
    "parameters": "parameters",
    "data_stage": "data",
    "reward": "reward",
    "weight_op": "weights",
    "decoder": "decoding",
    "analysis": "analysis",
    "procedure": "procedure",
}


def _registrations(path: Path) -> list[tuple[str, str]]:
    """(axis, slug) of every registration decorator in a file, read without importing it."""
    found = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for decorator in getattr(node, "decorator_list", ()):
            if isinstance(decorator, ast.Call) and decorator.args and isinstance(decorator.args[0], ast.Constant):
                name = getattr(decorator.func, "id", None) or getattr(decorator.func, "attr", None)
                if name in _DECORATORS:
                    found.append((_DECORATORS[name], str(decorator.args[0].value)))
    return found


@cache
def _index() -> dict[tuple[str, str], str]:
    """(axis, slug) -> module for the methods shipped with the library and those of installed plug-ins."""
    index: dict[tuple[str, str], str] = {}
    root = Path(__file__).resolve().parent.parent / "methods"
    for path in sorted(root.rglob("*.py")):
        if not path.name.startswith("_"):
            module = "luthier.methods." + ".".join(path.relative_to(root).with_suffix("").parts)
            for key in _registrations(path):
                index[key] = module
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        spec = importlib.util.find_spec(entry.module)
        if spec and spec.origin:
            for key in _registrations(Path(spec.origin)):
                index.setdefault(key, entry.module)
    return index


def names(axis: str) -> list[str]:
    """The slugs of an axis, sorted; no method file is imported."""
    if axis not in AXES:
        raise UserError(f"there is no axis '{axis}'.{did_you_mean(axis, AXES)} Axes: {', '.join(AXES)}.")
    return sorted({slug for a, slug in [*_index(), *_METHODS] if a == axis})


def get(axis: str, slug: str) -> Method:
    """The method of that name, importing its file (with torch deferred).

    ``slug`` may also be ``path/to/file.py:name``, the user's own file.

    Raises:
        UserError: there is no such method; the message lists what there is.
    """
    if ":" in slug and slug.split(":")[0].endswith(".py"):
        return _from_file(axis, slug)
    if (axis, slug) not in _METHODS:
        module = _index().get((axis, slug))
        if module is None:
            known = names(axis)
            elsewhere = [a for a in AXES if a != axis and slug in names(a)]
            hint = f" '{slug}' exists under: {', '.join(elsewhere)}." if elsewhere else did_you_mean(slug, known)
            raise UserError(f"unknown {axis} '{slug}'.{hint} Accepted: {', '.join(known)}.")
        with deferred():
            importlib.import_module(module)
    return _METHODS[axis, slug]


def _from_file(axis: str, reference: str) -> Method:
    file, _, name = reference.rpartition(":")
    module = module_of(file)
    target = getattr(module, name, None)
    if target is None:
        raise UserError(f"defines no '{name}'.{did_you_mean(name, vars(module))}", where=file)
    registered = [m for m in _METHODS.values() if m.target is target and m.axis == axis]
    return registered[0] if registered else Method(axis=axis, slug=reference, target=target)


def all_methods() -> list[Method]:
    """Every method of the library and of installed plug-ins, sorted by axis and slug (imports their files)."""
    return [get(axis, slug) for axis in AXES for slug in names(axis)]
