"""Functions of the user's own, named in a recipe as ``path/to/file.py:name`` or ``package.module:name``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from luthier.core.errors import UserError, did_you_mean


def module_of(file: str) -> ModuleType:
    """A Python file as a module; imported once.

    Raises:
        UserError: there is no such file, or it cannot be imported.
    """
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"no file {file}.")
    name = f"luthier_user_{path.stem}_{abs(hash(str(path)))}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise UserError(f"could not import it: {type(error).__name__}: {error}", where=file) from error
    return sys.modules[name]


def function_of(reference: str, option: str) -> Callable[..., Any]:
    """The function a reference names.

    Args:
        reference: ``path/to/file.py:name`` or ``package.module:name``.
        option: the option it stands in, for messages.

    Raises:
        UserError: there is no such file, module or function.
    """
    place, _, name = reference.rpartition(":")
    if not place or not name:
        raise UserError(f"{option}: '{reference}' must be path/to/file.py:name or module:name.")
    if place.endswith(".py"):
        try:
            module = module_of(place)
        except UserError as error:
            raise UserError(f"{option}: {error}") from error
    else:
        try:
            module = importlib.import_module(place)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"{option}: cannot import '{place}': {error}. Expected path/to/file.py:name or module:name."
            ) from error
    found = getattr(module, name, None)
    if not callable(found):
        raise UserError(f"{option}: {place} defines no function '{name}'.{did_you_mean(name, vars(module))}")
    return found


def file_of(reference: str | None) -> Path | None:
    """The file a reference names, where it names one that is there."""
    place = (reference or "").rpartition(":")[0]
    path = Path(place).expanduser()
    return path if place.endswith(".py") and path.is_file() else None
