"""Two gloo processes: one trajectory, with e- of each step and with e- shared out at the start of each epoch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from fault_aware_rows import flagged_rows
from safetensors.torch import load_file, save_file

import two_processes
from helpers import make_session, settings, weights
from luthier.engine.distributed import Processes
from luthier.engine.loop import Trainer
from luthier.methods.objectives import fault_aware_ft
from luthier.methods.objectives.fault_aware_ft import FaultAwareFineTuning

# 19 rows leave one process without a row in an epoch's last step, and most micro-batches of one without a pair.
SGD = {"optimizer": "sgd", "learning_rate": 0.2, "schedule": "constant", "max_grad_norm": 1.0}
TRAINING = {**SGD, "epochs": 2, "batch_rows": 6, "accumulation": 2}
JOBS = {
    "ddp": {"refresh": "epoch", "unlikelihood": 0.3},
    "fsdp2": {"refresh": "step"},
}


def train(processes, options):
    # Several batches in a sweep, of an odd number.
    fault_aware_ft.SWEEP_TOKENS = 40
    session = make_session(objective=FaultAwareFineTuning(emphasis=2.0, **options), processes=processes)
    Trainer(session, flagged_rows(19, bare=2), settings(**TRAINING)).run()
    return session


def main(folder, sharding):
    torch.set_num_threads(1)
    processes = Processes(sharding, device="cpu")
    session = train(processes, JOBS[sharding])
    found = {n: processes.whole(p.detach()).contiguous() for n, p in session.model.named_parameters()}
    wrong = session.stack.objective.state()["wrong"]
    if wrong is not None:
        found["wrong"] = wrong
    save_file(found, folder / f"rank-{processes.rank}.safetensors")
    two_processes.leave()


def launch(folder, sharding):
    two_processes.launch(__file__, [str(folder), sharding])


@pytest.mark.distributed
@pytest.mark.parametrize("sharding", JOBS)
def test_two_processes_give_the_trajectory_of_one(sharding, tmp_path, monkeypatch):
    monkeypatch.setattr(fault_aware_ft, "SWEEP_TOKENS", 40)
    alone = train(Processes(device="cpu"), JOBS[sharding])
    launch(tmp_path, sharding)
    found = [load_file(tmp_path / f"rank-{rank}.safetensors") for rank in range(2)]
    if "wrong" in found[0]:
        wrong = [f.pop("wrong") for f in found]
        assert torch.equal(wrong[0].nan_to_num(), wrong[1].nan_to_num())
        expected = alone.stack.objective.state()["wrong"]
        torch.testing.assert_close(wrong[0], expected, atol=1e-4, rtol=1e-4, equal_nan=True)
    for name, value in weights(alone.model).items():
        torch.testing.assert_close(found[0][name], value, atol=2e-5, rtol=1e-3)


if __name__ == "__main__":
    place, chosen = json.loads(sys.argv[1])
    main(Path(place), chosen)
