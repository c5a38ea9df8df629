"""Errors that say what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LuthierError(Exception):
    """Something failed while running; the command line exits with status 1."""

    exit_status = 1


class UserError(LuthierError):
    """The user's input is wrong: one line with place, cause and way out; exit status 2.

    Args:
        message: what is wrong and what to do.
        where: the place, for example ``recipe.yaml:12`` or ``train.jsonl, row 7``.
    """

    exit_status = 2

    def __init__(self, message: str, *, where: str | None = None) -> None:
        self.message, self.where = message, where
        super().__init__(f"{where}: {message}" if where else message)


def did_you_mean(word: str, accepted: Iterable[str]) -> str:
    """A sentence for error texts: the nearest accepted word, or an empty string."""
    close = difflib.get_close_matches(str(word), [str(a) for a in accepted], n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def missing_extra(package: str, purpose: str, install: str) -> UserError:
    """The error for an optional dependency that is not installed.

    Args:
        package: what is missing.
        purpose: what it is needed for.
        install: the argument of ``pip install`` that brings it.
    """
    return UserError(f"{purpose} needs the package '{package}'. Install it with: pip install '{install}'")
