"""Prompts that hold solved examples, and the scores that a language model gives to class names after them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from luthier.core.rng import numpy_stream
from luthier.functional.answers import column
from luthier.functional.discriminative import given_answer
from luthier.functional.sequences import left_pad
from luthier.functional.target_rewriting import filled, question_of

# Where the further columns of a row keep its question without examples.
QUERY = "in_context_query"
Score = Literal["first_token", "mean_logit", "sum_logprob", "mean_logprob"]


@dataclass(frozen=True)
class Example:
    """A solved example: its input and its label."""

    input: str
    label: str


@dataclass(frozen=True)
class Template:
    """How examples and an input become a prompt.

    Attributes:
        overall: has the slots ``{examples}`` and ``{input}``; what stands before ``{input}`` is there with examples
            or without.
        example: has the slots ``{input}`` and ``{label}``.
        separator: behind each example.
    """

    overall: str = "{examples}{input}"
    example: str = "{input}{label}"
    separator: str = "\n\n"

    def __post_init__(self) -> None:
        for text, slots in ((self.overall, ("examples", "input")), (self.example, ("input", "label"))):
            if missing := [s for s in slots if "{" + s + "}" not in text]:
                raise ValueError(f"the template {text!r} has no slot {{{missing[0]}}}")

    def write(self, examples: Sequence[Example], query: str) -> str:
        """The prompt of a query behind some examples."""
        block = "".join(filled(self.example, input=e.input, label=e.label) + self.separator for e in examples)
        return filled(self.overall, examples=block, input=query)


def query_of(row: Mapping[str, Any]) -> str:
    """A canonical row's question alone, also where examples were put before it."""
    query = column(row, QUERY)
    return question_of(row) if query is None else str(query)


def example_of(row: Mapping[str, Any]) -> Example:
    """A canonical row with one answer as an example, joined as its prompt is rendered."""
    query = query_of(row)
    return Example(query + ("" if query[-1:].isspace() else row.get("separator") or ""), given_answer(row))


def drawn(pool: Sequence[Example], m: int, own: Example | None, seed: int, *keys: object) -> list[Example]:
    """M examples in random order, none of which has the input of ``own``; a function of seed, own input and keys alone.

    Copies of the query in other rows would tell its label as well as the row itself.

    Raises:
        ValueError: the pool holds fewer others.
    """
    asked = None if own is None else own.input
    rng, found = numpy_stream(seed, "data", "in-context examples", asked, *keys), []
    if m:
        for i in rng.permutation(len(pool)):
            if pool[i].input != asked:
                found.append(pool[i])
                if len(found) == m:
                    return found
        raise ValueError(f"{m} examples are asked for and there are {len(found)} besides the query")
    return found


def fitted(template: Template, examples: Sequence[Example], query: str, fits: Callable[[str], bool]) -> tuple[str, int]:
    """The prompt with as many of the examples as fit, and how many were dropped, whole and from the left.

    The query always stays, even where it does not fit by itself.
    """
    for dropped in range(len(examples)):
        if fits(text := template.write(examples[dropped:], query)):
            return text, dropped
    return template.write([], query), len(examples)


def check_labels(labels: Sequence[str], tokens: Sequence[Sequence[int]], score: Score) -> None:
    """Refuse labels that cannot be told apart.

    Raises:
        ValueError: fewer than two labels, one twice, one without a token, or (``first_token``) two that begin alike.
    """
    if len(set(labels)) < max(len(labels), 2):
        raise ValueError("labels must be two or more different texts")
    if empty := [name for name, ids in zip(labels, tokens, strict=True) if not len(ids)]:
        raise ValueError(f"the label {empty[0]!r} has no token")
    first: dict[int, str] = {}
    for name, ids in zip(labels, tokens, strict=True):
        if score == "first_token" and (other := first.setdefault(ids[0], name)) != name:
            raise ValueError(f"the labels {other!r} and {name!r} begin with the same token; use score: mean_logprob")


@torch.no_grad()
def class_scores(
    model: Any,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    score: Score = "mean_logprob",
    batch_rows: int = 32,
    pad_id: int = 0,
    device: Any = "cpu",
) -> np.ndarray:
    """Scores [N, K] in float64 whose softmax are the class probabilities.

    ``first_token`` is the logit of the label's first token behind the prompt; the others feed each label behind the
    prompt and take the mean of its tokens' logits, or the sum or mean of their log-probabilities.

    Args:
        model: a causal language model.
        prompts: token ids of N prompts, at least one each.
        labels: token ids of K labels, at least one each.
        score: which score.
        batch_rows: prompts (each with one label) that run together.
        pad_id: fills the padding on the left.
        device: where the model is.
    """
    first = score == "first_token"
    ends = [ids[:1] for ids in labels] if first else [list(ids) for ids in labels]
    # The last token of a label predicts nothing, so it is not fed; with one token each, all labels share one row.
    shared = all(len(ids) == 1 for ids in ends)
    rows = [list(p) + list(e[:-1]) for p in prompts for e in ([[0]] if shared else ends)]
    keep = max(map(len, ends))
    training = model.training
    model.eval()
    try:
        # Similar lengths run together; the results go back into their places.
        order = np.argsort([len(r) for r in rows], kind="stable")
        value = np.empty((len(rows), len(ends) if shared else 1))
        for start in range(0, len(rows), batch_rows):
            index = order[start : start + batch_rows]
            ids_BT, mask_BT = left_pad([rows[i] for i in index], pad_id)
            logits_BLV = model(
                input_ids=ids_BT.to(device),
                attention_mask=mask_BT.to(device),
                position_ids=(mask_BT.cumsum(1) - 1).clamp(min=0).to(device),
                logits_to_keep=keep,
                use_cache=False,
            ).logits.double()
            if score in ("sum_logprob", "mean_logprob"):
                logits_BLV = logits_BLV.log_softmax(-1)
            if shared:
                found_BK = logits_BLV[:, -1, [e[0] for e in ends]]
                value[index] = found_BK.cpu().numpy()
                continue
            for at, i in enumerate(index):
                own = ends[i % len(ends)]
                token_t = logits_BLV[at, -len(own) :][range(len(own)), own]
                value[i, 0] = float(token_t.sum() if score == "sum_logprob" else token_t.mean())
    finally:
        model.train(training)
    return value.reshape(len(prompts), len(ends))


def variations(
    pool: Sequence[Example], query: str, templates: Sequence[Template], m: int, draws: int, seed: int
) -> list[tuple[Template, list[Example]]]:
    """The cross product of templates and draws of m examples; without examples one draw is all there is.

    A draw is the same under every template, and does not depend on what else is asked.
    """
    own = Example(query, "")
    sets = [drawn(pool, m, own, seed, e) for e in range(draws if m else 1)]
    return [(template, examples) for template in templates for examples in sets]


def templates_of(overall: Sequence[str], example: str, separator: str) -> list[Template]:
    """One template for each overall text."""
    return [Template(text, example, separator) for text in overall]
