"""Make a loaded model fit the data: class heads in the order of the labels, an embedding row for every token."""

from __future__ import annotations

from typing import Any

import torch

from luthier.core.errors import UserError
from luthier.core.rng import derive_seed


def label_names(config: Any) -> tuple[str, ...]:
    """Names of the classes in the order of the outputs."""
    return tuple(str(config.id2label[i]) for i in range(config.num_labels))


def output_layer(model: Any) -> torch.nn.Linear:
    """The last linear layer outside the base with one output per class.

    Raises:
        UserError: there is none; such a head is not supported.
    """
    prefix = model.base_model_prefix + "."
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and not name.startswith(prefix)
        and module.out_features == model.config.num_labels
    ]
    if not found:
        raise UserError(f"{type(model).__name__} has no linear output layer over classes; this head is not supported.")
    return found[-1]


def reorder_labels(model: Any, names: tuple[str, ...]) -> None:
    """Permute the outputs so that they follow ``names``, which are the model's own classes in some order."""
    current = label_names(model.config)
    if current == names:
        return
    order = torch.tensor([current.index(name) for name in names])
    layer = output_layer(model)
    with torch.no_grad():
        layer.weight.copy_(layer.weight[order])
        if layer.bias is not None:
            layer.bias.copy_(layer.bias[order])
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}


def new_head(model: Any) -> None:
    """Draw the output layer anew from the global random state: normal weights, zero bias."""
    layer = output_layer(model)
    with torch.no_grad():
        layer.weight.normal_(0.0, getattr(model.config, "initializer_range", None) or 0.02)
        if layer.bias is not None:
            layer.bias.zero_()


def fit_vocabulary(model: Any, tokenizer: Any, seed: int) -> int:
    """Give the embedding a row for every token of the tokenizer; returns how many rows were added.

    Rows beyond the tokenizer (padding to a round number) are kept. A new row is the mean of the old ones, so an unseen
    token neither wins nor disturbs.
    """
    rows, wanted = model.get_input_embeddings().weight.shape[0], len(tokenizer)
    if wanted <= rows:
        return 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "init", "embedding"))
        model.resize_token_embeddings(wanted, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if module is not None:
                module.weight[rows:] = module.weight[:rows].mean(0)
                if getattr(module, "bias", None) is not None:
                    module.bias[rows:] = module.bias[:rows].mean(0)
    return wanted - rows
