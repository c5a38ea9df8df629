"""Stand-ins for the run-time context, for tests of single methods: no engine, no files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from luthier.core.protocols import Batch, Loss
from luthier.core.rng import stream


class FakeOutputs:
    """Outputs from finished logits [N, V] in their own precision; every statistic the protocol names."""

    def __init__(self, logits_NV: torch.Tensor, batch: Batch) -> None:
        self.logits_NV, self.batch = logits_NV, batch
        self.sequence_N = batch.sequence_N
        self._all_NV = torch.log_softmax(logits_NV, dim=-1)

    @property
    def logp_N(self) -> torch.Tensor:
        return self._all_NV.gather(1, self.batch.target_N[:, None]).squeeze(1)

    @property
    def entropy_N(self) -> torch.Tensor:
        return -(self._all_NV.exp() * self._all_NV).sum(-1).detach()

    @property
    def top1_N(self) -> torch.Tensor:
        return self._all_NV.argmax(-1)

    @property
    def top1_logp_N(self) -> torch.Tensor:
        return self._all_NV.max(-1).values.detach()

    @property
    def collision_N(self) -> torch.Tensor:
        return self._all_NV.exp().square().sum(-1).detach()

    def over_vocabulary(self, fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return fn(self.logits_NV, torch.arange(len(self.logits_NV)))

    def positionwise(self, batch: Batch, loss: Callable[[Any, Batch], Loss]) -> Loss:
        return loss(self, batch)


class KnownLogp:
    """Outputs of which only the target log-probabilities are known."""

    def __init__(self, logp_N: torch.Tensor, sequence_N: torch.Tensor | None = None) -> None:
        self.logp_N = logp_N
        self.sequence_N = torch.zeros(logp_N.numel(), dtype=torch.long) if sequence_N is None else sequence_N

    def positionwise(self, batch: Batch, loss: Callable[[Any, Batch], Loss]) -> Loss:
        return loss(self, batch)


class FakeTokenizer:
    """A vocabulary of ``<pad> <s> </s>`` and letters; one id per character."""

    def __init__(self, letters: str = "abcdefghijklmnopqrstuvwxyz0123456789+-*/=#:. ", mask: bool = False) -> None:
        self.tokens = ["<pad>", "<s>", "</s>", *(["<mask>"] if mask else []), *letters]
        self.pad_token_id, self.bos_token_id, self.eos_token_id = 0, 1, 2
        self.mask_token_id = 3 if mask else None
        self.all_special_ids = [0, 1, 2, *([3] if mask else [])]

    def __len__(self) -> int:
        return len(self.tokens)

    def get_vocab(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        vocabulary = self.get_vocab()
        ids = [vocabulary[c] for c in text if c in vocabulary]
        return [self.bos_token_id, *ids] if add_special_tokens else ids

    def add_special_tokens(self, tokens: dict[str, str]) -> int:
        for key, token in tokens.items():
            self.tokens.append(token)
            self.all_special_ids.append(len(self.tokens) - 1)
            setattr(self, f"{key}_id", len(self.tokens) - 1)
        return len(tokens)


class MemorySource:
    """A model as weight operations see it, its tensors in memory."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        base: str | None = None,
        config: Mapping[str, Any] | None = None,
        tokens: dict[str, int] | None = None,
    ) -> None:
        self.tensors, self.base_fingerprint = tensors, base
        self.config, self._tokens = dict(config or {}), tokens

    def names(self) -> list[str]:
        return list(self.tensors)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def piece(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.tensors[name].reshape(-1)[start:stop].clone()

    def tokens(self) -> dict[str, int] | None:
        return self._tokens


class FakeContext:
    """The context a method sees at run time.

    Args:
        forward: ``(batch, model) -> Outputs``; forward passes are counted in ``passes``.
        scores: what ``score`` returns.
        evaluate: metric of a state dict, for weight operations.
        held_out: what ``batches()`` gives.
        controls: name -> metric of a state dict on what is to be kept.
        models: sources of the models that weight operations began with.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        step: int = 0,
        total_steps: int | None = 10,
        epoch: int = 0,
        task: str = "causal-lm",
        processor: Any = None,
        forward: Callable[..., Any] | None = None,
        scores: Sequence[Any] = (),
        evaluate: Callable[[Mapping[str, torch.Tensor]], float] | None = None,
        held_out: Sequence[Any] = (),
        controls: Mapping[str, Callable[[Mapping[str, torch.Tensor]], float]] | None = None,
        models: Mapping[str, Any] | None = None,
    ) -> None:
        self.seed, self.step, self.total_steps, self.epoch = seed, step, total_steps, epoch
        self.task = SimpleNamespace(name=task)
        self.processor = processor if processor is not None else FakeTokenizer()
        self.device = torch.device("cpu")
        self.totals = {"token": 1.0, "sequence": 1.0}
        self.start = 0
        self.models: Mapping[str, Any] = models or {}
        self._controls = controls
        self.logged: dict[str, float] = {}
        self.passes = 0
        self._forward, self._scores, self._evaluate, self._held_out = forward, scores, evaluate, held_out

    def forward(self, batch: Batch, model: str = "policy", *, grad: Any = None, parameters: Any = None) -> Any:
        self.passes += 1
        assert self._forward is not None
        return self._forward(batch, model) if parameters is None else self._forward(batch, model, parameters)

    def score(self, dataset: Any, model: str = "policy") -> Sequence[Any]:
        self.scored = (dataset, model)
        return self._scores

    def evaluate(self, model: Mapping[str, torch.Tensor]) -> float:
        assert self._evaluate is not None
        return self._evaluate(model)

    accuracy = evaluate

    def controls(self, model: Mapping[str, torch.Tensor]) -> dict[str, float]:
        assert self._controls is not None
        return {name: score(model) for name, score in self._controls.items()}

    def batches(self) -> Any:
        return iter(self._held_out)

    def rng(self, name: str, *keys: object) -> torch.Generator:
        return stream(self.seed, name, *(keys or (self.step, 0, 0)))

    def log(self, **values: float) -> None:
        self.logged.update({k: float(v) for k, v in values.items()})


def token_batch(rows: Sequence[tuple[Sequence[int], int]], *, pad: int = 0, special: Sequence[int] = (0, 1)) -> Batch:
    """A right-padded causal batch; each row is (ids, number of prompt tokens)."""
    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.full((len(rows), width), pad, dtype=torch.long)
    mask_BT = torch.zeros(len(rows), width, dtype=torch.bool)
    supervised_BT = torch.zeros_like(mask_BT)
    adjustable_BT = torch.zeros_like(mask_BT)
    for b, (ids, prompt) in enumerate(rows):
        ids_BT[b, : len(ids)] = torch.tensor(ids)
        mask_BT[b, : len(ids)] = True
        supervised_BT[b, max(prompt, 1) : len(ids)] = True
        adjustable_BT[b, : len(ids)] = torch.tensor([i not in special for i in ids])
    example_N, token_N = torch.nonzero(supervised_BT, as_tuple=True)
    return Batch(
        inputs={"input_ids": ids_BT, "attention_mask": mask_BT.long()},
        position_N=example_N * width + token_N - 1,
        target_N=ids_BT[example_N, token_N],
        weight_N=torch.ones(example_N.numel()),
        sequence_N=example_N,
        row_B=torch.arange(len(rows)),
        keys_B=[f"{b:032x}" for b in range(len(rows))],
        adjustable_BT=adjustable_BT,
        supervised_BT=supervised_BT,
    )


def position_batch(n: int, *, weight_N: torch.Tensor | None = None, target_N: torch.Tensor | None = None) -> Batch:
    """A batch of n supervised positions of one example, for objectives that look at nothing else."""
    return Batch(
        inputs={},
        position_N=torch.arange(n),
        target_N=torch.zeros(n, dtype=torch.long) if target_N is None else target_N,
        weight_N=torch.ones(n) if weight_N is None else weight_N,
        sequence_N=torch.zeros(n, dtype=torch.long),
        row_B=torch.zeros(1, dtype=torch.long),
    )
