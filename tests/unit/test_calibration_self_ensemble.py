"""Self-ensembles: rules and metrics by hand, class scores one at a time, draws, and the three axes end to end."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.core.errors import UserError
from luthier.core.registry import get
from luthier.functional.class_ensembles import (
    StreamingCalibration,
    aggregate,
    batch_calibrated,
    contextual_calibrated,
    quality,
    reliability,
    softmax,
)
from luthier.functional.in_context import Example, Template, check_labels, class_scores, drawn, fitted, variations

SLUG = "calibration-self-ensemble"
P = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.8, 0.1], [0.7, 0.2, 0.1]])[:, None]


def test_rules_on_the_hand_table():
    q, best = aggregate(P, "mean_prob")
    np.testing.assert_allclose(q, [[0.4, 0.45, 0.15]], atol=1e-15)
    assert best.tolist() == [1]
    q, best = aggregate(P, "max_prob")
    np.testing.assert_allclose(q, [[7 / 18, 8 / 18, 3 / 18]], atol=1e-15)
    # 0.6 + 0.7 against 0.5 + 0.8: a tie, which the first variation decides.
    q, best = aggregate(P, "majority_vote")
    np.testing.assert_allclose(q, [[0.65, 0.25, 0.1]], atol=1e-15)
    assert best.tolist() == [0]
    q, best = aggregate(P[::-1], "majority_vote")
    assert best.tolist() == [0]
    q, best = aggregate(P[[1, 0, 2, 3]], "majority_vote", weighted=False)
    np.testing.assert_allclose(q, [[0.15, 0.65, 0.2]], atol=1e-15)
    assert best.tolist() == [1]


def test_votes_count_their_confidence_and_too_few_keep_all():
    p = P.copy()
    p[1, 0] = [0.2, 0.6, 0.2]
    q, best = aggregate(p, "majority_vote")
    np.testing.assert_allclose(q, [[0.15, 0.7, 0.15]], atol=1e-15)
    assert best.tolist() == [1]
    q, best = aggregate(p, "majority_vote", min_votes=1.5)
    np.testing.assert_allclose(q, [[0.4, 0.475, 0.125]], atol=1e-15)
    assert best.tolist() == [1]


@pytest.mark.parametrize("rule", ["mean_prob", "max_prob", "majority_vote"])
@pytest.mark.parametrize("count", [1, 5])
def test_equal_variations_are_the_single_one(rule, count):
    p = softmax(np.random.default_rng(0).normal(size=(7, 4)))
    q, best = aggregate(np.stack([p] * count), rule)
    np.testing.assert_allclose(q, p, atol=1e-15)
    assert best.tolist() == p.argmax(-1).tolist()


def hand_items():
    """Four items of confidence 0.1, four of 1.0 and four of 0.55, over ten classes."""
    q = np.zeros((12, 10))
    q[:4] = 0.1
    q[4:8, 2] = 1.0
    q[8:, 4], q[8:, 5] = 0.55, 0.45
    return q, np.array([0, 1, 1, 1, 2, 2, 2, 3, 4, 4, 5, 5])


def test_metrics_of_twelve_hand_items():
    q, gold = hand_items()
    found = quality(q, gold)
    assert found.accuracy == found.micro_f1 == 0.5
    # Bins of 4 items each: |0.25 - 0.1|, |0.75 - 1|, |0.5 - 0.55|, and empty ones.
    assert found.ece == pytest.approx((0.15 + 0.25 + 0.05) / 3, abs=1e-12)
    nll = 4 * math.log(10) + 12 * math.log(10) - 2 * math.log(0.55) - 2 * math.log(0.45)
    assert found.nll == pytest.approx(nll / 12, abs=1e-12)
    assert found.brier == pytest.approx((4 * 0.9 + 2 + 2 * 0.405 + 2 * 0.605) / 12, abs=1e-12)
    # F1 = 2 tp / (predicted + true); absent classes count zero.
    assert found.macro_f1 == pytest.approx((2 / 5 + 6 / 7 + 4 / 6) / 10, abs=1e-12)
    entropy = (4 * math.log(10) - 4 * (0.55 * math.log(0.55) + 0.45 * math.log(0.45))) / 12
    assert found.entropy == pytest.approx(entropy, abs=1e-12)
    assert found.entropy_term == pytest.approx(entropy / 10, abs=1e-12)
    assert found.overconfidence == pytest.approx(0.55 - 0.5, abs=1e-12)
    table = reliability(q.max(-1), q.argmax(-1) == gold)
    np.testing.assert_allclose(table, [(0.1, 0.25, 4), (0.55, 0.5, 4), (1.0, 0.75, 4)], atol=1e-12)


def test_binary_calibration_error_of_released_code_is_another_quantity():
    q, gold = np.array([[0.75, 0.25], [0.75, 0.25], [0.25, 0.75], [0.25, 0.75]]), [0, 1, 1, 1]
    assert quality(q, gold).ece == pytest.approx(0.0, abs=1e-12)
    # P(1) = 0.25 where half are 1, and 0.75 where all are.
    assert quality(q, gold, binary_ece="positive").ece == pytest.approx(0.25, abs=1e-12)


def test_batch_calibration():
    rng = np.random.default_rng(1)
    z = rng.normal(size=(40, 3))
    z = (z - z.mean(0)) / z.std(0, ddof=1)
    assert batch_calibrated(z).argmax(-1).tolist() == z.argmax(-1).tolist()
    biased = z + np.array([0.0, 5.0, 0.0])
    assert biased.argmax(-1).tolist() != z.argmax(-1).tolist()
    np.testing.assert_allclose(batch_calibrated(biased), batch_calibrated(z), atol=1e-12)
    np.testing.assert_allclose(batch_calibrated(biased, demean_only=True), softmax(z), atol=1e-12)
    small = np.array([[1.0, 4.0], [3.0, 4.0]])
    # Mean 2 and unbiased variance 2 of the first class; the second does not vary.
    np.testing.assert_allclose(batch_calibrated(small), softmax([[-1 / math.sqrt(2), 0], [1 / math.sqrt(2), 0]]))
    stream = StreamingCalibration(2)
    np.testing.assert_allclose(
        stream(small), softmax((small - [0.2, 0.4]) / np.sqrt([0.9 + 0.2, 0.9])), atol=1e-12
    )  # fmt: skip


def test_contextual_calibration_makes_an_empty_input_uniform():
    empty = np.array([0.7, 0.2, 0.1])
    np.testing.assert_allclose(contextual_calibrated(empty[None], empty), np.full((1, 3), 1 / 3), atol=1e-15)


POOL = [Example(f"q{i} ", f"a{i}") for i in range(6)]


def test_the_query_is_never_among_its_examples_and_draws_repeat():
    pool = [*POOL, Example("q0 ", "another label of the same text")]
    seen = set()
    for draw in range(40):
        chosen = drawn(pool, 3, POOL[0], 0, draw)
        assert all(e.input != "q0 " for e in chosen)
        assert len({e.input for e in chosen}) == 3
        seen.add(tuple(e.input for e in chosen))
        assert chosen == drawn(pool, 3, POOL[0], 0, draw)
    assert len(seen) > 20
    assert drawn(POOL, 0, None, 0) == []
    with pytest.raises(ValueError, match="6 examples are asked for and there are 5"):
        drawn(POOL, 6, POOL[0], 0)


def test_templates_and_what_truncation_drops():
    template = Template()
    text, lost = fitted(template, POOL[:3], "q", lambda t: len(t) <= 14)
    assert (text, lost) == ("q2 a2\n\nq", 2)
    text, lost = fitted(template, POOL[:3], "q", lambda t: False)
    assert (text, lost) == ("q", 3)
    assert (
        Template("{examples}> {input}", "{input}={label}", "|").write([Example("{label}", "b")], "x") == "{label}=b|> x"
    )
    with pytest.raises(ValueError, match=r"no slot \{input\}"):
        Template("{examples}")
    with pytest.raises(ValueError, match=r"no slot \{label\}"):
        Template(example="{input}")


def test_variations_are_the_cross_product_with_shared_draws():
    two = [Template(), Template("Again: {examples}{input}")]
    made = variations(POOL, "q9", two, 2, 3, 0)
    assert len(made) == 6
    assert [examples for _, examples in made[:3]] == [examples for _, examples in made[3:]]
    assert len(variations([], "q9", two, 0, 3, 0)) == 2


def test_labels_that_cannot_be_told_apart():
    with pytest.raises(ValueError, match="begin with the same token"):
        check_labels(["ab", "ac"], [[1, 2], [1, 3]], "first_token")
    check_labels(["ab", "ac"], [[1, 2], [1, 3]], "mean_logprob")
    with pytest.raises(ValueError, match="different texts"):
        check_labels(["a", "a"], [[1], [1]], "mean_logit")
    with pytest.raises(ValueError, match="no token"):
        check_labels(["a", ""], [[1], []], "mean_logit")


def tiny(vocabulary=24, positions=64):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=positions,
            initializer_range=0.4,
        )
    ).eval()


@pytest.mark.parametrize("score", ["first_token", "mean_logit", "sum_logprob", "mean_logprob"])
@pytest.mark.parametrize("labels", [[[5], [7], [9]], [[5, 6, 8], [7], [5, 9]]])
def test_class_scores_against_one_prompt_at_a_time(score, labels):
    model, prompts = tiny(), [[1, 3, 4], [1, 10, 11, 12, 13, 3], [1]]
    wanted = np.empty((3, 3))
    for i, prompt in enumerate(prompts):
        for k, label in enumerate(labels):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + label])).logits[0].double()
            if "logprob" in score:
                logits = logits.log_softmax(-1)
            each = [float(logits[len(prompt) - 1 + t, token]) for t, token in enumerate(label)]
            wanted[i, k] = {"first_token": each[0], "sum_logprob": sum(each)}.get(score, sum(each) / len(each))
    found = class_scores(model, prompts, labels, score=score, batch_rows=2)
    np.testing.assert_allclose(found, wanted, atol=2e-5)


class Characters:
    """Ids of characters; 1 begins a text, 2 ends it, 0 pads."""

    all_special_ids, pad_token_id, eos_token_id = (0, 1, 2), 0, 2

    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + [ord(c) for c in text]

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(i) for i in ids if i > 2)


CONTEXT = SimpleNamespace(processor=Characters(), device="cpu")


def examples_file(folder):
    file = folder / "rows.jsonl"
    lines = [json.dumps({"prompt": f"{c}{c}?", "completion": label}) for c, label in zip("abcd", "xyxy", strict=True)]
    file.write_text("\n".join(lines), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("rule", ["mean_prob", "max_prob", "majority_vote"])
def test_decoder_against_single_prompts(tmp_path, rule):
    model, labels = tiny(128, 256), ["x", "yz"]
    decoder = get("decoding", SLUG).build(
        {"labels": labels, "examples": examples_file(tmp_path), "m": 2, "draws": 3, "rule": rule,
         "templates": ["{examples}{input}", "Say: {examples}{input}"]}
    )  # fmt: skip
    prompts = [Characters().encode(t) for t in ("aa?", "ef?")]
    found = decoder.generate(model, prompts, CONTEXT)
    for i, query in enumerate(("aa?", "ef?")):
        p = []
        for template, examples in variations(decoder.pool, query, decoder.templates, 2, 3, 0):
            ids = Characters().encode(template.write(examples, query))
            assert "aa?" not in [e.input for e in examples] or query != "aa?"
            p.append(softmax(class_scores(model, [ids], [[ord("x")], [ord("y"), ord("z")]])))
        q, best = aggregate(np.stack(p), rule)
        assert found[i].text == labels[best[0]]
        np.testing.assert_allclose(decoder.probabilities[i], q[0], atol=1e-6)
        assert found[i].logp == pytest.approx(math.log(q[0, best[0]]), abs=1e-6)
    alone = decoder.generate(model, prompts[1:], CONTEXT)
    assert alone[0].text == found[1].text
    assert alone[0].logp == pytest.approx(found[1].logp, abs=1e-6)


def test_decoder_drops_examples_that_do_not_fit(tmp_path):
    decoder = get("decoding", SLUG).build(
        {"labels": ["x", "y"], "examples": examples_file(tmp_path), "m": 3, "draws": 2}
    )
    decoder.generate(tiny(128, 12), [Characters().encode("ef?")], CONTEXT)
    # 1 + 3 of the query and 6 per example ("aa?x" and two line ends) leave room for one example of three.
    assert decoder.dropped == 4


def test_decoder_refuses(tmp_path):
    build = get("decoding", SLUG).build
    with pytest.raises(UserError, match="set m: 0"):
        build({"labels": ["x", "y"]})
    with pytest.raises(UserError, match="no file nowhere"):
        build({"labels": ["x", "y"], "examples": "nowhere.jsonl"})
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}')
    with pytest.raises(UserError, match=r"bad.jsonl, line 1"):
        build({"labels": ["x", "y"], "examples": str(tmp_path / "bad.jsonl")})
    with pytest.raises(UserError, match="no slot"):
        build({"labels": ["x", "y"], "m": 0, "templates": ["{input}"]})
    with pytest.raises(UserError, match="begin with the same token"):
        build({"labels": ["xa", "xb"], "m": 0, "score": "first_token"}).generate(tiny(128), [[1, 65]], CONTEXT)
    with pytest.raises(UserError, match="special tokens inside"):
        build({"labels": ["x", "y"], "m": 0}).generate(tiny(128), [[1, 65, 2, 66]], CONTEXT)


FEATURES = Features(
    {n: Value("string") for n in ("prompt", "separator", "completion", "kind", "extra", "messages", "source", "key")}
    | {"row": Value("int64")}
)


def rows(count=6):
    return [
        {"prompt": f"q{i}", "separator": " ", "completion": f"a{i}", "kind": "pair", "extra": None, "messages": None,
         "source": "s", "key": f"k{i}", "row": i}
        for i in range(count)
    ]  # fmt: skip


def staged(options, count=6):
    reports = []
    renderer = SimpleNamespace(prompt_ids=lambda row: list(row["prompt"]))
    ctx = SimpleNamespace(seed=0, renderer=renderer, report=reports.append)
    made = get("data", SLUG).build(options).run(Dataset.from_list(rows(count), features=FEATURES), ctx)
    return list(made), reports[0]


def test_without_examples_the_rows_are_those_of_plain_sft():
    assert staged({"m": 0})[0] == rows()


def test_stage_writes_examples_before_the_query():
    made, report = staged({"m": 2})
    assert report == {"rows": 6, "examples": 2, "dropped_examples": 0}
    for i, row in enumerate(made):
        first, second, query = row["prompt"].split("\n\n")
        assert query == f"q{i}"
        assert row["completion"] == f"a{i}"
        assert json.loads(row["extra"])["in_context_query"] == f"q{i}"
        for text in (first, second):
            asked, answer = text.split(" ")
            assert asked != f"q{i}"
            assert answer == "a" + asked[1:]
    assert made == staged({"m": 2})[0]
    twice, _ = staged({"m": 2, "draws": 2})
    assert len({row["key"] for row in twice}) == 12
    # Room for the query and one example: one of two is dropped in every row.
    assert staged({"m": 2, "max_prompt_tokens": 10})[1]["dropped_examples"] == 6
    with pytest.raises(UserError, match="give more rows"):
        staged({"m": 6})


class Few:
    """Prepared rows whose canonical form is given."""

    def __init__(self, rows):
        self.rows, self.prepared = rows, self

    def __len__(self):
        return len(self.rows)

    def canonical(self, index):
        return self.rows[index]


def analysed(options, test=4):
    given = [{**row, "completion": "xy"[row["row"] % 2]} for row in rows(8)]
    words = Characters()
    renderer = SimpleNamespace(prompt_ids=lambda row: words.encode(row["prompt"] + (row["separator"] or "")))
    session = SimpleNamespace(model=tiny(128, 256), processor=words, device="cpu")
    ctx = SimpleNamespace(
        base=session,
        shop=SimpleNamespace(session=lambda model: session),
        data=SimpleNamespace(
            train=Few(given), test=Few(given[:test]) if test else None, select=None, renderer=renderer
        ),
    )
    run = SimpleNamespace(folder=SimpleNamespace(name="one"), model=None)
    return get("analysis", SLUG).build(options).run([run], ctx), session, given


def test_analysis_against_the_scores_of_single_prompts():
    table, session, given = analysed({"m": 2, "draws": 3})
    found = {row[1:4]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    json.dumps(table.rows, allow_nan=False)
    gold, q = [0, 1, 0, 1], []
    pool = [Example(row["prompt"] + " ", row["completion"]) for row in given]
    for i in range(4):
        p = []
        for template, examples in variations(pool, f"q{i} ", [Template()], 2, 3, 0):
            ids = Characters().encode(template.write(examples, f"q{i} "))
            p.append(softmax(class_scores(session.model, [ids], [[ord("x")], [ord("y")]]))[0])
        q.append(aggregate(np.stack(p)[:, None], "max_prob")[0][0])
    wanted = quality(np.stack(q), gold)
    line = found["base", 2, "max_prob"]
    assert (line["n"], line["passes per row"]) == (4, 3)
    assert line["ECE"] == pytest.approx(wanted.ece, abs=1e-6)
    assert line["NLL"] == pytest.approx(wanted.nll, abs=1e-6)
    assert found["tuned", 0, "mean_prob"]["NLL"] == found["tuned", 0, "single"]["NLL"]


def test_analysis_refuses():
    with pytest.raises(UserError, match=r"data\.test"):
        analysed({}, test=0)
    with pytest.raises(UserError, match="'x' is none of the 2 labels"):
        analysed({"labels": ["y", "z"], "m": 1, "draws": 1})
    with pytest.raises(UserError, match="give more training rows"):
        analysed({"m": 8, "draws": 1})
