"""Supervised in-context learning: every training prompt begins with m solved examples, drawn from the other rows.

    x_i  ->  template(e_1 .. e_m, x_i),     e_j drawn without replacement from the training rows, never row i itself

The loss is that of the query's answer alone, as before; with ``m: 0`` the rows are plain SFT's. The draw of a row is a
function of the seed and of the row. ``draws`` makes several rows of each, with other examples: train ``draws`` times
fewer epochs to have examples drawn anew for each epoch. Examples that do not fit into ``max_prompt_tokens`` are dropped
whole; the query never is. Answers are then written by the decoder of the same name, and compared by its analysis.

Paper: "On Task Performance and Model Calibration with Supervised and Self-Ensembled In-Context Learning", 2023, arXiv
2312.13772. Official repository: cambridgeltl/ensembled-sicl.

Example::

    data:
      train: rows.jsonl
      stages: [{calibration-self-ensemble: {m: 3}}]
"""

from __future__ import annotations

import json
import logging
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.registry import data_stage
from luthier.core.store import content_hash
from luthier.functional.in_context import QUERY, Template, drawn, example_of, fitted
from luthier.functional.target_rewriting import asked, gold_of, question_of

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("luthier")
SLUG = "calibration-self-ensemble"


@data_stage(
    "calibration-self-ensemble",
    identity={"m": 0},
    example={"m": 2},
    tasks=("causal-lm",),
    paper="On Task Performance and Model Calibration with Supervised and Self-Ensembled In-Context Learning, 2023, "
    "arXiv 2312.13772",
)
class SupervisedInContext:
    """Supervised in-context learning: training prompts begin with solved examples from the other rows."""

    def __init__(
        self,
        *,
        m: Annotated[int, Field(ge=0, description="examples in each prompt")] = 3,
        overall: Annotated[str, Field(description="the prompt, with the slots {examples} and {input}")] = (
            "{examples}{input}"
        ),
        example: Annotated[str, Field(description="an example, with the slots {input} and {label}")] = "{input}{label}",
        separator: Annotated[str, Field(description="behind each example")] = "\n\n",
        draws: Annotated[int, Field(ge=1, description="rows made of each row, with examples of their own")] = 1,
        max_prompt_tokens: Annotated[
            int | None, Field(ge=1, description="longest prompt; examples that do not fit are dropped")
        ] = None,
    ) -> None:
        try:
            self.template = Template(overall, example, separator)
        except ValueError as error:
            raise UserError(f"{SLUG}: {error}.") from None
        self.m, self.draws, self.max_prompt_tokens = m, draws, max_prompt_tokens

    def run(self, dataset: Dataset, ctx: Any) -> Dataset:
        """The rows with examples before their questions; what they asked by themselves stands in ``extra``.

        Raises:
            UserError: a row has no prompt with one answer, or there are too few other rows.
        """
        from datasets import Dataset as Rows

        rows = list(dataset)
        for row in rows:
            gold_of(row)
        pool = [example_of(row) for row in rows]
        made, dropped = [], 0
        for row, own in zip(rows, pool, strict=True):
            for draw in range(self.draws):
                try:
                    chosen = drawn(pool, self.m, own, ctx.seed, draw)
                except ValueError as error:
                    raise UserError(f"{SLUG}: {error}; give more rows, or a smaller m.") from None
                fits = partial(self._fits, row=row, ctx=ctx)
                text, lost = fitted(self.template, chosen, question_of(row), fits)
                dropped += lost
                made.append(self._row(row, text, draw))
        ctx.report({"rows": len(made), "examples": self.m, "dropped_examples": dropped})
        logger.info("%s: %d prompts with %d examples each; %d dropped for length", SLUG, len(made), self.m, dropped)
        return Rows.from_list(made, features=dataset.features)

    def _fits(self, text: str, row: Any, ctx: Any) -> bool:
        most = self.max_prompt_tokens
        return most is None or len(ctx.renderer.prompt_ids(asked(row, text))) <= most

    def _row(self, row: dict[str, Any], text: str, draw: int) -> dict[str, Any]:
        if text == question_of(row) and not draw:
            return row
        extra = {**json.loads(row["extra"] or "{}"), QUERY: question_of(row)}
        new = {**asked(row, text), "extra": json.dumps(extra, ensure_ascii=False)}
        return {**new, "key": content_hash(row["key"], text, draw)}
