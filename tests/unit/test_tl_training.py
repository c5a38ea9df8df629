"""TL-Training: calls and rewards by hand, and the weighted loss in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tool_world import KNOWN, TOOLS, tool, user

from helpers import MemoryRows, make_session, random_rows, settings, tiny_llama, weights
from luthier.core import registry
from luthier.core.errors import UserError
from luthier.engine.loop import Trainer
from luthier.functional import tool_calls as calls
from luthier.functional.key_tokens import coefficients, key_weights, samples
from luthier.methods.objectives.tl_training import KeyTokenWeights
from luthier.methods.transforms.tl_training import KeyTokenWeighting

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "toolalpaca"


# -- calls


def test_a_tool_is_written_as_a_stub_with_required_parameters_first():
    schema = {
        "name": "trip",
        "description": "Plan it.",
        "parameters": {
            "properties": {"via": {"type": "string"}, "days": {"type": "integer", "description": "how many"}},
            "required": ["days"],
        },
    }
    wanted = 'Function:\ndef trip(days: integer, via: string = None):\n    """\n    Plan it.\n\n    Args:\n'
    wanted += '    days (integer): how many\n    via (string):\n    """'
    (known,) = calls.read_tools([schema])
    assert calls.stub(known) == wanted
    assert calls.stubs([known, known]) == f"{wanted}\n\n{wanted}"


def test_calls_are_read_back_as_they_were_written():
    arguments = {"from": 'a "b", (c)\n', "class": [1, -2.5, True, None], "x": {"y": {"z": "ü"}}, "n": 3}
    call = calls.Call("book.trip", arguments)
    text = calls.render_call(call)
    assert text.startswith('book.trip(from="a \\"b\\", (c)\\n", class=[1, -2.5, true, null], ')
    assert calls.parse_call(text) == call
    assert calls.parse_call("f()").arguments == {}
    assert calls.parse_call("I say (well) get_time('Rome', unit='x')", KNOWN).arguments == {"city": "Rome", "unit": "x"}
    assert calls.parse_call("(city='x')").name == ""
    assert calls.parse_call("f(True, a=False)").arguments == {"#1": True, "a": False}


@pytest.mark.parametrize(
    "text",
    ["", "no call", "f(", "f('a)", "f(a=__import__('os'))", "f(a=b)", "f(a=1, a=2)", "f(a=1,,b=2)", "f(a=[)", "f(a={1: 2})",
     "f(a=" + "(" * 500 + ")" * 500 + ")", "f(a=1+1)", "f(a=f'{x}')", "f(a=b'x')", "f(a=)"],
)  # fmt: skip
def test_what_is_no_call_is_refused_and_nothing_is_run(text):
    with pytest.raises(ValueError, match=r"."):
        calls.parse_call(text)


def test_two_tools_of_one_name_and_schemas_that_are_none_are_refused():
    with pytest.raises(ValueError, match="two tools have the name 'search'"):
        calls.read_tools([*TOOLS, tool("search")])
    for bad in ({}, [{}], [{"name": "f", "parameters": {"properties": [1]}}], [{"name": "f", "parameters": []}]):
        if bad != [{"name": "f", "parameters": []}]:
            with pytest.raises(ValueError, match="tool"):
                calls.read_tools(bad)
    with pytest.raises(ValueError, match="requires a parameter"):
        calls.read_tools([{"name": "f", "parameters": {"properties": {}, "required": ["a"]}}])


# -- the reward

WANTED = 'get_weather(city="Rome")'
BOTH = 'get_weather(city="Rome", unit="C")'
TABLE = [
    ("I cannot.", WANTED, -2.0, ("unparsable",)),
    ("", WANTED, -2.0, ("unparsable",)),
    ("get_weather(city=Rome)", WANTED, -2.0, ("unparsable",)),
    ('get_wether(city="Rome")', WANTED, -2.0, ("hallucinated_tool",)),
    ('get_time(city="Rome")', WANTED, -1.5, ("wrong_tool",)),
    ('(city="Rome")', WANTED, -1.5, ("wrong_tool",)),
    ('get_weather(town="x", unit="C")', WANTED, -1.8,
     ("hallucinated_argument", "redundant_argument", "missing_argument")),
    ('get_weather(city="Rome", town="x", unit="C")', WANTED, -1.3, ("hallucinated_argument", "redundant_argument")),
    ('get_weather(town="x")', WANTED, -1.3, ("hallucinated_argument", "missing_argument")),
    ('get_weather(unit="C")', WANTED, -1.0, ("redundant_argument", "missing_argument")),
    ('get_weather(city="Rome", town="x")', WANTED, -0.8, ("hallucinated_argument",)),
    ('get_weather(city="Rome", unit="C")', WANTED, -0.5, ("redundant_argument",)),
    ('get_weather(city="Rome")', BOTH, -0.5, ("missing_argument",)),
    ('get_weather(city="Oslo")', WANTED, -0.25, ("wrong_value",)),
    ("Well: get_weather(city = 'Rome')", WANTED, 1.0, ()),
    ('get_weather(unit="C", city="Rome")', BOTH, 1.0, ()),
    ('get_weather("Rome")', WANTED, 1.0, ()),
]  # fmt: skip


@pytest.mark.parametrize(("completion", "wanted", "reward", "errors"), TABLE)
def test_the_reward_table(completion, wanted, reward, errors):
    verdict = calls.judge_text(completion, calls.parse_call(wanted), KNOWN)
    assert (verdict.reward, verdict.errors) == (reward, errors)
    method = registry.get("reward", "tl-training").build({})
    assert method([{"completion": wanted, "tools": json.dumps(TOOLS)}], [completion], None) == [reward]


def test_values_are_json_values():
    wanted = calls.Call("f", {"a": 1, "b": True, "c": [1.0, {"d": None}]})
    known = [calls.Tool("f", "", {n: {} for n in "abc"}, ())]
    assert calls.judge_text("f(a=1.0, b=true, c=[1, {'d': null}])", wanted, known).reward == 1.0
    assert calls.judge_text("f(a=True, b=1, c=[1, {'d': 0}])", wanted, known).errors == ("wrong_value",)


def test_the_legacy_parser_sees_single_quotes_alone():
    def old(completion, wanted="get_weather(city='Rome')"):
        row = {"completion": wanted, "tools": TOOLS}
        return registry.get("reward", "tl-training").build({"legacy_parser": True})([row], [completion], None)[0]

    assert old("get_weather(city='Rome')") == 1.0
    assert old('get_weather(city="Rome")') == -0.5  # seen as missing
    assert old('get_weather(city="Oslo")', WANTED) == 1.0  # neither is seen
    assert old("Well: get_weather(city='Rome')") == -2.0  # the line before the parenthesis is the name
    assert old("get_weather(city='Ro)me')") == -0.5
    assert (old("(city='Rome')"), old("nothing"), old("get_time(city='Rome')")) == (-1.5, -2.0, -1.5)
    assert old("get_weather(town='x', unit='C')") == -1.8


def test_the_wanted_call_is_found_in_every_form_and_rows_without_one_are_not_judged():
    method = registry.get("reward", "tl-training").build({})
    call = {"name": "search", "arguments": '{"city": "Rome"}'}
    chat = json.dumps([user("q"), {"role": "assistant", "content": "I look.", "tool_calls": [{"function": call}]}])
    rows = [{"extra": json.dumps({"tools": TOOLS, "answer": call})}, {"messages": chat, "tools": json.dumps(TOOLS)}]
    rows += [
        {"completion": json.dumps(call), "tools": TOOLS},
        {"completion": 'search\n{"city": "Rome"}', "tools": TOOLS},
    ]
    assert method(rows, ['search(city="Rome")'] * 4, None) == [1.0] * 4
    assert (
        method([{"completion": "It rains.", "tools": TOOLS}, {"completion": WANTED}], [WANTED] * 2, None) == [None] * 2
    )
    for bad in ("search(city=Rome)", "search\n{city}", '{"name": "search", "arguments": [1]}', '{"name": "search"'):
        with pytest.raises(UserError, match=r"^d\.jsonl, row 7: the wanted call"):
            method([{"completion": bad, "tools": TOOLS, "source": "d.jsonl", "row": 7}], [WANTED], None)


def test_the_summary_counts_each_kind_of_error():
    verdicts = [
        calls.judge_text(text, calls.parse_call(BOTH), KNOWN) for text in (BOTH, WANTED, "x", 'get_time(city="a")')
    ]
    found = calls.summary(verdicts)
    assert (found["tool_accuracy"], found["name_accuracy"], found["value_accuracy"]) == (0.5, 0.25, 0.375)
    assert (found["call_accuracy"], found["reward"]) == (0.25, (1 - 0.5 - 2 - 1.5) / 4)
    assert [found[e] for e in calls.ERRORS] == [0.25, 0, 0.25, 0, 0, 0.25, 0]


# -- the weighted loss


def test_the_weight_is_the_ratio_under_its_cap():
    sample_N = samples(torch.tensor([4, 5, 6, 7, 8, 20, 21, 22, 23]))
    assert sample_N.tolist() == [0] * 5 + [1] * 4
    key_N = torch.tensor([1, 0, 0, 0, 0, 1, 1, 0, 0]).bool()
    closing_N = torch.tensor([1, 0, 0, 0, 1, 0, 0, 0, 0]).bool()
    # first: n_P 1, n_O 3 (the closing token that is a key one counts once); second: n_P 2, n_O 2, no weight
    assert key_weights(key_N, closing_N, sample_N, 9.0).tolist() == [3, 1, 1, 1, 1, 1, 1, 1, 1]
    assert key_weights(key_N, closing_N, sample_N, 2.0).tolist() == [2, 1, 1, 1, 1, 1, 1, 1, 1]
    assert key_weights(~key_N & False, closing_N, sample_N, 9.0).tolist() == [1] * 9


def keyed_rows(count=12):
    """Random rows of which three in four have key and closing tokens; the second half of a row is its target."""
    rows = random_rows(count)
    spans = [s.tolist() for s in rows.spans]
    rows.columns["key_tokens"] = [[s, s + 2] if i % 4 and e - s > 2 else None for i, (s, e) in enumerate(spans)]
    rows.columns["closing_tokens"] = [[e - 2, s] if i % 4 else None for i, (s, e) in enumerate(spans)]
    return rows


def by_hand(rows, index, model, *, max_weight, q, average):
    """The loss of some rows in float64."""
    top, bottom, means = 0.0, 0.0, []
    for i in index:
        start, end = rows.spans[i].tolist()
        with torch.no_grad():
            ids = torch.as_tensor(rows.ids[i], dtype=torch.long)
            logp = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        key = set(rows.columns["key_tokens"][i] or ())
        closing = set(rows.columns["closing_tokens"][i] or ()) - key
        others = end - start - len(key) - len(closing)
        omega = min(others / len(key), max_weight) if 0 < len(key) < others else 1.0
        losses, shares = [], []
        for t in range(start, end):
            p = math.exp(float(logp[t - 1, ids[t]]))
            share = omega if t in key else 1.0
            losses.append(share * ((1 - p**q) / q if q else -math.log(p)))
            shares.append(share)
        means.append(sum(losses) / sum(shares))
        top, bottom = top + sum(losses), bottom + sum(shares)
    return np.mean(means) if average == "sample" else top / bottom


@pytest.mark.parametrize("average", ["sample", "token"])
@pytest.mark.parametrize(("max_weight", "q"), [(9.0, 0.0), (1.5, 0.0), (9.0, 0.7), (1.0, 0.0)])
def test_the_loss_is_that_worked_out_by_hand(max_weight, q, average):
    rows, model = keyed_rows(), tiny_llama()
    options = {"max_weight": max_weight, "q": q, "average": average}
    session = make_session(tiny_llama(), objective=KeyTokenWeights(**options))
    session.head_chunk = 5  # the positions come in several pieces
    batch = session.task.collate(rows.fetch(range(12)), range(12), session.stack.needs.columns)
    loss = session.loss(batch)
    wanted = by_hand(rows, range(12), model.double(), max_weight=max_weight, q=q, average=average)
    assert float(loss.sum.detach() / loss.weight) == pytest.approx(wanted, rel=1e-5)
    if average == "sample":
        assert float(loss.weight) == pytest.approx(12, rel=1e-6)


def test_the_transform_before_plain_fine_tuning_gives_the_objectives_gradient():
    grads = []
    for average in ("sample", "token"):
        for stack in (
            {"objective": KeyTokenWeights(average=average)},
            {"transforms": [KeyTokenWeighting(average=average)]},
        ):
            session = make_session(**stack)
            batch = session.task.collate(keyed_rows().fetch(range(8)), range(8), session.stack.needs.columns)
            for change in session.stack.transforms:
                batch = change(batch, session)
            loss = session.loss(batch)
            (loss.sum / loss.weight).backward()
            grads.append(session.model.get_input_embeddings().weight.grad)
            assert float(loss.metrics["nll_key"][0]) > 0
    torch.testing.assert_close(grads[0], grads[1])
    torch.testing.assert_close(grads[2], grads[3])
    assert not torch.allclose(grads[0], grads[2])


def test_a_whole_row_counts_one_whatever_it_holds_and_masked_positions_do_not_count():
    rows = MemoryRows([([1, 5, 6, 7, 8, 9, 2], [1, 7])], {"key_tokens": [[1]], "closing_tokens": [[6]]})
    session = make_session(objective=KeyTokenWeights())
    batch = session.task.collate(rows.fetch([0]), [0], session.stack.needs.columns)
    weight_N, key_N = coefficients(batch, 9.0, per_sample=True)
    assert weight_N.tolist() == pytest.approx([4 / 9] + [1 / 9] * 5)
    assert key_N.tolist() == [True] + [False] * 5
    masked = batch.with_weights(torch.tensor([1.0, 0, 0, 1, 1, 1]))
    weight_N, _ = coefficients(masked, 9.0, per_sample=True)
    assert float((weight_N * masked.weight_N).sum()) == pytest.approx(1.0)


def test_one_row_a_step_without_weights_is_plain_fine_tuning():
    """max_weight 1 and the filter off: the mean of one turn is the mean of its tokens."""
    plain, same = make_session(), make_session(objective=KeyTokenWeights(max_weight=1.0))
    for session in (plain, same):
        Trainer(session, random_rows(6), settings(batch_rows=1, optimizer="sgd", schedule="constant")).run()
    for a, b in zip(weights(plain.model).values(), weights(same.model).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [KeyTokenWeights, KeyTokenWeighting])
def test_accumulation_changes_nothing(method):
    found = []
    for accumulation in (1, 4):
        built = method(average="sample")
        stack = {"objective": built} if method is KeyTokenWeights else {"transforms": [built]}
        session = make_session(**stack)
        training = settings(optimizer="sgd", learning_rate=0.1, schedule="constant", accumulation=accumulation)
        Trainer(session, keyed_rows(24), training).run()
        found.append(weights(session.model))
    for a, b in zip(found[0].values(), found[1].values(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("stack", [{"objective": KeyTokenWeights()}, {"transforms": [KeyTokenWeighting()]}])
def test_rows_without_any_key_token_are_refused(stack):
    with pytest.raises(UserError, match=r"Put the data stage 'tl-training' into data\.stages"):
        Trainer(make_session(**stack), random_rows(6), settings())


# -- real data


@pytest.mark.skipif(not SHARED.is_dir(), reason="ToolAlpaca is not here")
def test_toolalpaca_is_read_rendered_and_judged():
    kinds = {"integer": "integer", "number": "number", "string": "string", "boolean": "boolean"}
    judged = templates = others = 0
    for file in ("eval_real.json", "eval_simulated.json"):
        for api in json.loads((SHARED / file).read_text(encoding="utf-8")):
            schemas = []
            for name, about in api["Function_Description"].items():
                if name == "components":
                    continue
                told, _, rest = about.partition("Parameters: ")
                listed = json.loads(rest.partition("\nOutput:")[0])
                typed = {p: text.removeprefix("Required. ").partition(".")[0].lower() for p, text in listed.items()}
                properties = {p: {"type": kinds.get(typed[p], "object"), "description": t} for p, t in listed.items()}
                required = [p for p, text in listed.items() if text.startswith("Required")]
                parameters = {"type": "object", "properties": properties, "required": required}
                schemas.append({"name": name, "description": told, "parameters": parameters})
            known = calls.read_tools(schemas)
            text = calls.stubs(known)
            assert text.count("Function:\ndef ") == len(schemas)
            for steps in api["Golden_Answers"]:
                for step in steps:
                    try:
                        call = calls.read_call(
                            {"name": step["Action"].removeprefix("[Optional]"), "arguments": step["Action_Input"]}
                        )
                    except ValueError:
                        templates += "${" in step["Action_Input"]  # the result of an earlier call stands here
                        others += "${" not in step["Action_Input"]
                        continue
                    said_again = calls.parse_call(f"Assistant: {calls.render_call(call)}", known)
                    assert said_again == call
                    if call.name in [t.name for t in known]:
                        assert calls.judge(said_again, call, known).errors in ((), ("hallucinated_argument",))
                        judged += 1
    # Counted with another JSON reader: of 297 calls 261 are JSON, 32 wait for an earlier result and 4 are broken.
    assert judged > 240
    assert (templates, others) == (32, 4)
