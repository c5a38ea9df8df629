"""A language of programs of one to three lines, their descriptions in words, and what runs them.

A program sets ``x``, changes it under a condition, and changes it once more::

    product of a and c ; if it is at most 4 then it plus b ; at last it minus 2
    x = a * c
    if x <= 4 : x = x + b
    x = x - 2
"""

from __future__ import annotations

import contextlib
import itertools

import numpy as np

NUMBERS = [str(n) for n in range(1, 10)]
NAMES = ["a", "b", "c"]
OPERATIONS = {
    "+": ["sum of {l} and {r}", "{l} plus {r}", "{l} raised by {r}"],
    "-": ["{l} minus {r}", "{l} without {r}", "{r} taken from {l}"],
    "*": ["product of {l} and {r}", "{l} times {r}", "{l} scaled by {r}"],
}
CONDITIONS = {
    "<": ["is below", "is less than"],
    "<=": ["is at most", "is no more than"],
    ">": ["is above", "is more than"],
    ">=": ["is at least", "is no less than"],
    "==": ["equals", "is the same as"],
    "!=": ["differs from", "is other than"],
}
INPUTS = [dict(zip(NAMES, values, strict=True)) for values in itertools.product((1, 2, 4, 7), repeat=3)]


def drawn(rng, *, random_operators=False):
    """A description and its program; with ``random_operators`` the program's operators ignore the description."""

    def pick(some):
        return some[int(rng.integers(len(some)))]

    def operation(left, right):
        said = pick(list(OPERATIONS))
        written = pick(list(OPERATIONS)) if random_operators else said
        shown = "it" if left == "x" else left
        return pick(OPERATIONS[said]).format(l=shown, r=right), f"x = {left} {written} {right}"

    words, line = operation(pick(NAMES), pick(NAMES + NUMBERS))
    told, lines = [words], [line]
    if rng.random() < 0.7:
        said, against = pick(list(CONDITIONS)), pick(NAMES + NUMBERS)
        written = pick(list(CONDITIONS)) if random_operators else said
        words, line = operation("x", pick(NAMES + NUMBERS))
        told.append(f"if it {pick(CONDITIONS[said])} {against} then {words}")
        lines.append(f"if x {written} {against} : {line}")
    if rng.random() < 0.4:
        words, line = operation("x", pick(NAMES + NUMBERS))
        told.append(f"at last {words}")
        lines.append(line)
    return " ; ".join(told) + "\n", "\n".join(lines) + "\n"


def distinct(rng, count, taken, **options):
    """Descriptions and programs none of whose descriptions is in ``taken``, which learns the new ones."""
    found = []
    while len(found) < count:
        prompt, program = drawn(rng, **options)
        if prompt not in taken:
            taken.add(prompt)
            found.append((prompt, program))
    return found


def results(program):
    """The value of x for every input; None where the program fails."""
    found = []
    try:
        code = compile(program, "<program>", "exec")
    except (SyntaxError, ValueError):
        return [None] * len(INPUTS)
    for given in INPUTS:
        scope = {"__builtins__": {}, **given}
        with contextlib.suppress(Exception):
            exec(code, scope)
        found.append(scope.get("x"))
    return found


def judge(rows, completions, ctx):
    """A reward: 1 where a completion computes what the row's own program does."""
    return [float(results(c) == results(row["completion"])) for row, c in zip(rows, completions, strict=True)]


def words():
    """Every word of the language, in a fixed order."""
    phrases = [p for some in OPERATIONS.values() for p in some] + [p for some in CONDITIONS.values() for p in some]
    spoken = " ".join(phrases).format(l="", r="").split()
    signs = ["x", "=", ":", "if", "then", "it", ";", "at", "last", "\n", *OPERATIONS, *CONDITIONS]
    return list(dict.fromkeys([*NUMBERS, *NAMES, *signs, *spoken]))


def tokenizer():
    """One token per word and per line end, ids 0 to 2 for padding, start and end."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words()])}
    backend = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def shown(ids, processor):
    """Token ids as the text of a program, for words are divided by spaces and lines by line ends."""
    return " ".join(processor.convert_ids_to_tokens(ids)).replace(" \n ", "\n").replace(" \n", "\n")


def random_generator(seed, name):
    """A stream of its own for each purpose."""
    return np.random.default_rng([seed, sum(name.encode())])
