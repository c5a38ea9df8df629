"""Where answers stand in the rows of a batch."""

from __future__ import annotations

import torch

from luthier.core.protocols import Batch


def answer_starts(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Where supervision begins in each row, and where its last answer begins, as token numbers [B]."""
    assert batch.supervised_BT is not None
    there_BT = batch.supervised_BT
    opens_BT = there_BT & ~torch.nn.functional.pad(there_BT, (1, 0))[:, :-1]
    place_T = torch.arange(there_BT.shape[1], device=there_BT.device)
    return opens_BT.int().argmax(dim=1), (opens_BT * place_T).amax(dim=1)
