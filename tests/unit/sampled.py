"""A hand-made batch of four completions of up to five tokens, as the transform ``rollouts`` leaves them."""

from __future__ import annotations

import numpy as np
import torch

from luthier.core.protocols import Batch

LENGTHS = (5, 3, 4, 1)
THERE = np.arange(5) < np.array(LENGTHS)[:, None]
MASK = THERE.astype(float)
RNG = np.random.default_rng(7)
LP, OLD, REF = (RNG.normal(-1.5, 0.6, (4, 5)) for _ in range(3))
ADVANTAGE = np.array([1.3, -0.7, 0.0, -2.1])
ROOM = 6


def flat(values, grad=False):
    return torch.tensor(np.asarray(values)[THERE], requires_grad=grad)


def sampled(rows=(0, 1, 2, 3), *, advantage=ADVANTAGE, masked=(), **columns) -> Batch:
    """Some of the completions as one micro-batch; those of ``masked`` count for nothing."""
    index = list(rows)
    lengths = np.array(LENGTHS)[index]
    sequence = torch.from_numpy(np.repeat(np.arange(len(index)), lengths))
    n = int(lengths.sum())

    def of(values):
        return torch.cat([torch.tensor(np.asarray(values)[r, : LENGTHS[r]]) for r in index])

    one = torch.ones(len(index), dtype=torch.float64)
    kept = torch.tensor([0.0 if r in masked else 1.0 for r in index], dtype=torch.float64)
    return Batch(
        inputs={},
        position_N=torch.arange(n),
        target_N=torch.zeros(n, dtype=torch.long),
        weight_N=kept[sequence],
        sequence_N=sequence,
        row_B=torch.tensor(index),
        columns={
            "advantage_N": of(np.asarray(advantage)[:, None] * np.ones((4, 5))),
            "old_logp_N": of(OLD),
            "reward": one * 0.5,
            "sequence_weight": one,
            "finished": one,
            "no_signal": 0 * one,
            "room": one * ROOM,
            "temperature": one,
            **columns,
        },
    )


def part(values, rows, grad=False):
    """The values of these completions, flat."""
    return torch.cat([torch.tensor(np.asarray(values)[r, : LENGTHS[r]]) for r in rows]).requires_grad_(grad)
