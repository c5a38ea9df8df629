"""A language model as judge: it is shown question, reference and answer, and returns a score of 0 or 1.

The judge is any server that speaks the completions protocol of OpenAI; it answers at temperature 0 with a JSON object
``{"score": 0}`` or ``{"score": 1}``. A reply without one counts as 0. Replies are kept by content, so nothing is asked
twice. When more than ``most_failures`` of the replies of a call are without a score, the run stops: a judge that has
broken down must not look like a batch of wrong answers.

Example::

    transforms: [rollouts: {reward: {judge: {url: "http://localhost:8000/v1", model: judge}}, samples: 8}]
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from luthier.core.errors import LuthierError
from luthier.core.registry import reward
from luthier.functional.answers import reference_texts

INSTRUCTION = (
    "You grade answers. You get a question, the reference answer and a candidate. The candidate scores 1 when it says "
    "the same as the reference, in whatever words, and claims nothing that contradicts it; otherwise it scores 0. A "
    'candidate that declines to answer scores 0. Reply with a JSON object and nothing else, such as {"score": 1}.'
)
_SCORE = re.compile(r'\{[^{}]*"score"\s*:\s*"?([01])(?:\.0)?"?[^{}]*\}')


@reward("judge", example={"url": "http://localhost:1/v1", "model": "judge"})
def judge(
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[str],
    ctx: Any,
    *,
    url: Annotated[str, Field(min_length=1, description="address of the server, with the version")],
    model: Annotated[str, Field(min_length=1, description="the judge's name there")],
    answer: Annotated[str, Field(description="column that holds the reference")] = "answer",
    instruction: Annotated[str, Field(min_length=1, description="what the judge is told")] = INSTRUCTION,
    max_new_tokens: Annotated[int, Field(ge=1, description="longest reply, in tokens")] = 64,
    most_failures: Annotated[float, Field(ge=0, le=1, description="share of replies that may have no score")] = 0.1,
    parallel: Annotated[int, Field(ge=1, description="requests under way at once")] = 8,
) -> list[float | None]:
    """A language model's verdict on each completion: 1 where it says what the reference says."""
    from luthier.generation import Settings, kept
    from luthier.generation.endpoint import Endpoint

    asked: list[list[dict[str, str]]] = []
    judged: list[int] = []
    for index, (row, completion) in enumerate(zip(rows, completions, strict=True)):
        golds = reference_texts(row, answer)
        if golds:
            question = row.get("prompt") or _asked(row)
            shown = f"Question: {question}\n\nReference: {' / '.join(golds)}\n\nCandidate: {completion}"
            asked.append([{"role": "system", "content": instruction}, {"role": "user", "content": shown}])
            judged.append(index)
    settings = Settings(temperature=0.0, max_new_tokens=max_new_tokens)
    replies = kept(Endpoint(url, model, parallel=parallel), asked, settings)
    found = [_SCORE.search(some[0].text) for some in replies]
    failed = sum(match is None for match in found)
    if failed > most_failures * len(found):
        first = next(some[0].text for some, match in zip(replies, found, strict=True) if match is None)
        raise LuthierError(
            f"judge: {failed} of {len(found)} replies of '{model}' have no score, such as {first[:100]!r}. Look at the "
            "server, or change the instruction."
        )
    scores: list[float | None] = [None] * len(rows)
    for index, match in zip(judged, found, strict=True):
        scores[index] = float(match.group(1)) if match else 0.0
    return scores


def _asked(row: Mapping[str, Any]) -> str:
    messages = row.get("messages") or "[]"
    messages = json.loads(messages) if isinstance(messages, str) else messages
    return "\n".join(str(m.get("content")) for m in messages if m.get("role") != "assistant")
