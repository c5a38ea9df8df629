"""Run code written by a model: in a process of its own that can reach nothing, within limits, or not at all.

The process (:mod:`luthier.evaluation.sandbox_child`) closes its walls itself, tries to get through each of them, and
says so; the code is sent only then. It has no network, no environment and no open file of ours, sees the Python library
and a temporary folder and no other file, cannot make processes, signal or trace others, and is bounded in CPU time,
memory, file sizes, disk, threads, output and wall time; it is killed as a process group.

Passing cannot be faked by printing or by ending early: after the last test the process writes a random nonce that was
sent together with the code, and only that counts. The tests run in the interpreter of the code they test, though, so an
answer whose objects claim to equal anything still passes a test that compares with ``==``.

Linux on x86-64 or ARM64 only, with user namespaces (or root) and Linux 5.12, or with Landlock and Linux 6.2. Elsewhere
:func:`check` and :func:`run_tests` raise :class:`~luthier.core.errors.UserError` and nothing runs.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Literal

from luthier.core.errors import UserError

Reason = Literal["passed", "failed", "cpu", "wall", "output", "disk", "threads", "killed"]
Wall = Literal["namespaces", "landlock"]
WALLS: tuple[Wall, ...] = ("namespaces", "landlock")
_CHILD = Path(__file__).with_name("sandbox_child.py")
_TICK = 0.02
_MESSAGE = 2000


@dataclass(frozen=True)
class Limits:
    """What a run may use.

    Attributes:
        cpu_seconds: CPU time of all threads.
        wall_seconds: time from the sending of the code.
        memory_mb: address space, MiB.
        file_mb: largest file, MiB.
        disk_mb: all files together, MiB.
        output_kb: what it may print, KiB.
        threads: threads at a time; further processes are never possible.
        open_files: open file descriptors.
        site_packages: also make the installed packages readable (numpy, ...), not only the standard library.
    """

    cpu_seconds: int = 5
    wall_seconds: float = 10.0
    memory_mb: int = 1024
    file_mb: int = 16
    disk_mb: int = 64
    output_kb: int = 1024
    threads: int = 32
    open_files: int = 64
    site_packages: bool = False


@dataclass(frozen=True)
class Verdict:
    """How a run ended.

    Attributes:
        passed: the tests ran to their end.
        reason: ``passed``, ``failed`` (an exception, or it ended by itself), the limit that ended it, or ``killed`` (by
            another signal).
        output: the end of what it printed, at most 2,000 characters.
    """

    passed: bool
    reason: Reason
    output: str


class _Refused(Exception):
    """The child could not close its walls."""


def _readable(limits: Limits) -> list[str]:
    """Folders and device files the interpreter needs; none lies inside another."""
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    folders = [sysconfig.get_path(name, vars=base) for name in ("stdlib", "platstdlib")]
    folders.append(sysconfig.get_config_var("LIBDIR"))
    if limits.site_packages:
        folders += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    folders += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/localtime"]
    folders += ["/dev/null", "/dev/zero", "/dev/urandom"]
    there = sorted({str(folder) for folder in folders if folder and os.path.exists(folder)})
    return [f for f in there if not any(f != other and Path(f).is_relative_to(other) for other in there)]


def _used(folder: str, most: int) -> int:
    """Bytes below a folder; stops counting above ``most``, and counts 4 KiB for each entry."""
    total, waiting = 0, [folder]
    while waiting and total <= most:
        with suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                with suppress(OSError):
                    total += 4096 + entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                if total > most:
                    break
    return total


def _threads(process: int) -> int:
    with suppress(OSError):
        return len(os.listdir(f"/proc/{process}/task"))
    return 0


class _Run:
    """One sandboxed process, from its start to its end."""

    def __init__(self, wall: Wall, limits: Limits, base: str) -> None:
        self.wall, self.limits = wall, limits
        self.work = os.path.join(base, "work")
        os.mkdir(self.work, 0o700)
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        self.verdict_pipe: IO[bytes] = os.fdopen(reader, "rb", buffering=0)
        self.verdict, self.output, self.printed = b"", b"", 0
        home = "/sandbox" if wall == "namespaces" else self.work
        # Isolated like ``python -I``, but with a fixed hash seed: the same code must get the same verdict.
        flags = ["-P", "-s", "-B"] if limits.site_packages else ["-P", "-s", "-B", "-S"]
        environment = {"HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        try:
            self.process = subprocess.Popen(
                [sys.executable, *flags, str(_CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment | single,
                cwd=self.work,
                pass_fds=(writer,),
                start_new_session=True,
            )
        except BaseException:
            self.verdict_pipe.close()
            raise
        finally:
            os.close(writer)
        settings = {
            "wall": wall,
            "verdict": writer,
            "root": self.work,
            "home": home,
            "work": self.work,
            "outside": base,
            "library": os.path.dirname(os.__file__),
            "readable": _readable(limits),
            "cpu_seconds": limits.cpu_seconds,
            "memory_bytes": limits.memory_mb << 20,
            "file_bytes": limits.file_mb << 20,
            "disk_bytes": limits.disk_mb << 20,
            "threads": limits.threads,
            "open_files": limits.open_files,
        }
        self._send(json.dumps(settings).encode() + b"\n")

    def _send(self, data: bytes) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the child has ended; its verdict says why
            self.process.stdin.write(data)
            self.process.stdin.flush()

    def end(self) -> None:
        """Kill the group and free what belongs to it."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.verdict_pipe):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()

    def _take(self, deadline: float, done: bytes) -> Reason | None:
        """Read both pipes until ``done`` stands in the verdict (None), the process ends, or a limit is passed."""
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        most = self.limits.output_kb << 10
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            selector.register(self.verdict_pipe, selectors.EVENT_READ)
            # A process that has closed both pipes may still run on, so its end is waited for as well.
            while selector.get_map() or self.process.poll() is None:
                for key, _ in selector.select(_TICK):
                    part = os.read(key.fd, 1 << 16)
                    if not part:
                        selector.unregister(key.fileobj)
                    elif key.fileobj is self.verdict_pipe:
                        self.verdict = (self.verdict + part)[-4096:]
                    else:
                        self.printed += len(part)
                        self.output = (self.output + part)[-4 * _MESSAGE :]
                if self.verdict.endswith(done):
                    return None
                if self.printed > most:
                    return "output"
                if time.monotonic() > deadline:
                    return "wall"
                if self.wall == "landlock":  # where no kernel limit counts these
                    if _threads(self.process.pid) > self.limits.threads:
                        return "threads"
                    if _used(self.work, self.limits.disk_mb << 20) > self.limits.disk_mb << 20:
                        return "disk"
        return "failed"

    def ready(self) -> None:
        """Wait until the walls stand.

        Raises:
            _Refused: they cannot be closed here.
        """
        if self._take(time.monotonic() + 30.0, b"\n") is not None or self.verdict != b"ready\n":
            said = (self.verdict or self.output).decode(errors="replace").strip()
            raise _Refused(said.removeprefix("refused: ") or "the process ended without a word")

    def judge(self, code: str, tests: str) -> Verdict:
        """Send the code and wait for the end."""
        nonce = secrets.token_hex(32)
        self._send(json.dumps({"code": code, "tests": tests, "nonce": nonce}).encode())
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.verdict = b""
        reason = self._take(time.monotonic() + self.limits.wall_seconds, nonce.encode())
        passed = reason is None and self.verdict == nonce.encode()
        if reason == "failed":
            status = self.process.wait()
            if status in (-signal.SIGXCPU, -signal.SIGKILL):
                reason = "cpu"
            elif status < 0:
                reason = "killed"
        text = self.output.decode(errors="replace")[-_MESSAGE:]
        return Verdict(passed, "passed" if passed else reason or "failed", text)


def _in_sandbox(wall: Wall, code: str, tests: str, limits: Limits) -> Verdict:
    base = tempfile.mkdtemp(prefix="luthier-sandbox-")
    try:
        run = _Run(wall, limits, base)
        try:
            run.ready()
            return run.judge(code, tests)
        finally:
            run.end()
    finally:
        _remove(base)


def _remove(folder: str) -> None:
    """Remove a folder however deep its sub-folders go (``shutil.rmtree`` recurses)."""
    remove = shutil.which("rm")
    if remove is None:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        subprocess.run([remove, "-rf", "--", folder], check=False, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


_CONNECT = """
import socket
try:
    socket.create_connection(("127.0.0.1", {port}), timeout=2).sendall(b"x")
except OSError:
    pass
else:
    raise SystemExit
"""


@cache
def _working_wall() -> Wall | str:
    """The first wall that stands here, or the reasons why none does."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return f"{platform.system()} on {platform.machine()} has no sandbox"
    reasons = []
    for wall in WALLS:
        try:
            # A server that listens tells what a failed call cannot: that nothing has arrived.
            with socket.create_server(("127.0.0.1", 0)) as server:
                server.settimeout(0)
                code = _CONNECT.format(port=server.getsockname()[1])
                verdict = _in_sandbox(wall, code, "pass", Limits())
                with suppress(BlockingIOError):
                    server.accept()
                    raise _Refused("a connection came through")
            if not verdict.passed:
                raise _Refused(f"the trial run ended with '{verdict.reason}': {verdict.output.strip()[-200:]}")
            return wall
        except _Refused as refusal:
            reasons.append(f"{wall}: {refusal}")
    return "; ".join(reasons)


def check() -> Wall:
    """Make sure that code can be run in isolation here.

    Returns:
        Which of :data:`WALLS` closes the file system.

    Raises:
        UserError: it cannot; nothing of the code under test has run.
    """
    found = _working_wall()
    for wall in WALLS:
        if found == wall:
            return wall
    raise UserError(
        f"running Python tests needs a sandbox, and none can be made here ({found}). Model-written code is not run "
        "without one. Use Linux with unprivileged user namespaces, or Linux 6.2 or newer with Landlock (a container's "
        "system-call filter must allow one of them), or choose another verifier."
    )


def run_tests(code: str, tests: str, limits: Limits | None = None, *, wall: Wall | None = None) -> Verdict:
    """Run ``code`` and then ``tests`` (assertions over its names) in the sandbox.

    Args:
        code: Python source, run as the module ``solution``.
        tests: Python source run in the same namespace afterwards.
        limits: what it may use.
        wall: force one of :data:`WALLS`; by default the one that :func:`check` finds.

    Raises:
        UserError: no isolation here; nothing has run.
    """
    chosen = wall or check()
    try:
        return _in_sandbox(chosen, code, tests, limits or Limits())
    except _Refused as refusal:
        raise UserError(f"the sandbox could not be closed ({refusal}); nothing has run.") from refusal


def run_many(
    programs: list[tuple[str, str]], limits: Limits | None = None, *, workers: int | None = None
) -> list[Verdict]:
    """:func:`run_tests` over ``(code, tests)`` pairs, some at a time (by default one for each core, at most 8)."""
    check()
    count = workers or min(8, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(max_workers=count) as pool:
        return list(pool.map(lambda program: run_tests(program[0], program[1], limits), programs))
