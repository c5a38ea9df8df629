"""Conversations and preference pairs in the canonical schema."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from luthier.data.columns import Columns, strings
from luthier.data.layouts import Layout
from luthier.data.problems import Problems
from luthier.data.roles import (
    CANONICAL,
    ROLE_OF,
    BadConversation,
    check_answerable,
    encode,
    normalise,
    tools_json,
)

_TEXTS = [(name, pa.string()) for name in ("role", "content", "from", "value")]
# Tool calls are looked at row by row; here it only matters whether there are any.
_MESSAGE = pa.struct([*_TEXTS, ("tool_calls", pa.list_(pa.struct([])))])
_KNOWN_ROLES = pa.array([r for r in ROLE_OF if r != "function_call"])

Messages = list[dict[str, Any]]


def conversations(columns: Columns, column: str, problems: Problems, *, answered: bool = True) -> list[Messages | None]:
    """The checked conversations of a column in canonical form; None where a row is bad.

    Args:
        columns: the block.
        column: the column of message lists.
        problems: takes the bad rows.
        answered: a conversation needs a message of the assistant.
    """
    values = columns.listed(column)
    try:
        array = pa.array(values, pa.list_(_MESSAGE))
    except (pa.ArrowException, UnicodeEncodeError):
        return [_one(v, i, column, problems, answered) for i, v in enumerate(values)]
    flat, parents = array.flatten(), pc.list_parent_indices(array).to_numpy()
    role = pc.coalesce(flat.field("role"), flat.field("from"))
    content = pc.coalesce(flat.field("content"), flat.field("value"))
    good = pc.and_kleene(pc.is_in(role, _KNOWN_ROLES), pc.not_equal(pc.utf8_trim_whitespace(content), ""))
    good = pc.and_kleene(good, pc.invert(pc.match_substring(content, "\x00")))
    good = pc.and_kleene(good, flat.field("tool_calls").is_null())
    canonical = pc.and_kleene(pc.is_in(role, pa.array(CANONICAL)), flat.field("role").is_valid())
    canonical = pc.and_kleene(canonical, pc.and_kleene(flat.field("from").is_null(), flat.field("value").is_null()))
    size = len(values)
    suspect = _any(parents, ~_numpy(good), size) | (np.bincount(parents, minlength=size) == 0)
    if answered:
        speaks = pc.is_in(role, pa.array([r for r, known in ROLE_OF.items() if known == "assistant"]))
        suspect |= ~_any(parents, _numpy(speaks), size)
    as_is = ~_any(parents, ~_numpy(canonical), size)
    found: list[Messages | None] = []
    for index, (value, look, keep) in enumerate(zip(values, suspect.tolist(), as_is.tolist(), strict=True)):
        if look:
            found.append(_one(value, index, column, problems, answered))
        elif keep:
            found.append(value)
        else:
            found.append([_renamed(m) for m in value])
    return found


def _numpy(mask: pa.Array) -> np.ndarray:
    return pc.fill_null(mask, False).to_numpy(zero_copy_only=False)


def _any(parents: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
    return np.bincount(parents[mask], minlength=size) > 0


def _renamed(message: dict[str, Any]) -> dict[str, Any]:
    rest = {k: v for k, v in message.items() if k not in ("role", "from", "content", "value")}
    role, content = message.get("role") or message["from"], message.get("content")
    return {"role": ROLE_OF[role], "content": message["value"] if content is None else content, **rest}


def _one(value: Any, index: int, column: str, problems: Problems, answered: bool) -> Messages | None:
    try:
        messages = normalise(value, column)
        if answered:
            check_answerable(messages, column)
        encode(messages).encode()
    except BadConversation as error:
        problems.add(index, *error.args)
    except UnicodeEncodeError:
        problems.add(index, column, "invalid UTF-8", "Save the file as valid UTF-8.", repr(value))
    else:
        return messages
    return None


def _json(found: list[Messages | None], systems: list[str | None] | None = None) -> pa.Array:
    if systems is not None:
        found = [_with_system(m, s) for m, s in zip(found, systems, strict=True)]
    return pa.array([None if m is None else encode(m) for m in found], pa.string())


def _with_system(messages: Messages | None, system: str | None) -> Messages | None:
    if messages is None or not system or not system.strip() or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _systems(columns: Columns, layout: Layout, problems: Problems) -> list[str | None] | None:
    if "system" not in layout.optional:
        return None
    return strings(columns, layout.optional["system"], problems, required=False).to_pylist()


def _tools(columns: Columns, layout: Layout, problems: Problems) -> dict[str, pa.Array]:
    if "tools" not in layout.optional:
        return {}
    column, found = layout.optional["tools"], []
    for index, value in enumerate(columns.listed(column)):
        try:
            found.append(tools_json(value))
        except BadConversation as error:
            problems.add(index, *error.args)
            found.append(None)
    return {"tools": pa.array(found, pa.string())}


def _kind(value: str, size: int) -> pa.Array:
    return pa.array([value] * size, pa.string())


def chat(columns: Columns, layout: Layout, problems: Problems) -> dict[str, Any]:
    """Messages in OpenAI or ShareGPT keys, with tools and a system column."""
    found = conversations(columns, layout.fields["messages"], problems)
    messages = _json(found, _systems(columns, layout, problems))
    return {"kind": _kind("chat", len(columns)), "messages": messages, **_tools(columns, layout, problems)}


def _unsupervised(messages: Messages) -> Messages:
    """The messages with weight 0 on the assistant's, so that nothing is learnt from them."""
    return [{**m, "weight": 0} if m["role"] == "assistant" else m for m in messages]


def conversational_pair(columns: Columns, layout: Layout, problems: Problems) -> dict[str, Any]:
    """Prompt and completion that are lists of messages; only the completion's are learnt from."""
    prompts = conversations(columns, layout.fields["prompt"], problems, answered=False)
    completions = conversations(columns, layout.fields["completion"], problems)
    joined = [
        None if p is None or c is None else [*_unsupervised(p), *c] for p, c in zip(prompts, completions, strict=True)
    ]
    messages = _json(joined, _systems(columns, layout, problems))
    return {"kind": _kind("chat", len(columns)), "messages": messages}


def preference(columns: Columns, layout: Layout, problems: Problems) -> dict[str, Any]:
    """Chosen and rejected, as text after a prompt or as conversations."""
    chosen_column, rejected_column = layout.fields["chosen"], layout.fields["rejected"]
    if columns.holds_lists(chosen_column) or columns.holds_lists(rejected_column):
        arrays = _preferred_messages(columns, layout, problems)
        chosen, rejected = arrays["messages"], arrays["rejected_messages"]
    else:
        arrays = _preferred_texts(columns, layout, problems)
        chosen, rejected = arrays["completion"], arrays["rejected"]
    same = pc.fill_null(pc.equal(chosen, rejected), False)
    fix = "They must differ."
    problems.mark(same, lambda i: (rejected_column, "chosen and rejected are the same", fix, chosen[i].as_py()))
    return {"kind": _kind("preference", len(columns)), **arrays}


def _preferred_texts(columns: Columns, layout: Layout, problems: Problems) -> dict[str, Any]:
    chosen = strings(columns, layout.fields["chosen"], problems)
    rejected = strings(columns, layout.fields["rejected"], problems)
    if "prompt" in layout.optional:
        prompt = strings(columns, layout.optional["prompt"], problems)
        straight = layout.optional["prompt"].lower() == "prompt"
        arrays = {"prompt": prompt, "completion": chosen, "rejected": rejected}
        if not straight:
            arrays["separator"] = _kind("\n", len(columns))
    else:
        cut = [_split(c or "", r or "") for c, r in zip(chosen.to_pylist(), rejected.to_pylist(), strict=True)]
        fix = "Add a column 'prompt', or begin both with the same dialogue up to its last 'Assistant:'."
        for index, parts in enumerate(cut):
            if parts is None:
                problems.add(index, layout.fields["chosen"], "there is no prompt", fix, chosen[index].as_py() or "")
        columns_of = zip(*[parts or (None, None, None) for parts in cut], strict=True) if cut else ((), (), ())
        arrays = dict(
            zip(("prompt", "completion", "rejected"), [pa.array(c, pa.string()) for c in columns_of], strict=True)
        )
    systems = _systems(columns, layout, problems)
    return arrays if systems is None else arrays | {"system": pa.array(systems, pa.string())}


def _split(chosen: str, rejected: str) -> tuple[str, str, str] | None:
    """A dialogue written out as text, cut after the last ``Assistant:`` that both sides share."""
    end = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
    cut = chosen.rfind("Assistant:", 0, end or min(len(chosen), len(rejected)))
    if cut < 0:
        return None
    cut += len("Assistant:")
    prompt, good, bad = chosen[:cut], chosen[cut:], rejected[cut:]
    return (prompt, good, bad) if good.strip() and bad.strip() else None


def _preferred_messages(columns: Columns, layout: Layout, problems: Problems) -> dict[str, Any]:
    chosen = conversations(columns, layout.fields["chosen"], problems)
    rejected = conversations(columns, layout.fields["rejected"], problems)
    prompts: list[Messages | None] = [[]] * len(columns)
    if "prompt" in layout.optional:
        column = layout.optional["prompt"]
        if columns.holds_lists(column):
            prompts = conversations(columns, column, problems, answered=False)
        else:
            texts = strings(columns, column, problems).to_pylist()
            prompts = [None if t is None else [{"role": "user", "content": t}] for t in texts]
    sides: tuple[list[Messages | None], list[Messages | None]] = ([], [])
    for prompt, good, bad in zip(prompts, chosen, rejected, strict=True):
        for side, messages in zip(sides, _pair_of(prompt, good, bad), strict=True):
            side.append(messages)
    systems = _systems(columns, layout, problems)
    arrays = {"messages": _json(sides[0], systems), "rejected_messages": _json(sides[1], systems)}
    return arrays | _tools(columns, layout, problems)


def _pair_of(
    prompt: Messages | None, good: Messages | None, bad: Messages | None
) -> tuple[Messages | None, Messages | None]:
    """Both sides as whole conversations; what they share is not learnt from."""
    if prompt is None or good is None or bad is None:
        return None, None
    # Some files repeat the prompt at the head of both sides, others do not.
    speaks = next((m for m in good if m["role"] != "system"), good[0])
    if prompt and speaks["role"] == "assistant":
        good, bad = [*prompt, *good], [*prompt, *bad]
    shared = next((i for i, (a, b) in enumerate(zip(good, bad, strict=False)) if a != b), min(len(good), len(bad)))
    return _unsupervised(good[:shared]) + good[shared:], _unsupervised(bad[:shared]) + bad[shared:]
