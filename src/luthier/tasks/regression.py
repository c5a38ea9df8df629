"""Regression: one number per text, learnt by its squared error."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from luthier.core.protocols import Batch, Metrics
from luthier.tasks.base import Encoded
from luthier.tasks.classification import SequenceClassification, pooled
from luthier.tasks.outputs import Statistics, layer_of


class NumberOutputs(Statistics):
    """Predicted numbers, flat over the N supervised positions.

    ``logp_N`` is ``-(f - y)^2``: up to a constant the log-density of y in a normal distribution around the prediction,
    of variance 1/2. So a loss that is linear in the log-probabilities of targets is the squared error.

    Args:
        number_N: predictions f, with or without a graph.
        target_N: the true numbers y.
        sequence_N: int64, which example of the batch each belongs to.
        layers: ``layers(l) -> [N, H]`` for hidden states.
    """

    def __init__(
        self, number_N: torch.Tensor, target_N: torch.Tensor, sequence_N: torch.Tensor, *, layers: Any = None
    ) -> None:
        self.number_N = number_N if number_N.dtype == torch.float64 else number_N.float()
        self.target_N, self.sequence_N, self._layers = target_N, sequence_N, layers

    def statistic(self, name: str) -> torch.Tensor:
        """[N]; ``logp`` alone has a meaning.

        Raises:
            LuthierError: another statistic is asked for.
        """
        if name != "logp":
            self.refuse(name)
        return -(self.number_N - self.target_N.to(self.number_N)).square()

    def numbers(self) -> torch.Tensor:
        """[N] the predictions."""
        return self.number_N

    def hidden(self, layer: int = -1) -> torch.Tensor:
        """[N, H] hidden states of a layer."""
        return layer_of(self._layers, layer)

    def over_vocabulary(self, fn: Any) -> torch.Tensor:
        """There is none.

        Raises:
            LuthierError: always.
        """
        self.refuse("over_vocabulary")
        raise AssertionError

    def plain(self, batch: Batch) -> Metrics:
        """The squared error, for the log."""
        error_N, weight_N = -self.observed_logp_N, batch.weight_N
        return {"squared_error": ((error_N * weight_N).sum(), weight_N.sum())}


class SequenceRegression(SequenceClassification):
    """One number per text."""

    name = "sequence-regression"

    def _targets(self, labels: Any) -> torch.Tensor:
        return torch.as_tensor(np.asarray(labels, dtype=np.float32))

    def encode(self, model: torch.nn.Module, batch: Batch, *, hidden: bool = False) -> Encoded:
        """The model's one output per example."""
        out = model(**batch.inputs, output_hidden_states=hidden)
        layers = (lambda index: pooled(out.hidden_states[index], batch)) if hidden else None
        return Encoded(number_N=out.logits.squeeze(-1), layers=layers)
