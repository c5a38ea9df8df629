"""Of several responses to an instruction keep the one that your own base finds most probable per token (GRAPE).

    s(x, y) = 1/|y| sum_t log p_M(y_t | template(x), y_<t)              keep  argmax_y s(x, y)  of each instruction

M is the very model that will be trained, untouched; y are the tokens of the response, without the token that ends it
unless ``include_eos``. Rows are pooled by everything before the final answer (Unicode NFKC, blanks collapsed); equal
responses within a pool are one, under the first of them. Masking is that of training. A response that does not fit is
dropped, never scored in part. Ties go to the first row. Verifiers under ``gate`` see responses before they are scored.

Every candidate with its numbers and the decision stands in ``data/grape/scores.jsonl`` of the run; the report beside it
has shares and means by source, gaps, and the controls, which are also logged. ``arm`` trains on a control instead:
``random`` (one of each pool), ``all``, ``worst``, ``longest``, ``shortest``, ``sum_logprob`` (no division by |y|: it
picks the shortest nearly always), ``strongest`` (all of one source).

Paper: "The Best Instruction-Tuning Data are Those That Fit", 2025, arXiv 2502.04194. Its code is not public; the end
token, top_k, pooling and ties are this library's.

Example::

    data:
      train: [one.jsonl, two.jsonl]
      stages: [grape]
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from luthier.core.errors import UserError, did_you_mean
from luthier.core.registry import data_stage
from luthier.core.rng import numpy_stream
from luthier.functional import score_table as tables
from luthier.functional.answers import column
from luthier.functional.discriminative import given_answer
from luthier.functional.response_choice import (
    digest,
    distinct_ratio,
    first_of,
    gaps,
    instruction_of,
    numbered,
    ranked,
)

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("luthier")

SLUG = "grape"
BLOCK = 1024
# Below this gap the rounding of bfloat16 may decide.
NEAR = 1e-3
Arm = Literal["grape", "random", "all", "worst", "longest", "shortest", "sum_logprob", "strongest"]
OK, REPEATED, GATED, UNSCORED, SINGLE = "", "equal response", "gate", "nothing to score, or too long", "single response"


@dataclass
class Candidates:
    """What is known of N candidates.

    Attributes:
        group_N: which instruction each answers.
        response_N: which response it is; equal ones of an instruction are one.
        names: the sources.
        source_N: index of its source.
        reason_N: why it cannot be chosen; empty where it can.
        length_N: characters.
        total_N: sum of log-probabilities of its tokens.
        count_N: its tokens.
    """

    group_N: np.ndarray
    response_N: np.ndarray
    names: list[str]
    source_N: np.ndarray
    reason_N: np.ndarray
    length_N: np.ndarray
    total_N: np.ndarray = field(default_factory=lambda: np.zeros(0))
    count_N: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def there_N(self) -> np.ndarray:
        """Bool [N], the candidates that can be chosen."""
        return np.asarray(self.reason_N == OK)

    @property
    def mean_N(self) -> np.ndarray:
        """s, the mean log-probability of a token; NaN where it cannot be chosen."""
        nothing_N = np.full(len(self.group_N), np.nan)
        return np.divide(self.total_N, self.count_N, out=nothing_N, where=self.there_N)

    @property
    def size_G(self) -> np.ndarray:
        """Candidates left of each instruction."""
        return np.bincount(self.group_N[self.there_N], minlength=int(self.group_N.max(initial=-1)) + 1)

    def sources_of_equal(self) -> dict[int, list[str]]:
        """Names of all sources of each response that several rows give."""
        order = np.argsort(self.response_N, kind="stable")
        parts = np.split(order, np.flatnonzero(np.diff(self.response_N[order])) + 1)
        return {
            int(self.response_N[part[0]]): list(dict.fromkeys(self.names[k] for k in self.source_N[part]))
            for part in parts
            if len(part) > 1
        }


@data_stage(
    "grape",
    example={"force": True},
    tasks=("causal-lm",),
    paper="The Best Instruction-Tuning Data are Those That Fit, 2025, arXiv 2502.04194",
)
class FittingResponses:
    """Of several responses to an instruction keep the one the base itself finds most probable per token."""

    def __init__(
        self,
        *,
        top_k: Annotated[int, Field(ge=1, description="responses kept of each instruction")] = 1,
        include_eos: Annotated[bool, Field(description="the token that ends a response counts")] = False,
        singletons: Annotated[
            Literal["keep", "drop"], Field(description="instructions with one response: keep or drop")
        ] = "keep",
        source: Annotated[str | None, Field(description="column that names a row's source; null is its file")] = None,
        gate: Annotated[
            list[Any] | None, Field(min_length=1, description="verifiers that a response must pass to be scored")
        ] = None,
        min_distinct: Annotated[
            float, Field(ge=0, le=1, description="least share of different word 4-grams; 0 is off, 0.3 guards")
        ] = 0.0,
        longest: Annotated[
            int | None, Field(ge=1, description="most characters of a response; null for no limit")
        ] = None,
        arm: Annotated[Arm, Field(description="grape, or the control that is trained on instead")] = "grape",
        strongest: Annotated[str | None, Field(description="arm strongest: the name of the source")] = None,
        force: Annotated[bool, Field(description="go on where no instruction has two responses")] = False,
    ) -> None:
        if (arm == "strongest") != (strongest is not None):
            raise UserError(f"{SLUG}: arm: strongest and the name of a source under strongest go together.")
        self.top_k, self.include_eos, self.singletons, self.source = top_k, include_eos, singletons, source
        self.gate, self.min_distinct, self.longest = gate or [], min_distinct, longest
        self.arm, self.strongest, self.force = arm, strongest, force

    def run(self, dataset: Dataset, ctx: Any) -> Dataset:
        """The rows that are kept, in their order.

        Raises:
            UserError: a row has no response, every instruction has one response, or there is no such source.
        """
        found = self.pool(dataset, ctx)
        self.score(dataset, found, ctx)
        if found.size_G.max(initial=0) < 2 and not self.force:
            raise UserError(
                f"{SLUG}: no instruction has two responses to choose from, so nothing would change. Add responses of "
                "other sources to data.train, or set force: true."
            )
        if self.singletons == "drop":
            found.reason_N[found.there_N & (found.size_G[found.group_N] < 2)] = SINGLE
        arms = self.arms(found, ctx)
        report = {**self.report(found, arms), "scored by": ctx.identity()}
        logger.info("%s", tables.told(SLUG, report["arms"]))
        if (gap := report["smallest gap"]) is not None and gap < NEAR:
            logger.info("%s: the closest choice is decided by %.2g nats per token; score in float32", SLUG, gap)
        ctx.report(report)
        tables.write(ctx.folder / tables.NAME, self.lines(dataset, found, arms[self.arm]))
        kept_N = arms[self.arm]
        return dataset if kept_N.all() else dataset.select(np.flatnonzero(kept_N))

    def pool(self, dataset: Dataset, ctx: Any) -> Candidates:
        """The candidates by instruction, before they are scored."""
        keys, whole = bytearray(), bytearray()
        names: dict[str, int] = {}
        sources: list[int] = []
        lengths: list[int] = []
        passed: list[bool] = []
        for _, rows in tables.blocks(dataset, BLOCK):
            given = [given_answer(row) for row in rows]
            for row, text in zip(rows, given, strict=True):
                keys += (key := digest(instruction_of(row)))
                whole += digest(key.hex(), text.strip())
                name = str(row["source"] if self.source is None else column(row, self.source))
                sources.append(names.setdefault(name, len(names)))
                lengths.append(len(text))
            passed += self.passes(rows, given, ctx)
        response_N = numbered(whole)
        reason_N = np.full(len(passed), OK, dtype=object)
        reason_N[~np.array(passed, bool)] = GATED
        reason_N[~first_of(response_N)] = REPEATED
        return Candidates(
            numbered(keys), response_N, list(names), np.array(sources), reason_N, np.array(lengths, np.float64)
        )

    def passes(self, rows: list[dict[str, Any]], given: list[str], ctx: Any) -> list[bool]:
        """Whether each response may be chosen at all."""
        good = [
            bool(text.strip())
            and (self.longest is None or len(text) <= self.longest)
            and (self.min_distinct == 0 or distinct_ratio(text) >= self.min_distinct)
            for text in given
        ]
        for verifier in self.gate:
            scores = ctx.judge(rows, given, verifier)
            good = [g and s is not None and s >= 0.5 for g, s in zip(good, scores, strict=True)]
        return good

    def score(self, dataset: Dataset, found: Candidates, ctx: Any) -> None:
        """Sum of log-probabilities and number of tokens of what may be chosen, block by block."""
        found.total_N, found.count_N = np.zeros(len(dataset)), np.zeros(len(dataset), np.int64)
        for start, rows in tables.blocks(dataset, BLOCK):
            index = np.flatnonzero(found.there_N[start : start + len(rows)])
            sums = ctx.row_likelihood([rows[i] for i in index], ends=self.include_eos, last=True)
            found.total_N[start + index], found.count_N[start + index] = sums
        found.reason_N[found.there_N & (found.count_N == 0)] = UNSCORED

    def arms(self, found: Candidates, ctx: Any) -> dict[str, np.ndarray]:
        """The candidates of the choice and of each control, bool [N].

        Raises:
            UserError: there is no source of that name.
        """
        there_N, mean_N = found.there_N, found.mean_N

        def best(score_N: np.ndarray) -> np.ndarray:
            rank_N = ranked(np.where(there_N, score_N, np.nan), found.group_N)
            return (rank_N >= 0) & (rank_N < self.top_k)

        arms = {
            "grape": best(mean_N),
            "random": best(numpy_stream(ctx.seed, "data", SLUG).random(len(mean_N))),
            "all": there_N,
            "worst": best(-mean_N),
            "longest": best(found.length_N),
            "shortest": best(-found.length_N),
            "sum_logprob": best(found.total_N),
        }
        if self.strongest is not None:
            if self.strongest not in found.names:
                raise UserError(
                    f"{SLUG}: no row is of the source '{self.strongest}'."
                    f"{did_you_mean(self.strongest, found.names)} Sources: {', '.join(found.names[:20])}."
                )
            arms["strongest"] = there_N & (found.source_N == found.names.index(self.strongest))
        return arms

    def report(self, found: Candidates, arms: dict[str, np.ndarray]) -> dict[str, Any]:
        """What there was, what was chosen, and the controls beside it, as JSON."""
        there_N, mean_N, size_G, chosen_N = found.there_N, found.mean_N, found.size_G, arms["grape"]
        gap = gaps(mean_N, found.group_N)
        reasons, counts = np.unique(found.reason_N[~there_N].astype(str), return_counts=True)
        masks = {name: there_N & (found.source_N == k) for k, name in enumerate(found.names)}
        tokens_N = np.where(found.count_N > 0, found.count_N, np.nan)
        return {
            "arm": self.arm,
            "candidates": len(there_N),
            "instructions": len(size_G),
            "instructions without a candidate left": int((size_G == 0).sum()),
            "instructions with one": int((size_G == 1).sum()),
            "left out": dict(zip(reasons.tolist(), counts.tolist(), strict=True)),
            "sources": tables.arms(masks, logp=mean_N),
            "share of each source among the chosen": {
                name: tables.finite((mask_N & chosen_N).sum() / max(chosen_N.sum(), 1))
                for name, mask_N in masks.items()
            },
            "mean gap to the second": float(gap.mean()) if len(gap) else None,
            "smallest gap": float(gap.min()) if len(gap) else None,
            "arms": tables.arms(arms, logp=mean_N, tokens=tokens_N, characters=found.length_N),
        }

    def lines(self, dataset: Dataset, found: Candidates, kept_N: np.ndarray) -> Iterator[dict[str, Any]]:
        """The table, row by row."""
        rank_N, equal, size_G = ranked(found.mean_N, found.group_N), found.sources_of_equal(), found.size_G
        for start, rows in tables.blocks(dataset, BLOCK):
            for i, row in enumerate(rows, start):
                place = f"place {rank_N[i] + 1} of {size_G[found.group_N[i]]}"
                count, total = int(found.count_N[i]), float(found.total_N[i])
                yield {
                    **tables.name_of(row),
                    "instruction": int(found.group_N[i]),
                    "sources": equal.get(int(found.response_N[i]), [found.names[found.source_N[i]]]),
                    "decision": "kept" if kept_N[i] else "dropped",
                    "reason": str(found.reason_N[i]) or (place if self.arm == "grape" else f"arm {self.arm}, {place}"),
                    "mean_logp": total / count if count else None,
                    "sum_logp": total if count else None,
                    "tokens": count,
                }
