"""One scale and one shift per channel behind an operation: where, along which axis, and folded into its weights.

    y = scale * op(x) + shift,   scale, shift [C]

For a linear map (weight [out, in]), a convolution [O, I, kh, kw], an embedding [V, C] or a norm [C]::

    W' = scale * W  along the output channels      b' = scale * b + shift

Source: "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", 2022, arXiv 2210.08823. The axis
follows from the type of the module; the released code guesses it from the sizes, which goes wrong where height, width
or length equal the number of channels.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch

from luthier.core.errors import UserError

SITES = ("embed", "norm", "qkv", "proj", "fc1", "fc2", "conv", "final")
# A scale below this cannot be divided out again.
SMALLEST = 1e-6
_BLOCK = re.compile(r"(?P<block>.*\.\d+)\.(?P<inside>.+)$")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_POSITIONS = re.compile(r"position|wpe|pos_emb", re.IGNORECASE)


def channels(module: torch.nn.Module, path: str = "") -> tuple[int, int]:
    """(number of output channels, their axis in the output) of an operation.

    Raises:
        UserError: an operation of a type for which this is not known; ``path`` names it.
    """
    if isinstance(module, torch.nn.Linear):
        return module.out_features, -1
    if isinstance(module, torch.nn.modules.conv._ConvNd):
        return module.out_channels, 1
    if isinstance(module, torch.nn.Embedding):
        return module.embedding_dim, -1
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and weight is not None:
        return weight.shape[1], -1
    if "Norm" in type(module).__name__ and weight is not None and weight.dim() == 1:
        first = isinstance(module, torch.nn.modules.batchnorm._NormBase | torch.nn.GroupNorm)
        return len(weight), 1 if first or getattr(module, "data_format", "") == "channels_first" else -1
    raise UserError(f"'{path}' is a {type(module).__name__}, which has no channels that can be scaled and shifted.")


def affine(y: torch.Tensor, scale_C: torch.Tensor | None, shift_C: torch.Tensor | None, axis: int) -> torch.Tensor:
    """``scale * y + shift`` along an axis of y; None stands for 1 and 0."""
    shape = [1] * y.dim()
    shape[axis] = -1
    if scale_C is not None:
        y = y * scale_C.to(y.dtype).view(shape)
    return y if shift_C is None else y + shift_C.to(y.dtype).view(shape)


def folded(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale_C: torch.Tensor | None,
    shift_C: torch.Tensor | None,
    *,
    dim: int = 0,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of the operation with the affine in them, in the weight's type; computed in float32 or finer.

    Args:
        weight: of the operation.
        bias: of the operation, or None.
        scale_C: of the affine, or None for 1.
        shift_C: of the affine, or None for 0.
        dim: the dimension of the weight that is the output channel.
        offset: what the norm adds to its weight before it multiplies with it (1 for Gemma's).
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    shape = [1] * weight.dim()
    shape[dim] = -1
    if scale_C is not None:
        scale_C = scale_C.to(wide)
        weight = ((weight.to(wide) + offset) * scale_C.view(shape) - offset).to(weight.dtype)
    made = None if bias is None else bias.to(wide) * (1.0 if scale_C is None else scale_C)
    if shift_C is not None:
        made = shift_C.to(wide) + (0.0 if made is None else made)
    return weight, None if made is None else made.to(weight.dtype)


def unfolded(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale_C: torch.Tensor | None,
    shift_C: torch.Tensor | None,
    *,
    dim: int = 0,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The inverse of :func:`folded` up to rounding.

    Raises:
        UserError: a scale is too small to divide by.
    """
    if bias is not None and shift_C is not None:
        bias = (bias.to(shift_C.dtype) - shift_C).to(bias.dtype)
    if scale_C is None:
        return weight, bias
    if (least := float(scale_C.abs().min())) < SMALLEST:
        raise UserError(f"cannot be taken out of the weights again: a scale is {least:.1e}, nearly 0.")
    return folded(weight, bias, 1.0 / scale_C, None, dim=dim, offset=offset)


def norm_offset(norm: torch.nn.Module) -> float:
    """What a norm adds to its weight before it multiplies with it: 1 where a zero weight still lets signal through."""
    probe: Any = copy.deepcopy(norm).float().eval().requires_grad_(False)
    probe.weight.zero_()
    if getattr(probe, "bias", None) is not None:
        probe.bias.zero_()
    size, axis = channels(norm)
    shape = (2, size) if axis == -1 or isinstance(norm, torch.nn.BatchNorm1d) else (2, size, 2, 2)
    ramp = torch.arange(float(torch.Size(shape).numel()), device=probe.weight.device).view(shape)
    return 1.0 if bool(probe(ramp.sin()).abs().max() > 0) else 0.0


def find_sites(model: torch.nn.Module) -> dict[str, str]:
    """Path of every operation of the backbone that gets an affine -> its kind, one of :data:`SITES`.

    ``embed``: the patch embedding and norms of the embedding; for text with learned positions the table of positions,
    which stands for the sum of the tables. ``norm``, ``qkv``, ``proj`` (the last map of the attention), ``fc1``,
    ``fc2`` (the last of the feed-forward layer), ``conv``: inside blocks. ``final``: the norm before the head. Heads
    are left out.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    modules = {
        path: module
        for path, module in model.named_modules()
        if (path.startswith(prefix) or prefix == ".") and not any(True for _ in module.children())
    }
    inside: dict[str, list[str]] = {"attention": [], "other": []}
    found: dict[str, str] = {}
    blocks = {m["block"] for path in modules if (m := _BLOCK.match(path)) and _attends_or_convolves(path, modules)}
    for path, module in modules.items():
        match = _BLOCK.match(path)
        if "Norm" in type(module).__name__:
            if getattr(module, "weight", None) is not None:
                found[path] = "embed" if "embed" in path else "norm" if match else "final"
        elif isinstance(module, torch.nn.Conv2d):
            found[path] = "embed" if "embed" in path else "conv"
        elif _linear(module) and match and match["block"] in blocks:
            inside["attention" if _ATTENTION.search(match["inside"]) else "other"].append(path)
    for kind, (others, last) in {"attention": ("qkv", "proj"), "other": ("fc1", "fc2")}.items():
        of_block: dict[str, list[str]] = {}
        for path in inside[kind]:
            of_block.setdefault(_BLOCK.match(path)["block"], []).append(path)  # type: ignore[index]
        for paths in of_block.values():
            found |= dict.fromkeys(paths, others)
            if len(paths) > 1:
                found[paths[-1]] = last
    found |= dict.fromkeys(tables(model)[:1], "embed")
    return {path: found[path] for path in modules if path in found}


def _attends_or_convolves(path: str, modules: dict[str, torch.nn.Module]) -> bool:
    module, within = modules[path], _BLOCK.match(path)["inside"]  # type: ignore[index]
    return isinstance(module, torch.nn.Conv2d) or (_linear(module) and bool(_ATTENTION.search(within)))


def _linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def block_of(path: str) -> str | None:
    """The path of the innermost numbered module around an operation."""
    match = _BLOCK.match(path)
    return match["block"] if match else None


def tables(model: torch.nn.Module) -> list[str]:
    """Embedding tables whose sum enters the blocks, the learned positions first; empty where there are none.

    Also where the tokens' table is the head as well: folding a scale into the one would change the other.
    """
    try:
        tokens, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return []
    if head is not None and head.weight is tokens.weight:
        return []
    paths = {path: m for path, m in model.named_modules() if isinstance(m, torch.nn.Embedding)}
    parent = next((path.rpartition(".")[0] for path, m in paths.items() if m is tokens), None)
    beside = [path for path in paths if path.rpartition(".")[0] == parent]
    positions = [path for path in beside if _POSITIONS.search(path.rpartition(".")[2])]
    if len(positions) != 1 or len({paths[path].embedding_dim for path in beside}) != 1:
        return []
    return [*positions, *(path for path in beside if path not in positions)]


def shared(model: torch.nn.Module, wanted: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of paths of one and the same module, of which one is wanted: their affines could not be folded apart."""
    first: dict[int, str] = {}
    pairs, wanted = [], set(wanted)
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) in first and {path, first[id(module)]} & wanted:
            pairs.append((first[id(module)], path))
        first.setdefault(id(module), path)
    return pairs


def possible_biases(model: torch.nn.Module) -> dict[str, str]:
    """Linear maps without a bias that their architecture can have -> the setting of its configuration that gives it."""
    config = model.config
    have = {path for path, m in model.named_modules() if getattr(m, "bias", None) is not None}
    found: dict[str, str] = {}
    for flag in [k for k, v in vars(config).items() if "bias" in k and v is False]:
        other = copy.deepcopy(config)
        setattr(other, flag, True)
        with torch.device("meta"):
            like = type(model)(other)
        gained = {path for path, m in like.named_modules() if getattr(m, "bias", None) is not None} - have
        found |= dict.fromkeys(gained, flag)
    return found
