"""Adversarial fine-tuning on two gloo processes: the trajectory of one, for a language model and a classifier."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

import two_processes
from helpers import PROCESSOR, OpenAll, make_session, random_rows, settings, tiny_llama, weights
from luthier.engine.distributed import Processes
from luthier.engine.loop import Trainer
from luthier.engine.session import Session
from luthier.engine.stack import Stack
from luthier.methods.objectives.glue_bag_of_tricks import AdversarialFineTuning
from luthier.tasks import get_task

# 19 rows leave one process without a row in an epoch's last step.
TRAINING = {"optimizer": "sgd", "learning_rate": 0.1, "schedule": "constant", "batch_rows": 6, "epochs": 2}
ROWS = 19


class Classes:
    """The rows of a language model with a class for each."""

    def __init__(self, rows):
        self.rows, self.lengths, self.keys = rows, rows.lengths, rows.keys

    def __len__(self):
        return len(self.rows)

    def fetch(self, index):
        found = self.rows.fetch(index)
        return {"input_ids": found["input_ids"], "label": [int(ids[1]) % 3 for ids in found["input_ids"]]}


def classifier(objective, processes):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=3, **size, **still))
    # Under DDP every trained tensor takes part, in one process as in two.
    opened = OpenAll()
    stack = Stack(objective=objective, parameters=[opened], named={"objective": objective, "parameters": opened})
    task = get_task("sequence-classification", PROCESSOR)
    return Session(model=opened.apply(model, None), task=task, processor=PROCESSOR, stack=stack, processes=processes)


def train(kind, processes):
    objective = AdversarialFineTuning(adversarial_weight=2.0, step_size=0.5, noise=0.1)
    if kind == "language":
        session, rows = make_session(tiny_llama(tied=True), objective=objective, processes=processes), random_rows(ROWS)
    else:
        session, rows = classifier(objective, processes), Classes(random_rows(ROWS))
    Trainer(session, rows, settings(**TRAINING)).run()
    return session


def main(kind, folder):
    torch.set_num_threads(1)
    processes = Processes("ddp", device="cpu")
    found = {n: p.contiguous() for n, p in weights(train(kind, processes).model).items()}
    save_file(found, Path(folder) / f"rank-{processes.rank}.safetensors")
    two_processes.leave()


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["language", "classes"])
def test_two_processes_give_the_trajectory_of_one(kind, tmp_path):
    two_processes.launch(__file__, [kind, str(tmp_path)])
    alone = weights(train(kind, Processes(device="cpu")).model)
    first, second = (load_file(tmp_path / f"rank-{rank}.safetensors") for rank in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        torch.testing.assert_close(value, alone[name], atol=2e-5, rtol=1e-3)


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
