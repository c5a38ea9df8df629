"""Train on the examples with the highest loss: the plain baseline of online batch selection.

    keep the ceil(keep * B) of the B offered examples with the largest mean -log p over their supervised positions

The engine offers ``oversample`` times the rows of a step; a forward pass without gradient scores them, and the chosen
ones are trained with weight 1. With ``keep: 1.0`` and ``oversample: 1`` nothing is dropped and no extra pass is made.
Examples with wrong answers have high loss too, so on noisy data this often chooses the noise.

Example::

    selection:
      loss-top-k: {keep: 0.5, oversample: 2}
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field

from luthier.core.protocols import Batch, Context
from luthier.core.registry import selection
from luthier.functional.per_example import mean_loss


def highest(loss_B: torch.Tensor, keep: float) -> torch.Tensor:
    """Indices of the ceil(keep * B) largest losses, in the order of the batch; ties go to the earlier example."""
    # keep * B may exceed the whole number it stands for by a rounding error (0.1 * 30).
    count = max(1, math.ceil(keep * loss_B.numel() - 1e-9))
    order = torch.argsort(loss_B, descending=True, stable=True)
    return order[:count].sort().values


@selection(
    "loss-top-k",
    numbers=True,
    identity={"keep": 1.0, "oversample": 1},
    example={"keep": 0.5, "oversample": 2},
)
class LossTopK:
    """Train on the examples of each step that the model finds hardest: those with the highest mean loss."""

    def __init__(
        self,
        *,
        keep: Annotated[float, Field(gt=0, le=1, description="share of the offered examples that is trained")] = 0.5,
        oversample: Annotated[int, Field(ge=1, le=64, description="how many times the rows of a step are offered")] = 2,
    ) -> None:
        self.keep, self.oversample = keep, oversample

    def select(self, batch: Batch, ctx: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of the chosen examples, in order, each with weight 1."""
        if self.keep == 1.0:
            index_b = torch.arange(batch.examples, device=batch.row_B.device)
        else:
            logp_N = ctx.forward(batch, grad=False).logp_N.detach().float()
            loss_B = mean_loss(logp_N, batch.weight_N, batch.sequence_N, batch.examples)
            index_b = highest(loss_B, self.keep).to(batch.row_B.device)
            if bool(loss_B.isfinite().all()):
                ctx.log(
                    selected_loss=float(loss_B[index_b.to(loss_B.device)].mean()), offered_loss=float(loss_B.mean())
                )
        return index_b, torch.ones(index_b.numel(), device=batch.weight_N.device)
