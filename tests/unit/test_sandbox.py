"""The sandbox holds against code that attacks it, behind each of its two file-system walls, and refuses without them."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from luthier.core.errors import UserError
from luthier.evaluation import sandbox
from luthier.evaluation.sandbox import Limits, Verdict, run_tests

FAST = Limits(cpu_seconds=1, wall_seconds=5.0)
RIGHT = "def double(x):\n    return 2 * x\n"
TEST = "assert double(3) == 6\n"


def _available(wall: sandbox.Wall) -> bool:
    try:
        return run_tests(RIGHT, TEST, wall=wall).passed
    except UserError:
        return False


@pytest.fixture(params=sandbox.WALLS, scope="module")
def wall(request: pytest.FixtureRequest) -> sandbox.Wall:
    if sys.platform != "linux" or not _available(request.param):
        pytest.skip(f"this system gives no '{request.param}' wall")
    return request.param


def denied(wall: sandbox.Wall, attempt: str, limits: Limits = FAST) -> None:
    """Assert that an attempt (statements) raises OSError inside, and that the run goes on after it."""
    body = "\n".join(f"    {line}" for line in attempt.strip().splitlines())
    code = f"import os, sys\ntry:\n{body}\nexcept OSError:\n    held = True\nelse:\n    held = False\n"
    verdict = run_tests(code, "assert held", limits, wall=wall)
    assert verdict.passed, verdict


def test_right_and_wrong_answers(wall: sandbox.Wall) -> None:
    assert run_tests(RIGHT, TEST, FAST, wall=wall) == Verdict(True, "passed", "")
    wrong = run_tests("def double(x):\n    return x\n", TEST, FAST, wall=wall)
    assert (wrong.passed, wrong.reason) == (False, "failed")
    assert "AssertionError" in wrong.output
    broken = run_tests("def double(x) return", TEST, FAST, wall=wall)
    assert not broken.passed
    assert "SyntaxError" in broken.output


def test_ordinary_code_works(wall: sandbox.Wall) -> None:
    code = """
from __future__ import annotations
import asyncio, collections, dataclasses, decimal, hashlib, heapq, itertools, json, pathlib, random, re, tempfile
import threading, typing, unittest, zoneinfo

@dataclasses.dataclass
class Point:
    x: int
    tags: list[str] = dataclasses.field(default_factory=list)

async def later():
    await asyncio.sleep(0.001)
    return Point(3)

def in_thread():
    found = []
    thread = threading.Thread(target=found.append, args=(7,))
    thread.start(); thread.join()
    return found

def in_file():
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "x.txt")
        path.write_text("written")
        return path.read_text()

if __name__ == "__main__":
    raise SystemExit
"""
    tests = """
assert asyncio.run(later()) == Point(3)
assert in_thread() == [7]
assert in_file() == "written"
assert hashlib.sha256(b"").hexdigest().startswith("e3b0")
assert hash("a") == hash("a") and str(decimal.Decimal(1) / 3).startswith("0.33")
"""
    verdict = run_tests(code, tests, FAST, wall=wall)
    assert verdict.passed, verdict


def test_the_same_code_gets_the_same_verdict(wall: sandbox.Wall) -> None:
    outputs = {run_tests("print(list({'a', 'b', 'c', 'd'}))", "assert 0", FAST, wall=wall).output for _ in range(3)}
    assert len(outputs) == 1


def test_no_network(wall: sandbox.Wall) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        server.settimeout(0)
        with socket.create_connection(("127.0.0.1", port)):  # the server does listen
            server.accept()
        denied(wall, f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)")
        with pytest.raises(BlockingIOError):
            server.accept()
    denied(wall, "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 53))")
    denied(wall, "import socket\nsocket.socket(socket.AF_UNIX).connect('/dev/log')")
    denied(wall, "import socket\nsocket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)")
    denied(wall, "import socket\nsocket.create_server(('127.0.0.1', 0))")
    denied(wall, "import socket\nsocket.create_connection(('localhost', 80), timeout=1)")


def test_no_new_process(wall: sandbox.Wall) -> None:
    for attempt in ("os.fork()", "os.system('true') and 0 or os.fork()", "os.execv(sys.executable, ['python'])"):
        denied(wall, attempt)
    denied(wall, "import subprocess\nsubprocess.run([sys.executable, '-V'])")
    denied(wall, "import subprocess\nsubprocess._USE_VFORK = False\nsubprocess.run([sys.executable, '-V'])")
    denied(wall, "os.posix_spawn(sys.executable, ['python'], {})")


def test_fork_bomb(wall: sandbox.Wall) -> None:
    before = time.monotonic()
    verdict = run_tests("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", TEST, FAST, wall=wall)
    assert (verdict.passed, verdict.reason) == (False, "cpu")
    assert time.monotonic() - before < 5


def test_thread_bomb(wall: sandbox.Wall) -> None:
    code = """
import threading, time
threading.stack_size(64 << 10)
while True:
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
"""
    verdict = run_tests(code, TEST, FAST, wall=wall)
    assert not verdict.passed
    assert verdict.reason == "threads" or "can't start new thread" in verdict.output


def test_infinite_loops(wall: sandbox.Wall) -> None:
    assert run_tests("while True: pass", TEST, FAST, wall=wall).reason == "cpu"
    stubborn = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert run_tests(stubborn, TEST, FAST, wall=wall).reason == "cpu"


def test_sleeping_ends_by_the_wall_clock(wall: sandbox.Wall) -> None:
    before = time.monotonic()
    verdict = run_tests("import time\ntime.sleep(60)", TEST, replace(FAST, wall_seconds=0.3), wall=wall)
    assert (verdict.passed, verdict.reason) == (False, "wall")
    silent = "import os, time\nos.closerange(0, 50)\ntime.sleep(60)"
    assert run_tests(silent, TEST, replace(FAST, wall_seconds=0.3), wall=wall).reason == "wall"
    assert time.monotonic() - before < 5


def test_memory(wall: sandbox.Wall) -> None:
    code = """
try:
    block = bytearray(10 << 30)
except MemoryError:
    block = None
small = bytearray(100 << 20)
"""
    assert run_tests(code, "assert block is None and len(small)", FAST, wall=wall).passed
    growing = "kept = []\nwhile True: kept.append(bytearray(1 << 20))"
    verdict = run_tests(growing, TEST, replace(FAST, memory_mb=256), wall=wall)
    assert "MemoryError" in verdict.output
    raised = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))"
    assert "ValueError" in run_tests(raised, TEST, FAST, wall=wall).output


def test_file_size_and_disk(wall: sandbox.Wall) -> None:
    limits = replace(FAST, file_mb=2, disk_mb=8)
    denied(wall, "open('big', 'wb', buffering=0).write(b'x' * (3 << 20)) == 2 << 20 and 0 or open('/nowhere')", limits)
    many = """
import time
for number in range(100):
    with open(str(number), "wb") as handle:
        handle.write(b"x" * (1 << 20))
time.sleep(1)
"""
    verdict = run_tests(many, TEST, limits, wall=wall)
    assert verdict.reason == "disk" or "No space left" in verdict.output, verdict


def test_huge_output(wall: sandbox.Wall) -> None:
    before = time.monotonic()
    verdict = run_tests("while True: print('x' * 10_000)", TEST, FAST, wall=wall)
    assert (verdict.passed, verdict.reason) == (False, "output")
    assert len(verdict.output) <= 2000
    assert time.monotonic() - before < 4


def test_nothing_is_inherited(wall: sandbox.Wall, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    monkeypatch.setenv("PYTHONSTARTUP", "/nowhere")
    (tmp_path / "secret").write_text("secret")
    descriptor = os.open(tmp_path / "secret", os.O_RDONLY)
    os.set_inheritable(descriptor, True)
    code = """
import os, sys
def opened():
    found = []
    for number in range(3, 256):
        try: os.fstat(number)
        except OSError: continue
        found.append(number)
    return found
"""
    tests = f"""
assert "SECRET_TOKEN" not in os.environ and "hunter2" not in str(os.environ) and "PYTHONSTARTUP" not in os.environ
assert len(opened()) == 1, opened()   # the pipe to which the verdict goes
try: os.read(opened()[0], 10)
except OSError: pass
else: assert 0
assert sys.stdin.read() == "" and os.read(0, 10) == b""
assert os.path.realpath(os.getcwd()) == os.path.realpath(os.environ["TMPDIR"])
assert {os.getcwd()!r} != os.getcwd() and os.listdir(".") == []
"""
    try:
        verdict = run_tests(code, tests, FAST, wall=wall)
    finally:
        os.close(descriptor)
    assert verdict.passed, verdict


def test_the_parent_is_out_of_reach(wall: sandbox.Wall) -> None:
    parent = os.getpid()
    for path in (f"/proc/{parent}/environ", f"/proc/{parent}/mem", "/proc/self/environ", f"/proc/{parent}/cmdline"):
        denied(wall, f"open({path!r}, 'rb').read()")
    denied(wall, "open(f'/proc/{os.getppid()}/environ', 'rb').read()")
    for attempt in ("os.kill(os.getppid(), 9)", "os.kill(-1, 9)", "os.kill(0, 9)", "os.kill(1, 0)", "os.setsid()"):
        denied(wall, attempt)
    denied(wall, f"import resource\nresource.prlimit({parent}, resource.RLIMIT_CPU, (1, 1))")


def test_files_outside_are_out_of_reach(wall: sandbox.Wall, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    secret.chmod(0o666)
    tmp_path.chmod(0o777)
    for attempt in (
        f"open({str(secret)!r}).read()",
        f"open({str(secret)!r}, 'w').write('gone')",
        f"os.truncate({str(secret)!r}, 0)",
        f"os.open({str(secret)!r}, os.O_RDONLY | os.O_TRUNC)",
        f"os.remove({str(secret)!r})",
        f"os.chmod({str(secret)!r}, 0)",
        f"os.utime({str(secret)!r}, (0, 0))",
        f"os.rename({str(secret)!r}, 'mine')",
        f"os.link({str(secret)!r}, 'mine')\nopen('mine').read()",
        f"os.symlink({str(secret)!r}, 'mine')\nopen('mine').read()",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"os.mkdir({str(tmp_path / 'new')!r})",
        f"open({__file__!r}).read()",
        "open('/etc/passwd').read()",
        "open(os.__file__, 'a')",
        "open('/dev/mem')",
        "os.mknod('device', 0o600 | 0o020000, os.makedev(1, 1))",
    ):
        denied(wall, attempt)
    assert secret.read_text() == "secret"
    assert secret.stat().st_mode & 0o777 == 0o666
    assert sorted(p.name for p in tmp_path.iterdir()) == ["secret.txt"]


FAKES = {
    "printing": "print('passed')\nraise SystemExit(0)",
    "exit": "import sys\nsys.exit(0)",
    "hard exit": "import os\nos._exit(0)",
    "exit in the call": "import os\ndef double(x):\n    os._exit(0)",
    "system exit in the call": "def double(x):\n    raise SystemExit(0)",
    "exit handlers": "import atexit, os\natexit.register(os._exit, 0)\ndef double(x):\n    raise KeyboardInterrupt",
    "assertions off": "import builtins\nbuiltins.AssertionError = type('Quiet', (Exception,), {})",
    "built-ins": "import builtins\nbuiltins.exec = lambda *a: None\nbuiltins.compile = lambda *a, **k: None",
    "write": "import os\nos.write = lambda *a: 0\nfor n in range(3, 20):\n    try: os.fdopen(n, 'wb').write(b'0' * 64)\n"
    "    except OSError: pass",
    "closed pipe": "import os\nos.closerange(3, 20)",
    "no test function": "class Missing: pass",
    "C library": "import ctypes",
    "collector": "import gc\nprint(len(gc.get_objects()))",
    "main module": "import __main__\n__main__.ctypes.CDLL(None)\n",
    "stack": """
import os, re, sys
def double(x):
    words, frame = set(), sys._getframe()
    while frame is not None:
        for space in (frame.f_locals, frame.f_globals):
            for name, value in list(space.items()):
                words.update(re.findall("[0-9a-f]{64}", repr(value)))
                words.update(re.findall("[0-9a-f]{64}", repr(getattr(value, "__dict__", ""))))
        frame = frame.f_back
    for number in range(3, 20):
        for word in words:
            try: os.write(number, word.encode())
            except OSError: pass
    os._exit(0)
""",
}


@pytest.mark.parametrize("name", FAKES)
def test_a_pass_cannot_be_faked(wall: sandbox.Wall, name: str) -> None:
    verdict = run_tests(FAKES[name], "assert double(3) == 6", FAST, wall=wall)
    assert not verdict.passed, (name, verdict)


def test_built_ins_are_put_back_before_the_tests(wall: sandbox.Wall) -> None:
    code = "import builtins\nbuiltins.all = lambda items: True\n"
    assert not run_tests(code, "assert all([1, 0])", FAST, wall=wall).passed


def test_nothing_is_left_behind(wall: sandbox.Wall, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    deep = "import os\nfor _ in range(1500):\n    os.mkdir('d')\n    os.chdir('d')\n"
    assert run_tests(deep, "pass", FAST, wall=wall).passed
    lingering = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n" + RIGHT
    assert run_tests(lingering, TEST, FAST, wall=wall).passed
    assert list(tmp_path.iterdir()) == []


def test_a_killed_parent_takes_the_sandbox_with_it(wall: sandbox.Wall, tmp_path: Path) -> None:
    program = (
        "from luthier.evaluation.sandbox import *\n"
        f"run_tests('import time\\ntime.sleep(60)', 'pass', Limits(wall_seconds=60.0), wall={wall!r})"
    )
    surroundings = {**os.environ, "PYTHONPATH": str(Path(sandbox.__file__).parents[2]), "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", program], env=surroundings)
    child = ""
    while parent.poll() is None and not child:
        child = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().strip()
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert child
    assert not Path(f"/proc/{child}").exists()


@pytest.mark.parametrize(
    ("taken_out", "named"),
    [
        ('"socket": (41, 198), ', "the network could still be reached"),
        ('"fork": (57, None), ', "new processes"),
        ('("AS", settings["memory_bytes"], settings["memory_bytes"]),', "RLIMIT_AS does not hold"),
        ('_syscall("landlock", _LANDLOCK_RESTRICT, ruleset, 0)', "could still be reached"),
    ],
)
def test_an_open_wall_is_found_and_nothing_runs(
    taken_out: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one wall taken out of a copy of the child, its own attempts find the gap and the code is never sent."""
    if not _available("landlock"):
        pytest.skip("this system gives no 'landlock' wall")
    source = sandbox._CHILD.read_text()
    assert source.count(taken_out) == 1, "the line this test takes out is no longer there"
    if "fork" in taken_out:
        source = source.replace("(mask, 1, 0, 0x10000)", "(mask, 1, 0, 0)").replace(
            "(ret, 0, 0, error(errno.EAGAIN)), (ret, 0, 0, allow)", "(ret, 0, 0, allow), (ret, 0, 0, allow)"
        )
    weak = tmp_path / "child.py"
    weak.write_text(source.replace(taken_out, ""))
    monkeypatch.setattr(sandbox, "_CHILD", weak)
    with pytest.raises(UserError, match=re.escape(named)):
        run_tests("print('run')", "pass", FAST, wall="landlock")


def test_refusal_says_why_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Verdict:
        raise sandbox._Refused("unshare: Operation not permitted")

    sandbox._working_wall.cache_clear()
    monkeypatch.setattr(sandbox, "_in_sandbox", refuse)
    try:
        with pytest.raises(UserError, match=r"namespaces: unshare.*landlock: unshare.*choose another verifier"):
            sandbox.run_many([("raise SystemExit", "pass")])
    finally:
        sandbox._working_wall.cache_clear()


def test_many_keep_their_order() -> None:
    if sys.platform != "linux":
        pytest.skip("no sandbox on this system")
    verdicts = sandbox.run_many([(f"x = {n}", "assert x % 2 == 0") for n in range(6)], FAST, workers=2)
    assert [v.passed for v in verdicts] == [True, False] * 3
