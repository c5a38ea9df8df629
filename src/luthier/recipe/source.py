"""Read YAML so that every key remembers its line, and apply ``key.path=value`` overrides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from luthier.core.errors import UserError, did_you_mean
from luthier.recipe.schema import KeyPath

# A text at one of these keys stands for a mapping with this one key.
SHORTHAND = {("model",): "id", ("data",): "train"}


def parse(text: str, name: str) -> tuple[Any, dict[KeyPath, str]]:
    """The value of a YAML 1.2 document and the place ``name:line`` of each key path in it.

    Raises:
        UserError: not YAML, a key twice, a tag that is not plain data, or a recursive alias; with the line.
    """
    yaml = YAML(typ="safe", pure=True)
    try:
        node = yaml.compose(text)
        places: dict[KeyPath, str] = {(): f"{name}:1"}
        if node is None:
            return None, places
        value = _value(yaml, node, (), places, name, ())
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        problem = " ".join(str(error.problem or error.context).split())
        raise UserError(f"not valid YAML: {problem}.{_hint(text, mark)}", where=where) from error
    except YAMLError as error:
        raise UserError(f"not valid YAML: {' '.join(str(error).split())}", where=name) from error
    return value, places


def _hint(text: str, mark: Any) -> str:
    lines = text.splitlines()
    line = lines[mark.line] if mark is not None and mark.line < len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return " Indent with spaces, not tabs."
    excerpt = line.strip()
    return f" The line reads: {excerpt[:80]}" if excerpt else ""


def _value(yaml: Any, node: Node, path: KeyPath, places: dict[KeyPath, str], name: str, open_: tuple[int, ...]) -> Any:
    where = f"{name}:{node.start_mark.line + 1}"
    places.setdefault(path, where)
    if isinstance(node, ScalarNode):
        return yaml.constructor.construct_object(node)
    if id(node) in open_:
        raise UserError("an alias refers to what contains it", where=where)
    open_ = (*open_, id(node))
    if isinstance(node, SequenceNode):
        return [_value(yaml, item, (*path, i), places, name, open_) for i, item in enumerate(node.value)]
    assert isinstance(node, MappingNode)
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        line = f"{name}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, ScalarNode):
            raise UserError("a key must be a plain word", where=line)
        if str(key_node.tag).endswith(":merge"):
            raise UserError("'<<' is not YAML 1.2; write the keys out", where=line)
        key = yaml.constructor.construct_object(key_node)
        if key in result:
            first = places[(*path, key)].rpartition(":")[2]
            raise UserError(f"the key '{key}' is there twice (first on line {first})", where=line)
        places[(*path, key)] = line
        result[key] = _value(yaml, value_node, (*path, key), places, name, open_)
    return result


def read(path: Path) -> tuple[Any, dict[KeyPath, str]]:
    """:func:`parse` of a file.

    Raises:
        UserError: the file cannot be read, is not UTF-8 or not YAML.
    """
    if path.is_dir():
        raise UserError("is a folder, not a recipe; give the recipe file in it", where=str(path))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"there is no recipe '{path}'{_neighbours(path)} Write one with: luthier init MODEL DATA -o {path}"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text (byte {error.start})", where=str(path)) from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from None
    return parse(text, str(path))


def _neighbours(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f": there is no folder '{folder}'."
    recipes = [p.name for p in folder.iterdir() if p.suffix in {".yaml", ".yml"}]
    return "." + did_you_mean(path.name, recipes)


def override(data: Any, places: dict[KeyPath, str], texts: Sequence[str]) -> Any:
    """Apply ``key.path=value`` texts (values are YAML) to a recipe's data, in order; ``data`` and ``places`` change.

    A method written as a name becomes a mapping when an option of it is set, and in a list of methods the name picks
    the entry, so ``objective.anchored-sft.anchor_weight=0.1`` works however the recipe is written.

    Raises:
        UserError: no ``=``, an empty key, a value that is not YAML, or a path that leads through a plain value.
    """
    if texts and not isinstance(data, dict):
        return data
    for text in texts:
        where = f"command line, '{text}'"
        dotted, equals, raw = text.partition("=")
        dotted = dotted.strip()
        if not equals or not dotted or dotted.startswith("-"):
            raise UserError("an override is written key.path=value, such as training.epochs=2", where=where)
        value, _ = parse(raw, where)
        _set(data, dotted, value, (), places, where)
    return data


def _set(node: Any, rest: str, value: Any, path: KeyPath, places: dict[KeyPath, str], where: str) -> None:
    key, rest = _next_key(node, rest, path, where)
    here = (*path, key)
    if isinstance(node, list) and key == len(node):
        node.append(None)
    if not rest:
        node[key] = value
        for old in [p for p in places if p[: len(here)] == here]:
            del places[old]
        places[here] = where
        return
    child = node[key] if isinstance(node, list) else node.get(key)
    if child is None:
        child = {}
    elif isinstance(child, str):
        child = {SHORTHAND[here]: child} if here in SHORTHAND else _opened(child, rest, here, where)
    elif not isinstance(child, dict | list):
        dotted = ".".join(map(str, here))
        raise UserError(f"{dotted} is {child!r}, which has no keys inside", where=where)
    node[key] = child
    places.setdefault(here, where)
    if isinstance(child, list):
        child, rest, here = _entry(child, rest, here)
    _set(child, rest, value, here, places, where)


def _opened(name: str, rest: str, here: KeyPath, where: str) -> dict[str, Any]:
    """``sft`` -> ``{sft: {}}`` when the path goes on with that name."""
    if rest == name or rest.startswith(name + "."):
        return {name: {}}
    dotted = ".".join(map(str, here))
    wanted = rest.split(".")[0]
    raise UserError(f"{dotted} is '{name}', not '{wanted}'; to replace it write {dotted}={wanted}", where=where)


def _entry(items: list[Any], rest: str, here: KeyPath) -> tuple[Any, str, KeyPath]:
    """In a list of methods, step into the entry of that name; else leave the list for an index."""
    for index, item in enumerate(items):
        names = [item] if isinstance(item, str) else list(item) if isinstance(item, dict) else []
        for name in names:
            if rest.startswith(f"{name}.") and name != "weight":
                if isinstance(item, str) or item[name] is None:
                    items[index] = {**(item if isinstance(item, dict) else {}), name: {}}
                return items[index], rest, (*here, index)
    return items, rest, here


def _next_key(node: Any, rest: str, path: KeyPath, where: str) -> tuple[Any, str]:
    if isinstance(node, list):
        first, _, tail = rest.partition(".")
        dotted = ".".join(map(str, path))
        if not first.isdigit() or int(first) > len(node):
            entries = ", ".join(f"{i}: {_short(item)}" for i, item in enumerate(node)) or "none"
            raise UserError(f"{dotted} is a list without '{first}'; its entries: {entries}", where=where)
        return int(first), tail
    # A key may itself hold dots (the user's own ./file.py:name), so a key that is there wins over splitting.
    for key in sorted((k for k in node if isinstance(k, str)), key=len, reverse=True):
        if rest == key or rest.startswith(key + "."):
            return key, rest[len(key) + 1 :]
    first, _, tail = rest.partition(".")
    if not first or rest.endswith("."):
        raise UserError("the key has an empty part", where=where)
    return first, tail


def _short(item: Any) -> str:
    return item if isinstance(item, str) else next(iter(item), "{}") if isinstance(item, dict) else repr(item)
