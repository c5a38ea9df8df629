"""The command line as a program: exit status, one line of error, speed of --help, clean stdout."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

from luthier.cli import main as cli
from luthier.core.errors import LuthierError

COMMANDS = (
    *("quickstart", "init", "check", "show-data", "train", "evaluate", "generate", "methods", "doctor", "migrate"),
)


def run(*arguments, code="", **options):
    command = [
        sys.executable,
        "-c",
        f"import sys\nfrom luthier.cli.main import run\n{code}\nsys.exit(run(sys.argv[1:]))",
    ]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=60, **options)


def test_help_is_fast_and_imports_nothing_heavy():
    seconds = []
    for _ in range(5):
        # Processor time: what else the machine does is not in it.
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-m", "luthier.cli.main", "--help"], capture_output=True, text=True)
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(end.ru_utime - start.ru_utime + end.ru_stime - start.ru_stime)
    assert done.returncode == 0
    for name in COMMANDS:
        assert name in done.stdout
    assert min(seconds) < 0.5
    code = "import atexit\natexit.register(lambda: print([m for m in ('torch', 'pydantic', 'pyarrow') if m in sys.modules]))"
    assert run("--help", code=code).stdout.rstrip().endswith("[]")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name, capsys):
    assert cli.run([name, "--help"]) == 0
    assert f"luthier {name}" in capsys.readouterr().out


def test_no_arguments_show_the_help(capsys):
    assert cli.run([]) == 0
    assert "Commands" in capsys.readouterr().out


def test_version(capsys):
    from luthier import __version__

    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["No such command 'trian'", "train"]),
        (["train"], ["Missing argument", "luthier train --help"]),
        (["train", "x.yaml", "--resum"], ["--resum", "--resume"]),
        (["train", "no.yaml"], ["there is no recipe 'no.yaml'", "luthier init"]),
        (["generate", "m", "p", "--max-new-tokens", "0"], ["--max-new-tokens", "greater than or equal to 1"]),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(arguments, words, capsys):
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    for word in words:
        assert word in err


def test_a_wrong_recipe_fails_before_torch(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("luthier: 1\nmodel: lab:nano\ndata: {train: lab:text}\ntraining:\n  epoch: 2\n  log_steps: 0\n")
    code = "import atexit\natexit.register(lambda: print('torch' in sys.modules))"
    done = run("train", recipe, code=code)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines[0].startswith(f"error: {recipe}:5: training.epoch: unknown key. Did you mean 'epochs'?")
    assert lines[1] == f"error: {recipe}:6: training.log_steps: must be at least 1, not 0"
    assert len(lines) == 2
    assert done.stdout == "False\n"
    done = run("train", recipe, "training={epochs: 2}", "objective.sft.x=1", code=code)
    assert done.stderr.startswith("error: command line, 'objective.sft.x=1': objective.sft.x: unknown key")
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (LuthierError("the disk is full"), 1, "error: the disk is full"),
        (ValueError("two\nlines"), 1, "error: ValueError: two lines (add --debug for the traceback)"),
        (KeyboardInterrupt(), 130, "interrupted: stopped"),
    ],
)
def test_failures(monkeypatch, capsys, error, status, words):
    def failing():
        raise error

    monkeypatch.setattr("luthier.cli.doctor.examine", failing)
    assert cli.run(["doctor"]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert words in err


def test_debug_shows_the_traceback_wherever_it_stands(monkeypatch):
    monkeypatch.setattr("luthier.cli.doctor.examine", lambda: 1 / 0)
    for arguments in (["--debug", "doctor"], ["doctor", "--debug"]):
        with pytest.raises(ZeroDivisionError):
            cli.run(arguments)


def test_a_closed_pipe_is_not_an_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "luthier.cli.main", "methods"], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
