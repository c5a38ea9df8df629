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

from pydantic import Field

from luthier.core.protocols import Completion, Context
from luthier.core.registry import decoder
from luthier.functional.writing import completions


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
        return completions(model, prompts, ctx, batch_rows=self.batch_rows, max_new_tokens=self.max_new_tokens)
