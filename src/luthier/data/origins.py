"""Where each token of a rendered row comes from, for people to look at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from luthier.core.errors import UserError

if TYPE_CHECKING:
    from luthier.data.render import Rendered, Renderer


def origins(renderer: Renderer, row: dict[str, Any], rendered: Rendered) -> list[tuple[int, int, str]]:
    """(start, end, where) for every token of ``rendered.input_ids``, in order and without gaps."""
    size = len(rendered.input_ids)
    if row["kind"] in ("pair", "preference") and not row.get("messages") and renderer.chat is None:
        edges = [(rendered.prompt_length, "prompt"), (size, "completion")]
    elif renderer.task != "causal-lm" or row["kind"] == "text":
        edges = [(size, "text")]
    else:
        edges = _chat_edges(renderer, row, rendered)
    found, start = [], 0
    for end, where in edges:
        end = min(end, size)
        if end > start:
            found.append((start, end, where))
            start = end
    return found


def _chat_edges(renderer: Renderer, row: dict[str, Any], rendered: Rendered) -> list[tuple[int, str]]:
    """The end of each message among the tokens; what a template writes around it counts as the message's."""
    messages, tools = renderer.messages_of(row, "messages")
    shown = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
    assert renderer.chat is not None
    text = renderer.chat.render(shown, tools)
    edges = []
    for index, message in enumerate(shown):
        try:
            until = renderer.chat.render(shown[: index + 1], tools)
        except UserError:
            continue  # some templates refuse a conversation that is cut here; the next message takes its tokens
        if text.startswith(until):
            edges.append((len(renderer.encoder.ids([until])[0]), f"message {index + 1}: {message['role']}"))
    return [*edges, (len(rendered.input_ids), "template")]
