"""Turns of tool dialogues to learn from: a call that led to an error stays in sight but is never a target.

Every assistant turn k of a dialogue is one sample: all messages before it are the context, the turn alone is the
target. If it is not the last message, the next one must be a tool's result, else the turn is skipped; if that result
shows an error, the turn is dropped. It still stands in the context of later turns, which recover from it.

``layout: per_turn`` makes a row of each sample; ``masked_dialogue`` keeps one row per dialogue and supervises the same
turns in one pass. A result shows an error when it contains one of ``patterns``, both reduced to letters, digits and
Chinese characters in lower case (so ``'error'`` is found in every result that speaks of an error), or when the user's
own function ``is_error`` says so. What each pattern took is shown.

``rendering: python`` shows tools as Python-like stubs in the system message and writes calls ``name(argument=json)``;
with ``data.template: plain`` rows read System:, User:, Assistant:, Output:. ``rendering: template`` leaves tools and
calls to the chat template. The row's tools come from its column ``tools``, or from a system message that is their JSON.
Of each target the places of key tokens (those that decide the tool) are kept for the objective of the same name.

Paper: "TL-Training: A Task-Feature-Based Framework for Training Large Language Models in Tool Use", EMNLP 2025, arXiv
2412.15495. Official repository: Junjie-Ye/TL-Training.

Example::

    data:
      stages:
        - tl-training: {layout: per_turn}
    objective: tl-training
"""

from __future__ import annotations

import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.own_code import file_of
from luthier.core.registry import data_stage
from luthier.core.store import content_hash
from luthier.functional.discriminative import place
from luthier.functional.tool_calls import Call
from luthier.functional.tool_dialogues import ERROR_PATTERNS, Dialogue, ErrorTest, KeyTokens, load_test

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("luthier")

BATCH_ROWS = 256
TOO_MANY = 0.5


@data_stage(
    "tl-training",
    tasks=("causal-lm",),
    paper="TL-Training: A Task-Feature-Based Framework for Training Large Language Models in Tool Use, EMNLP 2025, "
    "arXiv 2412.15495",
)
class ToolDialogues:
    """Learn tool calls turn by turn, without those that led to an error, and mark the tokens that decide the tool."""

    def __init__(
        self,
        *,
        layout: Annotated[
            Literal["per_turn", "masked_dialogue"],
            Field(description="a row for each turn that is learnt, or one for each dialogue"),
        ] = "per_turn",
        drop_errors: Annotated[bool, Field(description="do not learn calls whose result is an error")] = True,
        patterns: Annotated[
            list[str] | None, Field(min_length=1, description="what makes a result an error; by default the paper's")
        ] = None,
        is_error: Annotated[
            str | None,
            Field(
                description="instead of patterns, a function of the result's text: path/to/file.py:name or module:name"
            ),
        ] = None,
        rendering: Annotated[
            Literal["python", "template"],
            Field(description="stubs and name(argument=json), or the chat template's form"),
        ] = "python",
        result_role: Annotated[
            str | None,
            Field(min_length=1, description="role of results: tool where the template knows that word, else output"),
        ] = None,
        text_turns: Annotated[
            Literal["skip", "keep"],
            Field(description="turns without a call that are not the last: skip, or learn them"),
        ] = "skip",
        bad_calls: Annotated[
            Literal["error", "drop"], Field(description="a target call that cannot be read: stop, or do not learn it")
        ] = "error",
    ) -> None:
        if patterns is not None and is_error is not None:
            raise UserError("tl-training: patterns and is_error both say what an error is; give one of them.")
        self.layout, self.rendering, self.result_role = layout, rendering, result_role
        self.text_turns, self.bad_calls = text_turns, bad_calls
        self.is_error = is_error
        self.test: ErrorTest | None = None
        if drop_errors:
            self.test = load_test(is_error) if is_error else ErrorTest(patterns or ERROR_PATTERNS)

    def reads(self, ctx: Any) -> list[str]:
        """What the file of the user's own test holds."""
        file = file_of(self.is_error)
        return [] if file is None else [content_hash(file)]

    def run(self, dataset: Dataset, ctx: Any) -> Dataset:
        """The rows to learn from, with the places of their key tokens in ``extra``.

        Raises:
            UserError: no chat template, a row that is no conversation, two tools of one name, a call that cannot be
                read or that no tool of the row has.
        """
        from datasets import Dataset as Rows

        if ctx.renderer.chat is None:
            raise UserError(
                "tl-training writes conversations, and the tokenizer has no chat template. Set data.template: plain "
                "(the paper's lines), chatml, or a .jinja file."
            )
        role = self.result_role or ("tool" if "tool" in ctx.renderer.template else "output")
        counts: Counter[str] = Counter()
        found: Counter[str] = Counter()
        keys = KeyTokens(ctx.renderer, ctx.processor, self.rendering)
        made: list[dict[str, Any]] = []
        waiting: list[tuple[dict[str, Any], list[Call | None], Dialogue]] = []
        for row in _rows(dataset):
            counts["rows"] += 1
            waiting += self._samples(row, role, ctx.renderer.system, counts, found)
            if len(waiting) >= BATCH_ROWS:
                made += keys.add(waiting)
                waiting = []
        made += keys.add(waiting)
        self._report(counts, found, role)
        names = dataset.column_names
        return Rows.from_list([{name: row[name] for name in names} for row in made], features=dataset.features)

    def _samples(
        self, row: dict[str, Any], role: str, system: str | None, counts: Counter[str], found: Counter[str]
    ) -> list[tuple[dict[str, Any], list[Call | None], Dialogue]]:
        """The new rows of a dialogue, the calls that each one learns (None for plain text), and the dialogue."""
        if row["kind"] != "chat":
            raise UserError(
                f"tl-training reads conversations (data.layout: chat); a row of kind '{row['kind']}' is none.",
                where=place(row),
            )
        try:
            dialogue = Dialogue(row)
        except ValueError as error:
            raise UserError(f"{error}. Correct the row.", where=place(row)) from error
        targets: list[tuple[int, Call | None]] = []
        for turn in dialogue.turns():
            counts["turns"] += 1
            why = self._why_not(dialogue, turn, found, counts)
            if why is None:
                call, problem = dialogue.calls[turn], dialogue.problem(turn)
                if problem and self.bad_calls == "error":
                    raise UserError(
                        f"message {turn + 1}: {problem}. Correct it, or set bad_calls: drop.", where=place(row)
                    )
                if not problem:
                    targets.append((turn, call))
                    continue
                why = "unreadable"
            counts[why] += 1
        written = dialogue.messages if self.rendering == "template" else dialogue.as_python(role, system)
        return [
            (self._row(row, dialogue, written, [turn for turn, _ in group]), [call for _, call in group], dialogue)
            for group in ([[t] for t in targets] if self.layout == "per_turn" else [targets] if targets else [])
        ]

    def _why_not(self, dialogue: Dialogue, turn: int, found: Counter[str], counts: Counter[str]) -> str | None:
        """Why a turn is not learnt from; None where it is."""
        messages = dialogue.messages
        if not messages[turn].get("weight", 1):
            return "unsupervised"
        if turn == len(messages) - 1:
            return None
        if messages[turn + 1]["role"] != "tool":
            return None if self.text_turns == "keep" and dialogue.calls[turn] is None else "skipped"
        counts["results"] += 1
        if self.test is None:
            return None
        reasons = self.test(messages[turn + 1].get("content") or "")
        found.update(reasons)
        return "errors" if reasons else None

    def _row(
        self, row: dict[str, Any], dialogue: Dialogue, written: list[dict[str, Any]], targets: list[int]
    ) -> dict[str, Any]:
        """The canonical row that learns some turns of a dialogue, cut behind the last of them."""
        # A system message that was added in front moves the others by one.
        shift = len(written) - len(dialogue.messages)
        chosen = {turn + shift for turn in targets}
        messages = [
            {**m, "weight": int(i in chosen)} if m["role"] == "assistant" else m
            for i, m in enumerate(written[: max(chosen) + 1])
        ]
        text = json.dumps(messages, ensure_ascii=False)
        extra = json.loads(row["extra"] or "{}")
        if self.rendering == "python" and dialogue.tools_json is not None:
            extra["tools"] = dialogue.tools_json
        number = f"turn {targets[-1] + 1}"
        return {
            **row,
            "messages": text,
            "tools": row["tools"] if self.rendering == "template" else None,
            "extra": json.dumps(extra, ensure_ascii=False),
            "id": row["id"] if self.layout == "masked_dialogue" or row["id"] is None else f"{row['id']}, {number}",
            "key": content_hash(row["key"], text),
        }

    def _report(self, counts: Counter[str], found: Counter[str], role: str) -> None:
        logger.info(
            "tl-training: %d dialogues with %d turns of the assistant; not learnt: %d followed by an error, %d not "
            "followed by a result, %d unsupervised, %d with a call that cannot be read; results have the role '%s'",
            *(counts[name] for name in ("rows", "turns", "errors", "skipped", "unsupervised", "unreadable")),
            role,
        )
        results = counts["results"]
        for reason, count in found.most_common():
            logger.info("tl-training: %d of %d results (%.1f%%) have %s", count, results, 100 * count / results, reason)
        if results and counts["errors"] > TOO_MANY * results:
            worst, count = found.most_common(1)[0]
            warnings.warn(
                f"tl-training: {counts['errors']} of {results} calls with a result are dropped as errors, {count} of "
                f"them by {worst}. If these results are none ('no error found' has the word too), set patterns.",
                stacklevel=2,
            )


def _rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    for table in dataset.with_format("arrow").iter(BATCH_ROWS):
        yield from table.to_pylist()
