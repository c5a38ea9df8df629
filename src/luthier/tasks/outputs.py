"""Outputs over logits that are there already, and what they share with the outputs of the log-probability head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from luthier.core.errors import LuthierError
from luthier.core.protocols import Batch, Loss, Metrics

OverVocabulary = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _statistic(name: str, meaning: str) -> Any:
    return property(lambda self: self.statistic(name), doc=f"[N] {meaning}")


class Statistics:
    """The statistics of ``core.protocols.Outputs``, each computed at its first use."""

    target_N: torch.Tensor
    sequence_N: torch.Tensor
    logp_N = _statistic("logp", "log-probability of the target, in nats.")
    entropy_N = _statistic("entropy", "entropy of the prediction, in nats; no gradient.")
    top1_N = _statistic("top1", "int64, the most likely token or class.")
    top1_logp_N = _statistic("top1_logp", "log-probability of the most likely token or class; no gradient.")
    collision_N = _statistic("collision", "sum of squared probabilities; no gradient.")

    exits: Callable[[int], Any] | None = None
    form: Callable[[Batch, Callable[[Any, Batch], Loss]], Loss] | None = None
    _seen_N: torch.Tensor | None = None

    @property
    def observed_logp_N(self) -> torch.Tensor:
        """``logp_N`` without a graph, for what is logged; nothing is computed where :meth:`positionwise` has met it."""
        return self.logp_N.detach() if self._seen_N is None else self._seen_N

    def statistic(self, name: str) -> torch.Tensor:
        """[N], one of ``STATISTICS``."""
        raise NotImplementedError

    def plain(self, batch: Batch) -> Metrics:
        """What is logged beside any loss: plain NLL (also of groups of positions that a transform names) and mean p."""
        logp_N, weight_N = self.observed_logp_N, batch.weight_N
        count = weight_N.sum()
        found: Metrics = {
            "nll": (-(logp_N * weight_N).sum(), count),
            "mean_probability": ((logp_N.exp() * weight_N).sum(), count),
        }
        for name, flag_N in batch.columns.items():
            if isinstance(flag_N, torch.Tensor) and flag_N.dtype == torch.bool:
                inside_N = weight_N * flag_N
                found[f"nll_{name.removesuffix('_N')}"] = (-(logp_N * inside_N).sum(), inside_N.sum())
        return found

    def numbers(self) -> torch.Tensor:
        """Predicted numbers; classes and tokens have none.

        Raises:
            LuthierError: always here.
        """
        self.refuse("numbers")
        raise AssertionError

    @staticmethod
    def refuse(what: str) -> None:
        """Raise for what outputs of this kind do not have."""
        raise LuthierError(f"the outputs of this task have no '{what}'; the method is not defined for it.")

    def positionwise(self, batch: Batch, loss: Callable[[Any, Batch], Loss]) -> Loss:
        """The loss with its gradient formed chunk by chunk, where there is a head to form it in."""
        if self.form is None:
            return loss(self, batch)
        seen: list[torch.Tensor] = []

        def observed(out: Any, part: Batch) -> Loss:
            made = loss(out, part)
            seen.append(out.logp_N.detach())
            return made

        found = self.form(batch, observed)
        self._seen_N = torch.cat(seen)
        return found

    def exit(self, layer: int) -> Any:
        """The outputs of the sub-model that ends after block ``layer``.

        Raises:
            LuthierError: hidden states were not kept, or the task has no exits.
        """
        if self.exits is None:
            raise LuthierError(
                "there are no early exits here: the method's needs must say hidden=True, and the task be causal-lm"
            )
        return self.exits(layer)


def layer_of(layers: Callable[[int], torch.Tensor] | None, layer: int) -> torch.Tensor:
    """Hidden states [N, H] of a layer.

    Raises:
        LuthierError: they were not kept.
    """
    if layers is None:
        raise LuthierError(f"hidden states of layer {layer} were not kept: the method's needs must say hidden=True")
    return layers(layer)


class LogitsOutputs(Statistics):
    """The same interface over logits that are there already: classifiers with few classes.

    Args:
        logits_NV: logits with or without a graph.
        target_N: int64 target of each position.
        sequence_N: int64, which example of the batch each belongs to.
        layers: ``layers(l) -> [N, H]`` for hidden states; -1 is what the classifier reads.
    """

    def __init__(
        self,
        logits_NV: torch.Tensor,
        target_N: torch.Tensor,
        sequence_N: torch.Tensor,
        *,
        layers: Callable[[int], torch.Tensor] | None = None,
    ) -> None:
        self.logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
        self.target_N, self.sequence_N, self._layers = target_N, sequence_N, layers
        self._found: dict[str, torch.Tensor] = {}

    def statistic(self, name: str) -> torch.Tensor:
        """[N], float32; of ``logp`` with the graph of the logits."""
        if name not in self._found:
            with torch.autocast(self.logits_NV.device.type, enabled=False):
                log_p = torch.log_softmax(self.logits_NV if name == "logp" else self.logits_NV.detach(), -1)
                self._found[name] = {
                    "logp": lambda: log_p.gather(1, self.target_N[:, None]).squeeze(1),
                    "entropy": lambda: -(log_p.exp() * log_p).sum(-1),
                    "top1": lambda: log_p.argmax(-1),
                    "top1_logp": lambda: log_p.amax(-1),
                    "collision": lambda: log_p.exp().square().sum(-1),
                }[name]()
        return self._found[name]

    def hidden(self, layer: int = -1) -> torch.Tensor:
        """[N, H] hidden states of a layer."""
        return layer_of(self._layers, layer)

    def over_vocabulary(self, fn: OverVocabulary) -> torch.Tensor:
        """``fn(logits_NV, index_N)`` in one call."""
        return fn(self.logits_NV, torch.arange(len(self.target_N), device=self.target_N.device))
