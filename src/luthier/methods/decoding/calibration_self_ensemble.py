"""Choose one of K labels by an ensemble of one model over prompt variations, for calibrated confidences.

    q = aggregate_e softmax_c score(label_c | template_e(examples_e, x))         answer: the likeliest label

The E variations are ``draws`` sets of m examples from ``examples`` (Var-IC), the ``templates`` (Var-Prompt), or their
product. ``score``: ``first_token`` is the logit of the label's first token (released code, for causal models),
``mean_logit`` the mean of its tokens' logits, ``sum_logprob`` and ``mean_logprob`` (default) the log-probabilities of
the label fed behind the prompt. ``rule``: ``max_prob`` (best calibrated in the paper), ``mean_prob``, or
``majority_vote`` weighted by confidence. Probabilities are aggregated, never logits. The answer is always a label;
``probabilities`` [N, K] of the last call are kept beside it, and log q of the answer is the completion's ``logp``.

Paper: "On Task Performance and Model Calibration with Supervised and Self-Ensembled In-Context Learning", 2023, arXiv
2312.13772. Official repository: cambridgeltl/ensembled-sicl.

Example::

    decoding:
      calibration-self-ensemble: {labels: [food, room, staff], examples: train.jsonl, m: 3, draws: 20}
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Completion, Context
from luthier.core.registry import decoder
from luthier.functional.class_ensembles import Rule, aggregate, softmax
from luthier.functional.in_context import (
    Example,
    Score,
    check_labels,
    class_scores,
    fitted,
    templates_of,
    variations,
)

logger = logging.getLogger("luthier")
SLUG = "calibration-self-ensemble"


def read_examples(file: str) -> list[Example]:
    """Solved examples from lines of JSON with ``prompt`` and ``completion``.

    Raises:
        UserError: no such file, or a line without these two texts.
    """
    if not Path(file).is_file():
        raise UserError(f"{SLUG}: examples: no file {file}.")
    found = []
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            found.append(Example(row["prompt"], row["completion"]))
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{SLUG}: an example is a JSON object with prompt and completion.", where=f"{file}, line {number}"
            ) from None
    return found


@decoder(
    "calibration-self-ensemble",
    example={"labels": ["a", "b"], "m": 0},
    tasks=("causal-lm",),
    paper="On Task Performance and Model Calibration with Supervised and Self-Ensembled In-Context Learning, 2023, "
    "arXiv 2312.13772",
)
class SelfEnsemble:
    """Choose one of K labels by an ensemble of one model over prompts with other examples and wordings."""

    def __init__(
        self,
        *,
        labels: Annotated[list[str], Field(min_length=2, description="the texts to choose from, as they were trained")],
        examples: Annotated[
            str | None, Field(description="file of solved examples: lines of JSON with prompt and completion")
        ] = None,
        m: Annotated[int, Field(ge=0, description="examples in each prompt")] = 3,
        draws: Annotated[int, Field(ge=1, description="sets of examples drawn for each prompt (the paper's E)")] = 20,
        templates: Annotated[
            list[str] | None, Field(min_length=1, description="prompts with the slots {examples} and {input}")
        ] = None,
        example: Annotated[str, Field(description="an example, with the slots {input} and {label}")] = "{input}{label}",
        separator: Annotated[str, Field(description="behind each example")] = "\n\n",
        score: Annotated[Score, Field(description="what a label's score is")] = "mean_logprob",
        rule: Annotated[Rule, Field(description="how the variations are aggregated")] = "max_prob",
        weighted: Annotated[bool, Field(description="majority_vote: votes count their confidence")] = True,
        min_votes: Annotated[
            float, Field(ge=0, description="majority_vote: with fewer votes for the winner, all variations count")
        ] = 0.0,
        seed: Annotated[int, Field(ge=0, description="another draw of the examples")] = 0,
        batch_rows: Annotated[int, Field(ge=1, description="prompts that run together")] = 32,
    ) -> None:
        if m and examples is None:
            raise UserError(f"{SLUG}: name a file of examples, or set m: 0 for prompts without.")
        try:
            self.templates = templates_of(templates or ["{examples}{input}"], example, separator)
        except ValueError as error:
            raise UserError(f"{SLUG}: {error}.") from None
        self.labels, self.score, self.rule, self.weighted, self.min_votes = labels, score, rule, weighted, min_votes
        self.pool = read_examples(examples) if examples is not None and m else []
        self.m, self.draws, self.seed, self.batch_rows = m, draws, seed, batch_rows
        self.probabilities: np.ndarray | None = None
        self.dropped = 0

    def generate(self, model: Any, prompts: Sequence[Sequence[int]], ctx: Context) -> list[Completion]:
        """One label per prompt of token ids, in order.

        Raises:
            UserError: labels that cannot be told apart, too few examples, or a prompt with chat markers inside.
        """
        tokenizer = ctx.processor
        tokens = [tokenizer.encode(name, add_special_tokens=False) for name in self.labels]
        try:
            check_labels(self.labels, tokens, self.score)
        except ValueError as error:
            raise UserError(f"{SLUG}: {error}.") from None
        room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        rows: list[list[int]] = []
        self.dropped = 0
        for number, prompt in enumerate(prompts):
            start, query = _plain(prompt, tokenizer, number)
            most = None if room is None else room - len(start) - max(map(len, tokens))
            rows += [start + ids for ids in self._prompts(query, tokenizer, most)]
        logits = class_scores(
            model, rows, tokens, score=self.score, batch_rows=self.batch_rows, pad_id=tokenizer.pad_token_id or 0,
            device=ctx.device,
        )  # fmt: skip
        if not prompts:
            return []
        p_ENK = softmax(logits).reshape(len(prompts), -1, len(self.labels)).swapaxes(0, 1)
        q_NK, best_N = aggregate(p_ENK, self.rule, weighted=self.weighted, min_votes=self.min_votes)
        self.probabilities = q_NK
        if self.dropped:
            logger.warning("%s: %d examples did not fit into the model's context and were dropped", SLUG, self.dropped)
        return [
            Completion(self.labels[k], (), True, (float(np.log(max(q_NK[i, k], 1e-12))),))
            for i, k in enumerate(best_N.tolist())
        ]

    def _prompts(self, query: str, tokenizer: Any, most: int | None) -> list[list[int]]:
        def ids(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False))

        try:
            chosen = variations(self.pool, query, self.templates, self.m, self.draws, self.seed)
        except ValueError as error:
            raise UserError(f"{SLUG}: {error}; give more examples, or a smaller m.") from None
        found = []
        for template, examples in chosen:
            text, lost = fitted(template, examples, query, lambda t: most is None or len(ids(t)) <= most)
            self.dropped += lost
            found.append(ids(text))
        return found


def _plain(prompt: Sequence[int], tokenizer: Any, number: int) -> tuple[list[int], str]:
    """The special tokens at the start of a prompt, and its text."""
    special = set(tokenizer.all_special_ids)
    start = next((i for i, token in enumerate(prompt) if token not in special), len(prompt))
    if special & set(prompt[start:]):
        raise UserError(
            f"{SLUG}: prompt {number + 1} has special tokens inside its text. Examples stand before plain prompts; set "
            "data.template: plain, or use the analysis of the same name, which renders conversations."
        )
    return list(prompt[:start]), tokenizer.decode(list(prompt[start:]))
