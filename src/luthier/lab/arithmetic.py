"""Arithmetic: sums, differences, products, and chains of them with the steps written out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from luthier.lab import Row, Task
from luthier.lab.drawing import draw, in_split, pick, pick_levels

SKILLS = ("add", "subtract", "multiply", "chain")
_WORDINGS = {
    "add": ("{a}+{b}=", "add {a} and {b}\n", "what is {a} plus {b}?\n", "sum of {a} and {b}\n"),
    "subtract": ("{a}-{b}=", "subtract {b} from {a}\n", "what is {a} minus {b}?\n", "take {b} away from {a}\n"),
    "multiply": ("{a}*{b}=", "multiply {a} by {b}\n", "what is {a} times {b}?\n", "product of {a} and {b}\n"),
}
# Largest first and second operand by difficulty, and the smallest of both.
_SIZES: dict[str, dict[int, tuple[int, int, int]]] = {
    "add": {1: (9, 9, 0), 2: (99, 99, 10), 3: (999, 999, 100)},
    "multiply": {1: (9, 9, 1), 2: (9, 99, 2), 3: (99, 99, 10)},
    "chain": {1: (9, 9, 1), 2: (50, 20, 1), 3: (99, 99, 1)},
}
_SIZES["subtract"] = _SIZES["add"]
# A minus after a digit is a difference, not a sign.
_NUMBER = re.compile(r"(?<!\d)-?\d+")


def _simple(n: int, skill: str, level: int, split: str, rng: np.random.Generator) -> list[Row]:
    high_a, high_b, low = _SIZES[skill][level]
    a, b = rng.integers(low, high_a + 1, n), rng.integers(low, high_b + 1, n)
    large, small = np.maximum(a, b), np.minimum(a, b)
    if skill == "subtract":
        a, b = large, small
    # 3+8 and 8+3 ask the same, so the split is by the unordered pair.
    kept = in_split(split, SKILLS.index(skill), large, small)
    answers = {"add": a + b, "subtract": a - b, "multiply": a * b}[skill]
    wordings = _WORDINGS[skill]
    choice = rng.integers(0, len(wordings), n)
    rows = []
    for x, y, answer, w in zip(
        a[kept].tolist(), b[kept].tolist(), answers[kept].tolist(), choice[kept].tolist(), strict=True
    ):
        rows.append(_row(wordings[w].format(a=x, b=y), str(answer), str(answer), skill, level))
    return rows


def _chain(n: int, level: int, split: str, rng: np.random.Generator, steps_shown: bool) -> list[Row]:
    """Chains of ``level`` + 1 sums and differences; every intermediate result is at least 0."""
    steps = level + 1
    high_a, high_b, low = _SIZES["chain"][level]
    start = rng.integers(low, high_a + 1, n)
    operands = rng.integers(low, high_b + 1, (n, steps))
    minus = rng.integers(0, 2, (n, steps)).astype(bool)
    values = np.empty((n, steps + 1), dtype=np.int64)
    values[:, 0] = start
    for i in range(steps):
        minus[:, i] &= values[:, i] >= operands[:, i]
        values[:, i + 1] = values[:, i] + np.where(minus[:, i], -operands[:, i], operands[:, i])
    kept = np.flatnonzero(in_split(split, 3, start, *(operands * (1 - 2 * minus)).T))
    spoken = rng.integers(0, 3, n)
    rows = []
    for i in kept.tolist():
        v, o, m = values[i].tolist(), operands[i].tolist(), minus[i].tolist()
        if spoken[i] == 0:
            prompt = f"{v[0]}" + "".join(f"{'-' if s else '+'}{x}" for x, s in zip(o, m, strict=True)) + "\n"
        elif spoken[i] == 1:
            told = "".join(f" then {'minus' if s else 'plus'} {x}" for x, s in zip(o, m, strict=True))
            prompt = f"start at {v[0]}{told}\n"
        else:
            told = "".join(f", {'take away' if s else 'add'} {x}" for x, s in zip(o, m, strict=True))
            prompt = f"{v[0]}{told}\n"
        shown = "".join(f"{v[k]}{'-' if m[k] else '+'}{o[k]}={v[k + 1]}\n" for k in range(steps)) if steps_shown else ""
        rows.append(_row(prompt, f"{shown}#### {v[-1]}", str(v[-1]), "chain", level))
    return rows


def _row(prompt: str, completion: str, answer: str, skill: str, level: int) -> Row:
    return {
        "prompt": prompt, "completion": completion, "answer": answer, "task": "arithmetic", "skill": skill,
        "difficulty": level, "verifier": "numeric",
    }  # fmt: skip


def make(
    n: int,
    split: str,
    rng: np.random.Generator,
    *,
    skill: str = "all",
    difficulty: str | int = "all",
    steps: bool = True,
) -> list[Row]:
    """Arithmetic rows.

    Args:
        n: how many rows.
        split: ``train`` or ``test``; no pair of operands (or chain) occurs in both.
        rng: where the numbers come from.
        skill: ``all``, or some of add, subtract, multiply, chain, joined by commas.
        difficulty: ``all``, or some of 1 (operands of one digit), 2 (two digits; a product's first factor has one), 3
            (three digits; products have two), joined by commas. Chains have one step more than their difficulty, and
            operands to 9, 20 and 99.
        steps: whether a chain's completion shows each step before ``#### answer``.
    """
    skills, levels = pick(skill, SKILLS, "skill"), pick_levels(difficulty)

    def proposer(name: str, level: int) -> Callable[[int], list[Row]]:
        if name == "chain":
            return lambda count: _chain(count, level, split, rng, steps)
        return lambda count: _simple(count, name, level, split, rng)

    return draw(n, rng, [proposer(name, level) for name in skills for level in levels])


def verify(row: Mapping[str, Any], completion: str) -> bool:
    """Whether the number after ``####``, or else the last number, is the answer."""
    found = _NUMBER.findall(completion.rpartition("####")[2])
    return bool(found) and int(found[-1]) == int(row["answer"])


task = Task("arithmetic", make, verify, SKILLS)
