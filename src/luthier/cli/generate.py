"""``luthier generate``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli import common
from luthier.core.errors import UserError

Prompt = str | list[dict[str, Any]]


def generate(
    model: Annotated[
        str, typer.Argument(help="A model folder, the folder of a run, a hub id or lab:nano.", show_default=False)
    ],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts; without any, or with -, lines from standard input.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Prompts from a file: a text per line, or JSONL.")
    ] = None,
    decoding: Annotated[str, typer.Option("--decoding", "-d", help="A decoding method.")] = "greedy",
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="An option of it, such as temperature=0.7.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")] = 256,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of what a sampling method draws.")] = 0,
    as_json: common.Json = False,
) -> None:
    """Let a model answer prompts."""
    wanted = _prompts(prompts or [], file)
    options = _checked(decoding, option or [])
    from luthier.runs import api

    answers = api.generate(model, wanted, decoding=decoding, options=options, max_new_tokens=max_new_tokens, seed=seed)
    pairs = [{"prompt": p, "completion": a} for p, a in zip(wanted, answers, strict=True)]

    def human(_: Any) -> None:
        for pair in pairs:
            if len(pairs) > 1:
                shown = pair["prompt"] if isinstance(pair["prompt"], str) else pair["prompt"][-1].get("content", "")
                print(f">>> {shown}")
            print(pair["completion"])

    common.emit(pairs, as_json, human)


def _checked(decoding: str, texts: list[str]) -> dict[str, Any]:
    """The options of a decoding method, refused before any model is loaded."""
    from luthier.core import registry
    from luthier.recipe.plan import method_options
    from luthier.recipe.source import parse

    options: dict[str, Any] = {}
    for text in texts:
        name, equals, raw = text.partition("=")
        if not equals or not name.strip():
            raise UserError(f"'{text}' is not written name=value, such as temperature=0.7.", where="--option")
        options[name.strip()] = parse(raw, f"--option {text}")[0]
    checked = method_options(registry.get("decoding", decoding), options, path=("--option",))
    return {name: checked[name] for name in options}


def _prompts(given: list[str], file: Path | None) -> list[Prompt]:
    if file is not None:
        if given:
            raise UserError("give prompts or --file, not both.")
        if not file.is_file():
            raise UserError(f"there is no file '{file}'.", where="--file")
        lines, where = _lines(file.read_bytes(), str(file)), str(file)
        jsonl = file.suffix in {".jsonl", ".json"}
    elif given and given != ["-"]:
        return list(given)
    elif given or not sys.stdin.isatty():
        lines, where, jsonl = _lines(sys.stdin.buffer.read(), "standard input"), "standard input", False
    else:
        raise UserError('give at least one prompt: luthier generate MODEL "a prompt"')
    found = [_row(line, f"{where}:{n}") if jsonl else line for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError("holds no prompt.", where=where)
    return found


def _lines(data: bytes, where: str) -> list[str]:
    try:
        return data.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 text (byte {error.start}).", where=where) from None


def _row(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"not valid JSON: {error}.", where=where) from None
    value = row if isinstance(row, str) else row.get("messages", row.get("prompt")) if isinstance(row, dict) else None
    chat = isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m for m in value)
    if not isinstance(value, str) and not chat:
        raise UserError("a row holds 'prompt' (text) or 'messages' (a list of {role, content}).", where=where)
    return value  # type: ignore[return-value]
