"""Dependence: falls of a model whose log-probabilities are a known function of the inputs, worked out in numpy."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from finished_runs import Context, finished

from helpers import PROCESSOR, render, tiny_llama
from luthier.core import registry
from luthier.core.errors import UserError
from luthier.functional.input_corruption import distances
from luthier.functional.questions import numbers, with_question, with_sentence
from luthier.functional.statistics import Estimate
from luthier.methods.analysis.masked_thought import Dependence, question, ranges
from luthier.tasks.causal_lm import CausalLM


def weight(distance):
    return 2.0**-distance


def known(ids, start, scale=1.0):
    """Log-probability of every target: a sum of weights over the tokens before it that are not masked (id 0)."""
    return [
        scale * sum(weight(j - i) for i in range(j) if ids[i] != 0) - 3.0 for j in range(start, len(ids))
    ]  # fmt: skip


class Known:
    """A session whose outputs are those of :func:`known`."""

    def __init__(self, scale=1.0, says="5"):
        self.scale, self.says, self.task, self.processor = scale, says, CausalLM(PROCESSOR), PROCESSOR
        self.model = torch.nn.Linear(1, 1)
        self.asked = []

    def evaluate_batch(self, batch, statistics):
        found = []
        for b in range(batch.examples):
            length = int(batch.inputs["attention_mask"][b].sum())
            start = int(batch.supervised_BT[b].long().argmax())
            found += known(batch.inputs["input_ids"][b, :length].tolist(), start, self.scale)
        return SimpleNamespace(logp_N=torch.tensor(found))

    def render(self, rows):
        return render(rows)

    def generate(self, rows):
        self.asked.append(rows)
        return [[SimpleNamespace(text=self.says)] for _ in rows]


def measured(options, *, base=1.0, tuned=2.0, rows=6, verifier=None):
    ctx = Context(Known(base), rows=rows)
    run = finished(Known(tuned))
    if verifier:
        ctx.verifier = verifier
    table = registry.get("analysis", "masked-thought").build(options).run([run], ctx)
    json.dumps([table.rows, table.notes], allow_nan=False)
    return ctx, run, {(row[1], row[2], row[3]): row[4:] for row in table.rows}, table


MASK = {"corruption": "mask", "answers": False}


def test_the_whole_question_masked_against_numpy():
    ctx, _, found, _ = measured({**MASK, "question_share": 1.0, "places": 0, "sentences": []})
    clean, falls, row_mean = [], [], []
    for ids, (start, _) in zip(ctx.data.test.memory.ids, ctx.data.test.memory.spans, strict=True):
        masked = [0 if 1 <= i < start else t for i, t in enumerate(ids.tolist())]  # the opening token stays
        before, after = np.array(known(ids.tolist(), start)), np.array(known(masked, start))
        clean += before.tolist()
        falls += (before - after).tolist()
        row_mean.append((before - after).sum())
    value, n, low, high, unit = found["base", "fall of log-probability", "100% of the question"]
    assert (value, n, unit) == (pytest.approx(np.mean(falls)), len(falls), "nats")
    assert low < value < high
    assert found["tuned", "fall of log-probability", "100% of the question"][0] == pytest.approx(2 * np.mean(falls))
    assert found["base", "log-probability", "clean"][0] == pytest.approx(np.mean(clean), rel=1e-6)
    assert len(found) == 4


def test_one_masked_token_falls_by_its_distance():
    _, _, found, _ = measured({**MASK, "places": 8, "distances": [1, 2, 4], "sentences": []}, rows=12)
    for model, scale in (("base", 1.0), ("tuned", 2.0)):
        fall = {k[2]: v for k, v in found.items() if k[0] == model and k[1] == "fall of log-probability"}
        assert fall["a token 1 back"][0] == pytest.approx(scale * 0.5)
        assert fall["a token 2 back"][0] == pytest.approx(scale * 0.25)
        assert scale * weight(4) < fall["a token 3 to 4 back"][0] < scale * weight(3)
    assert set(fall) == {"a token 1 back", "a token 2 back", "a token 3 to 4 back", "50% of the question"}


def test_ranges_and_distances():
    assert ranges([1, 2, 4, 8]) == [(1, 1), (2, 2), (3, 4), (5, 8)]
    assert ranges([3]) == [(1, 3)]
    # Two rows of width 5; the token before a target predicts it, so target token 3 of row 1 stands at position 5 + 2.
    found = distances(torch.tensor([0, 3, 7]), torch.tensor([0, 0, 1]), torch.tensor([1, 3]), 5)
    assert found.tolist() == [0, 3, 0]


def test_a_sentence_in_the_question_against_numpy():
    ctx, _, found, table = measured({**MASK, "places": 0, "sentences": ["40 41"]})
    falls = []
    for ids, (start, _) in zip(ctx.data.test.memory.ids, ctx.data.test.memory.spans, strict=True):
        if start > 1:  # a question without text has no place for a sentence
            longer = [ids[0], 40, 41, *ids[1:]]
            falls += (np.array(known(ids.tolist(), start)) - np.array(known(longer, start + 2))).tolist()
    value, n, *_ = found["base", "fall of log-probability", "an irrelevant sentence"]
    assert (value, n) == (pytest.approx(np.mean(falls), abs=1e-6), len(falls))
    assert table.notes == ()


def test_rows_whose_targets_change_are_left_out_and_counted():
    class Other(Known):
        def render(self, rows):
            return render([{**row, "completion": f"{row['completion']} 9"} for row in rows])

    ctx = Context(Other(), rows=5)
    table = Dependence(**MASK, places=0, sentences=["40"]).run([finished(Known())], ctx)
    assert "one: 5 rows" in table.notes[0]
    assert not [row for row in table.rows if row[3] == "an irrelevant sentence"]


def test_answers_with_and_without_the_sentence():
    def verifier(rows, texts, ctx):
        return [float(len(text) > 1) for text in texts]

    ctx, run, found, _ = measured(
        {"corruption": "mask", "places": 0, "sentences": ["40"], "rows": 3}, verifier=verifier
    )
    clean, disturbed = ctx.base.asked
    assert len(clean) == len(disturbed) == 3
    assert [row["prompt"] for row in disturbed] == [f"40 {row['prompt']}" for row in clean]
    assert found["base", "right answers", "clean"][:2] == (0.0, 3)
    run.model.says = "ten"
    again = Dependence(corruption="mask", places=0, sentences=["40"], rows=3).run([run], ctx)
    shares = {row[1:4]: row[4] for row in again.rows if row[2] == "right answers"}
    assert shares["tuned", "right answers", "an irrelevant sentence"] == 1.0


@pytest.mark.parametrize("corruption", ["random", "mask"])
def test_every_model_and_run_sees_the_same_replacements(corruption):
    class Watching(Known):
        def evaluate_batch(self, batch, statistics):
            seen.append(batch.inputs["input_ids"].clone())
            return super().evaluate_batch(batch, statistics)

    patterns = []
    for neighbours in (4, 2):
        seen: list[torch.Tensor] = []
        ctx = Context(Watching(), batch_rows=neighbours)
        Dependence(corruption=corruption, answers=False, places=2, sentences=[]).run([finished(Watching())], ctx)
        by_row: dict[int, list] = {}
        step = 2 * (1 + 1 + 2)  # clean, the question, two places; base and tuned
        for number, batch in enumerate(ctx.batches()):
            part = seen[number * step : (number + 1) * step]
            for base, tuned in zip(part[::2], part[1::2], strict=True):
                assert torch.equal(base, tuned)
                for b, row in enumerate(batch.row_B.tolist()):
                    by_row.setdefault(row, []).append(base[b, : len(ctx.data.test.memory.ids[row])].tolist())
        patterns.append(by_row)
    assert patterns[0] == patterns[1]  # the neighbours in a batch do not matter


def test_the_question_ends_at_the_first_target():
    batch = Context(Known(), rows=2).batches()[0]
    for b in range(2):
        start = int(batch.supervised_BT[b].long().argmax())
        assert question(batch)[b].nonzero().flatten().tolist() == list(range(1, start))


def test_with_real_models_the_falls_are_those_of_their_own_passes():
    base, tuned = tiny_llama(0), tiny_llama(1)
    ctx = Context(base, rows=4)
    table = Dependence(question_share=1.0, corruption="mask", answers=False, places=0, sentences=[]).run(
        [finished(tuned)], ctx
    )
    found = {row[1]: row[4] for row in table.rows if row[2] == "fall of log-probability"}
    for name, model in (("base", base), ("tuned", tuned)):
        falls = []
        for ids, (start, _) in zip(ctx.data.test.memory.ids, ctx.data.test.memory.spans, strict=True):
            whole = torch.from_numpy(ids).long()
            masked = whole.clone()
            masked[1:start] = 0
            both = []
            for given in (whole, masked):
                logp = model(input_ids=given[None]).logits[0].double().log_softmax(-1)
                both.append(logp[start - 1 : -1].gather(1, whole[start:, None]).squeeze(1))
            falls += (both[0] - both[1]).tolist()
        assert found[name] == pytest.approx(np.mean(falls), abs=1e-5)


def test_questions_in_other_words():
    pair = {"kind": "pair", "prompt": "What is 2 + 2?", "completion": "4"}
    assert with_question(pair, str.upper)["prompt"] == "WHAT IS 2 + 2?"
    assert pair["prompt"] == "What is 2 + 2?"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
                {"role": "assistant", "content": "d"}]  # fmt: skip
    changed = with_question({"kind": "chat", "messages": json.dumps(messages)}, str.upper)
    assert [m["content"] for m in json.loads(changed["messages"])] == ["a", "b", "C", "d"]
    assert with_question({"kind": "text", "text": "x", "prompt": None}, str.upper) is None
    assert with_question({"kind": "chat", "messages": json.dumps(messages[1:2])}, str.upper) is None
    assert with_question(pair, lambda text: None) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ann has 3. She gets 2. How many?", "Ann has 3. She gets 2. NEW How many?"),
        ("How many?", "NEW How many?"),
        ("a = 1; b = a + 2; b?\n", "a = 1; b = a + 2; NEW b?\n"),
        ("first line\nsecond line", "first line\nNEW second line"),
        ("It costs 1.50 now", "NEW It costs 1.50 now"),
    ],
)
def test_a_sentence_goes_before_the_last_one(text, expected):
    assert with_sentence(text, "NEW") == expected


def test_open_ends_are_none():
    assert numbers(Estimate(1.0, 1, float("nan"), float("inf"))) == (1.0, 1, None, None)


@pytest.mark.parametrize("ends", [[2, 1], [0, 1], [1, 1]])
def test_distances_must_increase(ends):
    with pytest.raises(UserError, match="must increase strictly"):
        Dependence(distances=ends)
