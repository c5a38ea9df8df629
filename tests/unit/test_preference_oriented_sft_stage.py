"""Scores of aligned models: what is counted, matched, merged and kept, and the way from a recipe to the objective."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from data_tokenizers import byte_level
from datasets import Dataset

import luthier
from helpers import OpenAll, tiny_llama
from luthier.core.errors import UserError
from luthier.data.layouts import SCHEMA
from luthier.data.prepare import prepare
from luthier.data.render import Renderer
from luthier.engine.session import Session
from luthier.engine.stack import Stack
from luthier.methods.data.preference_oriented_sft import Scorer, ScoreWithAlignedModels
from luthier.methods.objectives.preference_oriented_sft import PreferenceOrientedFineTuning
from luthier.runs.api import plan_of
from luthier.runs.stages import StageContext
from luthier.tasks.causal_lm import CausalLM

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PAIRS = [("what is 1\n", "the answer"), ("hello\n", "world 5"), ("the question\n", "0 1 2 3")]
TURNS = [
    {"role": "user", "content": "what is"},
    {"role": "assistant", "content": "the answer"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "world é"},
]


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))


def rows(*items):
    arrays = {name: [item.get(name) for item in items] for name in SCHEMA.names}
    return Dataset(pa.table(arrays, schema=SCHEMA))


def pairs(items=PAIRS, ids=None, **more):
    return rows(
        *(
            {"kind": "pair", "source": "x.jsonl", "row": i + 1, "prompt": p, "completion": c, "id": ids and ids[i]}
            | more
            for i, (p, c) in enumerate(items)
        )
    )


def chats(*conversations):
    return rows(
        *({"kind": "chat", "row": i + 1, "source": "c", "messages": json.dumps(c)} for i, c in enumerate(conversations))
    )


def saved(folder, *, seed=0, template=None):
    """A small model with its tokenizer on disk."""
    tokenizer = byte_level(template=template)
    tiny_llama(seed, vocabulary=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def context(**options):
    plan = plan_of(model="lab:nano", data={"train": "lab:arithmetic"})
    return StageContext(plan, Renderer(byte_level(), task="causal-lm", **options))


def scores(dataset):
    return [json.loads(extra)["ref_score"]["value"] for extra in dataset["extra"]]


def logps(folder, ids, counted):
    """Float64 log-probabilities of the tokens at the given places."""
    seed = int(str(folder)[-1])
    model = tiny_llama(seed, vocabulary=len(byte_level())).double()
    with torch.no_grad():
        logp = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], dim=-1).numpy()
    return [logp[t - 1, ids[t]] for t in counted]


@pytest.fixture
def passes(monkeypatch):
    """Counts forward passes of scoring."""
    made = []
    real = Scorer.forward
    monkeypatch.setattr(Scorer, "forward", lambda self, rendered: made.append(self.name) or real(self, rendered))
    return made


@pytest.mark.parametrize(("targets", "end"), [("assistant", [1]), ("content", [])])
def test_raw_pairs_against_float64(tmp_path, targets, end):
    folder, tokenizer = saved(tmp_path / "m0"), byte_level()
    found = ScoreWithAlignedModels(scorers=[folder], score_targets=targets, batch_rows=2).run(pairs(), context())
    wanted = []
    for prompt, completion in PAIRS:
        before, after = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, completion))
        after = after + [tokenizer.eos_token_id for _ in end]
        wanted.append(np.mean(logps(folder, before + after, range(len(before), len(before + after)))))
    np.testing.assert_allclose(scores(found), wanted, rtol=1e-5)
    assert found.column_names == SCHEMA.names
    assert found.data.table.cast(SCHEMA).num_rows == 3
    by_char = ScoreWithAlignedModels(scorers=[folder], score_targets=targets, normalise="char").run(pairs(), context())
    tokens = [len(tokenizer(c, add_special_tokens=False)["input_ids"]) + len(end) for _, c in PAIRS]
    np.testing.assert_allclose(
        scores(by_char), [w * n / len(c) for w, n, (_, c) in zip(wanted, tokens, PAIRS, strict=True)], rtol=1e-5
    )


@pytest.mark.parametrize("targets", ["assistant", "content"])
def test_all_answers_of_a_conversation_with_the_models_own_template(tmp_path, targets):
    folder, tokenizer = saved(tmp_path / "m0", template=CHAT), byte_level()
    silent = [{**m, "weight": 0} if i == 1 else m for i, m in enumerate(TURNS)]
    stage = ScoreWithAlignedModels(scorers=[folder], score_targets=targets)
    found = stage.run(chats(TURNS, silent), context(template=CHAT, system="hello system"))
    ids, counted = [], []

    def say(text, learnt=False):
        new = tokenizer(text, add_special_tokens=False)["input_ids"]
        counted.append((learnt, list(range(len(ids), len(ids) + len(new)))))
        ids.extend(new)

    say("<|im_start|>system\nhello system<|im_end|>\n")
    for turn in TURNS:
        mine = turn["role"] == "assistant"
        say(f"<|im_start|>{turn['role']}\n")
        say(turn["content"], mine)
        say("<|im_end|>", mine and targets == "assistant")
        say("\n")
    places = [[t for learnt, some in counted if learnt for t in some]]
    half = len(tokenizer("the answer", add_special_tokens=False)["input_ids"]) + (targets == "assistant")
    places.append(places[0][half:])
    np.testing.assert_allclose(scores(found), [np.mean(logps(folder, ids, p)) for p in places], rtol=1e-5)


def test_models_without_a_template_need_one_for_conversations(tmp_path):
    folder = saved(tmp_path / "m0")
    with pytest.raises(UserError, match=r"m0 has no chat template, and the rows are conversations\. Set the"):
        ScoreWithAlignedModels(scorers=[folder]).run(chats(TURNS), context(template=CHAT))
    given = ScoreWithAlignedModels(scorers=[folder], template="chatml").run(chats(TURNS), context(template=CHAT))
    own = saved(tmp_path / "n0", template=CHAT)
    np.testing.assert_allclose(
        scores(given), scores(ScoreWithAlignedModels(scorers=[own]).run(chats(TURNS), context(template=CHAT)))
    )


def test_a_models_scores_of_its_own_rows_make_the_loss_log_two(tmp_path):
    folder = saved(tmp_path / "m0")
    ctx = context()
    found = ScoreWithAlignedModels(scorers=[folder]).run(pairs(), ctx)
    method, opened = PreferenceOrientedFineTuning(beta=7.0), OpenAll()
    session = Session(
        model=opened.apply(tiny_llama(0, vocabulary=len(byte_level())), None),
        task=CausalLM(byte_level()),
        processor=byte_level(),
        stack=Stack(objective=method, parameters=[opened], named={"objective": method}),
    )
    prepared = prepare(found, ctx.renderer, columns=method.needs.columns)
    method.prepare(session, prepared)
    loss = session.loss(session.task.collate(prepared.fetch(range(3)), range(3), method.needs.columns))
    assert float(loss.sum.detach()) / 3 == pytest.approx(math.log(2), abs=2e-6)
    assert float(loss.metrics["quality_weight"][0]) / 3 == pytest.approx(0.5, abs=2e-6)
    other = found.remove_columns("completion").add_column("completion", ["a", "b", "c"]).select_columns(SCHEMA.names)
    with pytest.raises(UserError, match=r"x\.jsonl, row 1: .* the text is not the one that was scored"):
        method.prepare(session, prepare(other, ctx.renderer, columns=method.needs.columns))


def test_rows_cut_to_nothing_and_scores_that_are_not_numbers_are_dropped_and_counted(tmp_path):
    folder, kept = saved(tmp_path / "m0"), tmp_path / "scores.jsonl"
    long = pairs([*PAIRS, ("1 " * 30 + "\n", "2")])
    stage = ScoreWithAlignedModels(scorers=[folder], max_length=16, score_file=str(kept))
    assert len(stage.run(long, context())) == 3
    report = json.loads((tmp_path / "scores.jsonl.report.json").read_text())
    assert (report["rows"], report["dropped"], report["models"][folder]["unscored"]) == (4, 1, 1)
    assert report["merged"]["x.jsonl"]["rows"] == 3
    broken = tiny_llama(1, vocabulary=len(byte_level()))
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = torch.nan
    broken.save_pretrained(tmp_path / "m1")
    byte_level().save_pretrained(tmp_path / "m1")
    assert len(ScoreWithAlignedModels(scorers=[folder, str(tmp_path / "m1")]).run(pairs(), context())) == 0


def test_models_are_merged_and_scores_are_computed_once(tmp_path, passes):
    models = [saved(tmp_path / f"m{k}", seed=k) for k in range(2)]
    alone = [scores(ScoreWithAlignedModels(scorers=[m]).run(pairs(), context())) for m in models]
    assert len(passes) == 2
    for rule, wanted in (
        ("mean", np.mean(alone, axis=0)),
        ("max", np.max(alone, axis=0)),
        ("m1", alone[1]),
        ([3.0, 1.0], np.average(alone, axis=0, weights=[3, 1])),
    ):
        found = ScoreWithAlignedModels(scorers=models, merge=rule).run(pairs(), context())
        np.testing.assert_allclose(scores(found), wanted, rtol=1e-12)
    assert len(passes) == 2  # kept by content
    ScoreWithAlignedModels(scorers=models[:1]).run(pairs(PAIRS[:2]), context())
    ScoreWithAlignedModels(scorers=models[:1]).run(pairs(), context(system="hello"))
    assert len(passes) == 4
    tiny_llama(7, vocabulary=len(byte_level())).save_pretrained(tmp_path / "m0")
    changed = scores(ScoreWithAlignedModels(scorers=models[:1]).run(pairs(), context()))
    assert len(passes) == 5
    assert changed != alone[0]


def test_a_score_file_is_matched_by_id_in_any_order_without_the_models(tmp_path, passes):
    folder, kept = saved(tmp_path / "m0"), tmp_path / "scores.jsonl"
    data = pairs(ids=["c", "a", "b"])
    stage = {"scorers": [folder], "score_file": str(kept)}
    first = scores(ScoreWithAlignedModels(**stage).run(data, context()))
    shutil.rmtree(folder)
    kept.write_text("".join(sorted(kept.read_text().splitlines(keepends=True))))
    assert scores(ScoreWithAlignedModels(**stage).run(data, context())) == first
    shuffled = pairs([PAIRS[i] for i in (2, 0, 1)], ids=["b", "c", "a"])
    found = ScoreWithAlignedModels(score_file=str(kept)).run(shuffled, context())
    assert scores(found) == [first[i] for i in (2, 0, 1)]
    more = pairs([*PAIRS, ("hello\n", "5")], ids=["c", "a", "b", "new"])
    assert len(ScoreWithAlignedModels(score_file=str(kept)).run(more, context())) == 3  # one has no score
    assert len(passes) == 1
    with pytest.raises(UserError, match=r"m0: no such model folder"):
        ScoreWithAlignedModels(**stage).run(more, context())


def test_what_a_score_file_may_not_be(tmp_path):
    folder, kept = saved(tmp_path / "m0"), tmp_path / "scores.jsonl"
    data = pairs(ids=["a", "b", "c"])
    ScoreWithAlignedModels(scorers=[folder], score_file=str(kept)).run(data, context())
    lines = kept.read_text().splitlines(keepends=True)
    other = pairs([PAIRS[0], ("hello\n", "world 6"), PAIRS[2]], ids=["a", "b", "c"])
    again = ScoreWithAlignedModels(score_file=str(kept))
    with pytest.raises(UserError, match=r"scores\.jsonl: the row with id 'b' has another text"):
        again.run(other, context())
    with pytest.raises(UserError, match="has another text than the one that was scored, or was scored with other opt"):
        ScoreWithAlignedModels(score_file=str(kept), score_targets="content").run(data, context())
    tiny_llama(5, vocabulary=len(byte_level())).save_pretrained(folder)
    with pytest.raises(UserError, match=r"scores\.jsonl: its scores by .*m0 are those of another state of that model"):
        again.run(data, context())
    kept.write_text("".join([*lines, lines[1]]))
    with pytest.raises(UserError, match=r"scores\.jsonl, line 4: the id 'b' is there twice"):
        again.run(data, context())
    kept.write_text(lines[0] + '{"id": "b", "score": 1}\n')
    with pytest.raises(UserError, match=r"scores\.jsonl, line 2: not a line of scores"):
        again.run(data, context())
    kept.write_text("")
    with pytest.raises(UserError, match=r"scores\.jsonl: .* holds no scores"):
        again.run(data, context())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: pairs(ids=["a", "b", "a"]), r"^x\.jsonl, row 3: the id 'a' is also that of x\.jsonl, row 1"),
        (lambda: pairs(extra='{"ref_score": 1}'), r"^x\.jsonl, row 1: the row has a column 'ref_score' already"),
        (lambda: rows({"kind": "text", "text": "a", "source": "t", "row": 1}), r"^t, row 1: a row of kind 'text'"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(data, message):
    with pytest.raises(UserError, match=message) as error:
        ScoreWithAlignedModels(scorers=["nowhere"]).run(data(), context())
    assert "\n" not in str(error.value)


def test_options_that_do_not_go_together():
    for options, message in (
        ({}, r"name the aligned models \(scorers"),
        ({"scorers": ["a", "a"]}, "a model is there twice"),
        ({"scorers": ["a", "b"], "merge": [1.0]}, "1 weights for 2 models"),
        ({"scorers": ["a"], "merge": "median"}, "names none of the models"),
    ):
        with pytest.raises(UserError, match=message):
            ScoreWithAlignedModels(**options)


def test_from_a_recipe_score_merge_and_train_and_again_from_the_kept_scores(tmp_path, passes):
    base, models = saved(tmp_path / "m0"), [saved(tmp_path / f"m{k}", seed=k) for k in (1, 2)]
    kept, data = tmp_path / "scores.jsonl", tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in PAIRS * 2))

    def tune(output, merge):
        run = luthier.tune(
            model=base,
            data={
                "train": str(data),
                "keep": "none",
                "stages": [{"preference-oriented-sft": {"scorers": models, "score_file": str(kept), "merge": merge}}],
            },
            objective={"preference-oriented-sft": {"beta": 2.0}},
            training={"max_steps": 2, "batch_rows": 3, "learning_rate": 1e-3, "log_steps": 1},
            evaluation={"before": False, "generate": False},
            output=str(tmp_path / output),
            quiet=True,
        )
        lines = (run.folder / "metrics.jsonl").read_text().splitlines()
        record = json.loads((run.folder / "methods.json").read_text())["objective:preference-oriented-sft"]
        return [json.loads(line) for line in lines], record

    lines, record = tune("first", "mean")
    # Two models, each over the rows once; equal texts are one line.
    assert sorted(passes) == sorted(models)
    assert len(kept.read_text().splitlines()) == 3
    assert [line["step"] for line in lines] == [1, 2]
    assert {"likelihood", "ref_score", "above_reference", "nll", "kl_to_base"} <= lines[0].keys()
    (source,) = record["scores"].values()
    assert source["rows"] == 6
    for model in models:
        shutil.rmtree(model)
    again, other = tune("second", "max")
    assert len(passes) == 2
    assert next(iter(other["scores"].values()))["q0.5"] >= source["q0.5"]
    assert again[0]["likelihood"] == lines[0]["likelihood"]


def test_the_stage_runs_again_when_a_scorer_or_the_score_file_changes(tmp_path):
    folder, file = saved(tmp_path / "m0"), tmp_path / "scores.jsonl"
    stage = ScoreWithAlignedModels(scorers=[folder], score_file=str(file))
    first = stage.reads(context())
    assert first == stage.reads(context())
    saved(tmp_path / "m0", seed=1)
    second = stage.reads(context())
    assert second != first
    file.write_text("")
    assert stage.reads(context()) != second
