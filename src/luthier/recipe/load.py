"""Load a recipe from a file or a mapping, with overrides; write a resolved one."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from luthier.core.errors import UserError
from luthier.recipe.problems import explain
from luthier.recipe.schema import VERSION, KeyPath, Recipe, place_of
from luthier.recipe.source import override, read


def load(source: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """The validated recipe.

    Relative paths are relative to the current directory; where nothing is there and the recipe file's own folder has
    it, that is taken.

    Args:
        source: a recipe file, or its content as a mapping (then ``luthier: 1`` may be left out).
        overrides: ``key.path=value`` texts, applied in order; a value is YAML.

    Raises:
        UserError: anything wrong with the recipe, with file and line (a :class:`RecipeError` carries every problem).
    """
    places: dict[KeyPath, str] = {}
    folder: Path | None = None
    stem = ""
    if isinstance(source, Recipe):
        places, folder = dict(source._places), source._folder
        data: Any = source.model_dump(exclude={"data": {"train", "test", "select", "keep"}})
        data["data"] |= {key: getattr(source.data, key) for key in ("train", "test", "select", "keep")}
    elif isinstance(source, Mapping):
        data = {"luthier": VERSION, **_copied(source)}
    else:
        path = Path(source).expanduser()
        data, places = read(path)
        folder, stem = path.parent, path.stem
        _check_version(data, places, path)
    data = override(data, places, overrides)

    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise explain(error, Recipe, lambda p: place_of(places, p), known=lambda p: has(data, p)) from None
    recipe._places, recipe._folder = places, folder
    _resolve_paths(recipe)
    if not recipe.output:
        recipe.output = f"runs/{stem or _derived_name(recipe)}"
    return recipe


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every key with its value; loading it gives the same recipe."""
    data = recipe.model_dump(exclude={"data": {"train", "test", "select", "keep"}})
    keep = recipe.data.keep
    sources = {
        "train": _named(recipe.data.train),
        "test": _named(recipe.data.test),
        "select": _named(recipe.data.select),
        "keep": [_named(k) for k in keep] if isinstance(keep, list) else keep,
    }
    data["data"] = {**sources, **data["data"]}
    return dump_yaml(data)


def dump_yaml(data: dict[str, Any]) -> str:
    """A mapping as YAML, its keys in their order."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.allow_unicode = True
    yaml.width = 4096
    out = io.StringIO()
    yaml.dump(data, out)
    return out.getvalue()


def _named(source: Any) -> Any:
    """A source as it can be written: rows that were given in memory leave only their number."""
    if source is None or isinstance(source, str) or (isinstance(source, list) and isinstance(source[0], str)):
        return source
    return f"memory:{len(source)} rows"


def _copied(value: Any) -> Any:
    """Mappings and lists are copied (overrides change them), rows and data sets are not."""
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return copy.copy(value) if isinstance(value, list) else value


def has(data: Any, path: KeyPath) -> bool:
    """Whether there is something at this path of nested mappings and lists."""
    for part in path:
        if isinstance(data, Mapping):
            if part not in data:
                return False
            data = data[part]
        elif isinstance(data, list) and isinstance(part, int):
            if part >= len(data):
                return False
            data = data[part]
        else:
            return False
    return True


def _check_version(data: Any, places: dict[KeyPath, str], path: Path) -> None:
    where = place_of(places, ())
    if data is None:
        raise UserError(f"the recipe is empty. Write one with: luthier init MODEL DATA -o {path}", where=where)
    if not isinstance(data, dict):
        raise UserError(f"a recipe is a mapping of keys to values, not {type(data).__name__} data", where=where)
    if "luthier" not in data:
        raise UserError(
            f"luthier: is missing. Add the line 'luthier: {VERSION}', or run: luthier migrate {path}", where=where
        )
    version = data["luthier"]
    if version == VERSION and type(version) is int:
        return
    place = place_of(places, ("luthier",))
    if type(version) is int and version > VERSION:
        raise UserError(
            f"luthier: the recipe is of version {version}, this Luthier reads up to {VERSION}. "
            "Update it with: pip install --upgrade luthier",
            where=place,
        )
    if type(version) is int and version >= 0:
        raise UserError(f"luthier: version {version} is old; run: luthier migrate {path}", where=place)
    raise UserError(f"luthier: must be the version of the recipe format, {VERSION}, not {version!r}", where=place)


def found(text: str, folder: Path | None) -> str:
    """The path as it can be opened from here: as given, or inside ``folder`` where only that exists."""
    if folder is None or Path(text).expanduser().exists() or not (folder / text).exists():
        return text
    return str(folder / text)


def _resolve_paths(recipe: Recipe) -> None:
    folder = recipe.folder
    recipe.model.id = found(recipe.model.id, folder)
    for key in ("train", "test", "select", "keep", "template"):
        value = getattr(recipe.data, key)
        if isinstance(value, str):
            setattr(recipe.data, key, found(value, folder))
        elif isinstance(value, list):
            setattr(recipe.data, key, [found(v, folder) if isinstance(v, str) else v for v in value])


def _derived_name(recipe: Recipe) -> str:
    """``<data>-<procedure or objectives or parameters>`` in letters that any file system takes."""
    train = recipe.data.train
    data = Path(train.split("?")[0]).name.split(".")[0] if isinstance(train, str) else "rows"
    if isinstance(train, str) and data in {"train", "data", "training"} and Path(train).parent.name:
        data = Path(train).parent.name
    procedure = method_name(recipe.procedure)
    parts = [data, procedure] if procedure != "sft" else [data, *map(method_name, recipe.objective)]
    parts += [name for name in map(method_name, recipe.parameters) if name != "full"]
    text = "-".join(parts)
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in text).strip("-.") or "run"


def method_name(spec: Any) -> str:
    """The name in a method's specification."""
    if isinstance(spec, str):
        return spec
    return next(key for key in spec if key != "weight" or len(spec) == 1)
