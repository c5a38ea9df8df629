"""Sampling negatives: what is asked, what is kept, and the way from a recipe to the objective."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from data_tokenizers import byte_level
from datasets import Dataset

from helpers import tiny_llama
from luthier.core import registry
from luthier.core.errors import UserError
from luthier.core.rng import stream
from luthier.data.layouts import SCHEMA
from luthier.data.render import Renderer
from luthier.methods.data.discriminative_ft import SampleNegatives

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def rows(*items):
    arrays = {name: [item.get(name) for item in items] for name in SCHEMA.names}
    import pyarrow as pa

    return Dataset(pa.table(arrays, schema=SCHEMA))


def pairs(*items):
    return rows(
        *(
            {
                "kind": "pair",
                "source": "x.jsonl",
                "row": i + 1,
                "prompt": p,
                "completion": c,
                "extra": '{"answer": "1"}',
            }
            for i, (p, c) in enumerate(items)
        )
    )


def chats(*conversations):
    return rows(*({"kind": "chat", "row": 1, "source": "c", "messages": json.dumps(c)} for c in conversations))


class Base:
    """The stage's context over a tiny model, or with answers put into its mouth."""

    def __init__(self, *, template=None, max_length=None, truncation="error", says=None):
        self.processor = byte_level(template=template)
        self.renderer = Renderer(self.processor, task="causal-lm", max_length=max_length, truncation=truncation)
        self.prompts, self.says = [], says
        model = tiny_llama(vocabulary=len(self.processor))
        model.generation_config.eos_token_id = self.processor.eos_token_id
        if says is not None:
            model.generate = self.speak
        self.model = model
        self.session = SimpleNamespace(
            processor=self.processor, device=torch.device("cpu"), rng=lambda name, *keys: stream(0, name, *keys)
        )

    def generate(self, prompts, *, samples, decoding, **options):
        """As the run's stage context: samples of one prompt stand together."""
        decoder = registry.get("decoding", decoding).build(options)
        found = decoder.generate(self.model, [p for p in prompts for _ in range(samples)], self.session)
        return [found[i : i + samples] for i in range(0, len(found), samples)]

    def speak(self, input_ids, attention_mask, generation_config, logits_processor):
        (chooser,) = logits_processor
        self.settings, self.most = chooser.sampling, generation_config.max_new_tokens
        chooser.logp.append(torch.zeros(len(input_ids), 1))
        written = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            prompt = self.processor.decode(ids[mask.bool()])
            said = self.says[prompt]
            text = said[self.prompts.count(prompt)] if isinstance(said, list) else said
            self.prompts.append(prompt)
            ids_of = self.processor(text)["input_ids"]
            written.append([*ids, *ids_of, *[self.processor.eos_token_id] * (40 - len(ids_of))])
        return torch.tensor(written)


def negatives(dataset):
    return [json.loads(extra)["negatives"] for extra in dataset["extra"]]


def test_answers_are_stripped_kept_in_order_and_equal_ones_left_out():
    ctx = Base(says={"a=": [" 1", "2", "", "3"], "b=": ["7", " 5", "7", "6"]})
    data = pairs(("a=", "1"), ("b=", " 7"))
    found = SampleNegatives().run(data, ctx)
    assert negatives(found) == [["2", "", "3", "2"], [" 5", " 6", " 5", " 6"]]
    assert found.column_names == data.column_names
    assert json.loads(found[0]["extra"])["answer"] == "1"
    assert found.data.table.cast(SCHEMA).num_rows == 2
    settings = ctx.settings
    assert (settings.temperature, settings.top_k, settings.top_p, ctx.most) == (
        0.7,
        50,
        1.0,
        62,
    )  # its context holds no more
    kept = SampleNegatives(drop_equal=False).run(data, Base(says=ctx.says))
    assert negatives(kept) == [["1", "2", "", "3"], [" 7", " 5", " 7", " 6"]]


def test_a_prompt_without_any_negative_stops_the_run_or_goes():
    data, says = pairs(("a=", "1"), ("b=", "7")), {"a=": "2", "b=": "7"}
    with pytest.raises(UserError, match=r"^x\.jsonl, row 2: no negative available for this prompt: all 4 answers"):
        SampleNegatives().run(data, Base(says=says))
    found = SampleNegatives(no_negative="drop").run(data, Base(says=says))
    assert (found["prompt"][:], negatives(found)) == (["a="], [["2"] * 4])


def test_the_unhelpful_system_message_is_there_while_sampling_chat_and_only_then():
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    conversation = [{"role": "system", "content": "be kind"}, *turns, *turns]
    first = "<|im_start|>system\nYou are an unhelpful assistant.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
    asked = f"{first}<|im_start|>assistant\nworld<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    ctx = Base(template=CHAT, says={asked: "no"})
    found = SampleNegatives(samples=1).run(chats(conversation), ctx)
    assert ctx.prompts == [asked]
    assert json.loads(found[0]["messages"]) == conversation
    assert negatives(found) == [["no"]]
    one = f"{first}<|im_start|>assistant\n"
    for data in (chats(turns), pairs(("hello", "world"))):
        ctx = Base(template=CHAT, says={one: "no"})
        assert negatives(SampleNegatives(samples=1).run(data, ctx)) == [["no"]]
    plain = one.replace("<|im_start|>system\nYou are an unhelpful assistant.<|im_end|>\n", "")
    ctx = Base(template=CHAT, says={plain: "no"})
    assert negatives(SampleNegatives(samples=1, system=None).run(chats(turns), ctx)) == [["no"]]


@pytest.mark.parametrize("truncation", ["error", "drop", "keep_start"])
def test_negatives_are_cut_from_the_right_to_the_limit_of_the_rows(truncation):
    ctx = Base(says={"hello": "world the answer is 1 2 3 4 5"}, max_length=8, truncation=truncation)
    text = negatives(SampleNegatives(samples=1).run(pairs(("hello", "1")), ctx))[0][0]
    assert text
    assert "world the answer is 1 2 3 4 5".startswith(text)
    row = {"kind": "pair", "prompt": "hello", "completion": text}
    rendered = ctx.renderer.render_batch([row])[0]
    assert (rendered.over, len(rendered.input_ids)) == (0, 8)


def test_the_real_sampler_draws_another_answer_each_time_and_the_same_in_each_run():
    data = pairs(("hello ", "1"), ("world ", "2"))
    method = SampleNegatives(samples=3, max_new_tokens=6, temperature=1.5)
    found = [negatives(method.run(data, Base())) for _ in range(2)]
    assert found[0] == found[1]
    assert len({text for some in found[0] for text in some}) == 6


def test_rows_that_cannot_have_negatives_are_refused():
    with pytest.raises(UserError, match="kind 'text' has no prompt with one answer"):
        SampleNegatives().run(rows({"kind": "text", "text": "a"}), Base())
    has = rows({"kind": "pair", "prompt": "a", "completion": "b", "extra": '{"negatives": ["c"]}'})
    with pytest.raises(UserError, match="has a column 'negatives' already"):
        SampleNegatives().run(has, Base())
