"""Any server that speaks the completions protocol of OpenAI (vLLM, llama.cpp, TGI, ...): several requests at once."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from luthier.core.errors import LuthierError, UserError
from luthier.core.protocols import Completion
from luthier.core.store import content_hash
from luthier.generation.base import Prompt, Settings, form

# Answers of a server that may be another in a while.
PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
MOST_SECONDS_BETWEEN = 60.0


class Endpoint:
    """A server.

    Args:
        url: up to and with the version, such as ``http://localhost:8000/v1``.
        model: the name under which the server has it.
        api_key_variable: environment variable that holds the key, where the server wants one.
        parallel: requests under way at once.
        tries: how often a request is sent before it counts as failed.
        pause: seconds before the second try; doubled for each one after.
        timeout: seconds until an answer must be there.
    """

    takes: tuple[str, ...] = ("ids", "text", "messages")

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key_variable: str = "OPENAI_API_KEY",
        parallel: int = 8,
        tries: int = 5,
        pause: float = 1.0,
        timeout: float = 600.0,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"the address of a server begins with http:// or https://, not '{url}'.")
        self.url, self.model, self.api_key_variable = url.rstrip("/"), model, api_key_variable
        self.parallel, self.tries, self.pause, self.timeout = parallel, tries, pause, timeout
        self.fingerprint = content_hash("endpoint", self.url, model)

    def write(
        self, prompts: Sequence[Prompt], settings: Settings, *, samples: int = 1
    ) -> Iterator[tuple[int, list[Completion]]]:
        """As :meth:`luthier.generation.base.Writer.write`.

        Raises:
            UserError: the server refuses the request: wrong key, no such model, a field it does not know.
            LuthierError: it cannot be reached, or answers nothing useful, after all tries. Requests that were under way
                are waited for and given first.
        """
        waiting, failed = iter(enumerate(prompts)), None
        with ThreadPoolExecutor(self.parallel) as pool:
            running: dict[Future[list[Completion]], int] = {}
            while True:
                while failed is None and len(running) < self.parallel and (item := next(waiting, None)) is not None:
                    running[pool.submit(self.one, item[1], settings, samples)] = item[0]
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    index = running.pop(future)
                    if (error := future.exception()) is not None:
                        failed = failed or error
                    else:
                        yield index, future.result()
        if failed is not None:
            raise failed

    def one(self, prompt: Prompt, settings: Settings, samples: int) -> list[Completion]:
        """The completions of one prompt; servers that give fewer than asked for are asked again for the rest."""
        chat = form(prompt) == "messages"
        found: list[Completion] = []
        while len(found) < samples:
            body: dict[str, Any] = {
                "model": self.model,
                "n": samples - len(found),
                "temperature": settings.temperature,
                "top_p": settings.top_p,
                "max_tokens": settings.max_new_tokens,
                "seed": int(content_hash(settings.seed, prompt, len(found))[:7], 16),
                **(
                    {"messages": list(prompt)}
                    if chat
                    else {"prompt": prompt if isinstance(prompt, str) else list(prompt)}
                ),
            }
            # Not of the protocol, but understood by most servers of open models.
            body |= {k: v for k in ("top_k", "min_p", "stop") if (v := getattr(settings, k))}
            if settings.logp:
                body["logprobs"] = True if chat else 0
            answer = self.post("/chat/completions" if chat else "/completions", body)
            try:
                some = [_completion(choice, chat) for choice in answer["choices"]]
            except (KeyError, TypeError, AttributeError) as error:
                raise LuthierError(f"{self.url} gave an answer without completions: {str(answer)[:200]}.") from error
            if not some:
                raise LuthierError(f"{self.url} gave an answer without completions: {str(answer)[:200]}.")
            found += some
        return found[:samples]

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Send a request, again after a while where that may help.

        Raises:
            UserError: the server refuses it.
            LuthierError: all tries failed.
        """
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.api_key_variable):
            headers["Authorization"] = f"Bearer {key}"
        data, last, pause = json.dumps(body).encode(), "", self.pause
        for attempt in range(self.tries):
            if attempt:
                time.sleep(min(pause, MOST_SECONDS_BETWEEN))
                pause *= 2
            try:
                request = urllib.request.Request(self.url + path, data=data, headers=headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                said = error.read().decode(errors="replace")[:300].strip()
                if error.code not in PASSING:
                    raise UserError(f"{self.url} refuses the request ({error.code}): {said}") from error
                last = f"{error.code} {said}"
                if (after := error.headers.get("Retry-After", "")).isdecimal():
                    pause = max(pause, float(after))
            except (OSError, ValueError) as error:  # no connection, a timeout, or an answer that is no JSON
                last = str(getattr(error, "reason", error))
        raise LuthierError(f"{self.url} cannot be reached or gives no answer after {self.tries} tries: {last}.")


def _completion(choice: Mapping[str, Any], chat: bool) -> Completion:
    given = choice.get("logprobs") or {}
    if chat:
        text = choice["message"].get("content") or ""
        logp = [token["logprob"] for token in given.get("content") or ()]
    else:
        text, logp = choice["text"], list(given.get("token_logprobs") or ())
    return Completion(text, (), choice.get("finish_reason") == "stop", tuple(logp))
