"""Chat templates: which one is used, rendering with it, and where the assistant's words stand in the text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.core.errors import UserError, did_you_mean

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
THINKING = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
BUILT_IN = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "plain": (
        "{{ bos_token or '' }}"
        "{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}"
        "{{ 'Assistant:' }}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ message['role'] | capitalize + ': ' + message['content'] + '\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
}
WAYS_OUT = (
    "Set `data.thinking: strip` to leave the reasoning out, or choose another `data.template` "
    "(chatml, plain, or a .jinja file)."
)

PROBE = "LUTHIERPROBE"
Span = tuple[int, int]
Messages = list[dict[str, Any]]


def resolve(template: str | None, tokenizer: Any) -> str | None:
    """The text of the chat template to use; None for raw prompt and completion.

    Args:
        template: ``none`` for no template, a built-in name, a path to a .jinja file, template text, or None for the
            tokenizer's own.
        tokenizer: the transformers tokenizer.

    Raises:
        UserError: there is no such template.
    """
    if template is None:
        own = getattr(tokenizer, "chat_template", None)
        return own.get("default", next(iter(own.values()))) if isinstance(own, Mapping) else own
    if template == "none":
        return None
    if template in BUILT_IN:
        return BUILT_IN[template]
    if "{{" in template or "{%" in template:
        return template
    path = Path(template).expanduser()
    if path.is_file():
        return path.read_text(encoding="utf-8")
    accepted = ("none", *BUILT_IN)
    raise UserError(
        f"no chat template '{template}'.{did_you_mean(template, accepted)} Accepted: {', '.join(accepted)}, a .jinja "
        "file, or template text.",
        where="data.template",
    )


class ChatTemplate:
    """One template with one tokenizer's special tokens.

    Args:
        text: the Jinja template.
        tokenizer: the transformers tokenizer.
        lenient: take an answer to begin where its content does, even where generation with this template would add
            more to the prompt (an opening <think> tag); generation here then uses the shorter prompt too.

    Raises:
        UserError: the template does not write what an assistant says.
    """

    def __init__(self, text: str, tokenizer: Any, *, lenient: bool = False) -> None:
        self.text, self.tokenizer, self.lenient = text, tokenizer, lenient
        self.has_markers = bool(GENERATION.search(text))
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        self._special = tuple(t.content for t in added if t.special)
        self._tokens = dict(tokenizer.special_tokens_map)
        self._parts = False
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
        written = self._probe(probe)
        if PROBE not in written:
            self._parts = True  # templates of vision-language models want content as a list of parts
            written = self._probe(probe)
        if PROBE not in written:
            raise UserError("the chat template does not write the assistant's content.", where="data.template")
        self.turn_end = written.rpartition(PROBE)[2].strip()

    def _probe(self, messages: Messages) -> str:
        try:
            return self.render(messages)
        except UserError:
            if self._parts:
                raise
            return ""

    def render(self, messages: Messages, tools: Any = None, *, prompt: bool = False) -> str:
        """The conversation as text; with ``prompt`` also the header that asks for the assistant's next words.

        Raises:
            UserError: the template refuses the conversation.
        """
        return self._render(messages, tools, prompt, False)[0]

    def _render(self, messages: Messages, tools: Any, prompt: bool, markers: bool) -> tuple[str, list[Span]]:
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        if self._parts:
            messages = [_as_parts(m) for m in messages]
        try:
            texts, spans = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self.text,
                return_assistant_tokens_mask=markers,
                add_generation_prompt=prompt,
                **self._tokens,
            )
        except (TemplateError, TypeError) as error:
            if (as_text := _arguments_as_text(messages)) != messages:
                return self._render(as_text, tools, prompt, markers)
            raise UserError(
                f"the chat template refuses the conversation: {error}. Choose another `data.template`."
            ) from error
        return texts[0], [tuple(s) for s in spans[0]] if markers else []

    def locate(self, messages: Messages, tools: Any = None) -> tuple[str, list[Span], int]:
        """The conversation as text, the spans of the assistant's words in it, and where the last turn's prompt ends.

        Spans are in characters, half-open; messages of the assistant with ``weight: 0`` have none. With generation
        markers the template tells the spans; without, they are found by rendering each turn's prefix.

        Raises:
            UserError: a prompt is not the beginning of the whole text, or an answer is not written as it was given.
        """
        shown = _shown(messages)
        turns = [i for i, m in enumerate(shown) if m["role"] == "assistant"]
        text, marked = self._render(shown, tools, False, self.has_markers)
        prompt_end = self._start(shown, turns[-1], tools, text)
        spans = _merged(marked)
        if not self.has_markers:
            spans = [self._turn(shown, turn, tools, text, prompt_end) for turn in turns]
        elif spans:
            spans[-1] = (max(spans[-1][0], prompt_end), spans[-1][1])
        spans = [self._trimmed(text, span) for span in spans]
        if len(spans) == len(turns):
            for span, turn in zip(spans, turns, strict=True):
                self._check_kept(shown[turn], turn, text[span[0] : span[1]])
            spans = [s for s, turn in zip(spans, turns, strict=True) if messages[turn].get("weight", 1)]
        return text, [s for s in spans if s[1] > s[0]], prompt_end

    def prompt(self, messages: Messages, tools: Any = None) -> str:
        """The text that asks for the last message of the assistant, or for a next one where there is none."""
        shown = _shown(messages)
        turns = [i for i, m in enumerate(shown) if m["role"] == "assistant"]
        return self._prompt(shown[: turns[-1] if turns else None], tools)

    def _prompt(self, before: Messages, tools: Any) -> str:
        if not before:
            return ""
        if self.lenient:
            return self.render([*before, {"role": "assistant", "content": PROBE}], tools).rpartition(PROBE)[0]
        return self.render(before, tools, prompt=True)

    def _start(self, messages: Messages, turn: int, tools: Any, text: str) -> int:
        prompt = self._prompt(messages[:turn], tools)
        if self.lenient and not text.startswith(prompt):
            prompt = self.render(messages[:turn], tools, prompt=True)  # a turn of tool calls has no content
        if not text.startswith(prompt):
            raise UserError(
                f"the chat template does not write the prompt of message {turn + 1} as the beginning of the whole "
                f"conversation, so training would not match generation. {WAYS_OUT}"
            )
        return len(prompt)

    def _turn(self, messages: Messages, turn: int, tools: Any, text: str, last_prompt_end: int) -> Span:
        message = messages[turn]
        content = (message.get("content") or "").strip()
        later = any(m["role"] == "assistant" for m in messages[turn + 1 :])
        if later and self.lenient and content and not message.get("tool_calls"):
            other = self.render([*messages[:turn], {**message, "content": PROBE}, *messages[turn + 1 :]], tools)
            before, _, after = other.partition(PROBE)
            if text.startswith(before) and text.endswith(after):
                return len(before), self._closed(text, len(text) - len(after))
        start = self._start(messages, turn, tools, text) if later else last_prompt_end
        until = text if turn == len(messages) - 1 else self.render(messages[: turn + 1], tools)
        if text.startswith(until):
            return start, len(until)
        # Reasoning templates write a turn otherwise once another follows; it is still whole where its content is.
        found = text.find(content, start) if content and not message.get("tool_calls") else -1
        if found >= 0:
            return start, self._closed(text, found + len(content))
        found = text.find(self.turn_end, start) if self.turn_end else -1
        if found < 0 or content:
            raise self._lost(turn)
        return start, found + len(self.turn_end)

    def _closed(self, text: str, end: int) -> int:
        """The end of a turn whose content ends at ``end``: past the special token that closes it."""
        closing = next((s for s in (self.turn_end, *self._special) if s and text.startswith(s, end)), "")
        return end + len(closing)

    def _trimmed(self, text: str, span: Span) -> Span:
        """White space after the stop token is the template's, never the model's."""
        words = text[span[0] : span[1]].rstrip()
        closed = words.endswith((self.turn_end, *self._special)) if self.turn_end else words.endswith(self._special)
        return (span[0], span[0] + len(words)) if closed else span

    def _check_kept(self, message: dict[str, Any], turn: int, words: str) -> None:
        content = message.get("content") or ""
        calls = [(call.get("function") or call).get("name") or "" for call in message.get("tool_calls") or ()]
        if ("<think>" in content and _bare(content) not in _bare(words)) or any(name not in words for name in calls):
            raise self._lost(turn)

    @staticmethod
    def _lost(turn: int) -> UserError:
        return UserError(
            f"the chat template does not write message {turn + 1} as it was given (it drops reasoning or "
            f"tool calls), so it cannot be learnt from. {WAYS_OUT}"
        )


def _shown(messages: Messages) -> Messages:
    """The messages without what is ours alone."""
    return [{k: v for k, v in m.items() if k != "weight"} for m in messages]


def _as_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return message if content is None else {**message, "content": [{"type": "text", "text": content}]}


def _arguments_as_text(messages: Messages) -> Messages:
    """The messages with the arguments of tool calls as JSON text, which some templates want."""

    def told(call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function") or {}
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            return call
        return {**call, "function": {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}}

    return [{**m, "tool_calls": [told(c) for c in m["tool_calls"]]} if m.get("tool_calls") else m for m in messages]


def _merged(spans: list[Span]) -> list[Span]:
    """Adjoining spans as one; some templates mark the words and their end apart."""
    found: list[Span] = []
    for start, end in spans:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found


def _bare(text: str) -> str:
    """The text without think tags and white space, which templates set anew."""
    return "".join(text.replace("<think>", "").replace("</think>", "").split())


def strip_thinking(messages: Sequence[dict[str, Any]]) -> Messages:
    """The messages without the assistant's reasoning."""
    return [
        {**{k: v for k, v in m.items() if k not in ("reasoning_content", "reasoning", "thinking")}, "content": said}
        if m["role"] == "assistant" and (said := THINKING.sub("", m.get("content") or "")) is not None
        else m
        for m in messages
    ]
