"""The entry point ``luthier``: registers the commands and turns errors into one line and an exit status.

Exit status: 0 done, 1 failed, 2 the user's input, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

import typer

from luthier.cli import (
    advise,
    check,
    compare,
    doctor,
    evaluate,
    generate,
    init,
    merge,
    methods,
    migrate,
    quickstart,
    show_data,
    train,
)
from luthier.cli.common import first_process, say
from luthier.core.errors import LuthierError

# What shells report for a program ended by Ctrl-C; typer turns the interrupt into this status.
INTERRUPTED = 130

app = typer.Typer(
    name="luthier",
    help="Fine-tune pretrained models, compose methods, and see which one helps.",
    epilog="Start with: luthier quickstart. Exit status: 0 done, 1 failed, 2 the input is wrong.",
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("quickstart")(quickstart.quickstart)
app.command("init")(init.init)
app.command("check")(check.check)
app.command("show-data")(show_data.show_data)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("compare")(compare.compare)
app.command("advise")(advise.advise)
app.command("merge")(merge.merge)
app.command("methods")(methods.methods)
app.command("doctor")(doctor.doctor)
app.command("migrate")(migrate.migrate)


def _version(wanted: bool) -> None:
    if wanted:
        from luthier import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", help="Show the version.", callback=_version, is_eager=True),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error (anywhere on the line)."),
) -> None:
    pass


def run(arguments: Sequence[str]) -> int:
    """Run one command line and give its exit status; errors go to stderr, one line each."""
    arguments = list(arguments) or ["--help"]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:end]
    arguments = [a for i, a in enumerate(arguments) if a != "--debug" or i > end]
    try:
        status = typer.main.get_command(app).main(args=arguments, prog_name="luthier", standalone_mode=False)
        sys.stdout.flush()
        return _interrupted(arguments) if status == INTERRUPTED else status if isinstance(status, int) else 0
    except LuthierError as error:
        if debug:
            raise
        for line in getattr(error, "problems", [str(error)]):
            say("error", line)
        return error.exit_status
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted(arguments)
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has enough: not an error. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        if hasattr(error, "format_message"):
            return _usage(error)
        say("error", f"{type(error).__name__}: {error} (add --debug for the traceback)")
        return 1


def _interrupted(arguments: Sequence[str]) -> int:
    training = "train" in arguments[:1]
    if first_process():
        say("interrupted", "the same command with --resume goes on from the last checkpoint" if training else "stopped")
    return INTERRUPTED


def _usage(error: Exception) -> int:
    """A wrong option or argument, as typer reports it."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "luthier"
    message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
    say("error", f"{message}{'' if message.endswith('?') else '.'} See: {command} --help")
    return getattr(error, "exit_code", 2)


def main() -> None:
    """The console script."""
    # A scheduler's SIGTERM ends a command as Ctrl-C does: with a word, and with half-written folders removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
