"""Learn from running what the model writes: no gold programs, only problems with tests (LETI).

In each iteration k::

    1  sample n programs for every problem; prompt x in the first iteration, "<|good|>" + x later
    2  run each with its tests in the sandbox
    3  s = R + F + x + y     R = "<|good|>" or "<|bad|>"; F = the error as text between tokens of its own, or nothing
    4  go on from the model and the optimiser of the iteration before: language modelling on ALL tokens of s, every step
       followed by one on ordinary text

Feedback stands before the program, so that the program is conditioned on it; ``feedback_position: after`` is the other
order. Prompts are raw text (no chat template) of rows with tests (``tests``, ``test_list``...), or of rows that an
``evaluator`` of yours judges: ``f(row, text) -> (ok, feedback or None, reason)``. Epochs of an iteration are
``training.epochs``; the schedule must be constant. ``objective: {leti: {kl_weight: ...}}`` also holds the model to the
base. ``decoding: leti`` writes with the good token; without it the model writes like anyone. What happened stands in
``leti.json``, the last iteration's programs in ``leti.jsonl``.

Paper: "LETI: Learning to Generate from Textual Interactions", Findings of NAACL 2024, arXiv 2305.10314. Official
repository: xingyaoww/LeTI. Defaults here are smaller: there 50 iterations of 128 programs for 350M parameters, 10 for
2B. There a trace is of the program with its tests in one source; here the two are named.

Example::

    data: {train: mbpp.jsonl, template: none}
    objective: leti
    procedure: {leti: {iterations: 10, samples: 16, pretraining: corpus.txt}}
    training: {epochs: 3, learning_rate: 1e-5, schedule: constant, warmup: 0}
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.own_code import function_of
from luthier.core.protocols import Artefact
from luthier.core.registry import procedure
from luthier.core.store import write_atomic, write_json
from luthier.functional import execution_feedback as feedback
from luthier.functional.answers import column
from luthier.functional.discriminative import place
from luthier.functional.execution_feedback import BAD, GOOD, TOKENS, Outcome, Position
from luthier.functional.rows import prepared_rows
from luthier.functional.target_rewriting import as_dataset

SLUG = "leti"
SPAN = "leti_span"
# Of the ordinary text one block in so many is held out, to see what the model forgets.
HELD_OUT = 10
REASONS_OF_THE_DRIVER = ("timeout", "process timeout", "killed", "output", "disk", "threads")
Evaluator = Callable[[dict[str, Any], str], tuple[bool, str | None, str]]


@procedure(
    "leti",
    example={"iterations": 1, "samples": 2, "max_new_tokens": 8, "pretraining": None},
    tasks=("causal-lm",),
    conflicts={"parameters:lora": "an adapter leaves the embeddings of the four new tokens as they are"},
    paper="LETI: Learning to Generate from Textual Interactions, Findings of NAACL 2024, arXiv 2305.10314",
)
def leti(
    ctx: Any,
    *,
    iterations: Annotated[int, Field(ge=1, description="K, times that programs are sampled and learnt from")] = 10,
    samples: Annotated[int, Field(ge=1, description="n, programs for each problem")] = 16,
    temperature: Annotated[float, Field(gt=0, description="of sampling")] = 1.0,
    max_new_tokens: Annotated[int, Field(ge=1, description="longest program, in tokens")] = 256,
    batch_rows: Annotated[int, Field(ge=1, description="prompts completed together")] = 32,
    textual: Annotated[bool, Field(description="feedback as text; false leaves the reward token alone")] = True,
    feedback_position: Annotated[
        Position, Field(description="before the program (the method), or after it")
    ] = "before",
    hide_tests: Annotated[bool, Field(description="lines of the tests do not appear in feedback")] = False,
    longest_feedback: Annotated[
        int, Field(ge=1, description="characters of feedback that are kept, from its end")
    ] = 1000,
    cut: Annotated[bool, Field(description="end a program before its next top-level block")] = False,
    tests: Annotated[str, Field(description="column that holds a problem's tests")] = "tests",
    with_prompt: Annotated[bool, Field(description="the prompt is part of the program, such as a docstring")] = True,
    seconds: Annotated[float, Field(gt=0, le=600, description="time of one program")] = 5.0,
    evaluator: Annotated[
        str | None, Field(min_length=1, description="path.py:function of (row, text), in place of running programs")
    ] = None,
    drop_timeouts: Annotated[bool, Field(description="leave out programs that were stopped")] = False,
    dedup: Annotated[bool, Field(description="leave out equal sequences")] = False,
    pretraining: Annotated[
        str | None, Field(min_length=1, description="ordinary text that every second step is on; null for none")
    ] = "lab:text",
    block_tokens: Annotated[int, Field(ge=8, description="ordinary text is joined to blocks of so many tokens")] = 512,
    eval_samples: Annotated[
        int,
        Field(ge=0, description="programs for each problem of data.test in the end, by each reward token; 0 for none"),
    ] = 0,
    eval_temperature: Annotated[float, Field(ge=0, description="of sampling them")] = 0.1,
) -> Artefact:
    """Sample programs, run them, and learn from reward token, error text, problem and program together."""
    own = None if evaluator is None else function_of(evaluator, f"{SLUG}: evaluator")
    rows = list(prepared_rows(ctx.data.train))
    check(ctx, rows, own, tests)
    ctx.add_tokens(TOKENS)
    judge = Judge(ctx, own, tests, with_prompt, hide_tests, seconds, longest_feedback)
    blocks, held_out = ([], None) if pretraining is None else ordinary_text(ctx, pretraining, block_tokens)
    options = {"decoding": "sample", "temperature": temperature, "max_new_tokens": max_new_tokens}
    options["batch_rows"] = batch_rows
    record: dict[str, Any] = {"iterations": []}
    made: Artefact | None = None
    for number in range(1, iterations + 1):
        model = None if made is None else made.model
        # The base has never seen the token, so that its embedding would only be noise before its prompt.
        prefix = "" if made is None else GOOD
        written = ctx.generate([prompt_of(ctx, r, prefix) for r in rows], model=model, samples=samples, **options)
        flat = [
            (row, feedback.cut(c.text) if cut else c.text, c)
            for row, some in zip(rows, written, strict=True)
            for c in some
        ]
        outcomes = judge([row for row, _, _ in flat], [text for _, text, _ in flat])
        lines = []
        for (row, text, completion), found in zip(flat, outcomes, strict=True):
            if not (drop_timeouts and found.reason in REASONS_OF_THE_DRIVER):
                ended = completion.finished and text == completion.text
                lines.append((row, text, found, ended))
        sequences = learnt(ctx, lines, textual, feedback_position, dedup)
        last = number == iterations
        told = summary(outcomes, len(sequences))
        if last and ctx.processes.main:
            write_atomic(ctx.folder / f"{SLUG}.jsonl", "".join(table(lines)))
        source = ctx.source(
            as_dataset(ctx, *zip(*sequences, *blocks, strict=True)), f"iteration {number}", ends=False, cut=True
        )
        made = ctx.train(
            source,
            stage=None if last else f"iteration-{number}",
            start=made,
            keep_optimizer=True,
            models={"reference": ctx.loaded.model},
            alternate=len(sequences) if blocks else None,
        )
        if held_out is not None:
            total, count = ctx.likelihood(held_out.prepared, made.model)
            told["perplexity of ordinary text"] = float(np.exp(-total.sum() / count.sum()))
        record["iterations"].append(told)
    assert made is not None
    if eval_samples and ctx.data.test is not None:
        record["test"] = evaluated(
            ctx, judge, made.model, eval_samples, eval_temperature, max_new_tokens, batch_rows, cut
        )
    if ctx.processes.main:
        write_json(ctx.folder / f"{SLUG}.json", record)
    return replace(made, metrics={**made.metrics, SLUG: record}, notes=(*made.notes, *notes(ctx, record)))


def check(ctx: Any, rows: Sequence[dict[str, Any]], own: Evaluator | None, tests: str) -> None:
    """Refuse what cannot work before anything is sampled.

    Raises:
        UserError: a schedule that is not constant, a chat template, a system message, or a row without prompt or tests.
    """
    if ctx.plan.recipe.training.schedule != "constant":
        raise UserError(
            f"{SLUG} goes on with the same optimiser from iteration to iteration; set training.schedule: constant.",
            where=ctx.plan.recipe.where(("training", "schedule")),
        )
    if ctx.data.renderer.chat is not None:
        raise UserError(f"{SLUG} learns raw text, reward token first; set data.template: none.", where="data.template")
    for row in rows:
        if row["kind"] != "pair" or row["system"] or ctx.data.renderer.system:
            raise UserError(
                f"{SLUG} needs a prompt as raw text, without messages or a system prompt.", where=place(row)
            )
        if own is None and source_of(row, tests) is None:
            raise UserError(
                f"{SLUG}: the row has no tests under '{tests}', 'test_list' or 'test'; name their column under tests, "
                "or an evaluator of your own.",
                where=place(row),
            )


def source_of(row: dict[str, Any], name: str) -> str | None:
    """The tests of a row as one source: a text or a list of lines, in MBPP's columns or HumanEval's."""
    for key in (name, "test_list"):
        if found := column(row, key):
            lines = [found] if isinstance(found, str) else [str(t) for t in found]
            setup = str(column(row, "test_setup_code") or "")
            return "\n".join([setup, *lines] if setup else lines)
    found, entry = column(row, "test"), column(row, "entry_point")
    return f"{found}\ncheck({entry})\n" if found and entry else None


class Judge:
    """What becomes of programs: run in the sandbox with their tests, or judged by a function of the user's."""

    def __init__(
        self, ctx: Any, own: Any, tests: str, with_prompt: bool, hide_tests: bool, seconds: float, most: int
    ) -> None:
        self.ctx, self.own, self.tests, self.with_prompt = ctx, own, tests, with_prompt
        self.hide_tests, self.seconds, self.most = hide_tests, seconds, most

    def __call__(self, rows: Sequence[dict[str, Any]], texts: Sequence[str]) -> list[Outcome]:
        """The outcome of each program.

        Raises:
            UserError: a row has no tests, or no sandbox can be made here.
        """
        if self.own is not None:
            return [Outcome(bool(ok), told, str(why)) for ok, told, why in map(self.own, rows, texts)]
        programs = []
        for row, text in zip(rows, texts, strict=True):
            program = (self.ctx.data.renderer.prompt_text(row) if self.with_prompt else "") + text
            programs.append((program, source_of(row, self.tests) or ""))
        verdicts = self.ctx.execute(programs, seconds=self.seconds)
        return [
            feedback.outcome(verdict, program, tests, hide_tests=self.hide_tests, most=self.most)
            for verdict, (program, tests) in zip(verdicts, programs, strict=True)
        ]


def prompt_of(ctx: Any, row: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The row with the reward token before its prompt; the separator is part of it then."""
    return {**row, "prompt": prefix + ctx.data.renderer.prompt_text(row), "separator": None}


Line = tuple[dict[str, Any], str, Outcome, bool]
Learnt = tuple[dict[str, Any], str]


def learnt(ctx: Any, lines: Sequence[Line], textual: bool, position: Position, dedup: bool) -> list[Learnt]:
    """Sequences as rows of plain text with their further columns.

    Raises:
        UserError: none is left.
    """
    encoder, end = ctx.data.renderer.encoder, ctx.data.renderer.processor.eos_token or ""
    found: dict[Any, Learnt] = {}
    for number, (row, text, outcome, ended) in enumerate(lines):
        prompt = ctx.data.renderer.prompt_text(row)
        before, body, after = feedback.sequence(prompt, text, outcome, textual=textual, position=position)
        body += end if ended else ""
        # Special tokens stand at the borders, so that the parts fall into the same tokens alone and together.
        first = len(encoder.ids([before])[0]) + int(encoder.adds_bos)
        span = [first, first + len(encoder.ids([body])[0])]
        made = {**row, "kind": "text", "text": before + body + after, "prompt": None, "completion": None}
        found[(before, body, after) if dedup else number] = ({**made, "separator": None}, json.dumps({SPAN: span}))
    if not found:
        raise UserError(f"{SLUG}: no program is left to learn from; raise seconds, or set drop_timeouts: false.")
    return list(found.values())


def ordinary_text(ctx: Any, spec: str, block_tokens: int) -> tuple[list[Learnt], Any]:
    """Rows of joined texts, and a source of those that are held out.

    Raises:
        UserError: the source holds too little text.
    """
    source = ctx.read(spec)
    rows = list(source.rows.dataset)
    lengths = [len(ids) for ids in ctx.data.renderer.encoder.ids([text_of(ctx, r) for r in rows])]
    end = ctx.data.renderer.processor.eos_token or "\n"
    blocks: list[str] = []
    held: list[str] = []
    size = 0
    for row, length in zip(rows, lengths, strict=True):
        if held and size + length > block_tokens:
            blocks.append(end.join(held))
            held, size = [], 0
        held.append(text_of(ctx, row))
        size += length + 1
    blocks += [end.join(held)] if held else []
    if len(blocks) < 2:
        raise UserError(f"{SLUG}: pretraining: '{spec}' holds less text than two blocks of {block_tokens} tokens.")
    made = [({**rows[0], "kind": "text", "text": b, "prompt": None, "completion": None}, "{}") for b in blocks]
    kept = [m for i, m in enumerate(made) if i % HELD_OUT != HELD_OUT - 1]
    apart = [m for i, m in enumerate(made) if i % HELD_OUT == HELD_OUT - 1] or made[-1:]
    return kept, ctx.source(as_dataset(ctx, *zip(*apart, strict=True)), "ordinary text", ends=False, cut=True)


def text_of(ctx: Any, row: dict[str, Any]) -> str:
    """A row's whole text."""
    if row["kind"] == "pair":
        return str(ctx.data.renderer.prompt_text(row)) + str(row["completion"])
    if row["kind"] == "text":
        return str(row["text"])
    raise UserError(f"{SLUG}: pretraining takes plain text, not rows of kind {row['kind']}.", where=place(row))


def summary(outcomes: Sequence[Outcome], sequences: int) -> dict[str, Any]:
    """An iteration in numbers."""
    return {
        "success": sum(o.ok for o in outcomes) / len(outcomes),
        "programs": len(outcomes),
        "sequences": sequences,
        "reasons": dict(Counter(o.reason for o in outcomes).most_common()),
    }


def table(lines: Sequence[Line]) -> list[str]:
    """Programs and what became of them, a line of JSON each."""
    return [
        json.dumps(
            {
                "id": row["id"],
                "source": row["source"],
                "row": row["row"],
                "reward": GOOD if found.ok else BAD,
                "reason": found.reason,
                "feedback": found.feedback,
                "program": text,
            },
            ensure_ascii=False,
        )
        + "\n"
        for row, text, found, _ in lines
    ]


def evaluated(
    ctx: Any, judge: Judge, model: Any, n: int, temperature: float, longest: int, batch_rows: int, cut: bool
) -> dict[str, Any]:
    """pass@1 and pass@n on data.test with each reward token before the prompt and with none."""
    rows = list(prepared_rows(ctx.data.test))
    found = {}
    for reward in ("good", "bad", "none"):
        options = {"reward": reward, "temperature": temperature, "max_new_tokens": longest, "batch_rows": batch_rows}
        written = ctx.generate(rows, model=model, samples=n, decoding=SLUG, **options)
        texts = [feedback.cut(c.text) if cut else c.text for some in written for c in some]
        outcomes = judge([r for r in rows for _ in range(n)], texts)
        right = [sum(o.ok for o in outcomes[i : i + n]) for i in range(0, len(outcomes), n)]
        found[reward] = {f"pass@{k}": float(np.mean([feedback.pass_at_k(n, c, k) for c in right])) for k in {1, n}}
    return found


def notes(ctx: Any, record: dict[str, Any]) -> tuple[str, ...]:
    """What whoever reads the run's numbers must know."""
    said = [
        f"{SLUG}: success by iteration " + ", ".join(f"{told['success']:.2f}" for told in record["iterations"]) + "."
    ]
    for number, told in enumerate(record["iterations"], 1):
        if told["success"] in (0.0, 1.0):
            said.append(
                f"{SLUG}: in iteration {number} {'every' if told['success'] else 'no'} program passed, so reward "
                "tokens had no contrast to learn from."
            )
    config = vars(ctx.loaded.model.config)
    if not any(config.get(key) is not None for key in ("rope_parameters", "rope_theta", "rope_scaling", "rotary_dim")):
        said.append(
            f"{SLUG}: this model has learned absolute positions, and the prefix shifts programs by varying numbers of "
            "tokens; models with rotary positions suit the method better."
        )
    return tuple(said)
