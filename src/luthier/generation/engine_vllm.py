"""vLLM in this process, where it is installed: the same prompts as token ids, written by its own scheduler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from luthier.core.errors import missing_extra
from luthier.core.protocols import Completion
from luthier.core.store import content_hash
from luthier.generation.base import Prompt, Settings, form

# Prompts between two times that something is given back, and so kept.
PIECE = 1024


class VLLM:
    """vLLM's offline engine.

    Args:
        model: a folder or hub id.
        fingerprint: a hash of its weights.
        options: of ``vllm.LLM``.

    Raises:
        UserError: vLLM is not installed.
    """

    takes: tuple[str, ...] = ("ids", "text")

    def __init__(self, model: str, *, fingerprint: str, **options: Any) -> None:
        try:
            import vllm
        except ImportError:
            raise missing_extra("vllm", "generation: {backend: vllm}", "vllm") from None
        self.fingerprint = content_hash("vllm", fingerprint, options, vllm.__version__)
        self._vllm, self._engine = vllm, vllm.LLM(model=model, **options)

    def write(
        self, prompts: Sequence[Prompt], settings: Settings, *, samples: int = 1
    ) -> Iterator[tuple[int, list[Completion]]]:
        """As :meth:`luthier.generation.base.Writer.write`; each prompt has a seed, from that of the settings."""
        for start in range(0, len(prompts), PIECE):
            part = prompts[start : start + PIECE]
            given = [{"prompt": p} if form(p) == "text" else {"prompt_token_ids": list(p)} for p in part]
            asked = [
                self._vllm.SamplingParams(
                    n=samples,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    top_k=settings.top_k or -1,
                    min_p=settings.min_p,
                    max_tokens=settings.max_new_tokens,
                    stop=list(settings.stop) or None,
                    seed=int(content_hash(settings.seed, prompt)[:15], 16),
                    logprobs=0 if settings.logp else None,
                )
                for prompt in given
            ]
            for index, out in enumerate(self._engine.generate(given, asked, use_tqdm=False)):
                yield start + index, [_completion(o) for o in out.outputs]


def _completion(out: Any) -> Completion:
    logp = [step[token].logprob for step, token in zip(out.logprobs or (), out.token_ids, strict=False)]
    return Completion(out.text, tuple(out.token_ids), out.finish_reason == "stop", tuple(logp))
