"""Graded reward for tool calls: how far the completion's call is from the wanted one, from -2 to 1.

The first ``name(argument=value, ...)`` of the completion is compared with the wanted call. With the arguments that the
tool does not have (hal), that it has but are not wanted (red), and that are wanted but not there (mis)::

    -2     no call that can be read, or a tool that is not offered      -0.8   hal
    -1.5   another offered tool, or no name                             -0.5   red or mis
    -1.8   hal, red and mis                                             -0.25  a value differs
    -1.3   hal, and red or mis                                           1     all is right
    -1     red and mis

The wanted call is the row's column ``answer``, its completion, or its last assistant message, as a call, as JSON with
``name`` and ``arguments``, or as a tool call of the message; the tools are its column ``tools``. A row without either,
or whose answer is plain text, gives None. Values are JSON values, read with Python's ``ast`` and never evaluated.
``legacy_parser`` reads as the released code does: to the first ``)``, and only string values in single quotes.

Paper: "TL-Training: A Task-Feature-Based Framework for Training Large Language Models in Tool Use", EMNLP 2025, arXiv
2412.15495. Official repository: Junjie-Ye/TL-Training.

Example::

    data: {test: calls.jsonl, verifier: tl-training}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Context
from luthier.core.registry import reward
from luthier.functional.answers import column, reference
from luthier.functional.tool_calls import (
    Call,
    Tool,
    call_in,
    judge_text,
    legacy_reward,
    looks_like_call,
    read_call,
    read_tools,
    render_call,
)


@reward(
    "tl-training",
    paper="TL-Training: A Task-Feature-Based Framework for Training Large Language Models in Tool Use, EMNLP 2025, "
    "arXiv 2412.15495",
)
def tl_training(
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[str],
    ctx: Context | None,
    *,
    answer: Annotated[str, Field(description="column that holds the wanted call")] = "answer",
    tools: Annotated[str, Field(description="column that holds the offered tools")] = "tools",
    legacy_parser: Annotated[bool, Field(description="read calls as the released code does")] = False,
) -> list[float | None]:
    """How far the completion's tool call is from the wanted one, graded by the kind of error, from -2 to 1."""
    scores: list[float | None] = []
    for index, (row, completion) in enumerate(zip(rows, completions, strict=True)):
        offered, told = column(row, tools), _wanted(row, answer)
        if not offered or told is None:
            scores.append(None)
            continue
        try:
            known = read_tools(json.loads(offered) if isinstance(offered, str) else offered)
            if isinstance(told, str) and not looks_like_call(told, known):
                scores.append(None)
            elif legacy_parser:
                text = told if isinstance(told, str) else render_call(read_call(told))
                scores.append(legacy_reward(completion, text, known))
            else:
                scores.append(judge_text(completion, _call(told, known), known).reward)
        except ValueError as error:
            where = f"{row.get('source') or 'data'}, row {row.get('row', index + 1)}"
            message = (
                f"the wanted call cannot be compared with: {error}. Write it as name(argument=value, ...) or JSON."
            )
            raise UserError(message, where=where) from error
    return scores


def _wanted(row: Mapping[str, Any], answer: str) -> Any:
    """The wanted call as the row has it; None where it has none."""
    told = reference({**row, "messages": None}, answer)
    if told is not None or not row.get("messages"):
        return told
    messages = json.loads(row["messages"]) if isinstance(row["messages"], str) else row["messages"]
    last: Mapping[str, Any] = next((m for m in reversed(messages) if m.get("role") == "assistant"), {})
    return last["tool_calls"][0] if last.get("tool_calls") else last.get("content")


def _call(told: Any, tools: Sequence[Tool]) -> Call:
    """A call from its text or its JSON form."""
    found = call_in(told, tools) if isinstance(told, str) else read_call(told)
    assert found is not None
    return found
