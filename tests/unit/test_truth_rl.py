"""TruthRL: labels and rewards of a table judged by hand, the probe, the metrics and the judge."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from test_generation import Server

from helpers import make_session, random_rows, settings, weights
from luthier.core import registry
from luthier.core.errors import LuthierError, UserError
from luthier.core.protocols import Completion
from luthier.engine.loop import Trainer
from luthier.functional.advantages import normalised
from luthier.functional.truthfulness import boxes, final_answer, label, majority, rates
from luthier.methods.data.truth_rl import KnowledgeProbe
from luthier.methods.objectives.grpo import GroupRelativePolicyOptimization as GRPO
from luthier.methods.rewards.truth_rl import TruthReward
from luthier.methods.transforms.rollouts import Rollouts

ROW = {
    "prompt": "capital of France?",
    "completion": "Paris",
    "extra": json.dumps({"answer": ["Paris", "City of Light"]}),
}
OOK = {**ROW, "extra": json.dumps({"answer": "Paris", "out_of_knowledge": True})}
IN = {**ROW, "extra": json.dumps({"answer": "Paris", "out_of_knowledge": False})}


def box(text):
    return f"<think>hm</think> \\boxed{{{text}}}"


TABLE = [
    (box("Paris"), "correct", 1.0),
    (box("I DON'T KNOW."), "abstain", 0.0),
    (box("I don\u2019t know"), "abstain", 0.0),
    (box("Rome"), "wrong", -1.0),
    ("Paris", "no_answer", -1.0),
    (box("the Paris"), "correct", 1.0),
    (box("A city of light!"), "correct", 1.0),
    (box("I don't know, perhaps Paris"), "abstain", 0.0),
    (box("Paris. I don't know"), "abstain", 0.0),
    (box("Rome") + box("Paris"), "wrong", -1.0),
    ("\\boxed{Paris", "no_answer", -1.0),
    (box("I know"), "wrong", -1.0),
]


@pytest.mark.parametrize(("text", "wanted", "value"), TABLE)
def test_labels_and_ternary_rewards(text, wanted, value):
    reward = TruthReward()
    assert reward.labels([ROW], [text], None) == [wanted]
    assert reward([ROW], [text], None) == [value]


def test_variants():
    texts = [box("Paris"), box("I don't know"), box("Rome"), "nothing"]
    assert TruthReward(variant="binary")([ROW] * 4, texts, None) == [1, -1, -1, -1]
    knowing = TruthReward(variant="knowledge")
    assert knowing([OOK] * 4, texts, None) == [-1, 1, -1, -1]
    assert knowing([IN] * 4, texts, None) == [1, 0, -1, -1]
    assert TruthReward(variant="knowledge", known="binary")([IN] * 4, texts, None) == [1, -1, -1, -1]
    assert TruthReward(abstain=-0.5)([ROW] * 4, texts, None) == [1, -0.5, -1, -1]
    other = TruthReward(phrases=["no idea"], form="tag")
    assert other.labels([ROW] * 2, ["<answer>No idea!</answer>", "<answer>I don't know</answer>"], None) == [
        "abstain",
        "wrong",
    ]
    canned = TruthReward(invalid="invalid question", form="whole")
    assert canned.labels([ROW], ["Invalid question."], None) == ["wrong"]


def test_answers_no_gold_equals_are_put_to_the_verifier_once_each():
    row = {"prompt": "2+2?", "completion": "4", "extra": None}
    reward = TruthReward(verifier="numeric", answer="completion")
    asked = []
    real = reward.verifier
    reward.verifier = lambda rows, texts, ctx: asked.append(texts) or real(rows, texts, ctx)
    assert reward([row] * 3, [box("it is 4.0"), box("5"), box("it is 4.0")], None) == [1, -1, 1]
    assert asked == [["it is 4.0"], ["5"]]


@pytest.mark.parametrize(
    ("combine", "wanted"),
    [("additive", [1.2, 0.2, -0.8]), ("when_correct", [1.2, 0, -1]), ("conditional", [1.2, 0.2, -1])],
)
def test_the_reward_of_reasoning(combine, wanted):
    reward = TruthReward(reasoning={"regex": {"pattern": "hm"}}, reasoning_weight=0.2, combine=combine)
    texts = [box("Paris"), box("I don't know"), box("Rome")]
    assert reward([ROW] * 3, texts, None) == pytest.approx(wanted)


def advantages(reward, texts):
    return normalised(torch.tensor([reward([ROW] * len(texts), texts, None)], dtype=torch.float64))[0].tolist()


def test_the_credit_of_abstaining_follows_what_the_group_knows():
    c, a, w = box("Paris"), box("I don't know"), box("Rome")
    lost = advantages(TruthReward(), [a, w, w, w])
    # rewards 0 -1 -1 -1: mean -0.75, standard deviation 0.5
    assert lost == pytest.approx([0.75 / 0.5001, *[-0.25 / 0.5001] * 3], abs=1e-9)
    assert advantages(TruthReward(variant="binary"), [a, w, w, w]) == [0.0] * 4
    mixed = advantages(TruthReward(), [c, a, w, w])
    assert mixed[0] > mixed[1] > 0 > mixed[2]
    assert advantages(TruthReward(), [c, c, a, c])[2] < 0


def test_an_abstention_at_minus_one_is_binary_step_for_step(tmp_path):
    """The same seed, the same weights: the two rewards differ in nothing else."""

    def run(**options):
        reward = {"truth-rl": {"form": "whole", "answer": "completion", "phrases": ["5"], **options}}
        made = Rollouts(reward=reward, samples=4, max_new_tokens=6)
        session = make_session(objective=GRPO(), transforms=[made])
        Trainer(session, random_rows(), settings(max_steps=2)).run()
        return weights(session.model)

    custom, binary, ternary = run(abstain=-1.0), run(variant="binary"), run()
    assert all(torch.equal(v, binary[n]) for n, v in custom.items())
    assert any(not torch.equal(v, ternary[n]) for n, v in custom.items())


def test_metrics():
    found = rates(["correct"] * 50 + ["abstain"] * 30 + ["wrong"] * 15 + ["no_answer"] * 5)
    assert found == pytest.approx(
        {"accuracy": 0.5, "abstention": 0.3, "hallucination": 0.2, "hallucination_given": 0.15, "truthfulness": 0.3}
    )
    assert rates(["abstain"] * 4)["truthfulness"] == 0.0
    assert rates(["correct", "abstain"], abstain=0.5)["truthfulness"] == pytest.approx(0.75)
    assert majority(["wrong", "correct", "correct", "wrong", "abstain"]) == "wrong"


def test_pieces_of_text():
    assert boxes("\\boxed{a{b}c} and \\fboxed{d}") == ["a{b}c", "d"]
    assert final_answer("  ", "whole") is None
    assert label("x", ["y"], lambda gold, said: gold == "y" and said == "x", form="whole") == "correct"


def test_what_is_missing_is_named():
    with pytest.raises(UserError, match="no gold answer"):
        TruthReward()([{"prompt": "?", "completion": " ", "extra": None, "source": "q.jsonl", "row": 3}], ["x"], None)
    with pytest.raises(UserError, match=r"q\.jsonl, row 4: truth-rl: variant: knowledge needs the column"):
        TruthReward(variant="knowledge")([{**ROW, "source": "q.jsonl", "row": 4}], [box("Paris")], None)
    with pytest.raises(UserError, match="Did you mean 'numeric'"):
        TruthReward(verifier="numerik")


def test_warnings_of_a_model_that_never_abstains_and_a_match_that_is_too_strict():
    row = {**ROW, "extra": json.dumps({"answer": "the capital city of France"})}
    with (
        pytest.warns(UserWarning, match="0 of the first 200 answers abstain"),
        pytest.warns(UserWarning, match="takes every paraphrase for wrong"),
    ):
        TruthReward()([row] * 200, [box("Rome")] * 200, None)


def test_groups_are_logged():
    logged = {}
    first, second = dict(ROW), dict(ROW)
    texts = [box("Paris")] * 2 + [box("Rome"), "nothing"]
    TruthReward()([first, first, second, second], texts, SimpleNamespace(log=logged.update))
    assert logged == {"truth_rl_all_correct": 0.5, "truth_rl_all_abstain": 0.0, "truth_rl_all_wrong": 0.5}


# -- the probe


FEATURES = Features({n: Value("string") for n in ("prompt", "completion", "rejected", "kind", "extra", "messages")})


def probed(answers, **options):
    """Rows after the stage, with scripted samples by prompt."""
    rows = [
        {"prompt": p, "completion": "yes", "kind": "pair", "extra": None, "rejected": None, "messages": None}
        for p in answers
    ]
    reports = []

    def generate(rows, *, samples, decoding, **sampling):
        assert decoding == "sample"
        return [[Completion(t, (), True) for t in answers[r["prompt"]]] for r in rows]

    ctx = SimpleNamespace(generate=generate, report=reports.append)
    options = {"reward": {"form": "whole", "answer": "completion"}, "samples": 3, **options}
    found = KnowledgeProbe(**options).run(Dataset.from_list(rows, features=FEATURES), ctx)
    return [dict(r) for r in found], reports[0]


ANSWERS = {
    "known": ["yes", "no", "yes"],
    "unsure": ["I don't know", "no", "no"],
    "unknown": ["no", "maybe", "no"],
}


def test_the_probe_flags_what_is_never_answered():
    rows, report = probed(ANSWERS)
    extra = [json.loads(r["extra"]) for r in rows]
    assert [e["out_of_knowledge"] for e in extra] == [False, True, True]
    assert [e["empirical_accuracy"] for e in extra] == pytest.approx([2 / 3, 0, 0])
    assert report == {
        "questions": 3, "samples": 3, "out_of_knowledge": 2, "accuracy": pytest.approx(2 / 9), "abstention": pytest.approx(1 / 9),
    }  # fmt: skip


def test_baselines_made_of_the_samples():
    tuned, _ = probed(ANSWERS, targets="r-tuning")
    assert [r["completion"] for r in tuned] == ["yes", "I don't know", "I don't know"]
    own, _ = probed(ANSWERS, targets="rft")
    assert [(r["prompt"], r["completion"]) for r in own] == [("known", "yes")]
    pairs, _ = probed(ANSWERS, targets="pairs")
    assert [(r["kind"], r["completion"], r["rejected"]) for r in pairs] == [
        ("preference", "yes", "no"),
        ("preference", "I don't know", "no"),
    ]
    with pytest.raises(UserError, match="targets: rft leaves no row"):
        probed({"unknown": ["no", "no", "no"]}, targets="rft")
    assert KnowledgeProbe().abstention == "\\boxed{I don't know}"


# -- the analysis


def test_the_table_before_and_after():
    rows = [{**(OOK if i % 2 else IN), "row": i} for i in range(4)]
    item = lambda i, text: {"row": i, "completion": box(text)}  # noqa: E731
    run = SimpleNamespace(metrics={
        "before": {"items": {"target": [item(i, "Rome") for i in range(4)]}},
        "after": {"items": {"target": [item(0, "Paris"), item(1, "I don't know"), item(2, "Rome"), item(3, "I don't know")]}},
    })  # fmt: skip
    ctx = SimpleNamespace(data=SimpleNamespace(test=SimpleNamespace(rows=SimpleNamespace(dataset=rows))))
    table = registry.get("analysis", "truth-rl").build({}).run([run], ctx)
    found = {(r[0], r[1]): r[2:] for r in table.rows}
    assert found["before", "all"] == (4, 0.0, 0.0, 1.0, 1.0, -1.0)
    assert found["after", "all"] == pytest.approx((4, 0.25, 0.5, 0.25, 0.25, 0.0))
    assert found["after", "out of knowledge"] == pytest.approx((2, 0.0, 1.0, 0.0, 0.0, 0.0))
    assert found["after", "within knowledge"] == pytest.approx((2, 0.5, 0.0, 0.5, 0.5, 0.0))


# -- the judge


def judged(replies, tmp_path, monkeypatch, **options):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))
    rows = [{"prompt": f"q{i}", "completion": "gold", "extra": None} for i in range(len(replies))]

    def answer(body, number):
        shown = body["messages"][-1]["content"]
        index = int(shown[len("Question: q")])
        return 200, {"choices": [{"message": {"content": replies[index]}, "finish_reason": "stop"}]}

    with Server(answer) as server:
        reward = registry.get("reward", "judge").build({"url": server.url, "model": "j", "parallel": 1, **options})
        found = reward(rows, ["said"] * len(rows), None)
        again = reward(rows, ["said"] * len(rows), None)
    assert again == found
    return found, server.bodies


def test_a_judge_gives_zero_or_one_and_is_asked_once(tmp_path, monkeypatch):
    replies = ['{"score": 1}', 'Sure: {"score": 0}', '{"why": "same", "score": "1"}', "I think so"]
    found, bodies = judged(replies, tmp_path, monkeypatch, most_failures=0.25)
    assert found == [1, 0, 1, 0]
    assert len(bodies) == 4
    assert bodies[0]["temperature"] == 0
    assert "Reference: gold\n\nCandidate: said" in bodies[0]["messages"][-1]["content"]


def test_a_judge_that_breaks_down_stops_the_run(tmp_path, monkeypatch):
    with pytest.raises(LuthierError, match="2 of 3 replies of 'j' have no score, such as 'eh'"):
        judged(['{"score": 1}', "eh", "oh"], tmp_path, monkeypatch)


def test_no_reward_is_not_a_number():
    assert np.isfinite(TruthReward()([ROW] * len(TABLE), [t for t, _, _ in TABLE], None)).all()
