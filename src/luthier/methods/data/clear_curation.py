"""Keep the rows whose answer the model itself is confident of: the filter of CLEAR.

    c_i = beta O(x_i, y_i) + (1 - beta) S(x_i, y_i)          keep i where c_i >= gamma

The untouched base answers every prompt k times; O says how consistent the GIVEN answer is with these, S what the base
says of it when asked (see :mod:`luthier.functional.confidence`). gamma is the median unless ``least`` or
``keep_fraction`` is set; rows equal to it stay. ``least: 0`` keeps everything and is plain SFT. A base that cannot
answer questions about an answer is used with ``beta: 1``, which does not ask it.

Every row with its numbers, its samples and its decision stands in ``data/clear-curation/scores.jsonl`` of the run,
least confident first; the report beside it has the histogram and the controls, which are also logged: all rows, and as
many drawn at random. ``arm`` trains on a control instead. The procedure of the same name also corrects answers.

Paper: "Automated Data Curation for Robust Language Model Fine-Tuning", ACL 2024, arXiv 2403.12776. It has no code.

Example::

    data:
      train: rows.jsonl
      stages:
        - clear-curation: {samples: 5, beta: 1.0}
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.registry import data_stage
from luthier.core.rng import numpy_stream
from luthier.functional import confidence as sure
from luthier.functional import score_table as tables
from luthier.functional.confidence import Confidence, Reflection, Similarity
from luthier.functional.discriminative import given_answer

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("luthier")

SLUG = "clear-curation"
Arm = Literal["filter", "random", "likelihood", "all"]
ARMS = {"filter": "kept", "random": "random of equal size", "likelihood": "likeliest of equal size", "all": "all"}


@data_stage(
    "clear-curation",
    example={"samples": 2, "beta": 1.0, "max_new_tokens": 8},
    tasks=("causal-lm",),
    paper="Automated Data Curation for Robust Language Model Fine-Tuning, ACL 2024, arXiv 2403.12776",
)
class ConfidenceFilter:
    """Keep the rows whose answer the base itself is confident of, by its own answers and by asking it."""

    def __init__(
        self,
        *,
        samples: Annotated[int, Field(ge=1, description="k, answers of the base to each prompt")] = 5,
        temperature: Annotated[float, Field(gt=0, description="of sampling them")] = 1.0,
        similarity: Annotated[
            Similarity, Field(description="of two answers: jaccard (words), json, numeric, positions or exact")
        ] = "jaccard",
        alpha: Annotated[float, Field(ge=0, le=1, description="share of similarity against equality in O")] = 0.8,
        beta: Annotated[
            float, Field(ge=0, le=1, description="share of O against what the base says; 1 does not ask")
        ] = (0.7),
        reflection: Annotated[
            Reflection,
            Field(description="ask the base and read what it writes, twice, or compare the options' likelihood"),
        ] = "ask",
        least: Annotated[float | None, Field(ge=0, le=1, description="gamma; null is the median")] = None,
        keep_fraction: Annotated[
            float | None, Field(gt=0, le=1, description="share of rows kept, instead of gamma")
        ] = (None),
        arm: Annotated[
            Arm, Field(description="filter, or a control: random rows, the likeliest answers, or all")
        ] = "filter",
        max_new_tokens: Annotated[int, Field(ge=1, description="longest sample, in tokens")] = 128,
        batch_rows: Annotated[int, Field(ge=1, description="prompts completed together")] = 32,
    ) -> None:
        if least is not None and keep_fraction is not None:
            raise UserError(f"{SLUG}: least and keep_fraction both say how much stays; set one of them to null.")
        sampling = {"temperature": temperature, "max_new_tokens": max_new_tokens}
        self.how = Confidence(samples, similarity, alpha, beta, reflection, sampling, batch_rows)
        self.least, self.keep_fraction, self.arm = least, keep_fraction, arm

    def run(self, dataset: Dataset, ctx: Any) -> Dataset:
        """The rows that are kept, in their order.

        Raises:
            UserError: a row has no response.
        """
        measured = self.how.measure(ctx, dataset)
        confidence_N = measured["confidence"]
        gamma = sure.threshold_of(confidence_N, self.least, self.keep_fraction)
        passed_N = confidence_N >= gamma
        chosen = self.arms(passed_N, measured, ctx)
        kept_N = chosen[ARMS[self.arm]]
        found = tables.arms(chosen, **measured)
        logger.info("%s", tables.told(SLUG, found))
        for warning in sure.warnings(measured):
            logger.warning("%s: %s", SLUG, warning)
        ctx.report(
            {
                "arm": self.arm,
                "gamma": gamma,
                "histogram of confidence, ten bins of [0, 1]": sure.histogram(confidence_N),
                "arms": found,
                "warnings": sure.warnings(measured),
            }
        )
        order = np.argsort(confidence_N, kind="stable")
        tables.write(ctx.folder / tables.NAME, self.lines(dataset, ctx, measured, gamma, kept_N), order)
        return dataset if kept_N.all() else dataset.select(np.flatnonzero(kept_N))

    def arms(self, passed_N: np.ndarray, measured: dict[str, np.ndarray], ctx: Any) -> dict[str, np.ndarray]:
        """The rows that are kept, and those of the controls."""
        count, total = int(passed_N.sum()), len(passed_N)
        likely_N = np.zeros(total, bool)
        likely_N[np.argsort(-np.nan_to_num(measured["logp"], nan=-np.inf), kind="stable")[:count]] = True
        return {
            "kept": passed_N,
            "random of equal size": tables.random_of(count, total, numpy_stream(ctx.seed, "data", SLUG)),
            "likeliest of equal size": likely_N,
            "all": np.ones(total, bool),
        }

    def lines(
        self, dataset: Dataset, ctx: Any, measured: dict[str, np.ndarray], gamma: float, kept_N: np.ndarray
    ) -> Any:
        """The table, row by row."""
        for start, rows in tables.blocks(dataset, sure.BLOCK):
            written = self.how.samples(ctx, rows)  # read again from where they are kept
            for i, (row, own) in enumerate(zip(rows, written, strict=True), start):
                passed = measured["confidence"][i] >= gamma
                yield {
                    **tables.name_of(row),
                    "decision": "kept" if kept_N[i] else "dropped",
                    "reason": f"confidence {'at least' if passed else 'below'} {gamma:.4g}"
                    if self.arm == "filter"
                    else f"arm: {self.arm}",
                    **{name: tables.finite(values[i]) for name, values in measured.items()},
                    "answer": given_answer(row),
                    "samples": own,
                }
