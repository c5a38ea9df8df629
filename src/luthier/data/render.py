"""The one path from a row to token ids and supervised spans, for training, evaluation and generation."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from luthier.core.errors import UserError, did_you_mean
from luthier.core.store import content_hash
from luthier.data.encoder import Encoded, Encoder
from luthier.data.layouts import TASK_LAYOUTS
from luthier.data.templates import ChatTemplate, Messages, Span, resolve, strip_thinking

TRUNCATIONS = ("error", "keep_start", "drop")
# The further column with the token ids of a row's last answer, the end token included; read only where asked for.
ANSWER_IDS = "answer_ids"
Row = dict[str, Any]


@dataclass(slots=True)
class Rendered:
    """A row as the model sees it.

    Attributes:
        input_ids: the tokens.
        spans: supervised tokens as half-open intervals, in order.
        origins: (start, end, where) for every token; only from :meth:`Renderer.render`.
        prompt_length: how many tokens generation would start from.
        rejected: the other side of a preference row.
        positions: first token of each word that has one (token-classification).
        words: which word of the row each position belongs to.
        over: tokens past ``max_length`` before any were cut.
        lost: supervised tokens that were cut off.
    """

    input_ids: list[int]
    spans: list[Span]
    origins: list[tuple[int, int, str]] = field(default_factory=list)
    prompt_length: int = 0
    rejected: Rendered | None = None
    positions: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    over: int = 0
    lost: int = 0

    @property
    def supervised(self) -> int:
        """How many tokens are targets."""
        return sum(end - start for start, end in self.spans)

    def answered(self, ids: list[int]) -> Rendered:
        """The same with other tokens from the end of the prompt on, which are all targets."""
        start = self.prompt_length
        spans = [span for span in self.spans if span[1] <= start]
        end = start + len(ids)
        return replace(self, input_ids=[*self.input_ids[:start], *ids], spans=[*spans, (max(start, 1), end)])


@dataclass(slots=True)
class _Plan:
    """What must be tokenized for one side of a row: its texts, and how they become one list of ids.

    ``parts`` are tokenized apart and joined; ``learnt`` says which are targets. A chat is one part, ``text``, with
    character spans and the length of its prompt.
    """

    parts: list[tuple[str, str]]
    learnt: tuple[bool, ...] = ()
    spans: list[Span] = field(default_factory=list)
    prompt_end: int = 0
    chat: bool = False


class Renderer:
    """Renders canonical rows.

    Args:
        processor: the transformers tokenizer (or image processor).
        task: the task of the model.
        template: see :func:`luthier.data.templates.resolve`.
        system: a system prompt for rows that have none.
        max_length: tokens that a row may have; None for no limit.
        truncation: ``error``, ``keep_start`` or ``drop`` for rows that are longer.
        add_eos: end raw rows with the end token.
        thinking: ``strip`` leaves <think> blocks out of the assistant's messages.

    Raises:
        UserError: an option has no such value.
    """

    def __init__(
        self,
        processor: Any,
        *,
        task: str,
        template: str | None = None,
        system: str | None = None,
        max_length: int | None = None,
        truncation: str = "error",
        add_eos: bool = True,
        thinking: str = "keep",
    ) -> None:
        _check("model.task", task, tuple(TASK_LAYOUTS))
        _check("data.truncation", truncation, TRUNCATIONS)
        _check("data.thinking", thinking, ("keep", "strip"))
        self.processor, self.task, self.system = processor, task, system
        self.max_length, self.truncation, self.add_eos, self.thinking = max_length, truncation, add_eos, thinking
        self.answer_ids = False
        self.has_text = task != "image-classification"
        if self.has_text:
            self.encoder = Encoder(processor)
        self.template = resolve(template, processor) if task == "causal-lm" else None
        self.chat = ChatTemplate(self.template, processor, lenient=thinking == "strip") if self.template else None

    @property
    def fingerprint(self) -> str:
        """A hash of the tokenizer, the template and every option that changes ids or spans."""
        options = [self.task, self.template, self.system, self.max_length, self.truncation, self.add_eos, self.thinking]
        given = [ANSWER_IDS] if self.answer_ids else []
        return content_hash(options + given, self.encoder.fingerprint() if self.has_text else "")

    def with_answer_ids(self) -> Renderer:
        """A copy that takes the tokens of a row's last answer from its further column ``answer_ids``, if it has one.

        What a model has written is learnt as it wrote it: its text may fall into other tokens.
        """
        made = copy.copy(self)
        made.answer_ids = True
        return made

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer: the tokenizer's end token, and the one that the template writes."""
        found = [] if self.encoder.eos is None else [self.encoder.eos]
        if self.chat and self.chat.turn_end:
            ids = self.encoder.ids([self.chat.turn_end])[0]
            found += [i for i in ids if i in self.encoder.special and i not in found]
        return found

    def prompts(self, rows: Any) -> dict[str, Any]:
        """What generation must know to write prompts as in training, where the saved tokenizer does not tell.

        Args:
            rows: the dataset of canonical training rows.
        """
        if self.task != "causal-lm":
            return {}
        known: dict[str, Any] = {"system": self.system}
        if self.template is None:
            known["template"] = "none" if getattr(self.processor, "chat_template", None) else None
            known["separator"] = _common_end(rows)
        return {key: value for key, value in known.items() if value}

    def render(self, row: Row) -> Rendered:
        """One row, with the origin of each token.

        Raises:
            UserError: the row cannot be rendered; it names file and row.
        """
        from luthier.data.origins import origins

        rendered = self.render_batch([row])[0]
        rendered.origins = origins(self, row, rendered)
        return rendered

    def prompt_ids(self, row: Row) -> list[int]:
        """The tokens from which generation starts: exactly those with which the training row begins.

        Raises:
            UserError: the row cannot be rendered; it names file and row.
        """
        if row["kind"] == "text":
            return self._join([self.encoder.ids([row["text"]])[0]], eos=False)[:1]
        if self.chat is None and not row.get("messages"):
            return self._join([self.encoder.ids([self.prompt_text(row)])[0]], eos=False)
        text = self._located(row, lambda: self._chat().prompt(*self.messages_of(row, "messages")))
        return self.encoder.ids([text])[0]

    def render_batch(self, rows: Sequence[Row]) -> list[Rendered]:
        """Many rows with one call of the tokenizer; ``origins`` are left empty.

        Raises:
            UserError: a row cannot be rendered; it names file and row.
        """
        if self.task in ("sequence-classification", "sequence-regression", "masked-lm"):
            return [self._cut_special(e) for e in self.encoder.encode([r["text"] for r in rows], special=True)]
        if self.task == "token-classification":
            texts = [" ".join(r["tokens"]) for r in rows]
            encoded = self.encoder.encode(texts, special=True)
            return [self._tagged(r["tokens"], e) for r, e in zip(rows, encoded, strict=True)]
        if self.task == "image-classification":
            return [Rendered([], []) for _ in rows]
        plans = [self._plan(row, "completion", "messages") for row in rows]
        sided = [i for i, row in enumerate(rows) if row["kind"] == "preference"]
        plans += [self._plan(rows[i], "rejected", "rejected_messages") for i in sided]
        answers = [json.loads(row["extra"] or "{}").get(ANSWER_IDS) for row in rows] if self.answer_ids else []
        rendered = self._tokenize(plans, answers + [None] * (len(plans) - len(answers)))
        for index, other in zip(sided, rendered[len(rows) :], strict=True):
            rendered[index].rejected = other
        return rendered[: len(rows)]

    # -- what is to be tokenized -------------------------------------------------------------------------------------

    def _plan(self, row: Row, completion: str, messages: str) -> _Plan:
        if row["kind"] == "text":
            return _Plan([("text", row["text"])], (True,))
        if self.chat is None and not row.get(messages):
            return _Plan([("prompt", self.prompt_text(row)), ("completion", row[completion])], (False, True))

        def locate() -> _Plan:
            text, spans, prompt_end = self._chat().locate(*self.messages_of(row, messages, completion))
            return _Plan([("text", text)], (), spans, prompt_end, True)

        return self._located(row, locate)

    def _chat(self) -> ChatTemplate:
        if self.chat is None:
            raise UserError(
                "the row is a conversation, but the tokenizer has no chat template. Set `data.template` to chatml, "
                "plain, or a .jinja file."
            )
        return self.chat

    @staticmethod
    def _located(row: Row, work: Any) -> Any:
        try:
            return work()
        except UserError as error:
            if error.where is None:
                raise UserError(error.message, where=f"{row.get('source', 'row')}, row {row.get('row', '?')}") from None
            raise

    def prompt_text(self, row: Row) -> str:
        """A prompt as raw text: the system prompt before it, the separator behind it."""
        prompt = row["prompt"]
        # The prompt must not depend on the answer, so only its own end decides.
        separator = "" if prompt[-1:].isspace() else row.get("separator") or ""
        system = row.get("system") or self.system
        return (f"{system}\n\n" if system else "") + prompt + separator

    def messages_of(self, row: Row, column: str, completion: str = "completion") -> tuple[Messages, Any]:
        """A row's conversation as the template gets it, and its tools."""
        if row.get(column):
            messages = json.loads(row[column])
        else:
            messages = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row.get(completion) or ""},
            ]
        system = row.get("system") or self.system
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        if self.thinking == "strip":
            messages = strip_thinking(messages)
        return messages, json.loads(row["tools"]) if row.get("tools") else None

    # -- tokens and spans --------------------------------------------------------------------------------------------

    def _tokenize(self, plans: list[_Plan], answers: list[list[int] | None]) -> list[Rendered]:
        chats = [p for p in plans if p.chat]
        whole = iter(self.encoder.encode([p.parts[0][1] for p in chats]) if self.encoder.has_offsets else [])
        prompts = iter(self.encoder.ids([p.parts[0][1][: p.prompt_end] for p in chats]))
        raw = iter(self.encoder.ids([text for p in plans if not p.chat for _, text in p.parts]))
        found = []
        for plan, answer in zip(plans, answers, strict=True):
            if plan.chat:
                text, prompt = plan.parts[0][1], next(prompts)
                encoded = next(whole) if self.encoder.has_offsets else None
                rendered = self._chat_tokens(text, plan, encoded, prompt)
            else:
                rendered = self._raw_tokens([next(raw) for _ in plan.parts], plan.learnt)
            found.append(self._cut(rendered if answer is None else rendered.answered(answer)))
        return found

    def _join(self, parts: list[list[int]], *, eos: bool) -> list[int]:
        ids = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        if self.encoder.adds_bos and ids[:1] != [self.encoder.bos]:
            ids = [self.encoder.bos, *ids]
        if eos and self.add_eos and self.encoder.eos is not None and ids[-1:] != [self.encoder.eos]:
            ids = [*ids, self.encoder.eos]
        return ids

    def _raw_tokens(self, parts: list[list[int]], learnt: tuple[bool, ...]) -> Rendered:
        ids = self._join(parts, eos=True)
        if len(parts) == 1:
            return Rendered(ids, [(1, len(ids))] if len(ids) > 1 else [], prompt_length=1)
        start = len(self._join(parts[:1], eos=False))
        # Without a token before it, the first one cannot be predicted.
        return Rendered(ids, [(max(start, 1), len(ids))] if len(ids) > max(start, 1) else [], prompt_length=start)

    def _chat_tokens(self, text: str, plan: _Plan, encoded: Encoded | None, prompt: list[int]) -> Rendered:
        end = plan.prompt_end
        if encoded is not None and encoded.ids[: len(prompt)] == prompt:
            ids, at = encoded.ids, encoded.token_at
        else:
            # A token would reach over the end of the prompt; generation never sees that token, so cut there.
            ids = prompt + self.encoder.ids([text[end:]])[0]

            def at(character: int) -> int:
                if character > end:
                    return len(prompt) + len(self.encoder.ids([text[end:character]])[0])
                return len(self.encoder.ids([text[:character]])[0])

        places = {end: len(prompt), len(text): len(ids)}
        spans = [(places[s] if s in places else at(s), places[e] if e in places else at(e)) for s, e in plan.spans]
        spans = [(max(s, 1), e) for s, e in spans if e > max(s, 1)]
        return Rendered(ids, spans, prompt_length=len(prompt))

    def _cut(self, rendered: Rendered) -> Rendered:
        if self.max_length is None or len(rendered.input_ids) <= self.max_length:
            return rendered
        rendered.over = len(rendered.input_ids) - self.max_length
        if self.truncation == "keep_start":
            before = rendered.supervised
            rendered.input_ids = rendered.input_ids[: self.max_length]
            kept = [(s, min(e, self.max_length)) for s, e in rendered.spans]
            rendered.spans = [(s, e) for s, e in kept if e > s]
            rendered.lost = before - rendered.supervised
        return rendered

    def _cut_special(self, encoded: Encoded) -> Rendered:
        """Cuts before a closing special token, which encoders need at the end."""
        rendered = Rendered(encoded.ids, [])
        if self.max_length is not None and len(encoded.ids) > self.max_length:
            rendered.over = len(encoded.ids) - self.max_length
            if self.truncation == "keep_start":
                last = encoded.ids[-1:] if encoded.ids[-1] in self.encoder.special else []
                rendered.input_ids = encoded.ids[: self.max_length - len(last)] + last
        return rendered

    def _tagged(self, tokens: list[str], encoded: Encoded) -> Rendered:
        rendered = self._cut_special(encoded)
        if not self.encoder.has_offsets:
            raise UserError("token-classification needs a fast tokenizer (tokenizer.json).", where="model")
        starts, at = [], 0
        for token in tokens:
            starts.append(at)
            at += len(token) + 1
        limit = len(rendered.input_ids) - (1 if rendered.over and len(rendered.input_ids) < len(encoded.ids) else 0)
        taken = -1
        for word, start in enumerate(starts):
            position = encoded.token_at(start)
            # A word of characters that the tokenizer drops has no token of its own.
            own = position < (encoded.token_at(starts[word + 1]) if word + 1 < len(starts) else len(encoded.ids))
            if own and taken < position < limit:
                rendered.positions.append(position)
                rendered.words.append(word)
                taken = position
        rendered.lost = len(tokens) - len(rendered.positions) if rendered.over else 0
        return rendered


def _check(where: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise UserError(
            f"unknown value '{value}'.{did_you_mean(value, accepted)} Accepted: {', '.join(accepted)}.", where=where
        )


def _common_end(rows: Any) -> str | None:
    """What every raw prompt of a dataset ends with before its answer: a separator, or white space of its own.

    White space at the end of all prompts is easily forgotten at a command line; None where prompts differ in it.
    """
    import pyarrow.compute as pc

    found: set[str | None] = set()
    for table in rows.select_columns(["prompt", "separator"]).with_format("arrow").iter(10_000):
        own = pc.replace_substring_regex(table["prompt"], r"^[\s\S]*\S", "")
        ends = pc.if_else(pc.equal(own, ""), pc.fill_null(table["separator"], ""), own)
        found.update(end for end in pc.unique(ends).to_pylist() if end is not None)
        if len(found) > 1:
            return None
    return found.pop() if found else None
