"""Discriminative likelihood of answers: sampled softmax over sequences with a running normaliser per example.

Shapes: B examples, K negatives of each, N supervised positions. Log-probabilities in nats; everything in log space,
because scores of whole answers differ by tens of nats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from luthier.core.errors import UserError

# exp(30) is still far from overflow in float32; a stale normaliser can lie further below.
LARGEST_EXPONENT = 30.0


def scores(
    logp_N: torch.Tensor, sequence_N: torch.Tensor, examples: int, *, mean: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score s(y, x) of each answer and its number of tokens, both [B].

    Args:
        logp_N: log-probability of each answer token, the end token included.
        sequence_N: int64, which answer each belongs to.
        examples: B.
        mean: divide by the number of tokens (plus 1e-8) instead of summing.
    """
    score_B = torch.zeros(examples, dtype=logp_N.dtype, device=logp_N.device).index_add(0, sequence_N, logp_N)
    count_B = torch.bincount(sequence_N, minlength=examples)
    return (score_B / (count_B.to(logp_N.dtype) + 1e-8) if mean else score_B), count_B


def updated(log_u_B: torch.Tensor, d_BK: torch.Tensor, gamma: float) -> torch.Tensor:
    """The normaliser after a visit [B]: exp(u) = (1 - gamma) exp(u_old) + gamma * mean_k exp(d_k)."""
    visit_B = math.log(gamma) + torch.logsumexp(d_BK, dim=1) - math.log(d_BK.shape[1])
    return visit_B if gamma == 1.0 else torch.logaddexp(math.log1p(-gamma) + log_u_B, visit_B)


def negative_weights(d_BK: torch.Tensor, log_u_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights exp(d - u) of the negatives [B, K] without a graph, and how many exponents were cut at 30."""
    exponent_BK = (d_BK - log_u_B[:, None]).detach()
    return exponent_BK.clamp(max=LARGEST_EXPONENT).exp(), (exponent_BK > LARGEST_EXPONENT).sum()


def surrogate(a_B: torch.Tensor, r_BK: torch.Tensor, p_BK: torch.Tensor) -> torch.Tensor:
    """-a + mean_k p_k r_k per example [B]; its gradient, not its value, is that of the objective."""
    return -a_B + (p_BK * r_BK).mean(dim=1)


def merged(log_u_T: torch.Tensor, visits: Sequence[tuple[Sequence[int], Sequence[float]]]) -> torch.Tensor:
    """The normalisers of all rows after every process told its visits, as (rows, new values).

    A row that several processes visited gets the mean of their values, one that none visited keeps its own.
    """
    total_T, count_T = torch.zeros_like(log_u_T, dtype=torch.float64), torch.zeros_like(log_u_T, dtype=torch.float64)
    for rows, values in visits:
        index = torch.as_tensor(rows, dtype=torch.long)
        total_T.index_add_(0, index, torch.as_tensor(values, dtype=torch.float64))
        count_T.index_add_(0, index, torch.ones(len(index), dtype=torch.float64))
    return torch.where(count_T > 0, (total_T / count_T.clamp(min=1.0)).to(log_u_T.dtype), log_u_T)


# -- answers of canonical rows


def given_answer(row: Mapping[str, Any]) -> str:
    """The answer of a pair or of a conversation that ends with the assistant.

    Raises:
        UserError: the row has none.
    """
    if row["kind"] == "pair":
        return str(row["completion"])
    if row["kind"] == "chat":
        last = json.loads(row["messages"])[-1]
        if last["role"] == "assistant" and isinstance(last.get("content"), str):
            return last["content"]
        raise UserError("the conversation does not end with a text of the assistant.", where=place(row))
    raise UserError(
        f"a row of kind '{row['kind']}' has no prompt with one answer; this method needs prompt/completion rows or "
        "conversations.",
        where=place(row),
    )


def with_answer(row: Mapping[str, Any], answer: str) -> dict[str, Any]:
    """A copy of the canonical row with another answer to the same prompt."""
    if row["kind"] == "pair":
        return {**row, "completion": answer}
    messages = json.loads(row["messages"])
    return {**row, "messages": json.dumps([*messages[:-1], {"role": "assistant", "content": answer}])}


def as_answer(text: str, given: str) -> str:
    """A sampled text as an answer: white space at its start is that of the given answer.

    Prompts and answers of raw pairs often meet at a space; a negative must not be known by the lack of it.
    """
    return given[: len(given) - len(given.lstrip())] + text.lstrip()


def place(row: Mapping[str, Any]) -> str:
    """File and number of a row, for errors."""
    return f"{row.get('source') or 'data.train'}, row {row.get('row', '?')}"
