"""Execution feedback as text, and sequences that put it before the program it is about.

    s = R + F + x + y
    R = "<|good|>" or "<|bad|>"        F = "" or "<|lang_feedback|>" + feedback + "<|/lang_feedback|>"

Feedback of an exception is its trace, reduced to frames of the program and of its tests, outermost first, each with its
source line, and then type and message; of a program that ran out of time, the reason alone.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

GOOD, BAD, OPEN, CLOSE = "<|good|>", "<|bad|>", "<|lang_feedback|>", "<|/lang_feedback|>"
TOKENS = (GOOD, BAD, OPEN, CLOSE)
Position = Literal["before", "after"]
HIDDEN = "the tests fail here"
TIMES = {"cpu": "timeout", "wall": "process timeout"}

# What starts a new block at the left margin: a completion of a function ends before it.
_NEW_BLOCK = re.compile(r"^(class\b|assert\b|print\b|if\b|\"\"\"|'''|<\|)")
_FRAME = re.compile(r'^  File "<(solution|tests)>", line (\d+)(?:, in (.+))?$')


@dataclass(frozen=True)
class Outcome:
    """What became of one program.

    Attributes:
        ok: it passed.
        feedback: text about what went wrong; None where there is none.
        reason: in a word or two.
    """

    ok: bool
    feedback: str | None
    reason: str


def cut(completion: str) -> str:
    """The completion up to the first line that starts another top-level block, without white space at its end.

    The first line is never cut, since a completion may begin in the middle of one.
    """
    lines = completion.split("\n")
    end = next((i for i, line in enumerate(lines) if i and _NEW_BLOCK.match(line)), len(lines))
    return "\n".join(lines[:end]).rstrip()


def outcome(verdict: dict[str, Any], program: str, tests: str, *, hide_tests: bool, most: int) -> Outcome:
    """The outcome of a run in the sandbox.

    Args:
        verdict: ``{passed, reason, output}``; ``output`` ends with the trace.
        program: source that ran as ``<solution>``.
        tests: source that ran as ``<tests>``.
        hide_tests: a fixed remark stands for lines of the tests.
        most: longest feedback, in characters; its end is kept.
    """
    if verdict["passed"]:
        return Outcome(True, None, "passed")
    reason = str(verdict["reason"])
    if reason != "failed":
        told = TIMES.get(reason, reason)
        return Outcome(False, told, told)
    text = trace(str(verdict["output"]), program, tests, hide_tests=hide_tests)
    name = text.rsplit("\n", 1)[-1].split(":", 1)[0] if text else "failed"
    return Outcome(False, text[-most:] or None, name)


def trace(output: str, program: str, tests: str, *, hide_tests: bool) -> str:
    """The last trace in what a program printed, in frames of program and tests; empty where there is none."""
    lines = output.splitlines()
    start = max((i for i, line in enumerate(lines) if line.startswith("Traceback ")), default=-1)
    if start < 0:
        return ""
    sources = {"solution": program.splitlines(), "tests": tests.splitlines()}
    shown: list[str] = []
    last = start
    for i, line in enumerate(lines[start:], start):
        if line.startswith("  "):
            last = i
        if match := _FRAME.match(line):
            place, number, where = match[1], int(match[2]), match[3]
            if place == "tests" and hide_tests:
                shown.append(HIDDEN)
                continue
            source = sources[place]
            told = "program" if place == "solution" else "tests"
            shown.append(f"{told}, line {number}" + (f", in {where}" if where and where != "<module>" else ""))
            if 0 < number <= len(source):
                shown.append(f"    {source[number - 1].strip()}")
    return "\n".join([*shown, *lines[last + 1 :]]).rstrip()


def neutral(text: str) -> str:
    """The text without special tokens of ours, which it could be mistaken for."""
    for token in TOKENS:
        text = text.replace(token, token.replace("<|", "< |"))
    return text


def sequence(
    prompt: str, program: str, found: Outcome, *, textual: bool, position: Position = "before"
) -> tuple[str, str, str]:
    """(what stands before prompt and program, both of them, what stands after) of a training sequence."""
    reward = GOOD if found.ok else BAD
    feedback = f"{OPEN}{neutral(found.feedback)}{CLOSE}" if textual and found.feedback and not found.ok else ""
    body = neutral(prompt) + neutral(program)
    return (reward + feedback, body, "") if position == "before" else (reward, body, feedback)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate that one of k programs is right when c of n are: 1 - C(n - c, k) / C(n, k)."""
    return 1.0 if n - c < k else 1.0 - math.comb(n - c, k) / math.comb(n, k)
