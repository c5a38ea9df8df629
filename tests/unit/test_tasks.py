"""Every task from rows to a trained model, on models of a few thousand parameters."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    ViTConfig,
    ViTForImageClassification,
)

from helpers import OpenAll, settings
from luthier.engine.distributed import Processes
from luthier.engine.loop import Trainer
from luthier.engine.optimizer import open_parameters
from luthier.engine.session import Session
from luthier.engine.stack import Setup, Stack
from luthier.methods.objectives.sft import SupervisedFineTuning
from luthier.tasks import get_task

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


class Rows:
    """Columns in memory."""

    def __init__(self, task, labels, **columns):
        self.task, self.labels, self.columns = task, labels, columns
        count = len(next(iter(columns.values())))
        self.columns["key"] = [f"{i:032x}" for i in range(count)]
        self.lengths = np.asarray([len(r) for r in columns.get("input_ids", [[]] * count)], dtype=np.int32)

    def __len__(self):
        return len(self.lengths)

    def fetch(self, index):
        return {name: [values[int(i)] for i in index] for name, values in self.columns.items()}


class Pixels:
    """An image processor in two lines."""

    def __call__(self, images, return_tensors):
        return {
            "pixel_values": torch.stack(
                [torch.from_numpy(np.asarray(i, dtype=np.float32) / 255).permute(2, 0, 1) for i in images]
            )
        }


class Pad:
    pad_token_id = 0


def picture(shade):
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def case(task):
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    if task == "image-classification":
        label = [i % 2 for i in range(24)]
        model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=2, **SMALL))
        return model, Pixels(), Rows(task, ["dark", "light"], image=[picture(200 * v + 20) for v in label], label=label)
    ids = [np.concatenate([[1], rng.integers(3, 30, size=rng.integers(3, 9))]).astype(np.int32) for _ in range(24)]
    config = BertConfig(vocab_size=32, max_position_embeddings=32, num_labels=2, pad_token_id=0, **SMALL)
    if task == "sequence-classification":
        return (
            BertForSequenceClassification(config),
            Pad(),
            Rows(task, ["a", "b"], input_ids=ids, label=[int(i[1] > 15) for i in ids]),
        )
    positions = [np.arange(1, len(i), dtype=np.int32) for i in ids]
    tags = [(i[p] > 15).astype(np.int32) for i, p in zip(ids, positions, strict=True)]
    return (
        BertForTokenClassification(config),
        Pad(),
        Rows(task, ["a", "b"], input_ids=ids, positions=positions, tags=tags),
    )


def make(task):
    model, processor, rows = case(task)
    part = OpenAll()
    stack = Stack(objective=SupervisedFineTuning(), parameters=[part], named={"parameters:all": part})
    model = open_parameters(model, stack, Setup(seed=0, task=task, processor=processor))
    session = Session(
        model=model, task=get_task(task, processor), processor=processor, stack=stack, processes=Processes(device="cpu")
    )
    return session, rows


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification", "image-classification"])
def test_one_objective_serves_the_task(task):
    session, rows = make(task)
    losses = []
    Trainer(
        session,
        rows,
        settings(epochs=20),
        observe=lambda event, values: losses.append(values["loss"]) if event == "step" else None,
    ).run()
    assert losses[0] == pytest.approx(np.log(2), abs=0.2)
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification", "image-classification"])
def test_outputs_are_those_of_the_model(task):
    session, rows = make(task)
    session.model.eval()
    batch = session.task.collate(rows.fetch([2, 5, 7]), [2, 5, 7])
    out = session.forward(batch, grad=False)
    with torch.no_grad():
        logits = session.model(**batch.inputs).logits.double()
    if task == "token-classification":
        wanted = torch.cat(
            [
                logits[row, torch.from_numpy(rows.columns["positions"][i]).long()]
                .log_softmax(-1)
                .gather(-1, torch.from_numpy(rows.columns["tags"][i]).long()[:, None])[:, 0]
                for row, i in enumerate([2, 5, 7])
            ]
        )
    else:
        wanted = logits.log_softmax(-1)[torch.arange(3), torch.tensor([rows.columns["label"][i] for i in (2, 5, 7)])]
    torch.testing.assert_close(out.logp_N.double(), wanted, atol=1e-6, rtol=1e-6)


def test_accumulation_does_not_change_a_classifier():
    from helpers import weights

    found = []
    for accumulation in (1, 4):
        session, rows = make("token-classification")
        Trainer(session, rows, settings(accumulation=accumulation, optimizer="sgd", learning_rate=0.1)).run()
        found.append(weights(session.model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=2e-6, rtol=1e-4)
