"""What an analysis may ask of finished runs: their weights, and what base and tuned model predict."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from luthier.core import rng
from luthier.core.protocols import Batch, Outputs
from luthier.models.sources import ModelSource
from luthier.runs.measure import batches


class AnalysisContext:
    """The context of analyses at the end of a run.

    Args:
        shop: the run.
    """

    def __init__(self, shop: Any) -> None:
        self.shop, self.plan, self.data, self.seed = shop, shop.plan, shop.data, shop.seed
        self._merged: dict[Path, Any] = {}

    @cached_property
    def base(self) -> Any:
        """The base as it was: opened anew, because training changed the model in memory."""
        from luthier.runs.workshop import open_model

        return self.shop.session(open_model(self.plan, self.data.labels).model)

    def rng(self, name: str, *keys: object) -> torch.Generator:
        """A generator of the named stream."""
        return rng.stream(self.seed, name, *keys)

    def score(self, prepared: Any, model: str = "base") -> Any:
        """Target log-probabilities of prepared rows under the base, one tensor per row."""
        assert model == "base", "analyses score with the base; tuned models come through `both`"
        return self.base.score(prepared)

    def sources(self, run: Any) -> Mapping[str, Any]:
        """``{"base", "tuned"}``, each with ``names()`` and ``tensor(name)``; an adapter is merged first."""
        folder = Path(run.folder) / "model"
        if (folder / "adapter_config.json").exists():
            folder = self._merge(folder)
        base = self.shop.loaded.base or self.shop.loaded.folder
        return {"base": ModelSource(base), "tuned": ModelSource(folder)}

    def _merge(self, folder: Path) -> Path:
        from luthier.models.merge import merge

        if folder not in self._merged:
            self._merged[folder] = tempfile.TemporaryDirectory()
            merge(folder, Path(self._merged[folder].name) / "model")
        return Path(self._merged[folder].name) / "model"

    def both(self, run: Any) -> Iterator[tuple[Batch, Outputs, Outputs]]:
        """(batch, outputs of the base, outputs of the tuned model) over held-out rows; nothing without test rows."""
        if self.data.test is None:
            return
        tuned = self.shop.session(run.model)
        run.model.eval()
        for batch in batches(self.base, self.data.test.prepared, self.plan.recipe.evaluation.batch_rows):
            yield batch, self.base.evaluate_batch(batch, ("logp",)), tuned.evaluate_batch(batch, ("logp",))
