"""What a writer is, and a writer whose completions are kept by content so that nothing is written twice.

A prompt is a list of token ids, a text, or a conversation (a list of messages); which of these a writer takes, it says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from luthier.core.errors import LuthierError, UserError
from luthier.core.protocols import Completion
from luthier.core.store import Store, content_hash

Prompt = Sequence[int] | str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Settings:
    """How completions are drawn.

    Attributes:
        temperature: 0 takes the most likely token at each step.
        top_p: probability that the kept tokens hold; 1 keeps all.
        top_k: number of tokens kept; 0 keeps all.
        min_p: least share of the top probability; 0 keeps all.
        max_new_tokens: longest completion.
        stop: texts that end a completion, besides the model's own end.
        seed: of the draws; a writer that takes none says so by drawing anew each time.
        logp: ask for the log-probability of each token.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int = 0
    logp: bool = False


class Writer(Protocol):
    """Writes completions.

    Attributes:
        takes: the forms of prompts it understands: ``ids``, ``text``, ``messages``.
        fingerprint: a hash of all that decides what it writes, apart from prompts and settings.
    """

    takes: tuple[str, ...]
    fingerprint: str

    def write(
        self, prompts: Sequence[Prompt], settings: Settings, *, samples: int = 1
    ) -> Iterator[tuple[int, list[Completion]]]:
        """``(number of the prompt, its completions)``, each as soon as it is there, in any order.

        Raises:
            UserError: the writer cannot be had, or refuses the request.
            LuthierError: it failed while writing; what was given before stands.
        """


def form(prompt: Prompt) -> str:
    """``ids``, ``text`` or ``messages``."""
    if isinstance(prompt, str):
        return "text"
    return "messages" if len(prompt) and isinstance(prompt[0], Mapping) else "ids"


class Kept:
    """A writer that keeps every completion on disk as soon as it is there, and gives what it has without writing.

    Completions of one writer with the same settings lie in one file, a line for each prompt; a line that a kill cut
    short is passed over.

    Args:
        writer: who writes what is not there yet.
        store: where they are kept; the user's store by default.
    """

    def __init__(self, writer: Writer, store: Store | None = None) -> None:
        self.writer, self.store = writer, store or Store()
        self.takes, self.fingerprint = writer.takes, writer.fingerprint

    def file(self, settings: Settings, samples: int) -> Path:
        """Where the completions are."""
        key = content_hash(self.fingerprint, asdict(settings), samples, "v1")
        return self.store.folder("written", key) / "completions.jsonl"

    def write(
        self, prompts: Sequence[Prompt], settings: Settings, *, samples: int = 1
    ) -> Iterator[tuple[int, list[Completion]]]:
        """As :meth:`Writer.write`; equal prompts are written once.

        Raises:
            LuthierError: the writer failed; the message tells how many prompts are done.
        """
        keys = [content_hash(plain(prompt)) for prompt in prompts]
        path = self.file(settings, samples)
        held = _read(path)
        places: dict[str, list[int]] = {}
        for index, key in enumerate(keys):
            places.setdefault(key, []).append(index)
        missing = [key for key in places if key not in held]
        for key in places:
            if key in held:
                yield from ((index, held[key]) for index in places[key])
        if not missing:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        done = len(places) - len(missing)
        with path.open("a", encoding="utf-8") as file:
            if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
                file.write("\n")
            try:
                for number, some in self.writer.write(
                    [prompts[places[k][0]] for k in missing], settings, samples=samples
                ):
                    line = {"prompt": missing[number], "completions": [vars(c) for c in some]}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    file.flush()
                    done += 1
                    yield from ((index, some) for index in places[missing[number]])
            except LuthierError as error:
                raise type(error)(
                    f"{error} {done:,} of {len(places):,} prompts are done and kept: run the same again to go on."
                ) from error


def kept(
    writer: Writer, prompts: Sequence[Prompt], settings: Settings, *, samples: int = 1, store: Store | None = None
) -> list[list[Completion]]:
    """The completions of every prompt in order, from the store where they are there.

    Raises:
        UserError: a prompt has a form that the writer does not take.
        LuthierError: the writer failed, or gave another number of completions; what is done is kept.
    """
    for index, prompt in enumerate(prompts):
        if form(prompt) not in writer.takes:
            raise UserError(
                f"prompt {index + 1} is given as {form(prompt)}, and this back-end takes {' or '.join(writer.takes)}."
            )
    found: list[list[Completion]] = [[] for _ in prompts]
    for index, some in Kept(writer, store).write(prompts, settings, samples=samples):
        found[index] = some
    for index, some in enumerate(found):
        if len(some) != samples:
            raise LuthierError(f"the back-end gave {len(some)} completions for prompt {index + 1}, not {samples}.")
    return found


def plain(prompt: Prompt) -> Any:
    """A prompt as JSON."""
    return prompt if isinstance(prompt, str) else [dict(p) if isinstance(p, Mapping) else int(p) for p in prompt]


def _read(path: Path) -> dict[str, list[Completion]]:
    """What a file of completions holds, by prompt."""
    held: dict[str, list[Completion]] = {}
    if not path.exists():
        return held
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            value = json.loads(line)
        except ValueError:  # cut short by a kill
            continue
        held[value["prompt"]] = [
            Completion(c["text"], tuple(c["token_ids"]), c["finished"], tuple(c["token_logp"]))
            for c in value["completions"]
        ]
    return held
