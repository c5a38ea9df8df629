"""Any objective as the ``compute_loss`` of a transformers ``Trainer``: an escape hatch, and the oracle of our tests.

Use it where Luthier's own loop lacks something that transformers' has (a sharding mode, a callback)::

    trainer = BridgeTrainer(session=session, data=prepared, args=TrainingArguments(...))
    trainer.train()

Methods that act on the batch or on the loss (objectives, transforms) work here; online selection and methods that act
on gradients or weights between steps belong to Luthier's loop and are refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from luthier.core.errors import UserError
from luthier.core.protocols import Batch
from luthier.engine.session import Session


class _Rows(torch.utils.data.Dataset):
    """Row numbers; the collator fetches whole batches at once."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> int:
        return int(index)


class BridgeTrainer(Trainer):
    """A transformers Trainer whose loss is a Luthier objective.

    The loss of a step is ``sum / number of supervised positions of the step``, which transformers counts over
    accumulation and processes. An objective that divides by something else is divided by its own weight per
    micro-batch instead, and its micro-batches are averaged.

    Args:
        session: the model and its methods.
        data: prepared rows.
        args: transformers' settings; ``remove_unused_columns`` is switched off, since batches are collated here.
        kwargs: passed on to ``Trainer``.

    Raises:
        UserError: a method of the session needs Luthier's own loop, or the model is wrapped for several processes.
    """

    def __init__(self, *, session: Session, data: Any, args: TrainingArguments, **kwargs: Any) -> None:
        if session.stack.selector is not None:
            raise UserError("online selection needs Luthier's own loop; the bridge offers objectives only.")
        if session.processes.world > 1:
            raise UserError("the transformers bridge runs in one process; use Luthier's loop with training.sharding.")
        args.remove_unused_columns = False
        self.session, self.data = session, data
        session.total_epochs = math.ceil(args.num_train_epochs)
        session.stack.call("prepare", session, data)
        given = {"model": session.model, "args": args, "train_dataset": _Rows(data), "data_collator": self._collate}
        super().__init__(**given, **kwargs)

    def _collate(self, index_B: Sequence[int]) -> dict[str, Any]:
        columns = self.session.stack.needs.columns
        batch = self.session.task.collate(self.data.fetch(list(index_B)), index_B, columns)
        # transformers counts the labels of a step that are not -100, leaving out the first of a row.
        nothing = torch.full((1,), -100)
        return {"batch": batch, "labels": torch.cat([nothing, batch.target_N])}

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The objective's sum over the step's supervised positions."""
        session = self.session
        batch: Batch = session.to_device(inputs["batch"])
        session.step = self.state.global_step
        session.totals = session.stack.counts([batch], session)
        if num_items_in_batch:
            session.totals["token"] = float(num_items_in_batch)
        for transform in session.stack.transforms:
            batch = transform(batch, session)
        loss = session.loss(batch)
        own_weight = session.stack.objective.needs.fixed_weight and loss.unit == "token"
        divisor = num_items_in_batch if own_weight and num_items_in_batch is not None else loss.weight
        value = loss.sum / divisor
        if not own_weight and num_items_in_batch is not None:
            value = value / self.args.gradient_accumulation_steps
        return (value, {}) if return_outputs else value
