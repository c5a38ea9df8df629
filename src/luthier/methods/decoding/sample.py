"""Sampling: draw each token from the model's distribution, sharpened and cut as asked.

    p'(v) ~ p(v)^(1 / temperature), kept on the tokens that pass ``top_k``, ``top_p`` and ``min_p``

``top_k`` keeps the k most likely tokens (0: all); ``top_p`` the smallest set of most likely tokens that holds that much
probability (nucleus sampling, Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020, arXiv 1904.09751);
``min_p`` those at least ``min_p`` times as likely as the most likely one (Nguyen et al., "Turning Up the Heat: Min-p
Sampling", 2024, arXiv 2407.01082). The numbers drawn are those of the run's ``rollout`` stream; the process's own
random state is left as it was. ``min_p`` is applied first, then ``top_k``, then ``top_p``.

Example::

    decoding: {sample: {temperature: 0.7, top_p: 0.95}}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.core.protocols import Completion, Context
from luthier.core.registry import decoder
from luthier.functional.draws import by_prompt
from luthier.functional.writing import Sampling, completions


@decoder("sample")
class Sample:
    """Draw each token from the model's distribution."""

    def __init__(
        self,
        *,
        temperature: Annotated[float, Field(gt=0, description="below 1 sharpens, above 1 flattens")] = 1.0,
        top_p: Annotated[float, Field(gt=0, le=1, description="probability the kept tokens hold; 1 keeps all")] = 1.0,
        top_k: Annotated[int, Field(ge=0, description="number of tokens kept; 0 keeps all")] = 0,
        min_p: Annotated[float, Field(ge=0, le=1, description="least share of the top probability; 0 keeps all")] = 0.0,
        max_new_tokens: Annotated[int, Field(ge=1, description="longest completion, in tokens")] = 256,
        batch_rows: Annotated[int, Field(ge=1, description="prompts completed together")] = 32,
    ) -> None:
        self.sampling = Sampling(temperature, top_p, top_k, min_p)
        self.max_new_tokens, self.batch_rows = max_new_tokens, batch_rows

    def generate(self, model: Any, prompts: Sequence[Sequence[int]], ctx: Context) -> list[Completion]:
        """One completion per prompt of token ids, in order.

        Raises:
            UserError: a prompt has no token.
        """
        seed = int(torch.randint(2**62, (1,), generator=ctx.rng("rollout")))
        uniform_PT = by_prompt(prompts, self.max_new_tokens, seed)
        return completions(
            model,
            prompts,
            ctx,
            batch_rows=self.batch_rows,
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            uniform_PT=uniform_PT,
        )
