"""A transformers model in this process, batched by length with a key-value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from luthier.core.errors import UserError
from luthier.core.protocols import Completion
from luthier.core.rng import stream
from luthier.core.store import content_hash
from luthier.functional.writing import Sampling, completions
from luthier.generation.base import Prompt, Settings, form

# Completions between two times that something is given back, and so kept.
PIECE = 512


class Local:
    """A model in memory.

    Args:
        model: a causal language model.
        processor: its tokenizer.
        fingerprint: a hash of its weights.
        batch_rows: completions written together.
    """

    takes: tuple[str, ...] = ("ids", "text")

    def __init__(self, model: Any, processor: Any, *, fingerprint: str, batch_rows: int = 64) -> None:
        self.model, self.processor, self.batch_rows = model, processor, batch_rows
        self.fingerprint = content_hash("local", fingerprint)

    def write(
        self, prompts: Sequence[Prompt], settings: Settings, *, samples: int = 1
    ) -> Iterator[tuple[int, list[Completion]]]:
        """As :meth:`luthier.generation.base.Writer.write`; a prompt's draws depend on its own tokens and the seed.

        Raises:
            UserError: stop texts are asked for, which end no generation here.
        """
        if settings.stop:
            raise UserError("a model in this process ends at its own stop tokens; stop texts are for servers.")
        ids = [self.processor.encode(p) if form(p) == "text" else [int(i) for i in p] for p in prompts]  # type: ignore[arg-type]
        size = max(1, PIECE // samples)
        ctx: Any = SimpleNamespace(processor=self.processor, device=next(self.model.parameters()).device)
        greedy = settings.temperature == 0
        for start in range(0, len(ids), size):
            part = ids[start : start + size]
            numbers = [
                torch.rand(samples, settings.max_new_tokens, generator=stream(settings.seed, "rollout", tuple(p)))
                for p in (() if greedy else part)
            ]
            found = completions(
                self.model,
                [p for p in part for _ in range(samples)],
                ctx,
                batch_rows=self.batch_rows,
                max_new_tokens=settings.max_new_tokens,
                sampling=None
                if greedy
                else Sampling(settings.temperature, settings.top_p, settings.top_k, settings.min_p),
                uniform_PT=torch.cat(numbers) if numbers else None,
            )
            for i in range(len(part)):
                yield start + i, found[i * samples : (i + 1) * samples]
