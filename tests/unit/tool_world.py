"""A few tools, a tokenizer of letters, and dialogues as canonical rows, for the tests of tl-training."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pyarrow as pa
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from luthier.core import registry
from luthier.data.layouts import SCHEMA
from luthier.data.render import Renderer
from luthier.functional import tool_calls as calls

NATIVE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}[call]{{ c.function | tojson }}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{# tools #}"
)


def tool(name, *required, optional=()):
    properties = {p: {"type": "string", "description": f"the {p}"} for p in (*required, *optional)}
    schema = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "description": f"Do {name}.", "parameters": schema}}


NAMES = ("get_weather", "get_weather_alerts", "get_time", "search")
TOOLS = [tool(name, "city", optional=("unit",)) for name in NAMES]
KNOWN = calls.read_tools(TOOLS)


def processor(template=None):
    """Pieces of letters, and every other character by itself; lossless."""
    core = Tokenizer(models.BPE(vocab=_vocabulary(), merges=[], ignore_merges=True))
    split = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|[^A-Za-z]"), behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    made.chat_template = template
    return made


def _vocabulary():
    words = ["get", "weather", "alerts", "time", "search", "city", "Assistant", "User", "Output", "System", "Paris"]
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *words, *[f"Ġ{w}" for w in words]]
    return {token: i for i, token in enumerate(tokens)}


def stage(rows, *, template="plain", **options):
    words = processor()
    renderer = Renderer(words, task="causal-lm", template=template)
    ctx = SimpleNamespace(renderer=renderer, processor=words)
    return registry.get("data", "tl-training").build(options).run(rows, ctx), renderer


def canonical(*dialogues, tools=TOOLS):
    items = [
        {"kind": "chat", "source": "d.jsonl", "row": i + 1, "messages": json.dumps(d), "key": str(i), "extra": "{}",
         "tools": json.dumps(tools) if tools else None}
        for i, d in enumerate(dialogues)
    ]  # fmt: skip
    return Dataset(pa.table({n: [item.get(n) for item in items] for n in SCHEMA.names}, schema=SCHEMA))


def said(name, **arguments):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call]}


def user(text):
    return {"role": "user", "content": text}


def result(text):
    return {"role": "tool", "content": text}


FOUR = [
    user("Weather?"),
    said("get_weather", town="Rome"),
    result("TypeError: unexpected keyword argument 'town'"),
    said("get_weather", city="Rome"),
    result("sunny"),
    said("get_time", city="Atlantis"),
    result('{"error": "no such city"}'),
    said("search", city="Rome", unit="x"),
]


def learnt(renderer, row):
    """The supervised texts of a row, by its token spans."""
    rendered = renderer.render_batch([row])[0]
    return [renderer.processor.decode(rendered.input_ids[s:e]) for s, e in rendered.spans]
