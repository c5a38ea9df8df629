"""Two gloo processes: one trajectory, one table of normalisers on both, saved and resumed; as one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from discriminative_rows import pair_session, random_pairs
from safetensors.torch import load_file, save_file

import two_processes
from helpers import settings, weights
from luthier.engine.distributed import Processes
from luthier.engine.loop import Trainer
from luthier.methods.objectives.discriminative_ft import DiscriminativeFineTuning

# 19 rows leave one process without a row in an epoch's last step.
SGD = {"optimizer": "sgd", "learning_rate": 0.2, "schedule": "constant", "max_grad_norm": 1.0}
TRAINING = {**SGD, "epochs": 2, "batch_rows": 6, "save_steps": 3}
ROWS = 19


def train(processes, folder=None, stop=None, resume=False):
    def kill(event, values):
        if event in ("step", "tick") and values["step"] == stop:
            raise SystemExit(7)

    session = pair_session(DiscriminativeFineTuning(), processes=processes)
    training = settings(**TRAINING)
    Trainer(session, random_pairs(ROWS), training, folder=folder, observe=kill).run(resume=resume)
    return session


def main(folder, sharding, stop, resume):
    torch.set_num_threads(1)
    processes = Processes(sharding, device="cpu")
    session = train(processes, folder, stop, resume)
    found = {n: processes.whole(p.detach()).contiguous() for n, p in session.model.named_parameters()}
    save_file(
        {**found, "log_u": session.stack.objective.state()["log_u"]}, folder / f"rank-{processes.rank}.safetensors"
    )
    two_processes.leave()


def launch(folder, sharding, *, stop=None, resume=False):
    two_processes.launch(__file__, [str(folder), sharding, stop, resume], expect=7 if stop else 0)


@pytest.mark.distributed
@pytest.mark.parametrize(("sharding", "stop"), [("ddp", 4), ("fsdp2", None)])
def test_two_processes_give_the_trajectory_and_the_normalisers_of_one(sharding, stop, tmp_path):
    alone = train(Processes(device="cpu"))
    if stop:
        launch(tmp_path, sharding, stop=stop)
    launch(tmp_path, sharding, resume=True)
    found = [load_file(tmp_path / f"rank-{rank}.safetensors") for rank in range(2)]
    log_u = [f.pop("log_u") for f in found]
    assert torch.equal(*log_u)
    torch.testing.assert_close(log_u[0], alone.stack.objective.state()["log_u"], atol=1e-4, rtol=1e-4)
    for name, value in weights(alone.model).items():
        torch.testing.assert_close(found[0][name], value, atol=2e-5, rtol=1e-3)


if __name__ == "__main__":
    place, *options = json.loads(sys.argv[1])
    main(Path(place), *options)
