"""Writing conditioned on a reward token, for models trained with the procedure of the same name.

    y ~ p(. | "<|good|>" + x)

The token stands before the prompt, behind a beginning-of-text token. ``bad`` asks for what would fail, ``none`` leaves
the prompt as it is. ``temperature: 0`` takes the most likely token at each step.

Paper: "LETI: Learning to Generate from Textual Interactions", Findings of NAACL 2024, arXiv 2305.10314.

Example::

    decoding: {leti: {reward: good, temperature: 0.1}}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.core import registry
from luthier.core.errors import UserError
from luthier.core.protocols import Completion, Context
from luthier.core.registry import decoder
from luthier.functional.execution_feedback import BAD, GOOD

PREFIX = {"good": GOOD, "bad": BAD}


def conditioned(prompt: Sequence[int], token: int, bos: int | None) -> list[int]:
    """The prompt with the token before it, behind a beginning-of-text token."""
    start = 1 if len(prompt) and prompt[0] == bos else 0
    return [*prompt[:start], token, *prompt[start:]]


@decoder("leti", tasks=("causal-lm",))
class RewardConditioned:
    """Write what is conditioned on a reward token standing before the prompt."""

    def __init__(
        self,
        *,
        reward: Annotated[Literal["good", "bad", "none"], Field(description="the token before the prompt")] = "good",
        temperature: Annotated[float, Field(ge=0, description="of sampling; 0 takes the most likely token")] = 0.1,
        top_p: Annotated[float, Field(gt=0, le=1, description="probability the kept tokens hold; 1 keeps all")] = 1.0,
        max_new_tokens: Annotated[int, Field(ge=1, description="longest completion, in tokens")] = 256,
        batch_rows: Annotated[int, Field(ge=1, description="prompts completed together")] = 32,
    ) -> None:
        self.reward = reward
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_rows": batch_rows}
        if temperature:
            options |= {"temperature": temperature, "top_p": top_p}
        self.writer = registry.get("decoding", "sample" if temperature else "greedy").build(options)

    def generate(self, model: Any, prompts: Sequence[Sequence[int]], ctx: Context) -> list[Completion]:
        """One completion per prompt of token ids, in order.

        Raises:
            UserError: the tokenizer has no reward tokens.
        """
        if self.reward == "none":
            return list(self.writer.generate(model, prompts, ctx))
        token = ctx.processor.get_vocab().get(PREFIX[self.reward])
        if token is None:
            raise UserError(
                f"leti: the tokenizer has no token {PREFIX[self.reward]}, so this model was not trained with it. Set "
                "reward: none, or decode a model made by the procedure leti."
            )
        bos = ctx.processor.bos_token_id
        return list(self.writer.generate(model, [conditioned(p, token, bos) for p in prompts], ctx))
