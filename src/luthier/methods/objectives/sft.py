"""Plain supervised fine-tuning: the negative log-likelihood of the target, averaged over supervised positions.

    loss = sum_n w_n * (-log p(y_n)) / sum_n w_n

``logp_N`` [N] log-probability of each target, ``weight_N`` [N] position weights (1 unless a transform or a selector set
them). This is the reference every other method is compared with, and what each becomes at its identity setting. Where
targets are numbers, ``-log p`` is the squared error.

Example::

    objective: sft
"""

from __future__ import annotations

import torch

from luthier.core.protocols import Batch, Context, Loss, Needs, Outputs
from luthier.core.registry import objective


def negative_log_likelihood(logp_N: torch.Tensor, weight_N: torch.Tensor) -> torch.Tensor:
    """Weighted sum of -logp_N (nats); divide by the sum of weights for the mean."""
    return -(logp_N * weight_N).sum()


@objective("sft", identity={}, numbers=True)
class SupervisedFineTuning:
    """Plain supervised fine-tuning: minimise the negative log-likelihood of the targets."""

    needs = Needs(statistics=("logp",), positionwise=True)

    def loss(self, out: Outputs, batch: Batch, ctx: Context) -> Loss:
        """Sum of weighted -logp over the positions; weight is the sum of the position weights."""
        return Loss(sum=negative_log_likelihood(out.logp_N, batch.weight_N), weight=batch.weight_N.sum())
