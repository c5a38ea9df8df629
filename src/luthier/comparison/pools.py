"""Where trials run: processes of this machine, or tasks of a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any, Protocol

from luthier.comparison.trial import KEPT, command, environment
from luthier.core.errors import UserError, missing_extra
from luthier.core.store import write_atomic

# How long a trial that was asked to stop may take to save itself.
PATIENCE_SECONDS = 60


class Pool(Protocol):
    """Starts trials whose folders are prepared."""

    def start(self, folder: Path, *, threads: int, alone: bool) -> Any:
        """A handle of the started trial."""

    def poll(self, handle: Any) -> int | None:
        """Its exit status; None while it works."""

    def stop(self, handles: list[Any]) -> None:
        """Ask all of them to save themselves, and wait for it."""


class LocalPool:
    """Processes of this machine."""

    def start(self, folder: Path, *, threads: int, alone: bool) -> subprocess.Popen[bytes]:
        """A process that writes to the trial's ``log.txt``."""
        with (folder / "log.txt").open("ab") as log:
            return subprocess.Popen(
                command(folder), stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment(threads)
            )

    def poll(self, handle: subprocess.Popen[bytes]) -> int | None:
        """The exit status; None while it works."""
        return handle.poll()

    def stop(self, handles: list[subprocess.Popen[bytes]]) -> None:
        """SIGTERM, upon which a training saves itself; SIGKILL after a minute."""
        for handle in handles:
            with contextlib.suppress(ProcessLookupError):
                handle.send_signal(signal.SIGTERM)
        for handle in handles:
            try:
                handle.wait(PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                handle.kill()


def _in_task(folder: str, files: dict[str, bytes], threads: int) -> tuple[int, dict[str, bytes]]:
    """Run a trial on the node that the task landed on, and bring back what it measured."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (place / name).write_bytes(content)
    with (place / "log.txt").open("ab") as log:
        done = subprocess.run(
            command(place), stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment(threads), check=False
        )
    found = {
        name: (place / name).read_bytes() for name in (*KEPT, "texts.json", "data.json") if (place / name).is_file()
    }
    return done.returncode, found


def _reach(address: str) -> None:
    """Refuse an address where nothing listens; ray itself would try for minutes.

    Raises:
        UserError: nothing answers.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return  # `auto` and the like are for ray to find
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"--ray: no cluster answers at '{address}' ({error}). Start one with: ray start --head"
        ) from error


class RayPool:
    """Tasks of a Ray cluster. Model and data must be found under the same paths on every node.

    Args:
        address: of the cluster, ``host:port``, or ``auto``.

    Raises:
        UserError: ray is not installed, or nothing answers at the address.
    """

    def __init__(self, address: str) -> None:
        try:
            import ray
        except ImportError as error:
            raise missing_extra("ray", "--ray", "luthier[cluster]") from error
        self.ray = ray
        _reach(address)
        try:
            if not ray.is_initialized():
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"--ray: no cluster answers at '{address}' ({' '.join(str(error).split())[:200]}). Start one with: ray "
                "start --head"
            ) from error
        cpus = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
        self.most = int(max(cpus, default=1)) or 1
        self._folders: dict[Any, Path] = {}

    def start(self, folder: Path, *, threads: int, alone: bool) -> Any:
        """A task; one that must be alone takes all processors of a node."""
        files = {name: (folder / name).read_bytes() for name in ("recipe.yaml", "spec.json")}
        task = self.ray.remote(num_cpus=self.most if alone else min(threads, self.most), max_retries=0)(_in_task)
        handle = task.remote(str(folder.absolute()), files, threads)
        self._folders[handle] = folder
        return handle

    def poll(self, handle: Any) -> int | None:
        """The exit status, its files fetched; None while it works."""
        ready, _ = self.ray.wait([handle], timeout=0)
        if not ready:
            return None
        folder = self._folders.pop(handle)
        try:
            status, files = self.ray.get(handle)
        except Exception as error:  # a node that went away takes its task with it
            said = " ".join(str(error).split())[-300:]
            write_atomic(folder / "log.txt", f"error: the cluster lost this trial: {type(error).__name__}: {said}\n")
            return 1
        for name, content in files.items():
            write_atomic(folder / name, content)
        return status

    def stop(self, handles: list[Any]) -> None:
        """Cancel the tasks; their trials go on from their last checkpoint when they are run again."""
        for handle in handles:
            self.ray.cancel(handle, force=True)


def cores() -> int:
    """Usable cores of this machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
