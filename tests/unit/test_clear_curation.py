"""CLEAR: the confidence of a given answer, what the filter keeps, and what is corrected."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scripted import Script, run, same, tensors, tiny

from luthier.core.errors import UserError
from luthier.engine import loop
from luthier.functional import confidence as sure
from luthier.methods.decoding import greedy, sample
from luthier.runs import procedure as kept

SLUG = "clear-curation"
ROWS = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(5)] + [{"prompt": "8+1=", "completion": "bad 5"}]
FAST = {"samples": 2, "beta": 1.0, "max_new_tokens": 8}


def drawn(prompt, number):
    """The base knows the sums below 4 and 8+1, and is of two minds about 4+1."""
    first = int(prompt[0])
    return ["7", "5"][number % 2] if first == 4 else str(first + 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(autouse=True)
def script(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    made = Script(drawn)
    monkeypatch.setattr(sample, "completions", made)
    return made


def stage(base, folder, options=FAST, rows=ROWS, **more):
    stages = [] if options is None else [{SLUG: options}]
    return run(base, folder, rows, "sft", data={"stages": stages}, **more)


def table(made, name=f"data/{SLUG}/scores.jsonl"):
    return [json.loads(line) for line in (made.folder / name).read_text().splitlines()]


# -- numbers


def test_confidence_of_the_worked_example():
    similar, equal = np.array([0.9, 0.2, 0.7, 1.0, 0.4]), np.array([1, 0, 0, 1, 0])
    observed = sure.consistency(similar, equal, 0.8)
    assert observed == pytest.approx(0.592)
    assert sure.combined(np.array([observed]), np.array([0.75]), 0.7)[0] == pytest.approx(0.6394)
    assert sure.combined(np.array([observed]), None, 0.7)[0] == observed


def test_similarities_by_hand():
    assert sure.jaccard("the Red fox", "the red  dog") == 2 / 4
    assert sure.jaccard("1.5", "15") == 0.0
    assert sure.json_fields('{"a": "x y", "b": 1}', '{"a": "x", "c": 1}') == pytest.approx((1 / 2 + 0 + 0) / 3)
    assert sure.json_fields('{"a": 1}', "no json") == 0.0
    assert sure.positions("12345", " 12045") == 4 / 5
    assert sure.positions("12", "1234") == 2 / 4
    assert sure.numeric("it is 1,000", "1000.0") == 1.0
    assert sure.same('{"a": 1, "b": 2}', '{"b": 2, "a": 1}')
    assert not sure.same('{"a": 1}', '{"a"')
    assert sure.same(" A  b", "a b")
    assert sure.agreement(["a", "a", "b"], "exact") == pytest.approx(1 / 3)


def test_the_median_keeps_half_and_its_ties():
    five, six = np.array([0.1, 0.5, 0.5, 0.7, 0.9]), np.array([0.1, 0.2, 0.4, 0.6, 0.6, 0.8])
    assert (five >= sure.threshold_of(five, None, None)).tolist() == [False, True, True, True, True]
    assert (six >= sure.threshold_of(six, None, None)).tolist() == [False, False, False, True, True, True]
    assert (five >= sure.threshold_of(five, 0.0, None)).all()
    assert (five >= sure.threshold_of(five, None, 0.4)).sum() == 2


@pytest.mark.parametrize("kept_by_filter", [True, False])
@pytest.mark.parametrize("verdict", ["candidate", "given", "tie"])
@pytest.mark.parametrize("certain", [0.79, 0.8, 0.81])
def test_every_case_of_the_decision(kept_by_filter, verdict, certain):
    if verdict == "candidate" and certain == 0.81:
        wanted = "corrected"
    else:
        wanted = "kept" if kept_by_filter else "dropped"
    assert sure.decided(kept_by_filter, verdict, certain, 0.8) == wanted


def test_the_verdict_of_consistency():
    assert sure.by_consistency(0.1, 0.9) == ("candidate", pytest.approx(0.9))
    assert sure.by_consistency(0.9, 0.1) == ("given", pytest.approx(0.1))
    assert sure.by_consistency(0.5, 0.5) == ("tie", 0.5)


def test_choices_are_weighed_by_their_likelihood():
    logp = np.log(np.array([[0.6, 0.2, 0.2], [0.1, 0.1, 0.1]]))
    assert sure.expected_choice(logp) == pytest.approx([0.6 + 0.1, 0.5])
    assert sure.expected_choice(np.array([[-1.0, -np.inf, -1.0]])).tolist() == [0.5]


# -- the filter


def test_the_filter_drops_what_the_base_would_not_say(base, tmp_path):
    made = stage(base, tmp_path / "run")
    found = table(made)
    # Least confident first: never said, said by one of two samples, and four sums it knows.
    assert [line["consistency"] for line in found] == [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]
    assert [line["decision"] for line in found] == ["dropped", "dropped", "kept", "kept", "kept", "kept"]
    assert found[0]["samples"] == ["9", "9"]
    assert made.metrics["training"]["rows"] == 4
    told = json.loads((made.folder / "data" / SLUG / "report.json").read_text())
    assert told["gamma"] == 1.0
    assert {name: arm["rows"] for name, arm in told["arms"].items()} == {
        "kept": 4,
        "random of equal size": 4,
        "likeliest of equal size": 4,
        "all": 6,
    }
    assert told["arms"]["all"]["confidence"] == pytest.approx((0 + 0.5 + 4) / 6)
    assert sum(told["histogram of confidence, ten bins of [0, 1]"]) == 6


def test_no_threshold_is_plain_sft_bit_for_bit(base, tmp_path):
    plain = stage(base, tmp_path / "plain", None)
    assert same(tensors(plain), tensors(stage(base, tmp_path / "zero", {**FAST, "least": 0.0})))
    assert same(tensors(plain), tensors(stage(base, tmp_path / "all", {**FAST, "arm": "all"})))
    random = stage(base, tmp_path / "random", {**FAST, "arm": "random"})
    assert random.metrics["training"]["rows"] == 4


def test_confidence_does_not_depend_on_the_order_of_rows(base, tmp_path):
    first = {line["row"]: line for line in table(stage(base, tmp_path / "a"))}
    turned = {len(ROWS) + 1 - line["row"]: line for line in table(stage(base, tmp_path / "b", rows=ROWS[::-1]))}
    assert {r: line["confidence"] for r, line in first.items()} == {r: x["confidence"] for r, x in turned.items()}


def test_what_a_model_draws_for_a_prompt_depends_on_that_prompt_alone(base, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))

    def samples(made):
        return {line["answer"]: line["samples"] for line in table(made)}

    first = samples(stage(base, tmp_path / "a"))
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "another"))
    turned = samples(stage(base, tmp_path / "b", {**FAST, "batch_rows": 3}, rows=ROWS[::-1]))
    fewer = samples(stage(base, tmp_path / "c", rows=ROWS[1:3]))
    assert first == turned
    assert all(first[answer] == fewer[answer] for answer in fewer)
    assert len({tuple(s) for s in first.values()}) == len(ROWS)


def test_what_was_sampled_is_not_sampled_again(base, script, tmp_path):
    stage(base, tmp_path / "first")
    asked = len(script.prompts)
    assert asked == 12
    stage(base, tmp_path / "second", {**FAST, "keep_fraction": 0.5})  # another threshold, the same samples
    assert len(script.prompts) == asked


def test_asking_the_base_counts_what_it_says(base, script, monkeypatch, tmp_path):
    def says(prompt, number):
        if "really sure" in prompt:
            return "(B)" if "bad 5" in prompt else "A"
        return "hm" if "bad 5" in prompt else "(A) Correct"

    monkeypatch.setattr(greedy, "completions", Script(says))
    found = table(run(tiny(tmp_path / "wide", 512), tmp_path / "run", ROWS, "sft", data={"stages": [{SLUG: {**FAST, "beta": 0.7}}]}))  # fmt: skip
    # Unreadable and then "incorrect": (0.5 + 0) / 2.
    assert found[0]["reflection"] == 0.25
    assert found[0]["confidence"] == pytest.approx(0.7 * 0.0 + 0.3 * 0.25)
    assert found[-1]["confidence"] == pytest.approx(0.7 + 0.3)


def test_bad_settings_are_refused(base, tmp_path):
    with pytest.raises(UserError, match="least and keep_fraction both say"):
        stage(base, tmp_path / "a", {"least": 0.5, "keep_fraction": 0.5})
    with pytest.raises(UserError, match="has no prompt with one answer"):
        stage(base, tmp_path / "b", rows=[{"text": "no question"}] * 4)


# -- filter and correct


def correct(base, folder, options=None, **more):
    return run(base, folder, ROWS, {SLUG: {"samples": 2, "beta": 1.0, **(options or {})}}, **more)


@pytest.fixture
def candidates(monkeypatch):
    """What the model trained on the kept rows writes: right but for 0+1, and nothing for 2+1."""
    made = Script(lambda prompt, number: {"0": "6", "2": None}.get(prompt[0], str(int(prompt[0]) + 1)))
    monkeypatch.setattr(greedy, "completions", made)
    return made


def test_only_a_sure_and_better_candidate_replaces(base, candidates, tmp_path):
    made = correct(base, tmp_path / "run")
    found = {line["row"]: line for line in table(made, f"{SLUG}.jsonl")}
    decisions = [found[i + 1]["decision"] for i in range(6)]
    # 8+1 was never said, its candidate always: O goes from 0 to 1, so c_J = 1. 4+1 = 5 is a tie with itself.
    assert decisions == ["kept", "kept", "kept", "kept", "dropped", "corrected"]
    assert found[6]["verdict_confidence"] == 1.0
    assert found[1]["verdict_confidence"] == 0.0  # from 1 to 0
    assert found[3]["candidate"] is None
    told = made.metrics["training"][SLUG]
    assert {k: told[k] for k in ("kept", "corrected", "dropped", "gamma")} == {
        "kept": 4,
        "corrected": 1,
        "dropped": 1,
        "gamma": 1.0,
    }
    assert made.metrics["training"]["rows"] == 5
    assert (
        f"{SLUG}: of 6 rows 4 kept, 1 corrected, 1 dropped."
        in json.loads((made.folder / "manifest.json").read_text())["notes"]
    )


def test_correcting_alone_drops_nothing_and_eta_one_replaces_nothing(base, candidates, tmp_path):
    alone = correct(base, tmp_path / "alone", {"filter_first": False}).metrics["training"][SLUG]
    assert (alone["kept"], alone["corrected"], alone["dropped"]) == (5, 1, 0)
    never = correct(base, tmp_path / "never", {"certainty": 1.0}).metrics["training"][SLUG]
    assert (never["kept"], never["corrected"], never["dropped"]) == (4, 0, 2)


def test_both_orders_must_agree(base, monkeypatch, tmp_path):
    def says(prompt, number):
        if "Which answer" not in prompt:
            return str(int(prompt[0]) + 1)
        if "bad 5" in prompt:
            return "(B)" if prompt.index("bad 5") < prompt.index("Answer 2") else "(A)"
        return "(A)"  # always the first: a tie

    for decoder in (greedy, sample):
        monkeypatch.setattr(decoder, "completions", Script(says))
    wide = tiny(tmp_path / "wide", 512)
    found = {line["row"]: line for line in table(correct(wide, tmp_path / "run", {"judge": "ask"}), f"{SLUG}.jsonl")}
    assert found[6]["decision"] == "corrected"
    assert found[6]["verdict_confidence"] == 1.0
    assert all("prefers tie" in found[i]["reason"] for i in range(1, 6))


def test_killed_at_and_inside_every_stage_it_goes_on_to_the_same_result(
    base, script, candidates, monkeypatch, tmp_path
):
    monkeypatch.setattr(kept, "WRITTEN", 2)
    training = {"epochs": 2, "save_steps": 1, "batch_rows": 2}
    whole = correct(base, tmp_path / "whole", training=training)
    asked = (len(script.prompts), len(candidates.prompts))
    script.prompts.clear()
    candidates.prompts.clear()
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "another"))
    step, left = loop.Trainer._step, [None]

    def killed(self):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] = None if left[0] is None else left[0] - 1
        step(self)

    monkeypatch.setattr(loop.Trainer, "_step", killed)
    # Inside sampling, the first training, the candidates, the second training.
    for number, (sampled, steps, written) in enumerate(
        [(1, None, None), (None, 3, None), (None, None, 1), (None, 2, None)]
    ):
        script.left, left[0], candidates.left = sampled, steps, written
        with pytest.raises(KeyboardInterrupt):
            correct(base, tmp_path / "run", training=training, resume=number > 0)
    script.left = left[0] = candidates.left = None
    found = correct(base, tmp_path / "run", training=training, resume=True)
    assert same(tensors(whole), tensors(found))
    assert table(whole, f"{SLUG}.jsonl") == table(found, f"{SLUG}.jsonl")
    assert (len(script.prompts), len(candidates.prompts)) == asked
