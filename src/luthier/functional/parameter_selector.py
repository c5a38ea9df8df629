"""One grammar for naming parameters, the same for every method that trains, wraps or masks part of a model.

    selection: [category:attention, "layer:0-3 & category:ffn", lm_head, "model.layers.*.mlp.up_proj", "!category:norm"]

A selection is a list of terms; what any of them names is chosen, and what a term with ``!`` names is taken out again (a
list of such terms alone starts from everything). The parts of a term joined by ``&`` must all hold:

    layer:N        blocks by number: ``3``, ``0-3``, ``0,2,5``, ``-1`` (the last), of every stack
    category:C     attention, ffn, norm or other inside blocks; embedding, head, final-norm or outside elsewhere
    module:M       the last name of a module, such as ``q_proj``
    a path         a tensor's or module's path or the end of it (``*`` and ``?`` allowed); everything inside a module

A tensor under several names (tied embeddings) is one site, whichever of them is used. A fused projection answers to
its parts as well: ``qkv_proj[q]`` names rows of it. GPT-2's ``Conv1D`` keeps its matrix transposed, ``[in, out]``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from luthier.core.errors import UserError
from luthier.functional.tensor_selection import (
    Fused,
    Layer,
    block_units,
    fits,
    fused_rows,
    is_norm,
    looks_fused,
    module_of,
)

CATEGORIES = ("attention", "ffn", "norm", "other", "embedding", "head", "final-norm", "outside")
# Architectures whose fused attention matrix holds q, k and v side by side within each head.
_PER_HEAD = ("gpt_neox", "gpt_neox_japanese", "bloom")
_UNKNOWN_LAYOUT = ("codegen",)
_RANGE = re.compile(r"^(-?\d+)(?:-(\d+))?$")
_KINDS = ("layer", "category", "module")


@dataclass(frozen=True)
class Site:
    """One parameter tensor.

    Attributes:
        name: its name; the first one where its storage is tied.
        names: all its names.
        module: path of the module that owns it.
        category: one of :data:`CATEGORIES`.
        layer: stack and number of its block; None outside the blocks.
        shape: its shape.
        out_dim: the dimension that belongs to the module's outputs: 1 for ``Conv1D`` matrices, else 0.
        fused: the parts of a fused projection, where its layout is known.
    """

    name: str
    names: tuple[str, ...]
    module: str
    category: str
    layer: Layer | None
    shape: tuple[int, ...]
    out_dim: int = 0
    fused: Fused | None = None

    @property
    def numel(self) -> int:
        """Number of entries."""
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class Chosen:
    """What a selection names.

    Attributes:
        sites: the tensors, in the order of the model.
        parts: site name -> names of the parts of a fused projection that are meant, where not all of it is.
    """

    sites: tuple[Site, ...]
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return [site.name for site in self.sites]

    def mask(self, site: Site) -> torch.Tensor | None:
        """Bool, broadcasting over the tensor: true where the selection names its entries; None for all of it."""
        if site.name not in self.parts:
            return None
        assert site.fused is not None
        dim = site.fused.dim if len(site.shape) > 1 else 0
        mask = torch.zeros(site.shape[dim], dtype=torch.bool)
        for part in self.parts[site.name]:
            mask[site.fused.rows[site.fused.parts.index(part)]] = True
        return mask.view([-1 if d == dim else 1 for d in range(len(site.shape))])


def is_linear(module: torch.nn.Module) -> bool:
    """Whether a module is a linear map: ``nn.Linear`` or transformers' transposed ``Conv1D``."""
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def find_fused(model: torch.nn.Module) -> tuple[dict[str, Fused], list[str]]:
    """The fused projections of a model by module path, and the paths of those whose layout is not known."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    kind = getattr(config, "model_type", "")
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    hidden = int(getattr(config, "hidden_size", 0) or 0)
    head_dim = int(getattr(config, "head_dim", None) or (hidden // heads if heads else 0))
    per_head = kind in _PER_HEAD
    if kind == "falcon" and not config.new_decoder_architecture:
        kv_heads, per_head = (1, False) if config.multi_query else (heads, True)
    about: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "per_head": per_head}
    found, unknown = {}, []
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not looks_fused(path) or not isinstance(weight, torch.Tensor) or weight.dim() != 2:
            continue
        dim = 1 if type(module).__name__ == "Conv1D" else 0
        fused = None if kind in _UNKNOWN_LAYOUT else fused_rows(path, weight.shape[dim], dim=dim, **about)
        if fused is None:
            unknown.append(path)
        else:
            found[path] = fused
    return found, unknown


def sites(model: torch.nn.Module) -> list[Site]:
    """Every parameter tensor of a model once, in its order."""
    every: dict[int, list[str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        every.setdefault(id(parameter), []).append(name)
        shapes[name] = tuple(parameter.shape)
    in_blocks = {n: u for u in block_units(shapes) for n in u.tensors}
    fused, _ = find_fused(model)
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    words = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    backbone = getattr(model, "base_model_prefix", "")
    top = {n for n, child in model.named_children() if n != backbone} if hasattr(model, backbone) else set()
    head_ids = {id(p) for p in head.parameters()} if head is not None else set()
    modules = dict(model.named_modules())
    found = []
    for key, names in every.items():
        name, module = names[0], module_of(names[0])
        unit = in_blocks.get(name)
        if unit is not None:
            category = unit.category
        elif key in words:  # tied: the embedding comes first
            category = "embedding"
        elif key in head_ids or name.split(".")[0] in top:
            category = "head"
        else:
            category = "final-norm" if is_norm(module) else "embedding" if "embed" in name else "outside"
        owner = modules.get(module)
        found.append(
            Site(
                name=name,
                names=tuple(names),
                module=module,
                category=category,
                layer=unit.layer if unit else None,
                shape=shapes[name],
                out_dim=int(type(owner).__name__ == "Conv1D" and len(shapes[name]) == 2),
                fused=fused.get(module),
            )
        )
    return found


def choose(every: Sequence[Site], selection: str | Iterable[str], *, where: str = "selection") -> Chosen:
    """The sites that a selection names.

    Args:
        every: from :func:`sites`, or part of it.
        selection: a term or a list of terms, as the module's docstring has it.
        where: what to call the selection in errors, such as ``spiel: target_modules``.

    Raises:
        UserError: a term that names nothing, with the nearest names there are; or nothing is left.
    """
    terms = [selection] if isinstance(selection, str) else list(selection)
    chosen: dict[str, set[str] | None] = {}
    if all(term.strip().startswith("!") for term in terms):
        chosen = {site.name: None for site in every}
    for term in terms:
        text = term.strip()
        named = _term(every, text.removeprefix("!").strip(), where)
        for name, parts in named.items():
            site = next(s for s in every if s.name == name)
            if text.startswith("!"):
                _take_out(chosen, site, parts)
            elif parts is None or (name in chosen and chosen[name] is None):
                chosen[name] = None
            else:
                chosen[name] = (chosen.get(name) or set()) | parts
    kept = tuple(site for site in every if site.name in chosen)
    if not kept:
        raise UserError(f"{where}: {', '.join(terms) or 'an empty selection'} leaves no tensor of this model.")
    order = {s.name: s.fused.parts for s in kept if s.fused is not None}
    meant = {n: tuple(p for p in order[n] if p in some) for n, some in chosen.items() if some is not None}
    return Chosen(kept, {n: some for n, some in meant.items() if len(some) < len(order[n])})


def _take_out(chosen: dict[str, set[str] | None], site: Site, parts: set[str] | None) -> None:
    if site.name not in chosen:
        return
    if parts is None or site.fused is None:
        del chosen[site.name]
        return
    there = chosen[site.name]
    left = (set(site.fused.parts) if there is None else there) - parts
    if left:
        chosen[site.name] = left
    else:
        del chosen[site.name]


def _term(every: Sequence[Site], text: str, where: str) -> dict[str, set[str] | None]:
    """Site name -> the parts that are meant, None for the whole tensor."""
    found: dict[str, set[str] | None] = {site.name: None for site in every}
    for factor in text.split("&"):
        named = _factor(every, factor.strip(), where)
        both = {}
        for name in found.keys() & named.keys():
            a, b = found[name], named[name]
            both[name] = b if a is None else a if b is None else a & b
        found = {n: parts for n, parts in both.items() if parts is None or parts}
    if not found:
        raise UserError(f"{where}: '{text}' fits no tensor: each of its parts names some, but none are the same.")
    return found


def _factor(every: Sequence[Site], text: str, where: str) -> dict[str, set[str] | None]:
    kind, colon, value = text.partition(":")
    if not colon:
        return _path(every, text, where)
    if kind not in _KINDS:
        raise UserError(f"{where}: '{text}': there is no kind '{kind}'. Accepted: {', '.join(_KINDS)}, or a path.")
    if kind == "layer":
        return _layers(every, text, value, where)
    of = (lambda s: s.category) if kind == "category" else (lambda s: s.module.rpartition(".")[2])
    found: dict[str, set[str] | None] = {site.name: None for site in every if of(site) == value}
    if not found:
        _refuse(where, text, value, {of(site) for site in every})
    return found


def _layers(every: Sequence[Site], text: str, value: str, where: str) -> dict[str, set[str] | None]:
    counts: dict[str, int] = {}
    for site in every:
        if site.layer is not None:
            counts[site.layer[0]] = max(counts.get(site.layer[0], 0), site.layer[1] + 1)
    ranges = []
    for piece in value.split(","):
        match = _RANGE.match(piece.strip())
        if match is None:
            raise UserError(
                f"{where}: '{text}': layers are numbers and ranges, such as layer:0-3, layer:0,2, layer:-1."
            )
        ranges.append((int(match[1]), int(match[2] if match[2] is not None else match[1])))
    found: dict[str, set[str] | None] = {}
    for site in every:
        if site.layer is not None:
            prefix, number = site.layer
            if any((a if a >= 0 else a + counts[prefix]) <= number <= (b if b >= 0 else b + counts[prefix])
                   for a, b in ranges):  # fmt: skip
                found[site.name] = None
    if not found:
        known = ", ".join(f"{prefix} has layers 0 to {count - 1}" for prefix, count in counts.items())
        raise UserError(f"{where}: '{text}' fits no tensor: {known or 'this model has no blocks'}.")
    return found


def _path(every: Sequence[Site], text: str, where: str) -> dict[str, set[str] | None]:
    found: dict[str, set[str] | None] = {}
    for site in every:
        if any(_inside(name, text) for name in site.names):
            found[site.name] = None
        elif site.fused is not None and "[" in text:
            parts = {p for p in site.fused.parts if fits(f"{site.module}[{p}]", text)}
            if parts:
                found[site.name] = parts
    if not found:
        modules = {site.module for site in every}
        known = modules | {m.rpartition(".")[2] for m in modules}
        known |= {f"{s.module.rpartition('.')[2]}[{p}]" for s in every if s.fused for p in s.fused.parts}
        _refuse(where, text, text, known if "." in text else {k for k in known if "." not in k})
    return found


def _inside(name: str, pattern: str) -> bool:
    """Whether a tensor's path, or that of a module around it, is the pattern or ends with it."""
    pieces = name.split(".")
    return any(fits(".".join(pieces[:end]), pattern) for end in range(len(pieces), 0, -1))


def _refuse(where: str, text: str, value: str, known: Iterable[str]) -> None:
    names = sorted({k for k in known if k})
    near = difflib.get_close_matches(value, names, n=3, cutoff=0.6)
    hint = f" The nearest names: {', '.join(near)}." if near else ""
    shown = names if len(names) <= 16 else [*names[:15], f"and {len(names) - 15} more"]
    raise UserError(f"{where}: '{text}' fits no tensor of this model.{hint} It has: {', '.join(shown)}.")
