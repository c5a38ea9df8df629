"""Fault-aware fine-tuning, the data: wrong answers that look like the correct one, and the tokens where they differ.

For each row with a correct answer c+ this stage finds wrong answers c- to the same prompt and keeps, for the objective
of the same name, which tokens of both are error-sensitive:

1. candidates: ``mutate`` puts one small fault into Python (operators, constants, conditions, names, a statement left
   out, arguments exchanged), ``self`` lets the base model answer, ``variants`` takes a column of given texts;
2. they must be like c+ (difflib ratio of at least ``similarity``); the most similar ones come first;
3. c+ must pass the row's tests and c- must not, judged by a reward (``verifier``; Python tests run in the sandbox,
   which limits and isolates but is no security boundary);
4. lines that differ (``line``) and, within them, characters that a shortest edit script changes (``token``) are mapped
   to tokens through the tokenizer's offsets on the text that is trained on, template included. Only the code is
   compared, not the prose and the fence around it; comments and spacing are not compared at all.

A row of which no wrong answer is left is kept and trained on plainly. Of everything that was left out a count is shown.

Paper: "FAIT: Fault-Aware Fine-Tuning for Better Code Generation", 2025, arXiv 2503.16913 (FGIT in its second version).
No released code is known. The paper's wrong answers are written by a stronger model; give those as ``variants``.

Example::

    data:
      train: mbpp.jsonl                      # prompt, answer and tests
      stages:
        - fault-aware-ft: {source: mutate}
    objective: fault-aware-ft
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core import registry
from luthier.core.errors import UserError
from luthier.core.registry import data_stage
from luthier.functional.answers import code_blocks, column
from luthier.functional.code_differences import Language, differences, overlapping, similarity
from luthier.functional.code_mutations import KINDS, Kind, mutations, parse, parses
from luthier.functional.discriminative import as_answer, given_answer, place, with_answer
from luthier.functional.error_sensitive import SENSITIVE, WRONG, checksum

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("luthier")

SLUG = "fault-aware-ft"
BATCH_ROWS = 1000
FENCES = ("python", "py", "python3")


@dataclass(frozen=True)
class Tokens:
    """An answer as it is trained on: its tokens, the supervised spans, and each token's characters of the code."""

    ids: list[int]
    spans: list[tuple[int, int]]
    characters: list[tuple[int, int]]

    def over(self, places: Sequence[int]) -> list[int]:
        """The supervised tokens over some characters of the code."""
        return [t for t in overlapping(self.characters, places) if any(s <= t < e for s, e in self.spans)]


@dataclass
class Work:
    """One row on its way through the stage.

    Attributes:
        start: where the code begins in the answer.
        end: where it ends.
        open: candidates not yet looked at, the best first.
        kept: wrong answers found, with their flags.
        outcome: why the row has no pair, if that is so.
    """

    row: dict[str, Any]
    answer: str
    start: int
    end: int
    open: list[str] = field(default_factory=list)
    kept: list[dict[str, Any]] = field(default_factory=list)
    outcome: str = ""

    @property
    def code(self) -> str:
        """The code of the correct answer."""
        return self.answer[self.start : self.end]


@data_stage(
    "fault-aware-ft",
    example={"source": "mutate"},
    tasks=("causal-lm",),
    paper="FAIT: Fault-Aware Fine-Tuning for Better Code Generation, 2025, arXiv 2503.16913",
)
class WrongVariants:
    """Find wrong answers that look like the correct one, and the error-sensitive tokens where they differ."""

    def __init__(
        self,
        *,
        source: Annotated[
            Literal["mutate", "self", "variants"],
            Field(description="faults put into the code, answers of the base model, or a column of given texts"),
        ] = "mutate",
        language: Annotated[Language, Field(description="of the answers' code; text for anything else")] = "python",
        verify: Annotated[bool, Field(description="correct answers must pass the verifier and wrong ones fail")] = True,
        verifier: Annotated[
            str | dict[str, dict[str, Any] | None],
            Field(description="the reward that judges answers: a name, or a name with its options"),
        ] = "python-tests",
        similarity: Annotated[float, Field(ge=0, lt=1, description="least difflib ratio of a wrong answer")] = 0.6,
        unit: Annotated[
            Literal["characters", "lines"], Field(description="what the difflib ratio counts")
        ] = "characters",
        negatives: Annotated[int, Field(ge=1, description="wrong answers kept of each row, the most similar")] = 1,
        candidates: Annotated[int, Field(ge=1, description="most candidates that are verified for a row")] = 8,
        max_fraction: Annotated[
            float, Field(gt=0, le=1, description="largest share of the answer's tokens that may be error-sensitive")
        ] = 0.5,
        keep_unparsable: Annotated[bool, Field(description="python: keep wrong answers that do not parse")] = False,
        bad_code: Annotated[
            Literal["error", "plain"], Field(description="a correct answer that does not parse: stop, or train plainly")
        ] = "error",
        with_prompt: Annotated[
            bool, Field(description="python: the answer continues the prompt's program, as in HumanEval")
        ] = False,
        mutations: Annotated[
            list[Kind] | None, Field(min_length=1, description="mutate: kinds of faults; by default all")
        ] = None,
        column: Annotated[str, Field(min_length=1, description="variants: the column, a text or a list")] = "variants",
        samples: Annotated[int, Field(ge=1, description="self: answers per prompt")] = 8,
        temperature: Annotated[float, Field(gt=0, description="self: of sampling")] = 0.8,
        max_new_tokens: Annotated[int, Field(ge=1, description="self: longest answer, in tokens")] = 320,
        batch_rows: Annotated[int, Field(ge=1, description="self: prompts completed together")] = 32,
    ) -> None:
        if language == "text" and (source == "mutate" or with_prompt):
            raise UserError(
                f"{SLUG}: language: text has no source: mutate and no with_prompt; use source: self or variants."
            )
        self.source, self.language, self.verify, self.verifier = source, language, verify, verifier
        self.least, self.unit, self.negatives, self.candidates = similarity, unit, negatives, candidates
        self.max_fraction, self.keep_unparsable, self.bad_code = max_fraction, keep_unparsable, bad_code
        self.with_prompt, self.kinds, self.column = with_prompt, mutations or KINDS, column
        self.samples = samples
        self.sampling = {"temperature": temperature, "max_new_tokens": max_new_tokens, "batch_rows": batch_rows}

    def run(self, dataset: Dataset, ctx: Any) -> Dataset:
        """The rows with their wrong answers and flags in ``extra``.

        Raises:
            UserError: a row has no correct answer or one that does not parse, the tokenizer tells no offsets, no row
                can be verified, or no row gets a wrong answer.
        """
        if not getattr(ctx.processor, "is_fast", False):
            raise UserError(
                f"{SLUG}: flags need the places of tokens in the text: use a fast tokenizer.", where="model"
            )
        self.dropped: Counter[str] = Counter()
        work = [self._open(row) for row in _rows(dataset)]
        waiting = self._verified([w for w in work if not w.outcome])
        self._propose(waiting, ctx)
        for w in waiting:
            w.outcome = "" if w.open else "no candidate is like the correct answer"
        for _ in range(self.candidates):
            waiting = [w for w in waiting if w.open and len(w.kept) < self.negatives]
            if not waiting:
                break
            texts = [w.open.pop(0) for w in waiting]
            for w, text, wrong in zip(waiting, texts, self._wrong(waiting, texts), strict=True):
                flagged = self._flagged(w, text, ctx) if wrong else None
                if flagged is not None:
                    w.kept.append(flagged)
        self._report(work)
        names = dataset.column_names
        extra = [self._extra(w, ctx) for w in work]
        return dataset.remove_columns("extra").add_column("extra", extra).select_columns(names)

    # -- candidates

    def _open(self, row: dict[str, Any]) -> Work:
        """A row with its correct code.

        Raises:
            UserError: it has no answer, has flags already, or its code does not parse.
        """
        if row["kind"] not in ("pair", "chat"):
            raise UserError(
                f"a row of kind '{row['kind']}' has no prompt with one correct answer; {SLUG} needs prompt/completion "
                "rows or conversations.",
                where=place(row),
            )
        if column(row, SENSITIVE) is not None:
            raise UserError(
                f"the row has a column '{SENSITIVE}' already; remove the data stage, or that column.", where=place(row)
            )
        answer = given_answer(row)
        found = self._code(answer)
        if found is None:
            return Work(row, answer, 0, len(answer), outcome="several fenced blocks of code")
        made = Work(row, answer, *found)
        if self.language == "python":
            try:
                parse(self._program(row, made.code))
            except SyntaxError as error:
                if self.bad_code == "error":
                    raise UserError(
                        f"the correct answer is no Python that parses (line {error.lineno or '?'}: {error.msg}). Mend "
                        "or leave out the row, set bad_code: plain to train on it plainly, or language: text.",
                        where=place(row),
                    ) from None
                made.outcome = "the correct answer does not parse"
        return made

    def _code(self, answer: str) -> tuple[int, int] | None:
        """Where the code stands in an answer: its one fenced block, or all of it; None where there are several."""
        blocks = code_blocks(answer, FENCES)
        if len(blocks) > 1:
            return None
        if not blocks:
            return 0, len(answer)
        start = answer.index(blocks[0], answer.index("```"))
        return start, start + len(blocks[0])

    def _program(self, row: dict[str, Any], code: str) -> str:
        return f"{row['prompt']}{code}" if self.with_prompt else code

    def _propose(self, work: list[Work], ctx: Any) -> None:
        """Fill ``open`` with candidate answers, the most similar code first; equal ones in a random order."""
        if self.source == "self":
            prompts = [ctx.renderer.prompt_ids(w.row) for w in work]
            logger.info("%s: sampling %d answers to each of %d prompts", SLUG, self.samples, len(prompts))
            answers = ctx.generate(prompts, samples=self.samples, decoding="sample", **self.sampling)
            for w, found in zip(work, answers, strict=True):
                self._sort(w, [as_answer(c.text, w.answer) for c in found], ctx)
            return
        for w in work:
            if self.source == "variants":
                self._sort(w, self._given(w), ctx)
                continue
            start = len(self._program(w.row, ""))
            program = self._program(w.row, w.code)
            faulty = [m.apply(program)[start:] for m in mutations(program, start=start, kinds=self.kinds)]
            self._sort(w, [w.answer[: w.start] + code + w.answer[w.end :] for code in faulty], ctx)

    def _given(self, w: Work) -> list[str]:
        """The row's own variants; bare code takes the place of the fenced code of the correct answer."""
        value = column(w.row, self.column)
        texts = [value] if isinstance(value, str) else value or []
        if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
            raise UserError(f"the column '{self.column}' must be a text or a list of texts.", where=place(w.row))
        bare = w.start > 0
        return [
            w.answer[: w.start] + t.rstrip("\n") + "\n" + w.answer[w.end :]
            if bare and not code_blocks(t)
            else as_answer(t, w.answer)
            for t in texts
        ]

    def _sort(self, w: Work, answers: list[str], ctx: Any) -> None:
        rated: list[tuple[float, int, str]] = []
        order = torch.randperm(len(answers), generator=ctx.rng("data", SLUG, w.row["key"] or w.row["row"])).tolist()
        for rank, answer in zip(order, answers, strict=True):
            span = self._code(answer)
            code = "" if span is None else answer[slice(*span)]
            if span is None:
                self.dropped["several fenced blocks of code"] += 1
            elif code.strip() == w.code.strip() or any(answer == other for _, _, other in rated):
                self.dropped["equal to the correct answer or to another"] += 1
            elif self.language == "python" and not (self.keep_unparsable or parses(self._program(w.row, code))):
                self.dropped["does not parse"] += 1
            elif (ratio := similarity(w.code, code, self.unit)) < self.least or ratio == 1.0:
                self.dropped["not like the correct answer"] += 1
            else:
                rated.append((-ratio, rank, answer))
        w.open = [answer for _, _, answer in sorted(rated)]

    # -- verification

    def _judge(self, work: list[Work], answers: list[str]) -> list[float | None]:
        spec = self.verifier
        name, options = (spec, None) if isinstance(spec, str) else next(iter(spec.items()))
        options = dict(options or {})
        if name == "python-tests" and self.with_prompt:
            options = {"with_prompt": True, **options}
        try:
            reward = registry.get("reward", name).build(options)
        except ValueError as error:
            said = error.errors()[0] if hasattr(error, "errors") else {"loc": (), "msg": str(error)}
            raise UserError(f"{SLUG}: verifier: {'.'.join([name, *map(str, said['loc'])])}: {said['msg']}.") from None
        return reward([w.row for w in work], answers, None) if work else []

    def _verified(self, work: list[Work]) -> list[Work]:
        """The rows whose correct answer is known to be correct.

        Raises:
            UserError: no row can be judged.
        """
        if not self.verify:
            return work
        scores = self._judge(work, [w.answer for w in work])
        if work and all(score is None for score in scores):
            raise UserError(
                f"{SLUG}: no row can be verified: the verifier judges none of the correct answers (for python-tests: "
                "no row has tests). Add tests, name another verifier, or set verify: false to trust the variants.",
                where=place(work[0].row),
            )
        for w, score in zip(work, scores, strict=True):
            if score is None:
                w.outcome = "no tests"
            elif score < 1.0:
                w.outcome = "the correct answer fails its tests"
        return [w for w in work if not w.outcome]

    def _wrong(self, work: list[Work], answers: list[str]) -> list[bool]:
        """Which candidates are known to be wrong."""
        if not self.verify:
            return [True] * len(work)
        scores = self._judge(work, answers)
        self.dropped["passes the tests"] += sum(s is not None and s >= 1.0 for s in scores)
        self.dropped["cannot be judged"] += sum(s is None for s in scores)
        return [s is not None and s < 1.0 for s in scores]

    # -- flags

    def _flagged(self, w: Work, answer: str, ctx: Any) -> dict[str, Any] | None:
        """A wrong answer with the flags of both sides; None (and a count) where it is of no use."""
        span = self._code(answer)
        assert span is not None
        good = tokens_of(w.row, w.start, w.code, ctx)
        wrong = tokens_of(with_answer(w.row, answer), span[0], answer[slice(*span)], ctx)
        sides = differences(w.code, answer[slice(*span)], self.language)
        if not sides[0].characters and not sides[1].characters:
            self.dropped["differs in comments or spacing alone"] += 1
            return None
        if not good.spans or not wrong.spans:
            self.dropped["error-sensitive part cut away"] += 1
            return None
        found: dict[str, Any] = {"text": answer, "ids": wrong.ids, "response": wrong.spans[-1]}
        for name, tokens, side in (("good", good, sides[0]), ("wrong", wrong, sides[1])):
            found[name] = {"line": tokens.over(side.lines), "token": tokens.over(side.characters)}
        for name, side in (("good", sides[0]), ("wrong", sides[1])):
            if (side.characters or side.lines) and not (found[name]["line"] or found[name]["token"]):
                self.dropped["error-sensitive part cut away"] += 1
                return None
        if len(found["good"]["token"]) > self.max_fraction * sum(e - s for s, e in good.spans):
            self.dropped["too many error-sensitive tokens"] += 1
            return None
        shared = (i for i, (a, b) in enumerate(zip(good.ids, wrong.ids, strict=False)) if a != b)
        found["diverges"] = next(shared, min(len(good.ids), len(wrong.ids)))
        return found

    def _extra(self, w: Work, ctx: Any) -> str:
        """The row's further columns with those of the objective."""
        kept = w.kept
        ids = ctx.renderer.render_batch([w.row])[0].input_ids
        flags = {"check": checksum(ids), **{k: [v["good"][k] for v in kept] for k in ("line", "token")}}
        names = ("text", "ids", "response", "diverges")
        wrong = [{**{n: v[n] for n in names}, **v["wrong"]} for v in kept]
        extra = {**json.loads(w.row["extra"] or "{}"), SENSITIVE: flags, WRONG: wrong}
        return json.dumps(extra, ensure_ascii=False)

    def _report(self, work: list[Work]) -> None:
        """Say how many rows have a pair, and why others and other candidates were left out."""
        paired = [w for w in work if w.kept]
        plain = Counter(w.outcome or "no candidate was wrong and usable" for w in work if not w.kept)
        said = partial("; ".join)
        logger.info(
            "%s: %d of %d rows have a wrong variant (%d variants). Trained on plainly: %s. Candidates left out: %s",
            *(SLUG, len(paired), len(work), sum(len(w.kept) for w in paired)),
            said(f"{reason} ({count})" for reason, count in plain.most_common()) or "none",
            said(f"{reason} ({count})" for reason, count in self.dropped.most_common() if count) or "none",
        )
        if not paired:
            reasons = [*plain.most_common(1), *self.dropped.most_common(1)]
            raise UserError(
                f"{SLUG}: no row has a wrong variant, so there is nothing to emphasise. Most often: "
                + "; ".join(f"{reason} ({count})" for reason, count in reasons if count)
                + ". Lower similarity, raise candidates or max_fraction, or use another source.",
                where=place(work[0].row) if work else None,
            )


def _rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    for table in dataset.with_format("arrow").iter(BATCH_ROWS):
        yield from table.to_pylist()


def tokens_of(row: dict[str, Any], start: int, code: str, ctx: Any) -> Tokens:
    """The row as it is trained on, with each token's characters relative to the beginning of the code.

    Args:
        row: a canonical pair or conversation.
        start: where the code begins in its answer.
        code: it.
        ctx: the stage's context.

    Raises:
        UserError: the tokens of the row cannot be laid over its text.
    """
    renderer = ctx.renderer
    rendered = renderer.render_batch([row])[0]
    ids, first = rendered.input_ids, rendered.prompt_length
    if row["kind"] == "pair" and renderer.chat is None:
        tries, at = [(first, row["completion"], 0)], start
    else:
        text, _, prompt_end = renderer.chat.locate(*renderer.messages_of(row, "messages"))
        # As one text where its tokens keep to the end of the prompt, else cut there, as the renderer does.
        tries, at = [(0, text, 0), (first, text[prompt_end:], prompt_end)], text.find(code, prompt_end)
    for offset, text, shift in tries:
        encoded = ctx.processor(text, add_special_tokens=False, return_offsets_mapping=True)
        found = encoded["input_ids"]
        size = min(len(found), len(ids) - offset)
        if at < 0 or list(found[:size]) != list(ids[offset : offset + size]):
            continue
        spans = [(s + shift - at, e + shift - at) for s, e in encoded["offset_mapping"][:size]]
        inside = [(max(s, 0), max(min(e, len(code)), max(s, 0))) for s, e in spans]
        nothing = [(0, 0)]
        characters = nothing * offset + inside + nothing * (len(ids) - offset - size)
        limit = renderer.max_length or len(ids)
        cut = [(s, min(e, limit)) for s, e in rendered.spans if s < limit]
        return Tokens(list(ids[:limit]), cut, characters[:limit])
    raise UserError(
        f"{SLUG}: the tokens of the row cannot be laid over its text (the template or the tokenizer rewrites the "
        "answer), so no token can be flagged. Use another data.template.",
        where=place(row),
    )
