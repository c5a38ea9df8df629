"""Write behind a transformed prompt, and transform what is written back.

    answer(x) = T_inv( model( T(x) ) )

T makes a prompt less like the fine-tuning data while it needs the same skill; a capability that fine-tuning only
suppressed may then come back. ``transform`` is ``leetspeak``, ``pig-latin``, ``rot13``, ``letter-spacing``,
``swap-case``, ``digit-words``, ``{scale: 2}``, ``{wrapper: "... {prompt}"}``, ``{words: {yes: oui}}``,
``{functions: [file.py:apply, file.py:invert]}``, or a list of these, applied in order and undone in reverse. Leetspeak,
pig Latin and a single function have no exact inverse: they need ``answers``, the texts that may come. Special tokens of
the prompt (chat markers) stay as they are. Which transform helps, the analysis of the same name finds out.

Paper: "Understanding Catastrophic Forgetting in Language Models via Implicit Inference", ICLR 2024, arXiv 2309.10105.
Official repository: kothasuhas/understanding-forgetting.

Example::

    decoding: {conjugate-prompting: {transform: rot13}}
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import groupby
from typing import Annotated, Any

from pydantic import Field

from luthier.core import registry
from luthier.core.errors import UserError
from luthier.core.protocols import Completion, Context
from luthier.core.registry import decoder
from luthier.functional.conjugation import conjugation, round_trip_failures, with_answers

logger = logging.getLogger("luthier")
Spec = str | dict[str, Any] | list[str | dict[str, Any]]


@decoder(
    "conjugate-prompting",
    identity={"transform": "identity"},
    tasks=("causal-lm",),
    paper="Understanding Catastrophic Forgetting in Language Models via Implicit Inference, ICLR 2024, arXiv "
    "2309.10105",
)
class ConjugatePrompting:
    """Write behind a transformed prompt and transform the answer back, to reach what fine-tuning only suppressed."""

    def __init__(
        self,
        *,
        transform: Annotated[Spec, Field(description="the transform of prompts, or a list applied in order")] = "rot13",
        answers: Annotated[
            list[str] | None, Field(min_length=1, description="texts that may come, for transforms without an inverse")
        ] = None,
        temperature: Annotated[float, Field(ge=0, description="of sampling; 0 takes the most likely token")] = 0.0,
        max_new_tokens: Annotated[int, Field(ge=1, description="longest completion, in tokens")] = 256,
        batch_rows: Annotated[int, Field(ge=1, description="prompts completed together")] = 32,
    ) -> None:
        made = conjugation(transform)
        if made.kind == "verbatim":
            if answers is None:
                raise UserError(
                    f"conjugate-prompting: {made.name} has no exact inverse; name the texts that may come in answers, "
                    "or choose an invertible transform."
                )
            try:
                made = with_answers(made, answers)
            except ValueError as error:
                raise UserError(f"conjugate-prompting: answers: {error}.") from None
        self.conjugation = made
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_rows": batch_rows}
        if temperature:
            options["temperature"] = temperature
        self.writer = registry.get("decoding", "sample" if temperature else "greedy").build(options)

    def generate(self, model: Any, prompts: Sequence[Sequence[int]], ctx: Context) -> list[Completion]:
        """One completion per prompt of token ids, in order; transformed back, its text has no tokens of its own.

        Raises:
            UserError: the tokenizer has no tokens for a transformed prompt.
        """
        if self.conjugation.name == "identity":
            return list(self.writer.generate(model, prompts, ctx))
        given = [self._transformed(prompt, ctx.processor) for prompt in prompts]
        written = self.writer.generate(model, given, ctx)
        return [Completion(self.conjugation.invert(c.text), (), c.finished) for c in written]

    def _transformed(self, prompt: Sequence[int], tokenizer: Any) -> list[int]:
        special, made = set(tokenizer.all_special_ids), []
        for marker, group in groupby(prompt, lambda token: token in special):
            ids = list(group)
            if not marker:
                text = tokenizer.decode(ids)
                if round_trip_failures(self.conjugation, [text]):
                    logger.warning("conjugate-prompting: %s does not give back %r", self.conjugation.name, text[:80])
                new = self.conjugation.apply(text)
                ids = list(tokenizer.encode(new, add_special_tokens=False))
                if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
                    raise UserError(
                        f"conjugate-prompting: the tokenizer does not know all of {new[:60]!r}, which "
                        f"{self.conjugation.name} made. Choose a transform whose letters its vocabulary has."
                    )
            made += ids
        return made
