"""Negatives for discriminative fine-tuning: answers that the base model itself gives to the training prompts.

For each prompt x the base P0 writes m answers y'_1 .. y'_m; they are kept, in order, in the column ``negatives`` (a
list of texts), which the objective of the same name reads. Each epoch takes ``samples_per_prompt`` further ones, so

    samples >= samples_per_prompt * epochs

is needed unless the objective's ``resample_per_epoch`` is off. For chat rows a system message that asks for unhelpful
answers stands before the prompt while sampling, and only then; raw pairs are sampled from the plain prompt. End tokens
and leading white space are stripped; an empty answer is a negative too. Answers equal to the given one are left out
(``drop_equal``; the released code keeps them), and a prompt that then has fewer than m goes through those it has again.

Paper: "Discriminative Finetuning of Generative Large Language Models without Reward Models and Preference Data", ICML
2025, arXiv 2502.18679. Official repository: PenGuln/DFT.

Example::

    data:
      stages:
        - discriminative-ft: {samples: 4}
    objective: discriminative-ft
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.registry import data_stage
from luthier.functional.discriminative import as_answer, given_answer, place, with_answer

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("luthier")

COLUMN = "negatives"
UNHELPFUL = "You are an unhelpful assistant."
BATCH_ROWS = 1000


@data_stage(
    "discriminative-ft",
    example={"samples": 2, "max_new_tokens": 8},
    tasks=("causal-lm",),
    paper="Discriminative Finetuning of Generative Large Language Models without Reward Models and Preference Data, "
    "ICML 2025, arXiv 2502.18679",
)
class SampleNegatives:
    """Let the base model answer every training prompt; its answers are the negatives of the objective."""

    def __init__(
        self,
        *,
        samples: Annotated[int, Field(ge=1, description="answers per prompt: samples_per_prompt times epochs")] = 4,
        temperature: Annotated[float, Field(gt=0, description="of sampling")] = 0.7,
        top_p: Annotated[float, Field(gt=0, le=1, description="probability the kept tokens hold; 1 keeps all")] = 1.0,
        top_k: Annotated[int, Field(ge=0, description="number of tokens kept; 0 keeps all")] = 50,
        max_new_tokens: Annotated[int, Field(ge=1, description="longest negative, in tokens")] = 320,
        batch_rows: Annotated[int, Field(ge=1, description="prompts completed together")] = 32,
        system: Annotated[
            str | None, Field(min_length=1, description="chat rows: system message while sampling; null for none")
        ] = UNHELPFUL,
        drop_equal: Annotated[bool, Field(description="leave out answers equal to the given one")] = True,
        no_negative: Annotated[
            Literal["error", "drop"], Field(description="a prompt of which no answer is left: stop, or drop the row")
        ] = "error",
    ) -> None:
        self.samples, self.system, self.drop_equal, self.no_negative = samples, system, drop_equal, no_negative
        self.sampling = {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "max_new_tokens": max_new_tokens,
            "batch_rows": batch_rows,
        }

    def run(self, dataset: Dataset, ctx: Any) -> Dataset:
        """The rows with their negatives in ``extra``.

        Raises:
            UserError: a row has no prompt with one answer, has negatives already, or no negative is left for it.
        """
        given: list[str] = []
        prompts: list[list[int]] = []
        for row in _rows(dataset):
            given.append(given_answer(row))
            if COLUMN in json.loads(row["extra"] or "{}"):
                raise UserError(
                    f"the row has a column '{COLUMN}' already; remove the data stage, or that column.", where=place(row)
                )
            prompts.append(ctx.renderer.prompt_ids(self.asked(row, ctx.renderer)))
        logger.info("discriminative-ft: sampling %d answers to each of %d prompts", self.samples, len(prompts))
        # Whatever decoder the recipe evaluates with: negatives are samples.
        sampled = ctx.generate(prompts, samples=self.samples, decoding="sample", **self.sampling)

        kept: list[int] = []
        extra: list[str] = []
        equal = short = 0
        for index, row in enumerate(_rows(dataset)):
            found = [as_answer(c.text, given[index]) for c in sampled[index]]
            if self.drop_equal:
                other = [text for text in found if text.strip() != given[index].strip()]
                equal += len(found) - len(other)
                short += len(other) < len(found)
                found = other
            if found:
                found = _within(row, found, ctx)
                repeated = [found[i % len(found)] for i in range(self.samples)]
                kept.append(index)
                extra.append(json.dumps({**json.loads(row["extra"] or "{}"), COLUMN: repeated}, ensure_ascii=False))
            elif self.no_negative == "error":
                raise UserError(
                    f"no negative available for this prompt: all {self.samples} answers of the base equal the given "
                    "one. Set no_negative: drop to leave such rows out, drop_equal: false to keep equal answers, or "
                    "raise samples or temperature.",
                    where=place(row),
                )
        logger.info(
            "discriminative-ft: %d of %d answers equal the given one; %d prompts have fewer than %d negatives, %d rows "
            "without any were dropped",
            *(equal, self.samples * len(prompts), short, self.samples, len(prompts) - len(kept)),
        )
        names = dataset.column_names
        chosen = dataset if len(kept) == len(dataset) else dataset.select(kept)
        return chosen.remove_columns("extra").add_column("extra", extra).select_columns(names)

    def asked(self, row: dict[str, Any], renderer: Any) -> dict[str, Any]:
        """The row as it is sampled from: chat rows with the system message of the negatives."""
        if self.system is None or (renderer.chat is None and not row.get("messages")):
            return row
        if row["kind"] == "chat":
            messages = json.loads(row["messages"])
            rest = messages[1:] if messages[0]["role"] == "system" else messages
            row = {**row, "messages": json.dumps([{"role": "system", "content": self.system}, *rest])}
        return {**row, "system": self.system}


def _rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    for table in dataset.with_format("arrow").iter(BATCH_ROWS):
        yield from table.to_pylist()


def _within(row: dict[str, Any], texts: Sequence[str], ctx: Any) -> list[str]:
    """The texts cut from the right where prompt and text together are longer than a row may be."""
    found = list(texts)
    rendered = ctx.renderer.render_batch([with_answer(row, text) for text in found])
    for i, over in enumerate(r.over for r in rendered):
        # A text may fall into more tokens once it is cut, so the cut is repeated until it fits.
        while over > 0 and found[i]:
            ids = ctx.processor(found[i], add_special_tokens=False)["input_ids"]
            found[i] = ctx.processor.decode(ids[: max(len(ids) - over, 0)])
            over = ctx.renderer.render_batch([with_answer(row, found[i])])[0].over
    return found
