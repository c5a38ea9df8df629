"""Show a row as the model sees it: which tokens are supervised, and where each comes from."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any

from luthier.data.render import Rendered, Renderer

if TYPE_CHECKING:
    from rich.text import Text

SUPERVISED = ("bold green", "bold cyan")
CONTEXT = ("dim", "dim italic")


def pieces(renderer: Renderer, ids: list[int]) -> list[str]:
    """The text of each token; where several tokens make one character, the last of them has it and the others none."""
    found: list[str] = []
    # A token's text may depend on those before it (a leading space), so it is the difference of two prefixes; a
    # window keeps that linear in the number of tokens.
    window: list[int] = []
    done = ""
    for index, token in enumerate(ids):
        window.append(token)
        text = _decode(renderer, window)
        if text.endswith("\ufffd") and index < len(ids) - 1:
            found.append("")
            continue
        found.append(text[len(done) :] if text.startswith(done) else _decode(renderer, [token]))
        done = text
        if len(window) >= 16:
            window, done = [token], _decode(renderer, [token])
    return found


def _decode(renderer: Renderer, ids: list[int]) -> str:
    text = renderer.processor.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)


def spans_json(renderer: Renderer, row: dict[str, Any]) -> dict[str, Any]:
    """A JSON-able account of a row's tokens.

    Returns:
        ``row``, ``source``, ``kind``, ``length``, ``supervised`` (number of targets), ``spans``, ``prompt_length``,
        ``tokens`` (each with ``id``, ``text``, ``supervised``, ``origin``), and ``rejected`` for preference rows.
    """
    rendered = renderer.render(row)
    about = {"row": row.get("row"), "source": row.get("source"), "kind": row["kind"], **_side(renderer, rendered)}
    if rendered.rejected is not None:
        about["rejected"] = _side(renderer, rendered.rejected)
    if row.get("label") is not None:
        about["label"] = row["label"]
        about["supervised"] = 1  # the class is the one target
    if row.get("tags"):
        about["tags"] = [
            {"position": p, "word": row["tokens"][w], "tag": row["tags"][w]}
            for p, w in zip(rendered.positions, rendered.words, strict=True)
        ]
        about["supervised"] = len(about["tags"])
    return about


def _side(renderer: Renderer, rendered: Rendered) -> dict[str, Any]:
    supervised = _supervised(rendered)
    origin = [""] * len(supervised)
    for start, end, where in rendered.origins:
        origin[start:end] = [where] * (end - start)
    texts = pieces(renderer, rendered.input_ids) if renderer.has_text else []
    return {
        "length": len(rendered.input_ids),
        "supervised": rendered.supervised,
        "prompt_length": rendered.prompt_length,
        "spans": [list(span) for span in rendered.spans],
        "truncated_tokens": rendered.over,
        "tokens": [
            {"id": i, "text": t, "supervised": s, "origin": o}
            for i, t, s, o in zip(rendered.input_ids, texts, supervised, origin, strict=True)
        ],
    }


def _supervised(rendered: Rendered) -> list[bool]:
    flags = [False] * len(rendered.input_ids)
    for start, end in rendered.spans:
        flags[start:end] = [True] * (end - start)
    return flags


def coloured(renderer: Renderer, row: dict[str, Any]) -> Text:
    """The row for a terminal: supervised tokens bright, the others dim, shades alternating from token to token."""
    from rich.text import Text

    about = spans_json(renderer, row)
    text = Text()
    text.append(f"{about['source']}, row {about['row']} ({about['kind']}): {about['length']} tokens", "bold")
    text.append(f", {about['supervised']} supervised\n", "bold")
    _append_side(text, about)
    if "rejected" in about:
        text.append("\nrejected: ", "bold red")
        text.append(f"{about['rejected']['supervised']} supervised\n", "bold")
        _append_side(text, about["rejected"])
    for tag in about.get("tags", []):
        text.append(f"{tag['word']} ", SUPERVISED[0] if tag["tag"] != "O" else CONTEXT[0])
        text.append(f"{tag['tag']}  ", "magenta" if tag["tag"] != "O" else CONTEXT[0])
    if "label" in about:
        text.append("label: ", "bold")
        text.append(f"{about['label']}\n", "magenta")
    return text


def _append_side(text: Text, about: dict[str, Any]) -> None:
    shade = cycle((0, 1))
    origin = None
    for token in about["tokens"]:
        if token["origin"] != origin:
            origin = token["origin"]
            text.append(f"[{origin}] ", "yellow")
        text.append(token["text"], (SUPERVISED if token["supervised"] else CONTEXT)[next(shade)])
    text.append("\n")
