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
    """Outputs of the reference whose target log-probabilities come from the cache where the rows are unchanged."""

    def __init__(self, batch: Batch, scores: ReferenceScores, compute: Callable[[], Outputs]) -> None:
        self._batch, self._scores, self._compute = batch, scores, compute
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
        if keys is not None and self._computed is None:
            found = self._scores.get(keys)
            if found is not None and found.numel() == self._batch.target_N.numel():
                return found.to(self._batch.weight_N.device)
        logp_N = self._full.logp_N.detach()
        if keys is not None:
            self._scores.put(keys, logp_N, self._batch.sequence_N)
        return logp_N

    def __getattr__(self, name: str) -> Any:
        return getattr(self._full, name)
