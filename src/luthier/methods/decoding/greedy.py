"""Greedy decoding: write the most likely token at each step.

    y_t = argmax_v p(v | prompt, y_<t)

Prompts are grouped by length and padded on the left with an attention mask. Generation ends at a stop token of the
tokenizer or of the model, after ``max_new_tokens``, or where the model's context is full. The model's own sampling
settings (``generation_config``: temperature, penalties, ...) are not used.

Example::

    decoding: greedy
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Completion, Context
from luthier.core.registry import decoder
from luthier.functional import sequences


@decoder("greedy")
class Greedy:
    """Write the most likely token at each step."""

    def __init__(
        self,
        *,
        max_new_tokens: Annotated[int, Field(ge=1, description="longest completion, in tokens")] = 256,
        batch_rows: Annotated[int, Field(ge=1, description="prompts completed together")] = 32,
    ) -> None:
        self.max_new_tokens, self.batch_rows = max_new_tokens, batch_rows

    def generate(self, model: Any, prompts: Sequence[Sequence[int]], ctx: Context) -> list[Completion]:
        """One completion per prompt of token ids, in order.

        Raises:
            UserError: a prompt has no token.
        """
        if empty := [index for index, prompt in enumerate(prompts) if not len(prompt)]:
            raise UserError(f"prompt {empty[0] + 1} has no token; give at least a beginning-of-text token.")
        from transformers import GenerationConfig

        tokenizer = ctx.processor
        stop = sequences.stop_tokens(tokenizer.eos_token_id, model.generation_config.eos_token_id)
        pad_id = next((i for i in (tokenizer.pad_token_id, *stop) if i is not None), 0)

        def write(ids_BT: torch.Tensor, mask_BT: torch.Tensor, most: int) -> torch.Tensor:
            settings = GenerationConfig(
                **sequences.NEUTRAL,
                do_sample=False,
                max_new_tokens=most,
                eos_token_id=stop or None,
                pad_token_id=pad_id,
            )
            whole_BT = model.generate(
                input_ids=ids_BT.to(ctx.device), attention_mask=mask_BT.to(ctx.device), generation_config=settings
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
                    batch_rows=self.batch_rows,
                    max_new_tokens=self.max_new_tokens,
                    context=getattr(model.config.get_text_config(), "max_position_embeddings", None),
                )
        finally:
            if training:
                model.train()
        return [
            Completion(text=tokenizer.decode(ids, skip_special_tokens=True), token_ids=ids, finished=finished)
            for ids, finished in written
        ]
