"""A run killed by SIGKILL at 20 random moments resumes each time and ends with the same bits; SIGTERM saves first."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import make_session, random_rows, settings, tiny_llama
from luthier.engine import checkpoint
from luthier.engine.loop import Interrupted, Trainer

KILLS = 20
TRAINING = {"epochs": 100, "save_steps": 3, "max_steps": 300, "log_steps": 5, "keep_checkpoints": 2}


def trainer(folder):
    session = make_session(tiny_llama(dropout=0.1))
    return Trainer(session, random_rows(24), settings(**TRAINING), folder=folder)


def work(folder, started):
    """What a child process does: continue the run, and leave the final weights when it gets to the end."""
    run = trainer(folder)
    os.write(started, b"x")
    try:
        run.run(resume=True)
    except Interrupted:
        os._exit(3)
    model = {n: p.detach() for n, p in run.session.model.named_parameters()}
    save_file(model, folder / "partial.safetensors")
    os.replace(folder / "partial.safetensors", folder / "final.safetensors")


def spawn(folder):
    """A forked child (torch is imported already, so a kill lands in the run and not in an import)."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            work(folder, write)
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    os.read(read, 1)  # the session is built; training starts now
    os.close(read)
    return child


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_twenty_kills_end_with_the_same_bits(tmp_path, one_thread):
    whole = trainer(None)
    began = time.perf_counter()
    whole.run()
    seconds = time.perf_counter() - began
    wanted = {n: p.detach() for n, p in whole.session.model.named_parameters()}
    rng = random.Random(0)
    kills = 0
    while kills < KILLS and not (tmp_path / "final.safetensors").exists():
        child = spawn(tmp_path)
        # About one twentieth of the run a life, so that the kills spread over all of it.
        time.sleep(rng.uniform(0.01, 1.2 * seconds / KILLS))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        newest = checkpoint.latest(tmp_path / "checkpoints")
        if newest is not None:
            checkpoint.load(newest)  # whole, whatever the kill cut
    assert kills == KILLS
    child = spawn(tmp_path)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    found = load_file(tmp_path / "final.safetensors")
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_sigterm_saves_and_ends(tmp_path, one_thread):
    child = spawn(tmp_path)
    time.sleep(0.3)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    newest = checkpoint.latest(tmp_path / "checkpoints")
    assert newest is not None
    assert 0 < checkpoint.load(newest)[2]["step"] < 300
