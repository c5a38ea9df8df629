"""What each exit of a model is worth, and how far it is from the whole.

    loss, accuracy, perplexity of exit n       and, against the whole model K,
    agreement = mean_t [ argmax f_n = argmax f_K ],   KL_n = mean_t KL(softmax f_K | softmax f_n),
    cosine_n  = mean_t cos(h_nt, h_Kt)

``f_n`` are the logits of the sub-model that ends after block n, with the model's own final norm and head; ``h_n`` [H]
is what leaves block n, before the norm. t runs over supervised positions of held-out rows, at most ``positions`` of
each batch, evenly spaced. Base and tuned model are measured alike, so the gain of training the exits is seen beside
what the base's blocks could do untrained. Intervals are clustered by row.

Paper: "Sorted LLaMA: Unlocking the Potential of Intermediate Layers of Large Language Models for Dynamic Inference
(Using Sorted Fine-Tuning)", 2023, arXiv 2309.08968.

Example::

    objective: {sorted-ft: {exits: [2, 4, 6]}}
    analysis: [sorted-ft]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Batch, Table
from luthier.core.registry import analysis
from luthier.functional.divergences import divergence
from luthier.functional.exits import blocks_of, check_exits, default_exits, transformers_model
from luthier.functional.questions import numbers
from luthier.functional.statistics import ClusteredMean, Estimate

COLUMNS = ("run", "model", "exit", "quantity", "value", "n", "low", "high", "unit")
UNITS = {
    "loss": ("nats", 0.0, math.inf),
    "perplexity": ("perplexity", 1.0, math.inf),
    "accuracy": ("share", 0.0, 1.0),
    "agreement with the whole": ("share", 0.0, 1.0),
    "KL(whole|exit)": ("nats", 0.0, math.inf),
    "cosine with the whole": ("cosine", -1.0, 1.0),
}


@contextmanager
def leaving(block: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """While it is open, a list that holds what left the block [B, T, H] last."""
    seen: list[torch.Tensor] = []

    def see(module: Any, inputs: Any, out: Any) -> None:
        seen[:] = [out[0] if isinstance(out, tuple) else out]

    handle = block.register_forward_hook(see)
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def exits_of(session: Any, batch: Batch, exits: Sequence[int]) -> dict[int, dict[str, torch.Tensor]]:
    """Values at the batch's positions of each exit, [N] each: ``loss``, ``accuracy`` and what compares it to the whole.

    Args:
        session: gives ``task.encode``, ``outputs`` and ``autocast`` over its ``model``, already in evaluation mode.
        batch: the rows, cut to the positions wanted, on the session's device.
        exits: block numbers, the last being the whole model.
    """
    with leaving(blocks_of(session.model)[-1]) as left, session.autocast():
        encoded = session.task.encode(session.model, batch, hidden=True)
        out = session.outputs(encoded, batch, ("logp", "top1"))
        whole_NV = out.over_vocabulary(_logits)
        state_NH = left[0].reshape(-1, left[0].shape[-1]).index_select(0, batch.position_N).float()
        found = {}
        for n in exits:
            at = out if n == exits[-1] else out.exit(n)
            # Only the last of a model's hidden states has passed the final norm.
            own_NH = state_NH if n == exits[-1] else out.hidden(n).float()
            found[n] = {
                "loss": -at.logp_N.double(),
                "accuracy": (at.top1_N == batch.target_N).double(),
                "agreement with the whole": (at.top1_N == out.top1_N).double(),
                "KL(whole|exit)": divergence(at.over_vocabulary(_logits), whole_NV).double(),
                "cosine with the whole": torch.nn.functional.cosine_similarity(own_NH, state_NH, dim=-1).double(),
            }
        return found


def _logits(logits_CV: torch.Tensor, index_C: torch.Tensor) -> torch.Tensor:
    return logits_CV.float()


@analysis(
    "sorted-ft",
    example={"exits": [1, 2], "positions": 8},
    tasks=("causal-lm",),
    paper="Sorted LLaMA: Unlocking the Potential of Intermediate Layers of Large Language Models for Dynamic Inference "
    "(Using Sorted Fine-Tuning), 2023, arXiv 2309.08968",
)
class Exits:
    """What each exit of a model is worth: its loss, and how far its predictions and states are from the whole's."""

    def __init__(
        self,
        *,
        exits: Annotated[
            list[int] | None,
            Field(
                min_length=1, description="block numbers; by default those the run trained, else every tenth from 30%"
            ),
        ] = None,
        positions: Annotated[int, Field(ge=1, description="supervised positions of a batch that are compared")] = 256,
        confidence: Annotated[float, Field(gt=0, lt=1, description="of the intervals")] = 0.95,
    ) -> None:
        if exits is not None:
            check_exits(exits)
        self.exits, self.positions, self.confidence = exits, positions, confidence

    def run(self, runs: Iterable[Any], ctx: Any) -> Table:
        """One table over all runs.

        Args:
            runs: finished runs; each has a ``folder``, whose name stands in the table, and a ``model``.
            ctx: gives ``both(run)``, of which the batches of held-out rows are used; ``base``, the base's session; and
                ``shop.session(model)``, that of another model.

        Raises:
            UserError: the model has no such exit.
        """
        rows: list[tuple[Any, ...]] = []
        for run in runs:
            exits = self._exits(run.model)
            models = {"base": ctx.base, "tuned": ctx.shop.session(run.model)}
            means: dict[tuple[str, int, str], ClusteredMean] = {}
            for batch, *_ in ctx.both(run):
                count = len(batch.target_N)
                part = batch.positions(torch.linspace(0, count - 1, min(count, self.positions)).long())
                owner_N = part.sequence_N.numpy()
                size_B = np.bincount(owner_N, minlength=batch.examples)
                for model, session in models.items():
                    session.model.eval()
                    for n, values in exits_of(session, session.to_device(part), exits).items():
                        for quantity, value_N in values.items():
                            sum_B = np.bincount(owner_N, value_N.cpu().numpy(), minlength=batch.examples)
                            means.setdefault((model, n, quantity), ClusteredMean()).add(sum_B, size_B)
            for (model, n, quantity), mean in means.items():
                estimate = mean.estimate(self.confidence)
                rows.append((run.folder.name, model, n, quantity, *_within(quantity, estimate)))
                if quantity == "loss":
                    perplexity = estimate.mapped(lambda x: math.exp(min(x, 700.0)))
                    rows.append((run.folder.name, model, n, "perplexity", *_within("perplexity", perplexity)))
        return Table(
            title="What each exit is worth",
            columns=COLUMNS,
            rows=tuple(rows),
            units={"exit": "blocks", "value": "see unit", "n": "positions"},
        )

    def _exits(self, model: Any) -> tuple[int, ...]:
        """The exits to look at; the whole model is always the last."""
        depth = len(blocks_of(model))
        trained = getattr(transformers_model(model).config, "sorted_exits", None)
        wanted = tuple(self.exits or trained or default_exits(depth))
        if wanted[-1] > depth:
            raise UserError(
                f"sorted-ft: exits: there is no block {wanted[-1]}: the model has {depth}. Name 1 to {depth}."
            )
        return wanted if wanted[-1] == depth else (*wanted, depth)


def _within(quantity: str, found: Estimate) -> tuple[Any, ...]:
    unit, least, most = UNITS[quantity]
    return *numbers(found.clipped(least, most)), unit
