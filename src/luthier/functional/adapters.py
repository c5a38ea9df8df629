"""What the parameter methods that wrap modules share: which modules, which heads, how they merge.

Works on any ``torch.nn.Module``; peft's models are known by their attributes, so that nothing here imports it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from luthier.core.errors import UserError, did_you_mean
from luthier.functional.tensor_selection import block_units

# Task -> the name peft has for it.
TASK_TYPES = {
    "causal-lm": "CAUSAL_LM",
    "sequence-classification": "SEQ_CLS",
    "sequence-regression": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
}


def linear_modules(model: torch.nn.Module) -> list[str]:
    """Paths of the linear maps (also transformers' transposed ``Conv1D``)."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
    ]


def block_targets(model: torch.nn.Module, slug: str = "lora") -> list[str]:
    """Names of the linear maps inside the transformer blocks, short where the short name means nothing else.

    Raises:
        UserError: the model has no recognisable blocks.
    """
    inside = {u.name for u in block_units({n: tuple(p.shape) for n, p in model.named_parameters()})}
    linear = linear_modules(model)
    wanted = [path for path in linear if path in inside]
    if not wanted:
        raise UserError(
            f"{slug}: found no linear maps in transformer blocks of {type(model).__name__}; name them in "
            "target_modules."
        )
    return shortened(wanted, linear)


def feed_forward_targets(model: torch.nn.Module, slug: str) -> list[str]:
    """Names of the linear maps of the blocks' feed-forward layers, as :func:`block_targets` gives them.

    Raises:
        UserError: the model has none that are recognisable.
    """
    units = block_units({n: tuple(p.shape) for n, p in model.named_parameters()})
    inside = {u.name for u in units if u.category == "ffn"}
    linear = linear_modules(model)
    if not (wanted := [path for path in linear if path in inside]):
        raise UserError(
            f"{slug}: found no feed-forward layers in transformer blocks of {type(model).__name__}; name modules in "
            "target_modules."
        )
    return shortened(wanted, linear)


def shortened(wanted: Sequence[str], among: Iterable[str]) -> list[str]:
    """The last names of paths where these mean no other module of ``among``; the whole paths where they do."""
    short = sorted({path.rpartition(".")[2] for path in wanted})
    ambiguous = any(path.rpartition(".")[2] in short for path in among if path not in wanted)
    return list(wanted) if ambiguous else short


def named_targets(model: torch.nn.Module, names: Sequence[str], slug: str) -> list[str]:
    """The names, each checked to be a linear module's path or the end of one.

    Raises:
        UserError: there is no such module; the nearest name is given.
    """
    linear = linear_modules(model)
    for name in names:
        if not any(path == name or path.endswith(f".{name}") for path in linear):
            known = sorted({path.rpartition(".")[2] for path in linear})
            raise UserError(
                f"{slug}: target_modules: no linear module is called '{name}'.{did_you_mean(name, known)} "
                f"This model has: {', '.join(known)}."
            )
    return list(names)


def heads(model: torch.nn.Module) -> list[str]:
    """Names of the modules outside the backbone that hold weights: a classification head."""
    backbone = getattr(model, "base_model_prefix", "")
    return [
        name for name, child in model.named_children() if name != backbone and any(True for _ in child.parameters())
    ]


def virtual_tokens(model: Any) -> int:
    """How many virtual tokens prompt or prefix tuning puts in front of every row; 0 for any other model."""
    config = getattr(model, "active_peft_config", None)
    return config.num_virtual_tokens if config is not None and config.is_prompt_learning else 0


def quantized(model: Any) -> bool:
    """Whether the model's weights are quantised."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(getattr(base, "config", None), "quantization_config", None) is not None


def untie(model: Any) -> bool:
    """Give the output embedding its own weights where an adapter changes one of two tied embeddings."""
    base = model.get_base_model()
    if not getattr(base.config, "tie_word_embeddings", False):
        return False
    pair = (base.get_input_embeddings(), base.get_output_embeddings())
    if pair[0] is None or pair[1] is None:
        return False
    plain = [getattr(m, "base_layer", m) for m in pair]
    changed = [m is not p for m, p in zip(pair, plain, strict=True)]
    if not any(changed) or plain[0].weight is not plain[1].weight:
        return False
    plain[1].weight = torch.nn.Parameter(plain[1].weight.detach().clone(), requires_grad=False)
    base.config.tie_word_embeddings = False
    return True


def check_merge(model: Any, slug: str) -> None:
    """Refuse to merge into quantised weights.

    Raises:
        UserError: the base is quantised, and adding to rounded weights rounds them again.
    """
    if quantized(model):
        raise UserError(
            f"{slug}: merge: the base is quantised, and merging into quantised weights changes them. Save the adapter "
            "(merge: false) and merge it into the unquantised base with `luthier merge`."
        )


def merged(model: Any, slug: str) -> Any:
    """A copy of a peft model with its adapter in the weights; the model itself is left as it is, for training goes on.

    Raises:
        UserError: the base is quantised.
    """
    check_merge(model, slug)
    made = copy.deepcopy(model)
    untie(made)
    return made.merge_and_unload(safe_merge=True)
