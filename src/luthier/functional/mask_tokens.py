"""Tokens that stand for a hidden one: which a tokenizer has, and adding and removing one."""

from __future__ import annotations

from typing import Any

import torch

from luthier.core.errors import LuthierError, UserError

ADDED_TOKEN = "<mask>"


def mask_token_id(tokenizer: Any, choice: str) -> int:
    """The id of the corruption token.

    Raises:
        UserError: the tokenizer has no such token.
    """
    pad, mask = tokenizer.pad_token_id, getattr(tokenizer, "mask_token_id", None)
    if choice in ("auto", "pad"):
        found = mask if choice == "auto" and mask is not None else pad
        if found is None:
            raise UserError(
                "masked-thought: the tokenizer has neither a mask nor a pad token. Set mask_token to one of its tokens "
                "or to 'add', or use corruption: random."
            )
        return int(found)
    token = ADDED_TOKEN if choice == "add" else choice
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary:
        raise UserError(
            f"masked-thought: the tokenizer has no token '{token}'. Set mask_token to 'pad', to 'add' or to one of its "
            "tokens, or use corruption: random."
        )
    return int(vocabulary[token])


def add_mask_token(model: Any, tokenizer: Any) -> int:
    """Add ``<mask>`` to tokenizer and embeddings and keep it out of what the model writes; returns its id.

    The new rows of the input and the output embedding are the means of the old ones.
    """
    old = len(tokenizer)
    if ADDED_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"mask_token": ADDED_TOKEN})
    token_id = int(tokenizer.get_vocab()[ADDED_TOKEN])
    if token_id < old:
        return token_id
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    means = [None if layer is None else layer.weight.detach()[:old].mean(dim=0) for layer in layers]
    # Some checkpoints have spare rows, and then the new id needs no resizing.
    if token_id >= layers[0].weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for layer, mean in zip([model.get_input_embeddings(), model.get_output_embeddings()], means, strict=True):
            if mean is not None:
                layer.weight[token_id] = mean
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.suppress_tokens = [*(model.generation_config.suppress_tokens or []), token_id]
    return token_id


def strip_mask_token(model: Any, token_id: int) -> None:
    """Take the last row, that of the added mask token, out of the embeddings again.

    Raises:
        LuthierError: other tokens stand behind it.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if token_id != rows - 1:
        raise LuthierError(f"masked-thought: the mask token {token_id} is not the last of {rows} rows; it stays.")
    model.resize_token_embeddings(token_id)
    settings = getattr(model, "generation_config", None)
    if settings is not None and settings.suppress_tokens:
        settings.suppress_tokens = [i for i in settings.suppress_tokens if i != token_id] or None
