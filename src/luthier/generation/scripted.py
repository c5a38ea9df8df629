"""Completions that are written down beforehand: for tests, and for replaying what another engine wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from luthier.core.errors import UserError
from luthier.core.protocols import Completion
from luthier.core.store import content_hash
from luthier.generation.base import Prompt, Settings, plain


class Scripted:
    """Replays completions by prompt.

    Args:
        script: prompt -> its completions in order; a prompt that is no text stands as its JSON.
    """

    takes: tuple[str, ...] = ("ids", "text", "messages")

    def __init__(self, script: Mapping[str, Sequence[str]]) -> None:
        self.script = {prompt: list(texts) for prompt, texts in script.items()}
        self.fingerprint = content_hash("scripted", self.script)
        self.asked: list[Prompt] = []

    @classmethod
    def read(cls, path: str | Path) -> Scripted:
        """A JSON Lines file of ``{"prompt": ..., "completions": [...]}``.

        Raises:
            UserError: it is not there, or a line is of another form.
        """
        script: dict[str, Sequence[str]] = {}
        path = Path(path).expanduser()
        if not path.is_file():
            raise UserError(f"there is no script of completions '{path}'.")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                value = json.loads(line)
                script[_name(value["prompt"])] = [str(text) for text in value["completions"]]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    'is no {"prompt": ..., "completions": [...]}: ' + str(error), where=f"{path}, line {number}"
                ) from error
        return cls(script)

    def write(
        self, prompts: Sequence[Prompt], settings: Settings, *, samples: int = 1
    ) -> Iterator[tuple[int, list[Completion]]]:
        """The first ``samples`` completions of each prompt.

        Raises:
            UserError: the script has none for a prompt, or too few.
        """
        for index, prompt in enumerate(prompts):
            self.asked.append(prompt)
            texts = self.script.get(_name(prompt), [])
            if len(texts) < samples:
                raise UserError(
                    f"the script has {len(texts)} completions for prompt {index + 1}; {samples} are asked for."
                )
            yield index, [Completion(text, (), finished=True) for text in texts[:samples]]


def _name(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(plain(prompt), ensure_ascii=False)
