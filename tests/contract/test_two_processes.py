"""Every training method on two gloo processes gives the trajectory of one."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import two_processes
from helpers import BEDS, make_session, random_rows, settings, stack_with, weights
from luthier.core import registry
from luthier.engine.distributed import Processes
from luthier.engine.loop import Trainer

AXES = ("objective", "transform", "selection", "parameters")
TRAINING = [m for m in registry.all_methods() if m.axis in AXES and not m.missing]
# 19 rows leave one process without a row in an epoch's last step.
SGD = {"optimizer": "sgd", "learning_rate": 0.1, "schedule": "constant", "batch_rows": 6, "epochs": 1}
ROWS = 19


def name(method):
    return f"{method.axis}:{method.slug}"


def trained(method, processes):
    task = next(task for task in BEDS if not method.tasks or task in method.tasks)
    session = make_session(task=task, processes=processes, **stack_with(method, method.example))
    Trainer(session, random_rows(ROWS * session.stack.oversample), settings(**SGD)).run()
    return {n: p.contiguous() for n, p in weights(session.model).items()}


def main(folder):
    torch.set_num_threads(1)
    for number, method in enumerate(TRAINING):
        processes = Processes("ddp", device="cpu")
        place = folder / f"{number}-{processes.rank}"
        try:
            save_file(trained(method, processes), place.with_suffix(".safetensors"))
        except Exception:
            place.with_suffix(".txt").write_text(traceback.format_exc())
        processes.barrier()
    two_processes.leave()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    two_processes.launch(__file__, str(folder), timeout=1500)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("method", TRAINING, ids=name)
def test_two_processes_give_the_trajectory_of_one(method, two):
    number = TRAINING.index(method)
    failed = [p.read_text() for p in two.glob(f"{number}-*.txt")]
    if "processes" in method.conflicts:  # it says it cannot, and then it must say so by name on every process
        assert len(failed) == 2
        assert all(f"UserError: {method.slug}" in text for text in failed), failed[0]
        return
    assert not failed, failed[0]
    first, second = (load_file(two / f"{number}-{rank}.safetensors") for rank in range(2))
    alone = trained(method, Processes(device="cpu"))
    assert first.keys() == alone.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
        torch.testing.assert_close(value, alone[key], atol=2e-5, rtol=1e-3)


if __name__ == "__main__":
    main(Path(json.loads(sys.argv[1])))
