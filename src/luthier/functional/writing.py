"""Completions by transformers' own generation: batched by length, with key-value cache and log-probabilities.

Which token is next is chosen here, from numbers that are given for each prompt: what is written for a prompt then does
not depend on what it is batched with (up to rounding), nor on the process's own random state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from luthier.core.errors import UserError
from luthier.core.protocols import Completion, Context
from luthier.functional import sequences
from luthier.functional.adapters import virtual_tokens
from luthier.functional.draws import draw


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; a ``min_p`` is applied first, then ``top_k``, then ``top_p``, all after the temperature.

    Attributes:
        temperature: below 1 sharpens, above 1 flattens.
        top_p: probability that the kept tokens hold; 1 keeps all.
        top_k: number of tokens kept; 0 keeps all.
        min_p: least share of the top probability; 0 keeps all.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


class Chooser:
    """Chooses the next token of every row and notes its log-probability; a logits processor of transformers.

    Args:
        sampling: None takes the most likely token.
        uniform_BT: numbers in [0, 1), one for each token a row may get.
    """

    def __init__(self, sampling: Sampling | None, uniform_BT: torch.Tensor | None) -> None:
        self.sampling, self.uniform_BT = sampling, uniform_BT
        self.logp: list[torch.Tensor] = []

    def __call__(self, ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        """Logits of which the largest is the chosen token's."""
        logits_BV = logits_BV.float()
        if self.sampling is None:
            token_B1 = logits_BV.argmax(-1, keepdim=True)
            self.logp.append(logits_BV.gather(1, token_B1) - logits_BV.logsumexp(-1, keepdim=True))
            return logits_BV
        how = self.sampling
        assert self.uniform_BT is not None
        kept_BV = logits_BV
        if how.min_p > 0:
            least_B1 = logits_BV.amax(-1, keepdim=True) + how.temperature * math.log(how.min_p)
            kept_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
        token_B1 = draw(
            kept_BV,
            self.uniform_BT[:, len(self.logp), None].to(logits_BV.device),
            logits_BV.new_zeros(len(logits_BV), dtype=torch.long),
            how.temperature,
            top_k=how.top_k or None,
            top_p=how.top_p if how.top_p < 1 else None,
        )[0][:, :1]
        scaled_BV = logits_BV / how.temperature if how.temperature != 1 else logits_BV
        self.logp.append(scaled_BV.gather(1, token_B1) - scaled_BV.logsumexp(-1, keepdim=True))
        return torch.full_like(logits_BV, -torch.inf).scatter_(1, token_B1, 0.0)


def completions(
    model: Any,
    prompts: Sequence[Sequence[int]],
    ctx: Context,
    *,
    batch_rows: int,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    uniform_PT: torch.Tensor | None = None,
) -> list[Completion]:
    """One completion per prompt of token ids, in order; the model's own sampling settings are not used.

    Args:
        model: a causal language model; it writes in evaluation mode and is put back into the mode it was in.
        prompts: token ids, at least one each.
        ctx: gives the tokenizer and the device.
        batch_rows: prompts completed together.
        max_new_tokens: longest completion.
        sampling: None takes the most likely token at each step.
        uniform_PT: numbers in [0, 1) [prompts, max_new_tokens] that decide what is drawn.

    Raises:
        UserError: a prompt has no token.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    if empty := [index for index, prompt in enumerate(prompts) if not len(prompt)]:
        raise UserError(f"prompt {empty[0] + 1} has no token; give at least a beginning-of-text token.")
    tokenizer = ctx.processor
    stop = sequences.stop_tokens(tokenizer.eos_token_id, model.generation_config.eos_token_id)
    pad_id = next((i for i in (tokenizer.pad_token_id, *stop) if i is not None), 0)
    logp: dict[int, list[float]] = {}

    def write(ids_BT: torch.Tensor, mask_BT: torch.Tensor, most: int, index: list[int]) -> torch.Tensor:
        ends = {"max_new_tokens": most, "eos_token_id": stop or None, "pad_token_id": pad_id}
        chooser = Chooser(sampling, None if uniform_PT is None else uniform_PT[index])
        whole_BT = model.generate(
            input_ids=ids_BT.to(ctx.device),
            attention_mask=mask_BT.to(ctx.device),
            generation_config=GenerationConfig(**sequences.NEUTRAL, do_sample=False, **ends),
            logits_processor=LogitsProcessorList([chooser]),
        )
        logp.update(zip(index, torch.cat(chooser.logp, 1).tolist(), strict=True))
        return whole_BT[:, ids_BT.shape[1] :]

    training = model.training
    # peft puts them in front of the padding, and gives a prompt other positions than it had in training.
    ahead = virtual_tokens(model)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
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
                context=positions and positions - ahead,
                equal=ahead > 0,
            )
    finally:
        model.train(training)
    return [
        Completion(
            text=tokenizer.decode(ids, skip_special_tokens=True),
            token_ids=ids,
            finished=finished,
            token_logp=tuple(logp.get(index, ())[: len(ids)]),
        )
        for index, (ids, finished) in enumerate(written)
    ]
