"""Self-calibrated and transductive fine-tuning: who is trained on what, and that test labels are never read."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from transformers import BertConfig, BertForSequenceClassification

import luthier
from luthier import lab
from luthier.core.errors import UserError
from luthier.core.protocols import Artefact
from luthier.data.read import read
from luthier.engine import loop
from luthier.lab.tokenizer import tokenizer
from luthier.methods.procedures.glue_bag_of_tricks import RECORD, SLUG, calibrate, glue_bag_of_tricks
from luthier.runs.api import plan_of

LABELS = ("negative", "positive")


# -- a workshop whose models are functions


class Prepared:
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def fetch(self, index):
        return {"index": list(index), "label": [LABELS.index(self.rows[i]["label"]) for i in index]}


class Shop:
    """What a procedure calls; ``fit(rows)`` gives a function from texts to logits."""

    seed = 0

    def __init__(self, folder, fit, train, test=None, select=None):
        self.folder, self.fit, self.trained = folder, fit, []
        objective = [SimpleNamespace(slug=SLUG)]
        training = SimpleNamespace(early_stopping=None)
        self.plan = SimpleNamespace(
            task="sequence-classification", objective=objective, recipe=SimpleNamespace(training=training)
        )
        self.processes = SimpleNamespace(main=True)
        sources = {
            name: None if rows is None else self.source(self.read(rows), name)
            for name, rows in (("train", train), ("test", test), ("select", select))
        }
        self.data = SimpleNamespace(**sources, labels=LABELS)

    def read(self, rows):
        return read(rows, task="sequence-classification", cache=self.folder / "cache", progress=False).dataset

    def source(self, rows, name):
        return SimpleNamespace(name=name, rows=SimpleNamespace(dataset=rows), prepared=Prepared(rows))

    def train(self, source, *, stage=None, seed=None):
        rows = list(source.prepared.rows)
        folder = self.folder if stage is None else self.folder / "stages" / stage
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text(f"{stage}\n")
        self.trained.append((stage, seed, rows))
        model = SimpleNamespace(saw={row["text"] for row in rows}, logits=self.fit(rows))
        return Artefact(model=model, metrics={"steps": len(self.trained)}, folder=folder)

    def predict(self, prepared, model=None):
        return np.asarray(model.logits([row["text"] for row in prepared.rows]), np.float64)


def extra(row):
    return json.loads(row["extra"])


def constant(table):
    """A fit that has learnt nothing: the probabilities of a table."""
    return lambda rows: lambda texts: [np.log(table[t]) for t in texts]


TRAIN = [{"text": f"known {i}", "label": LABELS[i % 2]} for i in range(4)]
P = {"a": [0.95, 0.05], "b": [0.6, 0.4], "c": [0.08, 0.92], "d": [0.09, 0.91], "e": [0.97, 0.03], "f": [0.11, 0.89]}
TEST = [{"text": t, "label": "negative", "answer": "negative"} for t in P]


def test_exactly_the_confident_test_inputs_are_learnt_from(tmp_path):
    shop = Shop(tmp_path, constant(P), TRAIN, TEST)
    made = glue_bag_of_tricks(shop, transductive=True, threshold=0.9)
    assert [stage for stage, _, _ in shop.trained] == ["teacher-1", None]
    rows = shop.trained[-1][2]
    assert [r["text"] for r in rows] == [*(r["text"] for r in TRAIN), "a", "c", "d", "e"]
    assert [r["label"] for r in rows[4:]] == ["negative", "positive", "positive", "negative"]
    # 8 rows: means over 4 labelled and over 4 pseudo-labelled rows, the latter counted by half.
    assert [extra(r) for r in rows[:4]] == [{"glue_target": None, "glue_weight": 2.0}] * 4
    for row in rows[4:]:
        found = extra(row)  # and nothing else of the test row, which may tell its label
        assert found.pop("glue_target") == pytest.approx(P[row["text"]])
        assert found == {"glue_weight": 1.0, "glue_pseudo": True}
    assert "transductive: yes" in made.notes[0]
    assert "4 of 6 had a pseudo-label in round 1 (negative 2, positive 2)" in made.notes[0]
    record = json.loads((tmp_path / RECORD).read_text())
    assert record["transductive"]["rounds"][0]["kept"] == 4

    glue_bag_of_tricks(shop, transductive=True, threshold=0.9, class_share=0.3, targets="hard", pseudo_weight=2.0)
    rows = shop.trained[-1][2]  # a third of three predictions of each class, the surest
    assert [(r["text"], extra(r)["glue_target"]) for r in rows[4:]] == [("c", None), ("e", None)]
    assert [extra(r)["glue_weight"] for r in rows] == [1.5] * 4 + [6.0] * 2


def test_teachers_are_averaged_and_have_their_own_seeds(tmp_path):
    tables = iter([{t: [1 - p, p] for t, p in zip(P, ps, strict=True)} for ps in ([0.99] * 6, [0.85] * 3 + [0.7] * 3)])
    shop = Shop(tmp_path, lambda rows: constant(next(tables, P))(rows), TRAIN, TEST)
    glue_bag_of_tricks(shop, transductive=True, threshold=0.9, teachers=2)
    assert [stage for stage, _, _ in shop.trained] == ["teacher-1", "teacher-2", None]
    first, second, last = (seed for _, seed, _ in shop.trained)
    assert first is last is None
    assert second > 0
    rows = shop.trained[-1][2][4:]
    assert [r["text"] for r in rows] == ["a", "b", "c"]  # (0.99 + 0.85) / 2, but not (0.99 + 0.7) / 2
    assert extra(rows[0])["glue_target"] == pytest.approx([0.08, 0.92])


def test_rounds_end_where_the_score_falls(tmp_path):
    select = [{"text": "a", "label": "negative"}, {"text": "c", "label": "positive"}]
    worse = {**P, "c": [0.95, 0.05]}
    tables = iter([P, P, worse])
    shop = Shop(tmp_path, lambda rows: constant(next(tables))(rows), TRAIN, TEST, select)
    made = glue_bag_of_tricks(shop, transductive=True, rounds=3)
    assert [stage for stage, _, _ in shop.trained] == ["teacher-1", "round-1-1", "round-2-1"]
    assert made.metrics["steps"] == 2
    assert "Round 2 lowered the score on data.select, so the model is that of round 1." in made.notes
    assert made.metrics[SLUG]["transductive"]["teacher_score"] == 1.0
    assert [r["score"] for r in made.metrics[SLUG]["transductive"]["rounds"]] == [1.0, 0.5]
    assert (tmp_path / "metrics.jsonl").read_text() == "round-1-1\n"


def test_the_teacher_stays_where_nothing_is_certain(tmp_path):
    shop = Shop(tmp_path, constant(P), TRAIN, TEST)
    made = glue_bag_of_tricks(shop, transductive=True, threshold=0.98)
    assert [stage for stage, _, _ in shop.trained] == ["teacher-1"]
    assert "the highest was 0.97" in made.notes[1]
    assert (made.folder, (tmp_path / "metrics.jsonl").read_text()) == (tmp_path, "teacher-1\n")


def clouds(count, rng):
    """Rows of two separable clouds, a fifth of the labels flipped, half of the texts there twice."""
    true = rng.integers(0, 2, count)
    x = rng.normal(size=(count, 2)) + 4 * true[:, None]
    given = np.where(rng.random(count) < 0.2, 1 - true, true)
    index = [*range(count), *range(count // 2)]
    rows = [{"text": f"{x[i, 0]} {x[i, 1]}", "label": LABELS[given[i]]} for i in index]
    return rows, true[index], given[index]


def logistic(rows):
    def points(texts):
        return np.array([[float(v) for v in t.split()] for t in texts])

    model = LogisticRegression().fit(points([r["text"] for r in rows]), [LABELS.index(r["label"]) for r in rows])
    return lambda texts: model.predict_log_proba(points(texts))


def test_planted_flips_are_corrected_by_models_that_have_not_seen_them(tmp_path):
    rows, true, given = clouds(120, np.random.default_rng(0))
    select, _, _ = clouds(80, np.random.default_rng(1))
    shop = Shop(tmp_path, logistic, rows, select=select)
    predict, asked = shop.predict, []

    def checked(prepared, model=None):
        texts = [row["text"] for row in prepared.rows]
        if len(shop.trained) <= 5:
            assert not model.saw & set(texts)
            asked.extend(texts)
        return predict(prepared, model)

    shop.predict = checked
    made = glue_bag_of_tricks(shop, self_calibrated=True)
    assert [stage for stage, _, _ in shop.trained] == [*(f"fold-{k}" for k in range(1, 6)), None]
    assert sorted(asked) == sorted(r["text"] for r in rows)
    last = shop.trained[-1][2]
    assert [(r["text"], r["label"]) for r in last] == [(r["text"], r["label"]) for r in rows]
    targets = [extra(r)["glue_target"] or np.eye(2)[g].tolist() for r, g in zip(last, given, strict=True)]
    on_true = np.array(targets)[np.arange(len(rows)), true]
    assert on_true.mean() > (given == true).mean() + 0.03
    assert on_true[given != true].mean() > 0.15
    assert np.array(targets).sum(1) == pytest.approx(1.0)
    # The flips make the models unsure of what they know: the fitted temperature is of the right direction.
    found = made.metrics[SLUG]["temperature"]
    assert found["ece_after"] < found["ece_before"] + 1e-12
    assert made.notes[0].startswith("temperature: ")


def test_modes_by_hand(tmp_path):
    # Predictions that are calibrated already: of ten rows with p = 0.8, eight are right, so T = 1.
    shop = Shop(tmp_path, constant({f"row {i}": [0.8, 0.2] for i in range(10)}), [
        {"text": f"row {i}", "label": LABELS[int(i >= 8)]} for i in range(10)
    ])  # fmt: skip
    rows = shop.data.train.rows.dataset
    soft, record = calibrate(shop, rows, 2, 0.5, "soft_targets")
    assert record["out_of_fold_temperature"] == pytest.approx(1.0)
    assert soft.targets[:8] == [None] * 8
    # a = 0.5 * (0.8 - 0.2) = 0.3: 0.7 * (0, 1) + 0.3 * (0.8, 0.2)
    for target in soft.targets[8:]:
        assert target == pytest.approx([0.24, 0.76])
    down, _ = calibrate(shop, rows, 2, 0.5, "down_weight")
    assert down.weights == pytest.approx([np.sqrt(0.8)] * 8 + [np.sqrt(0.2)] * 2)
    assert down.targets == [None] * 10
    assert len(calibrate(shop, rows, 2, 0.5, "drop")[0].rows) == 10

    sure = {f"row {i}": [0.92, 0.08] for i in range(25)}
    shop = Shop(tmp_path, constant(sure), [{"text": t, "label": LABELS[int(i >= 23)]} for i, t in enumerate(sure)])
    glue_bag_of_tricks(shop, self_calibrated=True, mode="drop", folds=2)
    assert [r["text"] for r in shop.trained[-1][2]] == [f"row {i}" for i in range(23)]


def test_what_cannot_work_is_refused(tmp_path):
    shop = Shop(tmp_path, constant(P), TRAIN, TEST)
    with pytest.raises(UserError, match=r"at least 5 different texts, and there are 4\. Lower `folds`"):
        glue_bag_of_tricks(shop, self_calibrated=True)
    shop.plan.recipe.training.early_stopping = object()
    with pytest.raises(UserError, match=r"early_stopping would look at the labels of data\.test"):
        glue_bag_of_tricks(shop, transductive=True)
    shop.data.test = None
    with pytest.raises(UserError, match=r"learns from the inputs of data\.test; name some"):
        glue_bag_of_tricks(shop, transductive=True)
    with pytest.raises(UserError, match="procedure: 'glue-bag-of-tricks' needs the objective 'glue-bag-of-tricks'"):
        plan_of(model="lab:encoder-nano", data={"train": "lab:sentences"}, procedure="glue-bag-of-tricks")
    shop = Shop(tmp_path, constant(P), [{"text": "a", "label": "negative", "glue_weight": 1.0}])
    with pytest.raises(UserError, match="row 1: the row has a column 'glue_weight' already"):
        glue_bag_of_tricks(shop, self_calibrated=True)
    assert shop.trained == []


# -- whole runs of a tiny encoder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A BERT of 16 dimensions with dropout."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    words = tokenizer(32)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    BertForSequenceClassification(
        BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)
    ).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def other(rows):
    """The rows with the other label, and with it in every column that tells it."""
    swap = dict(zip(LABELS, reversed(LABELS), strict=True))
    return [{**r, "label": swap[r["label"]], "answer": swap[r["answer"]]} for r in rows]


BOTH = {"self_calibrated": True, "transductive": True, "folds": 2, "threshold": 0.5}


def run(base, folder, options=BOTH, *, objective=None, change=lambda rows: rows, resume=False, **training):
    held_out = lab.dataset("sentences", split="test", n=28, difficulty=1)
    return luthier.tune(
        model={"id": str(base), "task": "sequence-classification"},
        data={
            "train": lab.dataset("sentences", n=24, difficulty=1, noise=0.2),
            "test": change(held_out[:16]),
            "select": change(held_out[16:]),
        },
        objective=objective or {SLUG: {"step_size": 0.5}},
        procedure="sft" if options is None else {SLUG: options},
        training={"epochs": 2, "batch_rows": 8, "learning_rate": 1e-2, "log_steps": 1, **training},
        evaluation={"before": False},
        output=str(folder),
        quiet=True,
        resume=resume,
    )


def tensors(made):
    return {name: value.detach().clone() for name, value in made.model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    return run(base, tmp_path_factory.mktemp("whole") / "run", save_steps=2)


def test_without_its_weights_it_is_plain_fine_tuning_bit_for_bit(base, tmp_path):
    plain = run(base, tmp_path / "plain", None, objective="sft")
    alone = {SLUG: {"adversarial_weight": 0.0}}
    off = run(base, tmp_path / "off", {**BOTH, "largest_share": 0.0, "pseudo_weight": 0.0}, objective=alone)
    assert same(tensors(plain), tensors(off))
    assert not (tmp_path / "off" / "stages").exists()
    on = run(base, tmp_path / "on", {**BOTH, "transductive": False}, objective=alone)
    assert not same(tensors(plain), tensors(on))


def test_other_labels_of_test_and_select_change_the_score_alone(base, whole, tmp_path):
    found = run(base, tmp_path / "run", change=other)
    assert same(tensors(whole), tensors(found))
    before, after = (json.loads((r.folder / RECORD).read_text()) for r in (whole, found))
    assert before.pop("temperature") != after.pop("temperature")
    assert before == after
    assert before["transductive"]["rounds"][0]["kept"] == 16
    scores = [r.metrics["after"]["target"]["accuracy"]["value"] for r in (whole, found)]
    assert sum(scores) == pytest.approx(1.0)
    assert "transductive: yes" in (found.folder / "README.md").read_text()
    manifest = json.loads((found.folder / "manifest.json").read_text())  # where `luthier evaluate` has it from
    assert any("transductive: yes" in note for note in manifest["notes"])


def test_killed_in_its_stages_it_goes_on_with_the_same_bits(base, whole, tmp_path, monkeypatch):
    step, left = loop.Trainer._step, [0]

    def killed(self):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        step(self)

    monkeypatch.setattr(loop.Trainer, "_step", killed)
    # Each fold takes 4 steps, the teacher 6, the last training 10: inside fold 2, the teacher and the last one.
    for number, steps in enumerate((7, 4, 8)):
        left[0] = steps
        with pytest.raises(KeyboardInterrupt):
            run(base, tmp_path / "run", resume=number > 0, save_steps=2)
    left[0] = 10
    found = run(base, tmp_path / "run", resume=True, save_steps=2)
    assert left[0] < 8  # what was done was not done again
    assert same(tensors(whole), tensors(found))
    assert (whole.folder / RECORD).read_text() == (found.folder / RECORD).read_text()
