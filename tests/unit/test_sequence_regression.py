"""Texts with numbers: reading, squared error, correlations, what is refused, and the model that is left."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForMaskedLM

import luthier
from luthier.core import registry
from luthier.core.errors import LuthierError, UserError
from luthier.core.protocols import Batch
from luthier.data.read import read
from luthier.evaluation.regression import agreement, correlation
from luthier.lab.tokenizer import tokenizer
from luthier.methods.procedures.glue_bag_of_tricks import guessed_numbers
from luthier.models.info import inspect
from luthier.models.load import load
from luthier.runs import api
from luthier.runs import workshop as run_module
from luthier.tasks.regression import NumberOutputs

TASK = "sequence-regression"
rng = np.random.default_rng(0)
# The number is the share of a certain letter.
TEXTS = ["".join(rng.choice(list("ab"), size=6)) for _ in range(48)]
ROWS = [{"text": text, "label": 4 * text.count("a") / 6 - 2} for text in TEXTS]


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "bert"
    words = tokenizer(32)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def recipe(bert, **sections):
    return {
        "model": {"id": bert, "task": TASK},
        "data": {"train": ROWS, "test": ROWS[:24], "keep": "none"},
        "training": {"max_steps": 2, "batch_rows": 16, "learning_rate": 1e-2},
        **sections,
    }


def batch_of(target, weight=None):
    count = len(target)
    return Batch(
        inputs={}, position_N=torch.arange(count), target_N=torch.tensor(target),
        weight_N=torch.ones(count) if weight is None else torch.tensor(weight),
        sequence_N=torch.arange(count), row_B=torch.arange(count),
    )  # fmt: skip


def test_labels_are_numbers_and_keep_their_value():
    rows = read([{"text": "a", "label": v} for v in (0.1, 3, "-2.5e-3")], task=TASK)
    assert [float(v) for v in rows.dataset["label"]] == [0.1, 3.0, -0.0025]
    assert rows.labels == []
    for bad in ("good", None, float("nan"), float("inf"), True, [1.0]):
        with pytest.raises(UserError, match=r"row 2.*'label'.*not a finite number"):
            read([{"text": "a", "label": 1.0}, {"text": "b", "label": bad}], task=TASK)
    with pytest.raises(UserError, match="neither text nor a whole number"):
        read([{"text": "a", "label": 0.5}] * 2, task="sequence-classification")


def test_correlations_are_scipys():
    a, b = rng.normal(size=40), rng.normal(size=40).round(1)
    b = b + a.round(1)  # with ties
    found = correlation(a, b, 0.9)
    wanted = scipy.stats.pearsonr(a, b)
    assert found.value == pytest.approx(wanted.statistic, rel=1e-12)
    low, high = wanted.confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)
    ranked = correlation(a, b, 0.9, ranks=True)
    assert ranked.value == pytest.approx(scipy.stats.spearmanr(a, b).statistic, rel=1e-12)
    assert ranked.low < found.value < ranked.high
    assert ranked.high - ranked.low > found.high - found.low - 0.05
    assert np.isnan(correlation(a, np.ones(40), 0.9).value)


def test_agreement_over_batches():
    numbers, targets = rng.normal(size=9), rng.normal(size=9)
    parts = [slice(0, 5), slice(5, 9)]
    weight = np.r_[np.ones(8), 0.0].astype(np.float32)
    batches = [batch_of(targets[p], weight[p]) for p in parts]
    outputs = iter(NumberOutputs(torch.tensor(numbers[p]), b.target_N, b.sequence_N) for p, b in zip(parts, batches, strict=True))  # fmt: skip
    found = agreement(batches, lambda batch: next(outputs))
    error = (numbers - targets)[:8] ** 2
    assert found["loss"]["value"] == pytest.approx(error.mean(), rel=1e-12)
    half = scipy.stats.t.ppf(0.975, 7) * error.std(ddof=1) / np.sqrt(8)
    assert (found["loss"]["low"], found["loss"]["high"]) == pytest.approx((error.mean() - half, error.mean() + half))
    assert found["pearson"]["value"] == pytest.approx(np.corrcoef(numbers[:8], targets[:8])[0, 1])
    assert [found[k]["direction"] for k in ("loss", "pearson", "spearman")] == ["lower", "higher", "higher"]
    with pytest.raises(LuthierError, match="not finite"):
        agreement([batch_of([0.0])], lambda b: NumberOutputs(torch.tensor([torch.nan]), b.target_N, b.sequence_N))
    with pytest.raises(UserError, match="no row"):
        agreement([], lambda b: None)


def test_outputs_have_squared_errors_and_nothing_of_probabilities():
    number = torch.tensor([1.0, 2.5], dtype=torch.float64, requires_grad=True)
    batch = batch_of([0.5, 3.0], [1.0, 2.0])
    out = NumberOutputs(number, batch.target_N, batch.sequence_N)
    loss = registry.get("objective", "sft").build().loss(out, batch, None)
    loss.sum.backward()
    assert float(loss.sum.detach()) == pytest.approx(0.25 + 2 * 0.25)
    np.testing.assert_allclose(number.grad.numpy(), [2 * 0.5, -2 * 2 * 0.5])
    assert {k: (float(a), float(b)) for k, (a, b) in out.plain(batch).items()} == {"squared_error": (0.75, 3.0)}
    for ask in (lambda: out.entropy_N, lambda: out.top1_N, lambda: out.over_vocabulary(lambda z, i: i)):
        with pytest.raises(LuthierError, match="not defined for it"):
            ask()


def test_methods_of_probabilities_are_refused_with_the_reason(bert):
    for method in registry.all_methods():
        if method.axis not in ("objective", "transform", "selection") or method.numbers:
            continue
        key = {"objective": "objective", "transform": "transforms", "selection": "selection"}[method.axis]
        chosen = {method.slug: dict(method.example)}
        if method.requires:  # refused for what it needs besides
            continue
        with pytest.raises(
            UserError, match=r"not defined for the task|does not go with|targets of sequence-regression are numbers"
        ) as e:
            api.plan_of(recipe(bert, **{key: [chosen] if key == "transforms" else chosen}))
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"objective": {"glue-bag-of-tricks": {"step_size": 0.5}}},
        {"selection": {"loss-top-k": {"keep": 0.5, "oversample": 2}}},
        {"parameters": [{"lora": {"rank": 2, "merge": True}}]},
    ],
    ids=["sft", "glue-bag-of-tricks", "loss-top-k", "lora"],
)
def test_a_run_from_recipe_to_folder(bert, tmp_path, sections):
    run = luthier.tune(recipe(bert, output=str(tmp_path / "run"), **sections), quiet=True)
    target = run.metrics["after"]["target"]
    assert {"loss", "pearson", "spearman"} == set(target)
    assert all(target[k]["n"] == 24 for k in target)
    assert (tmp_path / "run" / "report.html").exists()
    folder = tmp_path / "run" / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    words = AutoTokenizer.from_pretrained(folder)
    assert (model.config.problem_type, model.config.num_labels) == ("regression", 1)
    with torch.no_grad():
        found = [float(model(**words(r["text"], return_tensors="pt")).logits) for r in ROWS[:24]]
    error = np.mean([(f - r["label"]) ** 2 for f, r in zip(found, ROWS, strict=False)])
    assert target["loss"]["value"] == pytest.approx(error, rel=1e-4)
    assert inspect(folder).task == TASK
    # What was saved is a regression by itself and keeps its head.
    again = load(folder)
    assert (again.task, again.labels, again.notes) == (TASK, (), ())


def test_it_learns(bert, tmp_path):
    sections = {"training": {"epochs": 30, "batch_rows": 16, "learning_rate": 3e-3}, "output": str(tmp_path / "run")}
    run = luthier.tune(recipe(bert, **sections), quiet=True)
    before, after = (run.metrics[k]["target"] for k in ("before", "after"))
    assert after["loss"]["value"] < 0.3 * before["loss"]["value"]
    assert after["pearson"]["value"] > 0.8


# -- the tricks that train several times


def glue(bert, tmp_path, **options):
    sections = {"objective": {"glue-bag-of-tricks": {"adversarial_weight": 0.0}}, "output": str(tmp_path / "run")}
    return recipe(bert, **sections, procedure={"glue-bag-of-tricks": options})


def test_numbers_are_drawn_to_what_the_other_folds_predict(bert, tmp_path, monkeypatch):
    seen = []
    train = run_module.Workshop.train

    def recorded(shop, source, *, stage=None, seed=None):
        seen.append((stage, source.rows.dataset))
        return train(shop, source, stage=stage, seed=seed)

    monkeypatch.setattr(run_module.Workshop, "train", recorded)
    luthier.tune(glue(bert, tmp_path, self_calibrated=True, folds=2, largest_share=0.4), quiet=True)
    record = json.loads((tmp_path / "run" / "glue-bag-of-tricks.json").read_text())["self_calibration"]
    assert [stage for stage, _ in seen] == ["fold-1", "fold-2", None]
    rows = seen[-1][1]
    y = np.array([float(v) for v in rows["label"]])
    target = np.array([json.loads(e)["glue_target"] for e in rows["extra"]])
    # The correction is bounded by a_max and by |err| * a_max * |err| / (3 sd).
    error, sd = record["out_of_fold_error"], math.sqrt(record["out_of_fold_error"])
    assert np.abs(target - y).mean() == pytest.approx(record["mean_correction"])
    assert 0 < record["mean_correction"] <= 0.4 * error / (3 * sd) * 1.5
    np.testing.assert_allclose(y, [row["label"] for row in ROWS])


def test_test_inputs_on_which_teachers_agree_are_learnt(bert, tmp_path):
    made = luthier.tune(glue(bert, tmp_path, transductive=True, teachers=2, largest_deviation=10.0), quiet=True)
    record = json.loads((made.folder / "glue-bag-of-tricks.json").read_text())["transductive"]
    assert (record["inputs"], record["rounds"][0]["kept"]) == (24, 24)
    made = luthier.tune(glue(bert, tmp_path / "b", transductive=True, teachers=2, largest_deviation=0.0), quiet=True)
    record = json.loads((made.folder / "glue-bag-of-tricks.json").read_text())["transductive"]
    assert (record["rounds"][0]["kept"], record["model"]) == (0, "teacher-1")


def test_pseudo_numbers_are_the_teachers_mean():
    predicted = np.array([[1.0, 2.0, 3.0], [1.02, 2.5, 3.0]])
    found = guessed_numbers(predicted, largest_deviation=0.05)
    assert found.kept.tolist() == [0, 2]
    assert [float(v) for v in found.labels] == [1.01, 3.0]
    assert found.told == {"lowest_deviation": 0.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transductive": True}, "set teachers: 2"),
        ({"self_calibrated": True, "mode": "drop"}, "labels here are numbers"),
    ],
)
def test_what_numbers_cannot_have_is_refused(bert, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        luthier.tune(glue(bert, tmp_path, **options), quiet=True)
