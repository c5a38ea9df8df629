"""Special tokens that a model does not have yet: added to tokenizer and embeddings, and never written by the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def add_tokens(
    model: Any, tokenizer: Any, names: Sequence[str], generator: torch.Generator | None = None, *, noise: float = 0.02
) -> list[int]:
    """Add special tokens; their ids.

    New rows of the input and the output embedding are the mean of the old ones. Several of them would be the same, so
    with a generator each gets normal noise of ``noise`` times the old rows' standard deviation. Spare rows that some
    checkpoints have are used before the embeddings grow. Tokens the tokenizer has already are left as they are.
    """
    old = len(tokenizer)
    fresh = [name for name in names if name not in tokenizer.get_vocab()]
    if fresh:
        tokenizer.add_tokens(fresh, special_tokens=True)
    ids = [int(tokenizer.get_vocab()[name]) for name in names]
    new = [i for i in ids if i >= old]
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    kept = [None if layer is None else layer.weight.detach()[:old].clone() for layer in layers]
    if new and max(new) >= layers[0].weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for layer, old_VH in zip([model.get_input_embeddings(), model.get_output_embeddings()], kept, strict=True):
            if old_VH is None or not new:
                continue
            rows = old_VH.mean(0).expand(len(new), -1).clone()
            if generator is not None:
                drawn = torch.randn(rows.shape, generator=generator).to(rows)
                rows += noise * old_VH.std() * drawn
            layer.weight[new] = rows
    settings = getattr(model, "generation_config", None)
    if settings is not None and new:
        settings.suppress_tokens = sorted({*(settings.suppress_tokens or []), *new})
    return ids
