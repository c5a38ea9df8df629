"""Chat templates: which one is used, rendering with it, and where the assistant's words stand in the text."""

from __future__ import annotations

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
    """

    def __init__(self, text: str, tokenizer: Any) -> None:
        self.text, self.tokenizer = text, tokenizer
        self.has_markers = bool(GENERATION.search(text))
        self.turn_end = self._turn_end()

    def _turn_end(self) -> str:
        """What the template writes after the assistant's words, without white space around it; may be empty."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "LUTHIERPROBE"}]
        return self.render(probe).rpartition("LUTHIERPROBE")[2].strip()

    def render(self, messages: Messages, tools: Any = None, *, prompt: bool = False) -> str:
        """The conversation as text; with ``prompt`` also the header that asks for the assistant's next words.

        Raises:
            UserError: the template refuses the conversation.
        """
        return self._render(messages, tools, prompt, False)[0]

    def _render(self, messages: Messages, tools: Any, prompt: bool, markers: bool) -> tuple[str, list[Span]]:
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self.text,
                return_assistant_tokens_mask=markers,
                add_generation_prompt=prompt,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError) as error:
            raise UserError(f"the chat template refuses the conversation: {error}. Choose another `data.template`.")
        return texts[0], [tuple(s) for s in spans[0]] if markers else []

    def locate(self, messages: Messages, tools: Any = None) -> tuple[str, list[Span], int]:
        """The conversation as text, the spans of the assistant's words in it, and where the last turn's prompt ends.

        Spans are in characters, half-open; messages of the assistant with ``weight: 0`` have none. With generation
        markers the template tells the spans; without, they are found by rendering each turn's prefix.

        Raises:
            UserError: a prompt is not the beginning of the whole text, or an answer is not written as it was given.
        """
        shown = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        text, spans = self._render(shown, tools, False, self.has_markers)
        prompt_end = len(self._prompt(shown, turns[-1], tools, text))
        if not self.has_markers:
            spans = [self._turn(shown, turn, tools, text, prompt_end) for turn in turns]
        if len(spans) == len(turns):
            spans = [s for s, turn in zip(spans, turns, strict=True) if messages[turn].get("weight", 1)]
        return text, [s for s in spans if s[1] > s[0]], prompt_end

    def prompt(self, messages: Messages, tools: Any = None) -> str:
        """The text that asks for the last message of the assistant, or for a next one where there is none."""
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        shown = [{k: v for k, v in m.items() if k != "weight"} for m in messages[: turns[-1] if turns else None]]
        return self.render(shown, tools, prompt=True)

    def _prompt(self, messages: Messages, turn: int, tools: Any, text: str) -> str:
        if turn == 0:
            return ""
        prompt = self.render(messages[:turn], tools, prompt=True)
        if not text.startswith(prompt):
            raise UserError(
                f"the chat template does not write the prompt of message {turn + 1} as the beginning of the whole "
                f"conversation, so training would not match generation. {WAYS_OUT}"
            )
        return prompt

    def _turn(self, messages: Messages, turn: int, tools: Any, text: str, last_prompt_end: int) -> Span:
        later = any(m["role"] == "assistant" for m in messages[turn + 1 :])
        start = len(self._prompt(messages, turn, tools, text)) if later else last_prompt_end
        until = text if turn == len(messages) - 1 else self.render(messages[: turn + 1], tools)
        if text.startswith(until):
            end = len(until)
        else:
            # Reasoning templates write a turn otherwise once another follows; it is still whole where its content is.
            content = (messages[turn].get("content") or "").strip()
            found = text.find(content, start) if content else -1
            if found < 0:
                raise UserError(
                    f"the chat template does not write message {turn + 1} as it was given (it drops the reasoning of "
                    f"earlier turns), so it cannot be learnt from. {WAYS_OUT}"
                )
            end = found + len(content)
            end += len(self.turn_end) if text.startswith(self.turn_end, end) else 0
        words = text[start:end].rstrip()
        # White space after the stop token is the template's, never the model's.
        return (start, start + len(words)) if self.turn_end and words.endswith(self.turn_end) else (start, end)


def strip_thinking(messages: Sequence[dict[str, Any]]) -> Messages:
    """The messages without the assistant's reasoning."""
    return [
        {**{k: v for k, v in m.items() if k not in ("reasoning_content", "reasoning", "thinking")}, "content": said}
        if m["role"] == "assistant" and (said := THINKING.sub("", m.get("content") or "")) is not None
        else m
        for m in messages
    ]
