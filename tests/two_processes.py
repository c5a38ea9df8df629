"""Run a script as two ranks of one gloo process group, as torchrun would."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def launch(script: str | Path, job: Any, *, expect: int = 0, timeout: float = 120.0) -> None:
    """``python script '<job as JSON>'`` twice; both must end with the status ``expect``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    shared |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), json.dumps(job)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            output, _ = process.communicate(timeout=timeout)
            assert process.returncode == expect, output
    finally:
        for process in ranks:
            process.kill()


def leave() -> None:
    """End this rank at once: taking a gloo group apart beside a live DDP module sometimes waits forever."""
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)
