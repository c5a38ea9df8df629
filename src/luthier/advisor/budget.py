"""A time budget as people write it: ``90s``, ``20m``, ``2h``, ``1h30m``."""

from __future__ import annotations

import re

from luthier.core.errors import UserError

_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}


def seconds_of(text: str | float) -> float:
    """The seconds of a budget; from Python a plain number is seconds.

    Raises:
        UserError: no such budget, or nothing in it.
    """
    if isinstance(text, int | float) and not isinstance(text, bool):
        found = float(text)
    else:
        match = re.fullmatch(
            r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", str(text).strip().lower()
        )
        if match is None or not any(match.groups()):
            raise UserError(f"the budget {text!r} is not a time. Write 90s, 20m, 2h or 1h30m.")
        found = sum(float(n) * size for n, size in zip(match.groups(), _UNITS.values(), strict=True) if n)
    if not 0 < found < float("inf"):
        raise UserError(f"the budget must be longer than nothing, not {text!r}. Write 90s, 20m, 2h or 1h30m.")
    return found
