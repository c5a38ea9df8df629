"""GRAPE: the score of a response, the choice within an instruction, the table, and its controls."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scripted import run, same, tensors, tiny

from luthier.core.errors import UserError
from luthier.engine.session import Session
from luthier.functional.response_choice import digest, distinct_ratio, first_of, gaps, instruction_of, numbered, ranked
from luthier.methods.data import grape
from luthier.runs import procedure as kept

POOLS = {"a =": ["1", "1 2 3", "44"], "b =": ["x", "yy zz"], "c =": ["only"]}
ROWS = [{"prompt": p, "completion": c, "by": f"s{i}"} for p, some in POOLS.items() for i, c in enumerate(some)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))


def tune(base, folder, options, rows=ROWS, **more):
    stages = [] if options is None else [{"grape": options}]
    return run(base, folder, rows, "sft", data={"stages": stages}, **more)


def table(made):
    return [json.loads(line) for line in (made.folder / "data" / "grape" / "scores.jsonl").read_text().splitlines()]


def report(made):
    return json.loads((made.folder / "data" / "grape" / "report.json").read_text())


def logp(base, prompt, answer, *, end):
    """Log-probabilities of an answer's tokens by transformers, in float64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, words = AutoModelForCausalLM.from_pretrained(base).double().eval(), AutoTokenizer.from_pretrained(base)
    start = [words.bos_token_id] if words("a")["input_ids"][0] == words.bos_token_id else []
    before = start + words(prompt, add_special_tokens=False)["input_ids"]
    after = words(answer, add_special_tokens=False)["input_ids"] + ([words.eos_token_id] if end else [])
    with torch.no_grad():
        logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    return logits.log_softmax(-1)[range(len(after)), after].numpy()


@pytest.mark.parametrize("end", [False, True])
def test_scores_are_the_models_own_whatever_stands_beside_them(base, tmp_path, end):
    made = tune(base, tmp_path / "all", {"include_eos": end})
    for row, line in zip(ROWS, table(made), strict=True):
        found = logp(base, row["prompt"], row["completion"], end=end)
        assert line["tokens"] == len(found)
        assert line["sum_logp"] == pytest.approx(found.sum(), abs=1e-4)
        assert line["mean_logp"] == pytest.approx(found.mean(), abs=1e-5)
    # Fewer and other neighbours, so other padding.
    alone = tune(base, tmp_path / "few", {"include_eos": end, "force": True}, rows=ROWS[1:2] + ROWS[3:4])
    for line, index in zip(table(alone), (1, 3), strict=True):
        assert line["mean_logp"] == pytest.approx(table(made)[index]["mean_logp"], abs=1e-6)


def test_with_end_tokens_a_score_is_minus_the_loss_of_plain_sft(base, tmp_path):
    score = table(tune(base, tmp_path / "score", {"include_eos": True, "force": True}, rows=ROWS[1:2]))[0]["mean_logp"]
    plain = tune(base, tmp_path / "plain", None, rows=ROWS[1:2])
    first = json.loads((plain.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert -score == pytest.approx(first["loss"], abs=1e-6)


def test_the_most_probable_response_per_token_is_kept_in_order(base, tmp_path):
    made = tune(base, tmp_path / "run", {"source": "by"})
    mean = [logp(base, r["prompt"], r["completion"], end=False).mean() for r in ROWS]
    best = {max(range(3), key=mean.__getitem__), max(range(3, 5), key=mean.__getitem__), 5}
    assert [i for i, line in enumerate(table(made)) if line["decision"] == "kept"] == sorted(best)
    assert made.metrics["training"]["rows"] == 3
    found = report(made)
    assert (found["instructions"], found["instructions with one"]) == (3, 1)
    assert sum(found["share of each source among the chosen"].values()) == pytest.approx(1.0)
    first, second = sorted(mean[:3])[::-1][:2]
    wanted = np.mean([first - second, abs(mean[3] - mean[4])])
    assert found["mean gap to the second"] == pytest.approx(wanted, abs=1e-5)
    arms = found["arms"]
    assert {name: arm["rows"] for name, arm in arms.items()} == {
        **dict.fromkeys(("grape", "random", "worst", "longest", "shortest", "sum_logprob"), 3),
        "all": 6,
    }
    assert arms["worst"]["logp"] < arms["grape"]["logp"]
    assert set(found["scored by"]) == {"model", "dtype", "rendering"}


def test_controls_are_trained_on_by_one_switch(base, tmp_path):
    rows = {arm: tune(base, tmp_path / arm, {"arm": arm}) for arm in ("shortest", "sum_logprob", "all")}
    chosen = {arm: [r["completion"] for r, x in zip(ROWS, table(m), strict=True) if x["decision"] == "kept"]
              for arm, m in rows.items()}  # fmt: skip
    assert chosen["shortest"] == ["1", "x", "only"]
    assert chosen["sum_logprob"] == ["1", "x", "only"]  # the length bias
    assert len(chosen["all"]) == 6
    strong = tune(base, tmp_path / "strong", {"arm": "strongest", "strongest": "s1", "source": "by"})
    assert strong.metrics["training"]["rows"] == 2


def test_with_one_response_each_nothing_changes_bit_for_bit(base, tmp_path):
    single = [r for r in ROWS if r["by"] == "s0"]
    plain = tune(base, tmp_path / "plain", None, rows=single)
    assert same(tensors(plain), tensors(tune(base, tmp_path / "same", {"force": True}, rows=single)))
    with pytest.raises(UserError, match="no instruction has two responses to choose from"):
        tune(base, tmp_path / "no", {}, rows=single)


def test_equal_responses_are_one_and_the_gate_comes_first(base, tmp_path):
    rows = [*ROWS, {"prompt": " a  =", "completion": "44", "by": "other"}]
    options = {"source": "by", "gate": [{"regex": {"pattern": "[14x]"}}], "singletons": "drop"}
    made = tune(base, tmp_path / "run", options, rows=rows)
    found = table(made)
    assert found[6]["reason"] == "equal response"
    assert found[2]["sources"] == found[6]["sources"] == ["s2", "other"]
    assert [line["reason"] for line in (found[4], found[5])] == ["gate", "gate"]
    assert found[3]["reason"] == "single response"
    assert found[3]["decision"] == "dropped"
    assert report(made)["instructions without a candidate left"] == 2  # "only", and "x" as a single one
    assert [x["instruction"] for x in found] == [0, 0, 0, 1, 1, 2, 0]


def test_responses_that_do_not_fit_are_dropped_and_never_scored_in_part(base, tmp_path):
    rows = [*ROWS[:3], {"prompt": "a =", "completion": "long " * 60}]
    made = run(base, tmp_path / "run", rows, "sft", data={"stages": ["grape"], "truncation": "drop"})
    last = table(made)[3]
    assert (last["decision"], last["reason"], last["tokens"]) == ("dropped", "nothing to score, or too long", 0)


def test_ranks_by_hand():
    group = np.array([0, 0, 1, 0, 1, 2])
    score = np.array([-2.0, -1.0, -3.0, -1.0, np.nan, -9.0])
    assert ranked(score, group).tolist() == [2, 0, 0, 1, -1, 0]  # the tie goes to the earlier one
    assert gaps(score, group).tolist() == [0.0]
    # By the mean the long one wins, by the sum the short one.
    total, count = np.array([-4.0, -3.0]), np.array([8, 2])
    same_group = np.zeros(2, np.int64)
    assert ranked(total / count, same_group).tolist() == [0, 1]
    assert ranked(total, same_group).tolist() == [1, 0]


def test_groups_are_numbered_as_they_appear():
    keys = b"".join(digest(t) for t in ("b", "a", "b", "c"))
    assert numbered(keys).tolist() == [0, 1, 0, 2]
    assert first_of(numbered(keys)).tolist() == [True, True, False, True]
    assert digest("ab", "c") != digest("a", "bc")


def test_instructions_are_compared_by_all_before_the_answer():
    chat = {"kind": "chat", "system": None, "tools": None}
    turns = [{"role": "user", "content": "A\u00a0 b"}, {"role": "assistant", "content": "x"}]
    other = [{"role": "user", "content": "A b"}, {"role": "assistant", "content": "y"}]
    assert instruction_of({**chat, "messages": json.dumps(turns)}) == instruction_of(
        {**chat, "messages": json.dumps(other)}
    )
    longer = json.dumps([*turns, {"role": "user", "content": "A b"}, {"role": "assistant", "content": "x"}])
    assert instruction_of({**chat, "messages": longer}) != instruction_of({**chat, "messages": json.dumps(turns)})
    pair = {"kind": "pair", "prompt": "A b", "system": None, "tools": None}
    assert instruction_of(pair) == instruction_of({**chat, "messages": json.dumps(turns)})
    assert instruction_of({**pair, "system": "s"}) != instruction_of(pair)


def test_repetition_by_hand():
    assert distinct_ratio("a b c d") == 1.0
    assert distinct_ratio("a a a a a a a") == 1 / 4
    assert distinct_ratio("a b") == 1.0


def test_a_stage_killed_half_way_goes_on_where_it_was(base, tmp_path, monkeypatch):
    monkeypatch.setattr(grape, "BLOCK", 2)
    real, calls = Session.score, []

    def score(self, dataset, model="policy"):
        if len(calls) == 2:
            calls.append("killed")
            raise KeyboardInterrupt
        calls.append(len(dataset))
        return real(self, dataset, model)

    monkeypatch.setattr(Session, "score", score)
    with pytest.raises(KeyboardInterrupt):
        tune(base, tmp_path / "run", {})
    made = tune(base, tmp_path / "run", {})
    assert calls == [2, 2, "killed", 2]
    before = table(made)
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "another"))
    assert table(tune(base, tmp_path / "whole", {})) == before
    # And what is kept is found again by another run, with its table.
    again = len(calls)
    assert table(tune(base, tmp_path / "second", {})) == before
    assert len(calls) == again


def test_memory_grows_by_a_few_numbers_a_row(monkeypatch, tmp_path):
    """The rows stay on disk: what is held of each candidate is bounded, whatever its length."""
    import tracemalloc

    from datasets import Dataset

    count = 20_000

    def rows():
        for i in range(count):
            answer = f"{i} " + "word " * 200
            yield {"kind": "pair", "prompt": f"q {i // 2}", "completion": answer, "system": None, "tools": None,
                   "source": "file", "row": i, "id": None, "messages": None}  # fmt: skip

    data = Dataset.from_generator(rows, cache_dir=str(tmp_path / "data"))

    class Ctx:
        folder, seed = tmp_path, 0

        def row_likelihood(self, some, **_):
            return -np.ones(len(some)), np.full(len(some), 2)

        def identity(self):
            return {}

        def report(self, values):
            self.told = values

    tracemalloc.start()
    kept_rows = grape.FittingResponses().run(data, Ctx())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(kept_rows) == count // 2
    assert peak < 8e6 + 500 * count  # a block of rows, and at most 500 bytes of each candidate: 0.5 GB for a million


def test_bad_settings_are_refused(base, tmp_path):
    with pytest.raises(UserError, match="strongest go together"):
        tune(base, tmp_path / "a", {"arm": "strongest"})
    with pytest.raises(UserError, match=r"no row is of the source 's9'\. Sources: s0, s1, s2"):
        tune(base, tmp_path / "b", {"arm": "strongest", "strongest": "s9", "source": "by"})
    with pytest.raises(UserError, match="has no prompt with one answer"):
        tune(base, tmp_path / "c", {}, rows=[{"text": "no question"}] * 4)
    assert kept.SCORED == grape.BLOCK  # a block is one piece of what is kept
