"""The divergence from the base, watched while training: losses of different objectives cannot be compared, this can.

    KL(base | tuned) = mean_n sum_v p_base(v) (log p_base(v) - log p_tuned(v))

over a few supervised positions of a few rows. What the base predicts there is kept before training starts, so that no
second model stays in memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from luthier.functional.divergences import divergence
from luthier.tasks.base import Encoded

ROWS = 4
POSITIONS = 64


class DivergenceFromBase:
    """Measures how far a policy has moved from where it started.

    Args:
        session: a session over the model before anything is done to it.
        prepared: rows of which a few are used, evenly spaced.
        rows: how many rows.
        positions: most supervised positions over all of them, evenly spaced.
    """

    def __init__(self, session: Any, prepared: Any, *, rows: int = ROWS, positions: int = POSITIONS) -> None:
        index_B = np.unique(np.linspace(0, len(prepared) - 1, min(rows, len(prepared))).round().astype(int))
        batch = session.task.collate(prepared.fetch(index_B), index_B)
        count = len(batch.target_N)
        chosen_n = torch.linspace(0, count - 1, min(count, positions)).long()
        self.batch = session.to_device(batch.positions(chosen_n))
        self.base_nV = self._logits(session)

    @torch.no_grad()
    def _logits(self, session: Any) -> torch.Tensor:
        """Float32 logits [n, V] in evaluation mode."""
        kept: list[torch.Tensor] = []

        def keep(logits_CV: torch.Tensor, index_C: torch.Tensor) -> torch.Tensor:
            kept.append(logits_CV.float())
            return logits_CV.new_zeros(len(index_C))

        def consume(encoded: Encoded) -> None:
            session.outputs(encoded, self.batch, ()).over_vocabulary(keep)

        was_training = session.model.training
        session.model.eval()
        try:
            with session.autocast():
                session.module(self.batch, False, consume)
        finally:
            session.model.train(was_training)
        return torch.cat(kept)

    def __call__(self, session: Any) -> dict[str, float]:
        """``kl_to_base`` in nats per position."""
        return {"kl_to_base": float(divergence(self._logits(session), self.base_nV).mean())}
