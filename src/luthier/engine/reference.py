"""Reference scores: computed once per row and model, kept on disk by (row hash, model hash, head options)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from luthier.core.protocols import Batch, Outputs
from luthier.core.store import Store, content_hash, write_atomic

FLUSH_ROWS = 4096


class ReferenceScores:
    """Target log-probabilities of clean rows under one frozen model.

    Args:
        fingerprint: hash of the model's weights.
        options: whatever else changes the numbers (task, precision).
        store: where to keep them; the user's store by default.
    """

    def __init__(self, fingerprint: str, *, options: str = "", store: Store | None = None) -> None:
        self.folder = (store or Store()).folder("reference", content_hash(fingerprint, options, "v1"))
        self._known: dict[str, np.ndarray] = {}
        self._fresh: dict[str, np.ndarray] = {}
        if self.folder.exists():
            for file in sorted(self.folder.glob("*.safetensors")):
                self._known.update(load_file(file))

    def get(self, keys: list[str]) -> torch.Tensor | None:
        """The log-probabilities of these rows joined [N], or None where one of them is missing."""
        try:
            found = [self._known[k] for k in keys]
        except KeyError:
            return None
        return torch.from_numpy(np.concatenate(found)) if found else torch.zeros(0)

    def put(self, keys: list[str], logp_N: torch.Tensor, sequence_N: torch.Tensor) -> None:
        """Keep the scores of a batch; written to disk now and then."""
        values, owner = logp_N.float().cpu().numpy(), sequence_N.cpu().numpy()
        for index, key in enumerate(keys):
            self._known[key] = self._fresh[key] = values[owner == index]
        if len(self._fresh) >= FLUSH_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the scores gathered since the last time as one more file."""
        if not self._fresh:
            return
        name = content_hash(sorted(self._fresh))
        target = self.folder / f"{name}.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / f".{name}.partial"
        save_file(self._fresh, aside)
        data = aside.read_bytes()
        aside.unlink()
        write_atomic(target, data)
        self._fresh = {}


class ReferenceOutputs:
    """Outputs of the reference whose target log-probabilities come from the cache where the rows are unchanged.

    Args:
        batch: a whole micro-batch; what is cached is cached for all positions of its rows.
        scores: the cache.
        compute: the outputs of the whole batch.
        part: where these outputs are a part of the batch: its positions, and the outputs there.
    """

    def __init__(
        self,
        batch: Batch,
        scores: ReferenceScores,
        compute: Callable[[], Outputs],
        part: tuple[torch.Tensor, Callable[[], Outputs]] | None = None,
    ) -> None:
        self._batch, self._scores, self._whole = batch, scores, compute
        self._index: torch.Tensor | None = part[0] if part else None
        self._compute = part[1] if part else compute
        self._computed: Outputs | None = None

    @property
    def _full(self) -> Outputs:
        if self._computed is None:
            self._computed = self._compute()
        return self._computed

    @property
    def logp_N(self) -> torch.Tensor:
        """Log-probability of the target under the reference [N]."""
        keys = self._batch.keys_B
        if keys is None:
            return self._full.logp_N.detach()
        found = self._scores.get(keys)
        if found is None or found.numel() != self._batch.target_N.numel():
            found = (self._full if self._index is None else self._whole()).logp_N.detach()
            self._scores.put(keys, found, self._batch.sequence_N)
        found = found.to(self._batch.weight_N.device)
        return found if self._index is None else found[self._index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._full, name)
