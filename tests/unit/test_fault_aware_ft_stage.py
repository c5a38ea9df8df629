"""Wrong variants: what is proposed, verified, kept and counted, and where the flags fall among the tokens."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from data_tokenizers import byte_level, metaspace
from datasets import Dataset

from helpers import make_session
from luthier.core.errors import UserError
from luthier.core.protocols import Completion
from luthier.core.rng import stream
from luthier.data.layouts import SCHEMA
from luthier.data.prepare import prepare
from luthier.data.read import read
from luthier.data.render import Renderer
from luthier.functional.code_mutations import parses
from luthier.functional.error_sensitive import SENSITIVE, WRONG
from luthier.methods.data.fault_aware_ft import WrongVariants
from luthier.methods.objectives.fault_aware_ft import FaultAwareFineTuning

MBPP = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "mbpp" / "mbpp.jsonl"
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CODE = "def area(w, h):\n    # of a rectangle\n    total = w * h\n    return total\n"
TESTS = ["assert area(2, 3) == 6", "assert area(1, 5) == 5"]
QUICK = {"python-tests": {"wall_seconds": 2.0, "workers": 1}}


def dataset(*items):
    arrays = {
        name: [{"source": "x.jsonl", "row": i + 1, "kind": "pair", **item}.get(name) for i, item in enumerate(items)]
        for name in SCHEMA.names
    }
    return Dataset(pa.table(arrays, schema=SCHEMA))


def pair(completion=CODE, prompt="Area.\n", **extra):
    return {"prompt": prompt, "completion": completion, "extra": json.dumps({"tests": TESTS, **extra})}


def context(*, template=None, says=(), tokenizer=None, **options):
    processor = tokenizer or byte_level(template=template)
    renderer = Renderer(processor, task="causal-lm", **options)

    def generate(prompts, *, samples, decoding, **sampling):
        assert decoding == "sample"
        return [[Completion(text, (), True) for text in says[:samples]] for _ in prompts]

    return SimpleNamespace(
        processor=processor, renderer=renderer, generate=generate, rng=lambda name, *keys: stream(0, name, *keys)
    )


def extras(found):
    return [json.loads(extra) for extra in found["extra"]]


def flagged(ctx, row, flags):
    """The texts of the flagged tokens of a row."""
    ids = ctx.renderer.render_batch([row])[0].input_ids
    return [ctx.processor.decode([ids[t]]) for t in flags]


GIVEN = {"source": "variants", "verify": False}
WRONG_CODE = CODE.replace("w * h", "w - h")


@pytest.mark.parametrize(
    ("template", "wrap"), [(None, "{}"), (CHAT, "{}"), (CHAT, "Here it is:\n```python\n{}```\nIt multiplies.")]
)
def test_flags_fall_on_the_tokens_of_the_difference_in_the_text_that_is_trained_on(template, wrap):
    ctx = context(template=template)
    data = dataset(pair(wrap.format(CODE), variants=wrap.format(WRONG_CODE)))
    (extra,) = extras(WrongVariants(**GIVEN).run(data, ctx))
    flags, (wrong,) = extra[SENSITIVE], extra[WRONG]
    assert [t.strip() for t in flagged(ctx, data[0], flags["token"][0])] == ["*"]
    line = "".join(flagged(ctx, data[0], flags["line"][0]))
    assert "".join(line.split()) == "total=w*h"
    assert [ctx.processor.decode([wrong["ids"][t]]).strip() for t in wrong["token"]] == ["-"]
    row = {**data[0], "completion": wrap.format(WRONG_CODE)}
    assert wrong["ids"] == ctx.renderer.render_batch([row])[0].input_ids
    assert wrong["diverges"] == wrong["token"][0] == flags["token"][0][0]
    assert extra["tests"] == TESTS


def test_conversations_and_bare_variants_of_fenced_code():
    said = "Sure.\n```python\n" + CODE + "```"
    messages = [{"role": "user", "content": "Area?"}, {"role": "assistant", "content": said}]
    row = {"kind": "chat", "messages": json.dumps(messages), "extra": json.dumps({"variants": [WRONG_CODE]})}
    ctx = context(template=CHAT)
    (extra,) = extras(WrongVariants(**GIVEN).run(dataset(row), ctx))
    assert extra[WRONG][0]["text"] == said.replace("w * h", "w - h")
    assert [t.strip() for t in flagged(ctx, dataset(row)[0], extra[SENSITIVE]["token"][0])] == ["*"]


def test_a_tokenizer_that_puts_a_space_before_every_text():
    ctx = context(tokenizer=metaspace())
    data = dataset(pair(CODE, variants=WRONG_CODE))
    (extra,) = extras(WrongVariants(**GIVEN).run(data, ctx))
    assert "*" in "".join(flagged(ctx, data[0], extra[SENSITIVE]["token"][0]))


def test_mutations_parse_and_fail_the_tests_and_the_most_similar_are_kept(caplog):
    ctx = context()
    data = dataset(pair(), pair(), pair("def area(w, h):\n    return w + h\n"), {**pair(), "extra": "{}"})
    with caplog.at_level(logging.INFO, logger="luthier"):
        found = WrongVariants(negatives=2, verifier=QUICK).run(data, ctx)
    assert found.column_names == data.column_names
    for extra in extras(found)[:2]:
        assert len(extra[WRONG]) == 2
        for variant in extra[WRONG]:
            scope: dict = {}
            exec(variant["text"], scope)
            results = []
            for args in ((2, 3), (1, 5)):
                try:
                    results.append(scope["area"](*args))
                except NameError:
                    results.append(None)
            assert parses(variant["text"])
            assert results != [6, 5]
    assert [extra[WRONG] for extra in extras(found)[2:]] == [[], []]
    assert "2 of 4 rows have a wrong variant (4 variants)" in caplog.text
    assert "the correct answer fails its tests (1)" in caplog.text
    assert "no tests (1)" in caplog.text
    again = WrongVariants(negatives=2, verifier=QUICK).run(data, context())
    assert again["extra"][:] == found["extra"][:]


def test_an_endless_loop_is_killed_and_counts_as_wrong_and_a_right_variant_does_not(caplog):
    endless = CODE.replace("    return", "    while w:\n        pass\n    return")
    right = CODE.replace("w * h", "h * w")
    broken = CODE.replace("w * h", "w * ")
    short = "def area(w, h): 1"
    data = dataset(pair(variants=[right, CODE + "\n", broken, short, endless, CODE.replace("rect", "round ")]))
    with caplog.at_level(logging.INFO, logger="luthier"):
        (extra,) = extras(WrongVariants(source="variants", verifier=QUICK).run(data, context()))
    assert [v["text"] for v in extra[WRONG]] == [endless]
    for reason in (
        "passes the tests (2)",
        "equal to the correct",
        "does not parse (1)",
        "not like the correct answer (1)",
    ):
        assert reason in caplog.text
    kept = WrongVariants(source="variants", verifier=QUICK, keep_unparsable=True).run(
        dataset(pair(variants=broken)), context()
    )
    assert extras(kept)[0][WRONG][0]["text"] == broken


def test_answers_of_the_model_and_texts_with_another_verifier():
    ctx = context(says=["12 is", "it is 12", "it is 13", " it is 12"])
    row = {**pair("it is 12", prompt="3*4="), "extra": json.dumps({"answer": "12"})}
    stage = WrongVariants(source="self", language="text", verifier="numeric", samples=4)
    (extra,) = extras(stage.run(dataset(row), ctx))
    assert [v["text"] for v in extra[WRONG]] == ["it is 13"]
    ctx = context(says=[WRONG_CODE, CODE, "no"])
    (extra,) = extras(WrongVariants(source="self", verifier=QUICK).run(dataset(pair()), ctx))
    assert [v["text"] for v in extra[WRONG]] == [WRONG_CODE]


def test_an_answer_that_continues_the_prompt_is_only_mutated_itself():
    prompt, body = "def area(w, h):\n", "    total = w * h\n    return total\n"
    row = pair(body, prompt=prompt)
    (extra,) = extras(WrongVariants(with_prompt=True, verifier=QUICK).run(dataset(row), context()))
    assert parses(prompt + extra[WRONG][0]["text"])
    assert not parses(extra[WRONG][0]["text"])


def test_pairs_that_differ_everywhere_nowhere_or_past_the_end_are_counted(caplog):
    renamed = CODE.replace("total", "x").replace("w", "width").replace("h", "height")
    data = dataset(
        pair(variants=WRONG_CODE),
        pair(variants=renamed),
        pair(variants=CODE.replace("# of", "# or")),
        pair("```python\na\n```\n```python\nb\n```", variants=WRONG_CODE),
    )
    with caplog.at_level(logging.INFO, logger="luthier"):
        found = WrongVariants(similarity=0.1, max_fraction=0.2, **GIVEN).run(data, context())
    assert [len(e[WRONG]) for e in extras(found)] == [1, 0, 0, 0]
    for reason in (
        "too many error-sensitive tokens (1)",
        "differs in comments or spacing alone (1)",
        "several fenced blocks of code (1)",
    ):
        assert reason in caplog.text
    caplog.clear()
    ctx = context(max_length=40, truncation="keep_start")
    data = dataset(pair(variants=WRONG_CODE), pair(CODE, variants=CODE.replace("area", "volume")))
    with caplog.at_level(logging.INFO, logger="luthier"):
        found = WrongVariants(**GIVEN).run(data, ctx)
    assert [len(e[WRONG]) for e in extras(found)] == [0, 1]
    assert len(extras(found)[1][WRONG][0]["ids"]) <= 40
    assert "error-sensitive part cut away (1)" in caplog.text


def test_prepared_rows_are_those_that_were_flagged_and_other_tokens_are_refused(tmp_path):
    ctx = context()
    found = WrongVariants(**GIVEN).run(dataset(pair(variants=WRONG_CODE), pair("x = 1\n")), ctx)
    method = FaultAwareFineTuning()
    session = make_session(objective=method)
    columns = list(method.needs.columns)
    method.prepare(session, prepare(found, ctx.renderer, columns=columns, cache=tmp_path, progress=False))
    assert method.record()["rows_with_a_pair"] == 1
    other = Renderer(byte_level(bos=True), task="causal-lm")
    with pytest.raises(UserError, match=r"^x\.jsonl, row 1: the flags of fault-aware-ft belong to other tokens"):
        method.prepare(session, prepare(found, other, columns=columns, cache=tmp_path, progress=False))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([pair(), pair("def f(:\n")], {}, r"^x\.jsonl, row 2: the correct answer is no Python that parses \(line 1: "),
        ([{**pair(), "extra": "{}"}], {"verifier": QUICK}, r"^x\.jsonl, row 1: fault-aware-ft: no row can be verified"),
        ([pair(variants=CODE)], GIVEN, r"no row has a wrong variant.* equal to the correct answer"),
        ([{"kind": "text", "text": "a"}], {}, r"^x\.jsonl, row 1: a row of kind 'text' has no prompt"),
        ([pair(**{SENSITIVE: {}})], {}, r"^x\.jsonl, row 1: the row has a column 'error_sensitive' already"),
        ([pair(variants=[1])], GIVEN, r"^x\.jsonl, row 1: the column 'variants' must be a text or a list"),
        ([pair()], {"verifier": {"python-tests": {"cpu_seconds": 0}}}, r"verifier: python-tests\.cpu_seconds: Input"),
        ([pair()], {"verifier": "nothing"}, r"unknown reward 'nothing'"),
    ],
)
def test_bad_rows_and_settings_get_one_line(rows, options, message):
    with pytest.raises(UserError, match=message) as error:
        WrongVariants(**options).run(dataset(*rows), context())
    assert "\n" not in str(error.value)


def test_settings_that_cannot_be_and_tokenizers_without_offsets_are_refused():
    with pytest.raises(UserError, match="language: text has no source: mutate"):
        WrongVariants(language="text")
    slow = context()
    slow.processor = SimpleNamespace(is_fast=False)
    with pytest.raises(UserError, match="use a fast tokenizer"):
        WrongVariants().run(dataset(pair()), slow)
    found = WrongVariants(bad_code="plain", **GIVEN).run(
        dataset(pair("def f(:\n"), pair(variants=WRONG_CODE)), context()
    )
    assert [len(e[WRONG]) for e in extras(found)] == [0, 1]


@pytest.mark.skipif(not MBPP.is_file(), reason="its data is not here")
def test_most_programs_of_mbpp_get_a_wrong_variant():
    rows = read(str(MBPP), task="causal-lm", limit=6, progress=False).dataset
    found = extras(WrongVariants(verifier=QUICK).run(rows, context()))
    assert sum(bool(e[WRONG]) for e in found) >= 5
