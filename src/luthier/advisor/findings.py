"""What was measured, as sentences with their numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from luthier.functional.statistics import Estimate


@dataclass(frozen=True)
class Finding:
    """One measurement.

    Attributes:
        name: what rules call it.
        value: the number; None where it could not be measured, and then the sentence says why.
        n: how many observations it is made of.
        low, high: its confidence interval; equal to the value where everything was counted, None where unknown.
        unit: ``share``, ``nats``, ``rows``, ``tokens`` and the like.
        sentence: the measurement in words.
        follows: what follows from it.
    """

    name: str
    value: float | None
    n: int
    low: float | None
    high: float | None
    unit: str
    sentence: str
    follows: str = ""


def estimated(name: str, found: Estimate, unit: str, sentence: str, follows: str = "") -> Finding:
    """A finding from a sample."""
    ends = [None if end != end else float(end) for end in (found.low, found.high)]
    return Finding(name, float(found.value), found.n, ends[0], ends[1], unit, sentence, follows)


def counted(name: str, value: float, n: int, unit: str, sentence: str, follows: str = "") -> Finding:
    """A finding over everything there is: no sampling error."""
    return Finding(name, float(value), n, float(value), float(value), unit, sentence, follows)


def unmeasured(name: str, why: str) -> Finding:
    """A finding that could not be made."""
    return Finding(name, None, 0, None, None, "", f"not measured: {why}")


class Findings:
    """Findings by name, with the two questions that rules ask. What was not measured answers no to both."""

    def __init__(self, findings: Iterable[Finding]) -> None:
        self._by_name = {f.name: f for f in findings}

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._by_name.values())

    def __getitem__(self, name: str) -> Finding:
        return self._by_name[name]

    def above(self, name: str, limit: float, *, surely: bool = False) -> bool:
        """Whether the value is at least ``limit``; ``surely``: its whole interval."""
        end = self._end(name, "low" if surely else "value")
        return end is not None and end >= limit

    def below(self, name: str, limit: float, *, surely: bool = False) -> bool:
        """Whether the value is at most ``limit``; ``surely``: its whole interval."""
        end = self._end(name, "high" if surely else "value")
        return end is not None and end <= limit

    def _end(self, name: str, key: str) -> float | None:
        found = self._by_name.get(name)
        return None if found is None else getattr(found, key)

    def to_list(self) -> list[dict[str, Any]]:
        """JSON values."""
        return [asdict(f) for f in self]

    @classmethod
    def from_list(cls, values: Iterable[dict[str, Any]]) -> Findings:
        """The inverse of :meth:`to_list`."""
        return cls(Finding(**value) for value in values)
