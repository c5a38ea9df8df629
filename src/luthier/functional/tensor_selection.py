"""Random choice of part of a transformer's tensors: by category in each layer, by size, by layer, or fixed.

Works on names and shapes alone. A unit is what is chosen as a whole: the tensors of one module of a block (a bias goes
with its matrix), or one part of a fused matrix. Categories within a block are ``attention``, ``ffn``, ``norm`` and
``other``.

Source: "HFT: Half Fine-Tuning for Large Language Models", 2024, arXiv 2404.18466.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

Shapes = Mapping[str, Sequence[int]]
Layer = tuple[str, int]

LEVELS = ("category", "layer", "model")
_IN_BLOCK = re.compile(r"(?P<prefix>.*?)\.(?P<index>\d+)\.(?P<rest>.+)$")
_ATTENTION = re.compile(r"attn|attention|(^|\.)(q|k|v|o|out|qkv)_proj(\.|$)", re.IGNORECASE)
_NORM = re.compile(r"norm|(^|[._])ln(_|\d|\.|$)", re.IGNORECASE)
# Above this many subsets the size-balanced choice looks at a random sample of them.
_SUBSETS = 2000


@dataclass(frozen=True)
class Unit:
    """What is chosen or left as a whole.

    Attributes:
        name: the module's path; ``[part]`` behind it for a part of a fused matrix.
        layer: prefix of the stack of blocks and the block's number.
        category: ``attention``, ``ffn``, ``norm`` or ``other``.
        tensors: names of its tensors.
        size: its elements.
        part: for a fused matrix, which of its parts.
    """

    name: str
    layer: Layer
    category: str
    tensors: tuple[str, ...]
    size: int
    part: int | None = None


@dataclass(frozen=True)
class Fused:
    """The parts of a fused matrix: their names and the rows (entries of the output dimension) of each."""

    parts: tuple[str, ...]
    rows: tuple[torch.Tensor, ...]
    dim: int


def is_norm(module: str) -> bool:
    """Whether a module's path names a normalisation layer."""
    return bool(_NORM.search(module))


def module_of(name: str) -> str:
    """The path of the module a tensor belongs to; the tensor's own name where it is not a weight or a bias."""
    path, _, last = name.rpartition(".")
    return path if last in ("weight", "bias") and path else name


def block_units(shapes: Shapes, fused: Mapping[str, Fused] | None = None) -> list[Unit]:
    """The units of the transformer blocks, ordered by stack, layer and name.

    A stack of blocks is a numbered list of modules (``model.layers.<n>``, ``transformer.h.<n>``, ...) of which at least
    one holds attention matrices. Tensors outside such lists are in no unit.

    Args:
        shapes: names and shapes of the model's tensors.
        fused: module path -> its parts, which become units of their own.
    """
    modules: dict[tuple[Layer, str], list[str]] = {}
    for name in shapes:
        if match := _IN_BLOCK.match(name):
            modules.setdefault(((match["prefix"], int(match["index"])), module_of(name)), []).append(name)
    categories = {key: _category(key, names, shapes) for key, names in modules.items()}
    stacks = {layer[0] for (layer, _), category in categories.items() if category == "attention"}
    units: list[Unit] = []
    for (layer, module), names in sorted(modules.items()):
        if layer[0] not in stacks:
            continue
        sizes = [math.prod(shapes[n]) for n in names]
        category = categories[layer, module]
        if fused and module in fused:
            pieces = fused[module]
            total = sum(r.numel() for r in pieces.rows)
            for index, (part, rows) in enumerate(zip(pieces.parts, pieces.rows, strict=True)):
                size = sum(sizes) * rows.numel() // total
                units.append(Unit(f"{module}[{part}]", layer, category, tuple(names), size, index))
        else:
            units.append(Unit(module, layer, category, tuple(names), sum(sizes)))
    return units


def _category(key: tuple[Layer, str], names: Sequence[str], shapes: Shapes) -> str:
    (prefix, index), module = key
    inside = module[len(f"{prefix}.{index}.") :]
    matrix = any(len(shapes[n]) >= 2 for n in names)
    if is_norm(inside) and not matrix:
        return "norm"
    if not matrix:
        return "other"
    return "attention" if _ATTENTION.search(inside) else "ffn"


_QKV = ("c_attn", "qkv_proj", "qkv", "Wqkv", "query_key_value", "W_pack")


def fused_rows(
    module: str, width: int, *, heads: int, kv_heads: int, head_dim: int, per_head: bool, dim: int = 0
) -> Fused | None:
    """The parts of a fused projection, or None where the matrix is not one or its layout is not understood.

    Args:
        module: the module's path; its last component tells what is fused.
        width: entries of the output dimension.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        per_head: whether q, k and v lie side by side within each head instead of one after the other.
        dim: the output dimension of the weight.
    """
    last = module.rpartition(".")[2]
    rows = torch.arange(width)
    if last == "gate_up_proj":
        return Fused(("gate", "up"), tuple(rows.chunk(2)), dim) if width % 2 == 0 else None
    if last not in _QKV or width != (heads + 2 * kv_heads) * head_dim:
        return None
    if per_head:
        if heads != kv_heads:
            return None
        grid = rows.view(heads, 3, head_dim)
        return Fused(("q", "k", "v"), tuple(grid[:, i].reshape(-1) for i in range(3)), dim)
    q, kv = heads * head_dim, kv_heads * head_dim
    return Fused(("q", "k", "v"), tuple(rows.split([q, kv, kv])), dim)


def looks_fused(module: str) -> bool:
    """Whether the module's name is that of a fused projection."""
    return module.rpartition(".")[2] in (*_QKV, "gate_up_proj")


def layers_of(units: Iterable[Unit]) -> list[Layer]:
    """The layers of the units, in order."""
    return sorted({unit.layer for unit in units})


def select(
    units: Sequence[Unit],
    fraction: float,
    generator: torch.Generator,
    *,
    level: str = "category",
    balance: str = "count",
) -> set[str]:
    """Names of a random ``fraction`` of the units.

    ``category``: in each layer floor(c * fraction) of the c units of a category, plus one more in as many random layers
    as bring the total to round(L * c * fraction). ``layer``: all units of round(L * fraction) random layers. ``model``:
    random units, whatever they are, up to the fraction of all elements.

    Args:
        units: from :func:`block_units`.
        fraction: share to choose, 0 to 1.
        generator: source of randomness.
        level: one of :data:`LEVELS`.
        balance: ``count``: any subset of the right number; ``size``: among those, one whose elements come nearest to
            the fraction (matters where key and value matrices are smaller than query matrices).
    """
    if level == "layer":
        layers = layers_of(units)
        order = _shuffled(len(layers), generator)[: max(round(len(layers) * fraction), 1 if fraction > 0 else 0)]
        picked = {layers[i] for i in order}
        return {u.name for u in units if u.layer in picked}
    if level == "model":
        return _by_size(units, fraction, generator)
    chosen: set[str] = set()
    for members in _rows_of_equal_shape(units):
        each = len(members[0])
        least = math.floor(each * fraction + 1e-9)
        more = round(len(members) * each * fraction) - len(members) * least
        with_one_more = set(_shuffled(len(members), generator)[:more])
        for index, row in enumerate(members):
            count = least + (index in with_one_more)
            chosen.update(u.name for u in _pick(row, count, fraction, generator, balance))
    return chosen


def _rows_of_equal_shape(units: Sequence[Unit]) -> list[list[list[Unit]]]:
    """For each (category, number of units of it in a layer): the layers' units."""
    by_layer: dict[tuple[str, Layer], list[Unit]] = {}
    for unit in units:
        by_layer.setdefault((unit.category, unit.layer), []).append(unit)
    groups: dict[tuple[str, int], list[list[Unit]]] = {}
    for (category, _), row in sorted(by_layer.items()):
        groups.setdefault((category, len(row)), []).append(row)
    return list(groups.values())


def _pick(row: Sequence[Unit], count: int, fraction: float, generator: torch.Generator, balance: str) -> Sequence[Unit]:
    order = _shuffled(len(row), generator)
    if balance == "count" or count in (0, len(row)):
        return [row[i] for i in order[:count]]
    if math.comb(len(row), count) <= _SUBSETS:
        subsets = [list(s) for s in itertools.combinations(range(len(row)), count)]
        subsets = [subsets[i] for i in _shuffled(len(subsets), generator)]
    else:
        subsets = [_shuffled(len(row), generator)[:count] for _ in range(_SUBSETS)]
    target = fraction * sum(u.size for u in row)
    best = min(subsets, key=lambda subset: abs(sum(row[i].size for i in subset) - target))
    return [row[i] for i in best]


def _by_size(units: Sequence[Unit], fraction: float, generator: torch.Generator) -> set[str]:
    target, total = fraction * sum(u.size for u in units), 0
    chosen = set()
    for index in _shuffled(len(units), generator):
        size = units[index].size
        # Taken where that brings the sum nearer to the target than leaving it.
        if total + size / 2 <= target:
            total += size
            chosen.add(units[index].name)
    return chosen


def _shuffled(count: int, generator: torch.Generator) -> list[int]:
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def fixed(units: Sequence[Unit], kind: str, fraction: float) -> set[str]:
    """Names of the units of a fixed choice: ``attention``, ``ffn``, or the ``lower`` or ``upper`` share of layers."""
    if kind in ("attention", "ffn"):
        return {u.name for u in units if u.category == kind}
    layers = layers_of(units)
    count = max(round(len(layers) * fraction), 1)
    picked = set(layers[:count] if kind == "lower" else layers[-count:])
    return {u.name for u in units if u.layer in picked}


def matching(units: Sequence[Unit], patterns: Iterable[str]) -> tuple[set[str], list[str]]:
    """Units whose name, or one of whose tensors, fits a pattern (``*`` and ``?``; a suffix of the path is enough).

    Returns:
        The names, and the patterns that fit nothing.
    """
    chosen: set[str] = set()
    idle = []
    for pattern in patterns:
        named = {u.name for u in units if any(fits(n, pattern) for n in (u.name, *u.tensors))}
        chosen |= named
        if not named:
            idle.append(pattern)
    return chosen, idle


def fits(name: str, pattern: str) -> bool:
    """Whether a path is the pattern or ends with it; ``*`` and ``?`` stand for any characters."""
    # "[" is a character of the names of fused parts, not a set of characters.
    literal = pattern.replace("[", "[[]")
    return fnmatch.fnmatchcase(name, literal) or fnmatch.fnmatchcase(name, f"*.{literal}")


def shares(units: Iterable[Unit], chosen: Callable[[Unit], bool]) -> dict[str, tuple[int, int]]:
    """For each category: (chosen elements, all elements)."""
    found: dict[str, tuple[int, int]] = {}
    for unit in units:
        inside, total = found.get(unit.category, (0, 0))
        found[unit.category] = (inside + unit.size * chosen(unit), total + unit.size)
    return found
