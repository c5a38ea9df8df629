"""Two gloo processes give one process's trajectory: DDP and FSDP2, with clipping, saving and resuming."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import two_processes
from helpers import make_session, random_rows, settings, tiny_llama, weights
from luthier.core.errors import UserError
from luthier.engine.distributed import Processes
from luthier.engine.loop import Trainer

WORKER = Path(__file__).resolve().parent.parent / "distributed_worker.py"
# Plain SGD, so that rounding differences stay rounding differences; a norm limit that is really exceeded.
TRAINING = {
    "optimizer": "sgd",
    "learning_rate": 0.5,
    "schedule": "constant",
    "epochs": 2,
    "max_grad_norm": 0.3,
    "batch_rows": 8,
    "save_steps": 2,
}


def launch(job, **options):
    two_processes.launch(WORKER, job, **options)


def single(accumulation=1, tied=False):
    session = make_session(tiny_llama(tied=tied))
    Trainer(session, random_rows(20), settings(**{**TRAINING, "accumulation": accumulation})).run()
    return weights(session.model)


def assert_close(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=3e-6, rtol=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_two_processes_give_the_trajectory_of_one(sharding, tmp_path):
    launch({"sharding": sharding, "folder": str(tmp_path), "training": {**TRAINING, "accumulation": 2}})
    assert_close(load_file(tmp_path / "final.safetensors"), single())


@pytest.mark.distributed
def test_fsdp2_with_tied_embeddings(tmp_path):
    launch({"sharding": "fsdp2", "folder": str(tmp_path), "training": TRAINING, "tied": True})
    assert_close(load_file(tmp_path / "final.safetensors"), single(tied=True))


@pytest.mark.distributed
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_a_method_may_look_at_the_rows_before_the_first_step(sharding, tmp_path):
    launch({"sharding": sharding, "folder": str(tmp_path), "training": TRAINING, "looks_first": True})
    assert_close(load_file(tmp_path / "final.safetensors"), single())


@pytest.mark.distributed
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_two_processes_resume_to_the_same_bits(sharding, tmp_path):
    job = {"sharding": sharding, "training": {**TRAINING, "optimizer": "adamw", "learning_rate": 1e-2}}
    launch({**job, "folder": str(tmp_path / "whole")})
    launch({**job, "folder": str(tmp_path / "cut"), "stop": 3}, expect=7)
    launch({**job, "folder": str(tmp_path / "cut"), "resume": True})
    whole, cut = (load_file(tmp_path / f / "final.safetensors") for f in ("whole", "cut"))
    for name, value in whole.items():
        assert torch.equal(cut[name], value), name


def test_a_mode_without_such_a_test_is_refused_by_name():
    with pytest.raises(UserError, match="'deepspeed' has no test"):
        Processes("deepspeed")
