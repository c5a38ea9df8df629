"""Completions by transformers' own generation: what the decoders that only choose its settings share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from luthier.core.errors import UserError
from luthier.core.protocols import Completion, Context
from luthier.functional import sequences


def completions(
    model: Any,
    prompts: Sequence[Sequence[int]],
    ctx: Context,
    *,
    batch_rows: int,
    max_new_tokens: int,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    **settings: Any,
) -> list[Completion]:
    """One completion per prompt of token ids, in order; the model's own sampling settings are not used.

    Args:
        model: a causal language model.
        prompts: token ids, at least one each.
        ctx: gives the tokenizer and the device.
        batch_rows: prompts completed together.
        max_new_tokens: longest completion.
        around: entered around the generation of each group.
        settings: of transformers' ``GenerationConfig``.

    Raises:
        UserError: a prompt has no token.
    """
    from transformers import GenerationConfig

    if empty := [index for index, prompt in enumerate(prompts) if not len(prompt)]:
        raise UserError(f"prompt {empty[0] + 1} has no token; give at least a beginning-of-text token.")
    tokenizer = ctx.processor
    stop = sequences.stop_tokens(tokenizer.eos_token_id, model.generation_config.eos_token_id)
    pad_id = next((i for i in (tokenizer.pad_token_id, *stop) if i is not None), 0)

    def write(ids_BT: torch.Tensor, mask_BT: torch.Tensor, most: int) -> torch.Tensor:
        ends = {"max_new_tokens": most, "eos_token_id": stop or None, "pad_token_id": pad_id}
        config = GenerationConfig(**sequences.NEUTRAL, **settings, **ends)
        with around():
            whole_BT = model.generate(
                input_ids=ids_BT.to(ctx.device), attention_mask=mask_BT.to(ctx.device), generation_config=config
            )
        return whole_BT[:, ids_BT.shape[1] :]

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            written = sequences.complete(
                write,
                prompts,
                stop=stop,
                pad_id=pad_id,
                batch_rows=batch_rows,
                max_new_tokens=max_new_tokens,
                context=getattr(model.config.get_text_config(), "max_position_embeddings", None),
            )
    finally:
        model.train(training)
    return [
        Completion(text=tokenizer.decode(ids, skip_special_tokens=True), token_ids=ids, finished=finished)
        for ids, finished in written
    ]
