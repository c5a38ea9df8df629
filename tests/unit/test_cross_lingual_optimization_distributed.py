"""Two gloo processes take the steps of one: both directions are means over the whole step."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from discriminative_rows import PairRows, pair_session, random_pairs
from safetensors.torch import load_file, save_file

import two_processes
from helpers import settings, weights
from luthier.engine.distributed import Processes
from luthier.engine.loop import Trainer
from luthier.methods.objectives.cross_lingual_optimization import CrossLingualOptimization

# 19 rows leave one process without a row in an epoch's last step.
SGD = {"optimizer": "sgd", "learning_rate": 0.2, "schedule": "constant", "max_grad_norm": 1.0}
TRAINING = {**SGD, "epochs": 2, "batch_rows": 6}
ROWS = 19


def paired():
    """Random pairs, with random texts in the place of their English."""
    both = zip(random_pairs(ROWS).pairs, random_pairs(ROWS, seed=1).pairs, strict=True)
    texts = ("prompt", "completion")
    return PairRows(
        [
            {**{n: own[n] for n in texts}, "other_answer": other["completion"], "english_prompt": other["prompt"]}
            for own, other in both
        ]
    )


def train(processes):
    session = pair_session(CrossLingualOptimization(beta=0.5), processes=processes)
    Trainer(session, paired(), settings(**TRAINING)).run()
    return session


def main(folder, sharding):
    torch.set_num_threads(1)
    processes = Processes(sharding, device="cpu")
    session = train(processes)
    found = {n: processes.whole(p.detach()).contiguous() for n, p in session.model.named_parameters()}
    save_file(found, folder / f"rank-{processes.rank}.safetensors")
    two_processes.leave()


def launch(folder, sharding):
    two_processes.launch(__file__, [str(folder), sharding])


@pytest.mark.distributed
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_two_processes_give_the_trajectory_of_one(sharding, tmp_path):
    alone = train(Processes(device="cpu"))
    launch(tmp_path, sharding)
    for rank in range(2):
        found = load_file(tmp_path / f"rank-{rank}.safetensors")
        for name, value in weights(alone.model).items():
            torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-3)


if __name__ == "__main__":
    place, chosen = json.loads(sys.argv[1])
    main(Path(place), chosen)
