"""A small world generated from a seed: tasks with exact verifiers, and bases pretrained on it.

A task is one file of this folder that defines ``task = Task(...)``; its file name is its name, so adding one edits no
other file. ``lab:<task>`` names its rows wherever a recipe takes data, and ``lab:nano``, ``lab:small``,
``lab:encoder-nano`` and ``lab:vision-nano`` name the bases wherever it takes a model. Options follow a question mark::

    lab:arithmetic?skill=add&difficulty=2
    lab:sentences?noise=0.25

Nothing here imports torch before a base is asked for.
"""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from luthier.core.errors import UserError, did_you_mean
from luthier.core.rng import numpy_stream

if TYPE_CHECKING:
    from pydantic import BaseModel

__all__ = ["BASES", "Split", "Task", "base", "competence", "dataset", "names", "tasks", "verify"]

Split = Literal["train", "test"]
Row = dict[str, Any]

BASES = ("nano", "small", "encoder-nano", "vision-nano")

# Files of this folder that are not tasks.
_SUPPORT = ("bases", "drawing", "tokenizer", "words")


@dataclass(frozen=True)
class Task:
    """One task of the lab.

    Attributes:
        name: its name after ``lab:``.
        make: ``make(n, split, rng, *, options) -> rows``; the keyword-only parameters are its options. Exactly ``n``
            rows, distinct as long as the task has that many, then repeating; no content of one split in the other.
        verify: ``verify(row, completion) -> bool``, exact.
        skills: the values of the rows' ``skill``.
        difficulties: the values of the rows' ``difficulty``, 1 being the easiest.
        rows: how many rows there are by default, by split.
    """

    name: str
    make: Callable[..., list[Row]]
    verify: Callable[[Mapping[str, Any], str], bool]
    skills: tuple[str, ...]
    difficulties: tuple[int, ...] = (1, 2, 3)
    rows: Mapping[str, int] = field(default_factory=lambda: {"train": 8000, "test": 500})

    @cached_property
    def options(self) -> type[BaseModel]:
        """The option schema, made from the signature of ``make``; text is converted, as options come from names."""
        from pydantic import ConfigDict, create_model

        scope = {**vars(typing), **vars(inspect.getmodule(self.make) or object())}
        fields: dict[str, Any] = {}
        for parameter in inspect.signature(self.make).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY:
                kind = parameter.annotation
                fields[parameter.name] = (
                    eval(kind, scope) if isinstance(kind, str) else kind,
                    parameter.default,
                )
        return create_model(f"{self.name} options", __config__=ConfigDict(extra="forbid"), **fields)


@cache
def names() -> tuple[str, ...]:
    """The tasks' names, sorted; none is imported."""
    found = [path.stem for path in Path(__file__).parent.glob("*.py")]
    return tuple(sorted(name for name in found if not name.startswith("_") and name not in _SUPPORT))


def _get(name: str) -> Task:
    if name not in names():
        raise UserError(f"there is no lab task '{name}'.{did_you_mean(name, names())} Accepted: {', '.join(names())}.")
    found: Task = importlib.import_module(f"luthier.lab.{name}").task
    return found


def tasks() -> dict[str, Task]:
    """Every task by name."""
    return {name: _get(name) for name in names()}


def dataset(
    name: str, *, split: Split = "train", n: int | str | None = None, seed: int | str = 0, **options: Any
) -> list[Row]:
    """Rows of a lab task, a pure function of the arguments.

    Args:
        name: a task, such as ``arithmetic``.
        split: ``train`` or ``test``; what is asked in one is never asked in the other, whatever the seed.
        n: how many rows; the task's own number when absent.
        seed: another seed draws other rows of the same world (the people and their facts stay).
        options: the task's options; text is converted (``noise="0.25"``).

    Returns:
        Rows in the layouts data comes in: ``prompt`` and ``completion`` (or ``text``, or ``text`` and ``label``, or
        ``image`` and ``label``), with ``task``, ``skill``, ``difficulty``, ``answer`` and ``verifier`` beside them.

    Raises:
        UserError: no such task, split or option, or a value that is not accepted.
    """
    from pydantic import ValidationError

    task = _get(name)
    if split not in ("train", "test"):
        raise UserError(f"split '{split}' is not one of train, test.", where=f"lab:{name}")
    for key, value, least in (("n", n, 1), ("seed", seed, 0)):
        if value is not None and not (str(value).isdecimal() and int(value) >= least):
            raise UserError(f"{key}={value!r} is not a whole number of {least} or more.", where=f"lab:{name}")
    try:
        checked = task.options.model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        key, accepted = str(first["loc"][0]), ["n", "seed", *task.options.model_fields]
        if first["type"] == "extra_forbidden":
            problem = f"unknown option '{key}'.{did_you_mean(key, accepted)} Accepted: {', '.join(accepted)}."
        else:
            problem = f"{key}={first['input']!r}: {first['msg']}."
        raise UserError(problem, where=f"lab:{name}") from error
    values = {key: getattr(checked, key) for key in type(checked).model_fields}
    count = task.rows[split] if n is None else int(n)
    rng = numpy_stream(int(seed), f"lab/{name}", split)
    return task.make(count, split, rng, **values)


def verify(name: str, row: Mapping[str, Any], completion: str) -> bool:
    """Whether a completion answers a row of the task, exactly."""
    return _get(name).verify(row, completion)


def base(name: str = "nano", *, refresh: bool = False, progress: bool = True) -> Path:
    """The folder of a pretrained base, made on first use and cached; see :func:`luthier.lab.bases.base`."""
    from luthier.lab.bases import base as make

    return make(name, refresh=refresh, progress=progress)


def competence(name: str = "nano") -> dict[str, Any]:
    """What a base can do, as measured when it was made; see :func:`luthier.lab.bases.competence`."""
    from luthier.lab.bases import competence as read

    return read(name)
