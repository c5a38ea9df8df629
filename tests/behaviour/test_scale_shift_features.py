"""Scale and shift features against a linear probe, LoRA and full fine-tuning: a small ViT on new pictures, and on digits.

The design: a ViT from a configuration (3 layers, width 64, 16 x 16 grey pictures, patches of 4) learns ten shapes on 4,000
noisy pictures (1,200 steps of 64, AdamW at 1e-3). It is then adapted, with a new head and three seeds of pictures, head and order,
to two tasks: 1,000 pictures of the same shapes with inverted contrast, a chequered ground and permuted labels (tested on 1,000
more); and scikit-learn's digits, 8 x 8 scans enlarged to 16 x 16, 1,000 to learn from and 797 to test on. 300 steps of 64 with
a cosine schedule for every arm; the learning rate is 1e-2 for the linear probe and for SSF (its identity start), 5e-3 for LoRA of rank 4
and 1e-3 for full fine-tuning; weight decay 0.01. What becomes of the old task: the accuracy on the shapes of the tuned backbone with
the old head, for adapters with the adapter off. Required by the specification on the new pictures: above the linear probe by
a clear margin (5 points), within 2 points of full fine-tuning or above, with less than 5% of the parameters; the old task
untouched when the affines are removed. All was fixed before anything was run.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from helpers import OpenAll, settings
from luthier.engine.distributed import Processes
from luthier.engine.loop import Trainer
from luthier.engine.optimizer import open_parameters
from luthier.engine.session import Session
from luthier.engine.stack import Setup, Stack
from luthier.methods.objectives.sft import SupervisedFineTuning
from luthier.methods.parameters.linear_probe import LinearProbe
from luthier.methods.parameters.lora import LowRankAdaptation
from luthier.methods.parameters.scale_shift_features import ScaleShiftFeatures
from luthier.tasks.classification import ImageClassification

RESULT = Path(__file__).resolve().parents[2] / "docs" / "measured" / "scale-shift-features.json"
SIDE, CLASSES = 16, 10
ARMS = {
    "linear probe": (LinearProbe, 1e-2),
    "ssf": (lambda: ScaleShiftFeatures(init="identity"), 1e-2),
    "lora": (lambda: LowRankAdaptation(rank=4), 5e-3),
    "full": (OpenAll, 1e-3),
}


def shapes(rng, count):
    """[count, 16, 16] noisy pictures of ten shapes somewhere in the frame, and their classes."""
    label = rng.integers(CLASSES, size=count)
    y, x = np.mgrid[:SIDE, :SIDE].astype(float)
    cx, cy = (rng.uniform(5, 10, size=(count, 1, 1)) for _ in range(2))
    r = rng.uniform(3, 5, size=(count, 1, 1))
    dx, dy = x[None] - cx, y[None] - cy
    far, box = np.hypot(dx, dy), np.maximum(abs(dx), abs(dy))
    drawn = np.stack(
        [
            far < r,
            abs(far - r) < 1,
            box < r,
            abs(box - r) < 1,
            ((abs(dx) < 1) | (abs(dy) < 1)) & (box < r),
            ((abs(dx - dy) < 1.2) | (abs(dx + dy) < 1.2)) & (box < r),
            (abs(dy) < 1) & (abs(dx) < r),
            (abs(dx) < 1) & (abs(dy) < r),
            (abs(dx) < (dy + r) / 2) & (abs(dy) < r),
            (abs(dx - dy) < 1.2) & (box < r),
        ]
    )
    picture = drawn[label, np.arange(count)].astype(np.float32)
    return picture + rng.normal(0, 0.2, size=picture.shape).astype(np.float32), label


def shifted(rng, count):
    """The same shapes dark on a chequered ground, the labels permuted."""
    picture, label = shapes(rng, count)
    ground = 0.5 * (np.indices((SIDE, SIDE)).sum(0) // 2 % 2)
    return (1.0 - picture + ground).astype(np.float32), np.random.default_rng(99).permutation(CLASSES)[label]


def digits(rng, train):
    """scikit-learn's scans, 0 to 1, enlarged; (train, test)."""
    datasets = pytest.importorskip("sklearn.datasets")
    picture, label = datasets.load_digits(return_X_y=True)
    picture = np.kron(picture.reshape(-1, 8, 8) / 16.0, np.ones((2, 2))).astype(np.float32)
    order = rng.permutation(len(label))
    return (picture[order[:train]], label[order[:train]]), (picture[order[train:]], label[order[train:]])


class Rows:
    """Pictures in memory as prepared rows."""

    def __init__(self, picture, label):
        self.picture, self.label = torch.from_numpy(picture)[:, None], label
        self.lengths = np.ones(len(label), dtype=np.int32)
        self.keys = [f"{i:032x}" for i in range(len(label))]

    def __len__(self):
        return len(self.label)

    def fetch(self, index):
        index = [int(i) for i in index]
        return {"pixels": self.picture[index], "label": self.label[index], "key": [self.keys[i] for i in index]}


class Pictures(ImageClassification):
    """Image classification of tensors."""

    def collate(self, rows, index_B, columns=()):
        return self._batch({"pixel_values": rows["pixels"]}, rows, index_B, columns)


def vit(seed):
    torch.manual_seed(seed)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=4,
            num_channels=1,
            num_labels=CLASSES,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def train(model, method, rows, *, rate, steps, seed):
    named = {"objective": SupervisedFineTuning(), "parameters": method}
    stack = Stack(objective=named["objective"], parameters=[method], named=named)
    model = open_parameters(model, stack, Setup(seed=seed, task="image-classification", processor=None))
    session = Session(
        model=model, task=Pictures(None), processor=None, stack=stack, processes=Processes(device="cpu"), seed=seed
    )
    values = {"learning_rate": rate, "batch_rows": 64, "max_steps": steps, "epochs": 1000, "weight_decay": 0.01}
    started = time.perf_counter()
    Trainer(session, rows, settings(**values)).run()
    return session.model.eval(), time.perf_counter() - started


@torch.no_grad()
def accuracy(model, rows):
    return float((model(pixel_values=rows.picture).logits.argmax(-1).numpy() == rows.label).mean())


def fresh_head(base, seed):
    model = copy.deepcopy(base)
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.classifier.weight, std=0.02)
    torch.nn.init.zeros_(model.classifier.bias)
    return model


def old_task(model, base, rows):
    """Accuracy on the shapes with the old head; the adapter, where there is one, off."""
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            hidden = model.get_base_model().vit(pixel_values=rows.picture).last_hidden_state[:, 0]
    else:
        hidden = model.vit(pixel_values=rows.picture).last_hidden_state[:, 0]
    return float((base.classifier(hidden).argmax(-1).numpy() == rows.label).mean())


def experiment(seeds=(0, 1, 2), *, learnt=4000, pretraining=1200, given=1000, steps=300):
    """Every arm on both tasks at every seed, with what was required."""
    base, _ = train(
        vit(0), OpenAll(), Rows(*shapes(np.random.default_rng(0), learnt)), rate=1e-3, steps=pretraining, seed=0
    )
    old = Rows(*shapes(np.random.default_rng(1), 1000))
    before = accuracy(base, old)
    tasks: dict[str, dict[str, dict[str, dict]]] = {"new pictures": {}, "digits": {}}
    for seed in seeds:
        rng = np.random.default_rng([seed, 2])
        data = {
            "new pictures": (shifted(rng, given), shifted(rng, 1000)),
            "digits": digits(rng, given),
        }
        for task, (learn, test) in data.items():
            for arm, (make, rate) in ARMS.items():
                model, seconds = train(fresh_head(base, seed), make(), Rows(*learn), rate=rate, steps=steps, seed=seed)
                trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
                with torch.no_grad():
                    tasks[task].setdefault(arm, {})[str(seed)] = {
                        "accuracy": accuracy(model, Rows(*test)),
                        "old_task": old_task(model, base, old),
                        "trained_share": trained / sum(p.numel() for p in base.parameters()),
                        "seconds": round(seconds, 1),
                    }

    def of(task, arm, key):
        return np.array([tasks[task][arm][str(seed)][key] for seed in seeds])

    new = {arm: of("new pictures", arm, "accuracy") for arm in ARMS}
    return {
        "method": "scale-shift-features",
        "design": __doc__,
        "seeds": list(seeds),
        "base_on_shapes": before,
        "arms": tasks,
        "claims": {
            "new pictures: ssf above the linear probe by 5 points on every seed": bool(
                (new["ssf"] > new["linear probe"] + 0.05).all()
            ),
            "new pictures: ssf within 2 points of full fine-tuning on average": bool(
                new["ssf"].mean() > new["full"].mean() - 0.02
            ),
            "less than 5% of the parameters": bool((of("new pictures", "ssf", "trained_share") < 0.05).all()),
            "the old task is as it was with the affines removed": bool(
                (of("new pictures", "ssf", "old_task") == before).all()
            ),
            "digits (reported): ssf above the linear probe on every seed": bool(
                (of("digits", "ssf", "accuracy") > of("digits", "linear probe", "accuracy")).all()
            ),
        },
        "mean": {
            task: {
                arm: {k: float(of(task, arm, k).mean()) for k in ("accuracy", "old_task", "trained_share", "seconds")}
                for arm in ARMS
            }
            for task in tasks
        },
    }


def test_shapes_and_digits():
    found = experiment()
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert found["base_on_shapes"] > 0.5
    for arms in found["arms"].values():
        for runs in arms.values():
            for run in runs.values():
                assert run["accuracy"] > 1.5 / CLASSES
    assert found["claims"]["the old task is as it was with the affines removed"]
