"""Completions for data stages and procedures by the back-end that the recipe names, in place of the base model here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.core.errors import UserError
from luthier.core.protocols import Completion
from luthier.generation import Settings, kept, open_writer

DECODERS = ("greedy", "sample")
_SETTINGS = ("temperature", "top_p", "top_k", "min_p", "max_new_tokens")


def settings_of(decoder: str, options: Mapping[str, Any], seed: int) -> Settings:
    """The settings of a decoder that any back-end has.

    Raises:
        UserError: the decoder is one that only a model in this process can run.
    """
    if decoder not in DECODERS:
        raise UserError(
            f"generation: a back-end outside of this process writes by {' or '.join(DECODERS)}, not by '{decoder}'. "
            "Choose one of these, or remove the key 'generation'."
        )
    given = {name: options[name] for name in _SETTINGS if name in options}
    return Settings(**{**given, **({"temperature": 0.0} if decoder == "greedy" else {})}, seed=seed)


def prompt_of(renderer: Any, prompt: Any, takes: Sequence[str]) -> Any:
    """A prompt in the form that a back-end takes: conversations where it knows them, else what training begins with."""
    if not isinstance(prompt, dict):
        return [int(i) for i in prompt]
    if "messages" in takes and renderer.chat is not None:
        messages, _ = renderer.messages_of(prompt, "messages")
        return messages[:-1] if messages[-1]["role"] == "assistant" else messages
    return renderer.prompt_ids(prompt)


def write(
    shop: Any, prompts: Sequence[Any], *, samples: int, decoding: str | None = None, **options: Any
) -> list[list[Completion]]:
    """Completions of canonical rows or token ids by the recipe's decoder or the one named, kept by content."""
    chosen = shop.plan.decoding
    settings = settings_of(decoding or chosen.slug, options if decoding else {**chosen.options, **options}, shop.seed)
    spec = dict(shop.plan.recipe.generation)
    if "vllm" in spec:
        spec["vllm"] = {"model": shop.loaded.folder, **(spec["vllm"] or {})}
    writer = open_writer(spec, fingerprint=shop.loaded.fingerprint)
    asked = [prompt_of(shop.data.renderer, p, writer.takes) for p in prompts]
    return kept(writer, asked, settings, samples=samples)
