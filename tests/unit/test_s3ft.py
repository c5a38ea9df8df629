"""Selective self-to-supervised fine-tuning: which target each row gets, what it is trained on, and that no kill changes it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scripted import Script, run, same, tensors, tiny
from transformers import AutoModelForCausalLM

from luthier.core.errors import UserError
from luthier.engine import loop
from luthier.functional import target_rewriting
from luthier.methods.decoding import greedy
from luthier.runs import procedure as kept

# What the model writes to each question, and to the prompt that asks for a paraphrase of its answer.
TABLE = {
    "1+1=": ("is 2", "-"),  # right: its own
    "2+2=": ("is 5", "so 4"),  # wrong, and the paraphrase right
    "3+3=": ("is 7", "so 8"),  # both wrong: the given answer
    "4+4=": (None, "so 8"),  # never ends: the paraphrase, although "8" may stand in it
    "5+5=": ("", None),  # empty, and the paraphrase never ends: the given answer
    "6+6=": ("6+6=", "12"),  # repeats the prompt
}
GOLD = {"1+1=": "2", "2+2=": "4", "3+3=": "6", "4+4=": "8", "5+5=": "10", "6+6=": "12"}
ROWS = [{"prompt": q, "completion": f" the sum: {a}", "answer": a} for q, a in GOLD.items()]
SHORT = "{question} {answer} again:"
OPTIONS = {"paraphrase_prompt": SHORT, "max_new_tokens": 16, "batch_rows": 2}


def scripted(prompt, number):
    question = prompt.split(" ")[0]
    return TABLE[question]["again" in prompt]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def script(monkeypatch):
    made = Script(scripted)
    monkeypatch.setattr(greedy, "completions", made)
    return made


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    """What one test kept must not answer for another."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))


def tune(base, folder, options=OPTIONS, **more):
    data = {"verifier": "numeric", **more.pop("data", {})}
    procedure = "sft" if options is None else {"s3ft": options}
    return run(base, folder, ROWS, procedure, data=data, **more)


def lines(made):
    return [json.loads(line) for line in (made.folder / "s3ft.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_row_gets_the_target_of_the_table_in_order(base, script, tmp_path):
    made = tune(base, tmp_path / "run")
    found = lines(made)
    assert [line["source"] for line in found] == ["self", "paraphrase", "gold", "paraphrase", "gold", "paraphrase"]
    # A paraphrase begins with the given answer's white space; the model's own answer is as it wrote it.
    assert [line["target"] for line in found] == ["is 2", " so 4", " the sum: 6", " so 8", " the sum: 10", " 12"]
    reasons = ["accepted", "rejected", "rejected", "truncated", "empty", "copy of the prompt"]
    assert [line["self"]["reason"] for line in found] == reasons
    assert found[0]["paraphrase"] is None
    assert found[4]["paraphrase"]["reason"] == "truncated"
    # Six questions, then the five that have no good answer.
    assert script.prompts[6:] == [f"{q}  the sum: {a} again:" for q, a in list(GOLD.items())[1:]]
    counts = {"self": 1, "paraphrase": 3, "gold": 2, "max_new_tokens": 16}
    assert made.metrics["training"]["s3ft"] == counts
    assert "of 6 rows 1 learn the model's own answer, 3 its paraphrase and 2 the given answer" in (
        made.folder / "README.md"
    ).read_text(encoding="utf-8")


def test_the_base_finds_its_own_targets_as_likely_as_transformers_says(base, script, tmp_path):
    from transformers import AutoTokenizer

    found = lines(tune(base, tmp_path / "run"))
    model, words = AutoModelForCausalLM.from_pretrained(base).double().eval(), AutoTokenizer.from_pretrained(base)

    def nll(prompt, answer):
        first = [words.bos_token_id] if words("a")["input_ids"][0] == words.bos_token_id else []
        before = first + words(prompt, add_special_tokens=False)["input_ids"]
        after = [*words(answer, add_special_tokens=False)["input_ids"], words.eos_token_id]
        logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        return float(-logits.log_softmax(-1)[range(len(after)), after].mean())

    with torch.no_grad():
        for row, line in zip(ROWS, found, strict=True):
            assert line["nll_gold_base"] == pytest.approx(nll(row["prompt"], row["completion"]), abs=1e-4)
            assert line["nll_target_base"] == pytest.approx(nll(row["prompt"], line["target"]), abs=1e-4)


def test_a_judge_that_accepts_nothing_leaves_plain_sft_bit_for_bit(base, script, tmp_path):
    plain = tune(base, tmp_path / "plain", None)
    none = tune(base, tmp_path / "none", {"paraphrase": False, "judges": [{"regex": {"pattern": "never"}}]})
    assert same(tensors(plain), tensors(none))
    curves = [(r.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines() for r in (plain, none)]
    assert [json.loads(a)["loss"] for a in curves[0]] == [json.loads(b)["loss"] for b in curves[1]]
    assert any("fewer than 5%" in note for note in json.loads((none.folder / "manifest.json").read_text())["notes"])


def test_a_judge_that_accepts_all_leaves_no_given_token(base, monkeypatch, tmp_path):
    monkeypatch.setattr(greedy, "completions", Script(lambda prompt, number: "xyz"))
    seen = []
    step = loop.Trainer._step

    def watched(self):
        rows = self.data.fetch(range(len(self.data)))
        seen.append([ids[s[-2] : s[-1]].tolist() for ids, s in zip(rows["input_ids"], rows["spans"], strict=True)])
        step(self)

    monkeypatch.setattr(loop.Trainer, "_step", watched)
    made = tune(base, tmp_path / "run", {"judges": [{"regex": {"pattern": "xyz"}}]})
    processor = made.processor
    wanted = [*processor("xyz", add_special_tokens=False)["input_ids"], processor.eos_token_id]
    assert seen[0] == [wanted] * 6


def test_baselines_drop_or_paraphrase_every_row(base, script, tmp_path):
    only = tune(base, tmp_path / "self", {**OPTIONS, "targets": "self_only"}, training={"batch_rows": 1})
    assert only.metrics["training"]["steps"] == 1  # one row is left
    assert lines(only)[1]["nll_target_base"] is None
    other = tune(base, tmp_path / "paraphrase", {**OPTIONS, "targets": "paraphrase_only"})
    assert [line["source"] for line in lines(other)] == [
        "gold",
        "paraphrase",
        "gold",
        "paraphrase",
        "gold",
        "paraphrase",
    ]
    with pytest.raises(UserError, match="no row is left to train on"):
        tune(base, tmp_path / "none", {"targets": "self_only", "judges": [{"regex": {"pattern": "never"}}]})


def test_weights_of_the_sources_are_those_of_the_formula():
    from fakes import KnownLogp

    from helpers import PROCESSOR
    from luthier.data.prepared_file import value_of
    from luthier.methods.objectives.sft import SupervisedFineTuning
    from luthier.tasks.causal_lm import CausalLM

    rows = {
        "input_ids": [np.array([1, 5, 6, 7]), np.array([1, 5, 8])],
        "spans": [np.array([1, 4]), np.array([2, 3])],
        "row_weight": [value_of({"extra": '{"row_weight": 0.5}'}, "row_weight"), None],
    }
    batch = CausalLM(PROCESSOR).collate(rows, range(2))
    assert batch.weight_N.tolist() == [0.5, 0.5, 0.5, 1.0]
    logp_N = torch.log(torch.tensor([0.5, 0.25, 0.125, 0.1], dtype=torch.float64))
    loss = SupervisedFineTuning().loss(KnownLogp(logp_N), batch, None)
    by_hand = (0.5 * (np.log(2) + np.log(4) + np.log(8)) + np.log(10)) / (0.5 * 3 + 1)
    assert float(loss.sum / loss.weight) == pytest.approx(by_hand, abs=1e-9)


def test_the_likeliest_accepted_sample_is_taken(base, monkeypatch, tmp_path):
    from luthier.methods.decoding import sample

    texts = ["is 2 2", "is 2", "is 3"]
    monkeypatch.setattr(sample, "completions", Script(lambda prompt, number: texts[number]))
    likely = iter([np.array([-2.0, -1.0, -0.5])])
    monkeypatch.setattr(target_rewriting, "mean_likelihood", lambda *_: next(likely))
    made = run(
        base, tmp_path / "run", ROWS[:1], {"s3ft": {"samples": 3, "paraphrase": False}}, data={"verifier": "numeric"}
    )
    assert lines(made)[0]["target"] == "is 2"  # "is 3" is likelier, and wrong


def test_killed_at_and_inside_every_stage_it_goes_on_to_the_same_result(base, script, monkeypatch, tmp_path):
    monkeypatch.setattr(kept, "WRITTEN", 2)
    monkeypatch.setattr(kept, "SCORED", 4)
    monkeypatch.setattr(kept, "JUDGED", 2)
    whole = tune(base, tmp_path / "whole", training={"epochs": 2, "save_steps": 1})
    asked = len(script.prompts)
    assert asked == 11
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "another"))
    script.prompts.clear()

    calls = {"score": 0, "judge": 0, "step": 0}
    stop = {}
    from luthier.engine.session import Session
    from luthier.methods.rewards import numeric

    def killing(name, real):
        def call(*args, **options):
            if calls[name] == stop.get(name):
                stop.pop(name)
                raise KeyboardInterrupt
            calls[name] += 1
            return real(*args, **options)

        return call

    monkeypatch.setattr(Session, "score", killing("score", Session.score))
    monkeypatch.setattr(numeric, "reference_texts", killing("judge", numeric.reference_texts))
    monkeypatch.setattr(loop.Trainer, "_step", killing("step", loop.Trainer._step))
    # Inside scoring, writing, judging, paraphrasing, scoring again, and the training.
    moments = [("score", 1), ("left", 2), ("judge", 1), ("left", 1), ("score", 3), ("step", 1), ("step", 2)]
    for number, (name, count) in enumerate(moments):
        script.left = count if name == "left" else None
        stop[name] = count
        with pytest.raises(KeyboardInterrupt):
            tune(base, tmp_path / "run", training={"epochs": 2, "save_steps": 1}, resume=number > 0)
    script.left = None
    found = tune(base, tmp_path / "run", training={"epochs": 2, "save_steps": 1}, resume=True)
    assert same(tensors(whole), tensors(found))
    assert lines(whole) == lines(found)
    assert len(script.prompts) == asked  # nothing was written twice


def test_composes_with_half_ft_and_the_anchored_loss(base, script, tmp_path):
    made = tune(base, tmp_path / "run", objective={"anchored-sft": {"anchor_weight": 0.05}}, parameters=["half-ft"])
    assert made.metrics["training"]["steps"] == 2
    assert [line["source"] for line in lines(made)].count("self") == 1


def test_lines_after_it_moves_the_shallow_blocks_back(base, script, tmp_path):
    made = tune(base, tmp_path / "run", weights=[{"lines": {"alpha": 0.0, "beta": 1.0}}])
    plain, start = tensors(tune(base, tmp_path / "plain")), AutoModelForCausalLM.from_pretrained(base).state_dict()
    found = tensors(made)
    first, last = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(found[first], start[first])
    torch.testing.assert_close(found[last], plain[last])
    assert not torch.equal(plain[first], start[first])


def test_what_cannot_work_is_refused_in_one_line(base, script, tmp_path):
    with pytest.raises(UserError, match=r"paraphrase_prompt has no \{answer\}"):
        tune(base, tmp_path / "a", {"paraphrase_prompt": "again: {question}"})
    with pytest.raises(UserError, match="is no regular expression"):
        tune(base, tmp_path / "b", {"strip": ["("]})
    with pytest.raises(UserError, match="unknown reward 'numeri'"):
        tune(base, tmp_path / "c", {"judges": ["numeri"]})
    with pytest.raises(UserError, match="has no prompt with one answer"):
        run(base, tmp_path / "d", [{"text": "just text, no question"}] * 4, "s3ft")


def test_lead_ins_are_taken_off_before_judging():
    from luthier.core.protocols import Completion

    told = target_rewriting.stripped(Completion("Sure! Here: 4", (1, 2), True), [r"Well,", r"Sure![^:]*:\s*"])
    assert told.text == "4"
    # One pass: what a question holds is not a slot.
    assert target_rewriting.filled("{question}|{answer}", question="{answer}", answer="x") == "{answer}|x"
