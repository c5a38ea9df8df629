"""Selective self-rehearsal: the rule for questions without an answer, the two subsets, and what the loss is a mean over."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scripted import Script, run, same, tensors, tiny

from luthier.core.errors import UserError
from luthier.core.rng import numpy_stream
from luthier.methods.decoding import greedy
from luthier.methods.procedures.selective_self_rehearsal import accepts, lopsided, spared
from luthier.methods.rewards.token_overlap import overlap, token_overlap

SLUG = "selective-self-rehearsal"
NOTHING = "not in the document"
ROWS = [
    {"prompt": "a=1 a?", "completion": "1", "answerable": True},
    {"prompt": "a=2 a?", "completion": "2", "answerable": True},
    {"prompt": "a=3 b?", "completion": NOTHING, "answerable": False},
    {"prompt": "a=4 b?", "completion": NOTHING, "answerable": False},
]
# Good, abstaining where there is an answer, abstaining where there is none, and made up.
SAYS = {
    "a=1 a?": "it is 1",
    "a=2 a?": "Not in the document",
    "a=3 b?": "this is not in the document.",
    "a=4 b?": "is 4",
}
OPTIONS = {"abstains": [NOTHING], "answerable": "answerable"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(autouse=True)
def script(monkeypatch, tmp_path):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    made = Script(lambda prompt, number: SAYS[prompt])
    monkeypatch.setattr(greedy, "completions", made)
    return made


def tune(base, folder, options=OPTIONS, rows=ROWS, **more):
    data = {"verifier": {"normalised": {"contained": True}}, **more.pop("data", {})}
    return run(base, folder, rows, "sft" if options is None else {SLUG: options}, data=data, **more)


def lines(made):
    return [json.loads(line) for line in (made.folder / f"{SLUG}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_rule_of_who_abstains():
    assert accepts(True, True) is True
    assert accepts(True, False) is False
    assert accepts(False, True) is False
    assert accepts(False, False) is None


def test_rows_are_parted_by_rule_and_judge(base, tmp_path):
    made = tune(base, tmp_path / "run")
    found = lines(made)
    assert [line["source"] for line in found] == ["self", "gold", "self", "gold"]
    assert [line["self"]["reason"] for line in found] == ["accepted", "rule", "rule", "rule"]
    assert [line["target"] for line in found] == ["it is 1", "2", "this is not in the document.", NOTHING]
    told = made.metrics["training"][SLUG]
    assert {k: told[k] for k in ("self", "gold", "self_abstaining", "gold_abstaining")} == {
        "self": 2,
        "gold": 2,
        "self_abstaining": 1,
        "gold_abstaining": 1,
    }
    gold, target = zip(
        *((x["nll_gold_base"], x["nll_target_base"]) for x in found if x["source"] == "self"), strict=True
    )
    assert told["nll_gold_of_self"] == pytest.approx(np.mean(gold))
    assert told["nll_target_of_self"] == pytest.approx(np.mean(target))


def test_the_partition_is_the_same_from_what_was_kept(base, script, tmp_path):
    first = tune(base, tmp_path / "first")
    asked = len(script.prompts)
    second = tune(base, tmp_path / "second")
    assert len(script.prompts) == asked == 4
    assert lines(first) == lines(second)
    assert same(tensors(first), tensors(second))


def test_without_rehearsal_it_is_plain_sft(base, tmp_path):
    never = {"judges": [{"regex": {"pattern": "never"}}]}
    plain = tune(base, tmp_path / "plain", None)
    assert same(tensors(plain), tensors(tune(base, tmp_path / "empty", never)))
    # lambda_R = 0 is plain SFT on the rows of G alone.
    alone = tune(base, tmp_path / "alone", None, rows=[ROWS[1], ROWS[3]])
    assert same(tensors(alone), tensors(tune(base, tmp_path / "zero", {**OPTIONS, "rehearsal_weight": 0.0})))


@pytest.mark.parametrize("normalise", ["token", "sequence"])
def test_loss_of_both_subsets_by_hand(base, tmp_path, normalise):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = tune(base, tmp_path / "run", {**OPTIONS, "rehearsal_weight": 0.5, "normalise": normalise})
    first = json.loads((made.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])["loss"]
    model, words = AutoModelForCausalLM.from_pretrained(base).double().eval(), AutoTokenizer.from_pretrained(base)
    top = bottom = 0.0
    for row, line in zip(ROWS, lines(made), strict=True):
        start = [words.bos_token_id] if words("a")["input_ids"][0] == words.bos_token_id else []
        before = start + words(row["prompt"], add_special_tokens=False)["input_ids"]
        after = [*words(line["target"], add_special_tokens=False)["input_ids"], words.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        nll = -logits.log_softmax(-1)[range(len(after)), after]
        share = (0.5 if line["source"] == "self" else 1.0) / (len(after) if normalise == "sequence" else 1)
        top, bottom = top + share * float(nll.sum()), bottom + share * len(after)
    assert first == pytest.approx(top / bottom, rel=1e-5)


@pytest.mark.parametrize("normalise", ["token", "sequence"])
def test_accumulation_changes_nothing(base, tmp_path, normalise):
    options = {**OPTIONS, "rehearsal_weight": 0.5, "normalise": normalise}
    sgd = {"optimizer": "sgd", "learning_rate": 0.1, "schedule": "constant"}
    one = tensors(tune(base, tmp_path / "1", options, training=sgd))
    for parts in (2, 4):
        more = tensors(tune(base, tmp_path / str(parts), options, training={**sgd, "accumulation": parts}))
        for name, value in one.items():
            torch.testing.assert_close(more[name], value, atol=1e-6, rtol=1e-5)


def test_rows_drawn_from_r_fill_g_up():
    rehearsed = np.array([True] * 8 + [False] * 2)
    left = spared(rehearsed, 0.5, numpy_stream(0, "data", SLUG, 1))
    assert left.sum() == 5
    assert not left[8:].any()
    assert (left == spared(rehearsed, 0.5, numpy_stream(0, "data", SLUG, 1))).all()
    assert (spared(rehearsed, 0.2, numpy_stream(0, "data", SLUG, 1)) == rehearsed).all()


def test_a_lopsided_g_is_said():
    record = {"self": 10, "gold": 10, "self_abstaining": 0, "gold_abstaining": 9}
    assert "9 of 10 given answers that are learnt abstain" in lopsided(record)[0]
    assert lopsided({**record, "gold_abstaining": 8}) == ()
    assert lopsided({**record, "gold_abstaining": 0, "self_abstaining": 5})[0].count("10 of 10") == 1
    assert lopsided({**record, "gold_abstaining": 0}) == ()  # nothing abstains anywhere


def test_words_in_common_by_hand():
    # a b b c against b x a: a and one b are shared.
    gold, said = ["a", "b", "b", "c"], ["b", "x", "a"]
    assert overlap(said, gold, "recall") == 2 / 4
    assert overlap(said, gold, "precision") == 2 / 3
    assert overlap(said, gold, "f1") == pytest.approx(2 * (1 / 2) * (2 / 3) / (1 / 2 + 2 / 3))
    rows = [{"extra": json.dumps({"answer": ["red fox", "fox"]})}, {"extra": json.dumps({"answer": "!"})}, {}]
    assert token_overlap(rows, ["The fox!", "x", "x"], None, measure="recall") == [1.0, None, None]


def test_bad_settings_are_refused(base, tmp_path):
    with pytest.raises(UserError, match="abstains must say by which phrases"):
        tune(base, tmp_path / "a", {"answerable": "answerable"})
    with pytest.raises(UserError, match="4 of 4 given answers abstain, which is more than 90%"):
        tune(base, tmp_path / "b", {"abstains": ["1", "2", "not"]})
    with pytest.raises(UserError, match=r"no file \./none\.py"):
        tune(base, tmp_path / "c", {"abstains": "./none.py:f"})
