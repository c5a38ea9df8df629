"""Every combination of some values of a recipe, as overrides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import PurePath
from typing import Any


def grid(output: str, values: Mapping[str, Sequence[Any]]) -> Iterator[list[str]]:
    """Overrides for one run after the other, each with an output folder of its own that tells its values.

    Args:
        output: the folder around the runs.
        values: key of the recipe, such as ``objective.learning-from-undesirable.alpha``, to the values it takes; the
            last key changes fastest.

    Yields:
        For each combination a list for ``luthier.tune(recipe, overrides=...)`` or the command line.

    Raises:
        ValueError: a key without values.
    """
    for key, given in values.items():
        if not given:
            raise ValueError(f"no values for {key}")
    for chosen in product(*values.values()):
        pairs = list(zip(values, chosen, strict=True))
        name = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in pairs)
        yield [*(f"{key}={value}" for key, value in pairs), f"output={PurePath(output, name)}"]
