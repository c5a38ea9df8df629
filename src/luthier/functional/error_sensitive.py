"""What the data stage and the objective of fault-aware fine-tuning share: columns of flags, and weights made of them.

Of each row ``error_sensitive`` holds, per wrong variant, the flagged tokens of the correct answer as places in the
row's ``input_ids``, by line and by token, and a checksum of these ids; ``wrong_variants`` holds each variant's text,
its ids, the flagged tokens among them, the span of its answer, and where its ids first differ from those of the row.

Shapes: B examples, N supervised positions, T tokens of a row.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

SENSITIVE = "error_sensitive"
WRONG = "wrong_variants"
# A token flagged by its line alone where both are asked for, and any other flagged one.
PART, FULL = 1, 2

Granularity = Literal["line", "token", "both"]
Mode = Literal["dynamic", "ratio", "static"]


def checksum(ids: Sequence[int]) -> int:
    """A number that tells whether a row still has the tokens that were flagged."""
    return zlib.crc32(np.asarray(ids, dtype=np.int32).tobytes())


def chosen(flags: Mapping[str, Sequence[int]], granularity: Granularity) -> dict[int, int]:
    """Token -> ``PART`` or ``FULL`` of one side of a pair; the finer flag wins."""
    if granularity != "both":
        return dict.fromkeys(flags[granularity], FULL)
    return dict.fromkeys(flags["line"], PART) | dict.fromkeys(flags["token"], FULL)


def of_row(flags: Mapping[str, Any] | None, picked: int | None, granularity: Granularity) -> dict[int, int]:
    """Token -> level of a correct answer, over all its variants or the picked one."""
    found: dict[int, int] = {}
    if flags:
        pairs = list(zip(flags["line"], flags["token"], strict=True))
        for line, token in pairs if picked is None else pairs[picked : picked + 1]:
            own = chosen({"line": line, "token": token}, granularity)
            found |= {t: max(level, found.get(t, 0)) for t, level in own.items()}
    return found


def factor(
    good_B: torch.Tensor, wrong_B: torch.Tensor, mode: Mode, *, temperature: float, ratio_clip: float
) -> torch.Tensor:
    """How much the model still mixes the two up [B], without a graph.

    Args:
        good_B: e+, mean log-probability of the flagged tokens of the correct answer.
        wrong_B: e-, that of the wrong one.
        mode: ``dynamic``: 2 sigmoid((e- - e+) / temperature), between 0 and 2 and 1 where both are as likely;
            ``ratio``: exp(e- - e+), the difference cut to +-``ratio_clip``; ``static``: 1.
        temperature: of the sigmoid.
        ratio_clip: largest difference in nats.
    """
    if mode == "static":
        return torch.ones_like(good_B)
    difference_B = (wrong_B - good_B).detach()
    if mode == "ratio":
        return difference_B.clamp(-ratio_clip, ratio_clip).exp()
    return 2 * torch.sigmoid(difference_B / temperature)


def emphasised(factor_B: torch.Tensor, emphasis: float, max_weight: float) -> torch.Tensor:
    """The weight omega = clip(1 + a g, 1, w_max) of flagged tokens, [B]."""
    return (1 + emphasis * factor_B).clamp(1.0, max_weight)


def token_weights(
    level_N: torch.Tensor, omega_N: torch.Tensor, weight_N: torch.Tensor, *, line_share: float, max_weight: float
) -> torch.Tensor:
    """Weights [N]: those of the batch, times omega at ``FULL`` and 1 + (omega - 1) line_share at ``PART``.

    A product with weights of another method is cut at ``max_weight``, but never below what that method gave.
    """
    share_N = (level_N == FULL).to(omega_N.dtype) + line_share * (level_N == PART).to(omega_N.dtype)
    product_N = weight_N * (1 + (omega_N - 1) * share_N)
    return torch.minimum(product_N, weight_N.clamp(min=max_weight))


def levels(flags_B: Sequence[Mapping[int, int]], position_N: torch.Tensor, width: int) -> torch.Tensor:
    """Flag of each supervised position, int64 [N]; the target of position p = example * width + t - 1 is token t.

    Args:
        flags_B: token -> flag of each example.
        position_N: as in ``core.protocols.Batch``.
        width: T.
    """
    level_BT = np.zeros(len(flags_B) * width + 1, dtype=np.int64)
    for b, flags in enumerate(flags_B):
        if flags:
            level_BT[b * width + np.fromiter(flags, dtype=np.int64)] = list(flags.values())
    return torch.from_numpy(level_BT).to(position_N.device)[position_N + 1]


def mean_by(value_N: torch.Tensor, group_N: torch.Tensor, count: int) -> torch.Tensor:
    """The mean of the values of each group in float32 [count]; 0 for a group without any."""
    total = torch.zeros(count, dtype=torch.float32, device=value_N.device).index_add(0, group_N, value_N.float())
    return total / torch.bincount(group_N, minlength=count).clamp(min=1)


def rows_of(variants: Sequence[Sequence[Mapping[str, Any]]], granularity: Granularity) -> dict[str, list[Any]]:
    """Wrong variants as rows to collate, whose supervised positions are the flagged tokens.

    The whole answer where a variant has none. What follows the last of them decides nothing and is cut off.

    Returns:
        ``input_ids``, ``spans``, and ``owner``: the example each belongs to.
    """
    made: dict[str, list[Any]] = {"input_ids": [], "spans": [], "owner": []}
    for owner, several in enumerate(variants):
        for variant in several:
            tokens = sorted(chosen(variant, granularity)) or list(range(*variant["response"]))
            made["input_ids"].append(np.asarray(variant["ids"][: tokens[-1] + 1], dtype=np.int32))
            made["spans"].append(np.asarray([edge for t in tokens for edge in (t, t + 1)], dtype=np.int32))
            made["owner"].append(owner)
    return made
