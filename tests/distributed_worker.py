"""One rank of a two-process run: ``python distributed_worker.py '<json>'`` with the usual torchrun environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import two_processes
from helpers import LooksFirst, make_session, random_rows, settings, tiny_llama
from luthier.engine.distributed import Processes
from luthier.engine.loop import Trainer


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    processes = Processes(job["sharding"], device="cpu")
    parameters = [LooksFirst()] if job.get("looks_first") else None
    session = make_session(tiny_llama(tied=job.get("tied", False)), processes=processes, parameters=parameters)
    folder = Path(job["folder"])

    def kill(event: str, values: dict) -> None:
        if event in ("step", "tick") and values["step"] == job.get("stop"):
            raise SystemExit(7)

    trainer = Trainer(session, random_rows(20), settings(**job["training"]), folder=folder, observe=kill)
    trainer.run(resume=job.get("resume", False))
    whole = {n: processes.whole(p.detach()).contiguous() for n, p in session.model.named_parameters()}
    if processes.main:
        save_file(whole, folder / "final.safetensors")
    two_processes.leave()


main()
