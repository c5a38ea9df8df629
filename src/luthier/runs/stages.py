"""Data stages: run once, their rows kept on disk by the content of all that decides them."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luthier import functional
from luthier.core import rng
from luthier.core.errors import UserError
from luthier.core.protocols import Completion
from luthier.core.store import Store, content_hash, write_json
from luthier.runs.procedure import row_likelihood

STAGE_BATCH = 1000


class StageContext:
    """What a data stage may ask: random streams, and the base model, which is opened only when it is used.

    Args:
        plan: the plan.
        renderer: the run's rendering path.
    """

    def __init__(self, plan: Any, renderer: Any) -> None:
        self.plan, self.renderer = plan, renderer
        # Where a stage writes what it found, for the user to read; set while it runs.
        self.folder: Path | None = None
        self.seed, self.task, self.processor = plan.recipe.seed, plan.task, renderer.processor

    def rng(self, name: str, *keys: object) -> torch.Generator:
        """A generator of the named stream."""
        return rng.stream(self.seed, name, *keys)

    def _shop(self, loaded: Any) -> Any:
        from luthier.runs.setup import Data
        from luthier.runs.workshop import Workshop

        return Workshop(self.plan, Data(train=None, renderer=self.renderer), loaded, Path(self.plan.recipe.output))

    @cached_property
    def shop(self) -> Any:
        """The base model with its decoder."""
        from luthier.runs.workshop import open_model

        return self._shop(open_model(self.plan))

    def other(self, spec: str, *, dtype: str = "float32") -> Any:
        """A session over another model: its ``processor``, ``task`` and ``forward``.

        Args:
            spec: a folder, a hub id, or one of the lab.
            dtype: of the weights.
        """
        from luthier.models.load import load

        loaded = load(spec, task=self.task, dtype=dtype)
        return self._shop(loaded).session(loaded.model.eval().requires_grad_(False))

    @staticmethod
    def fingerprint(spec: str) -> str:
        """A hash of a model's files."""
        from luthier.models.load import fingerprint, resolve

        return fingerprint(resolve(spec))

    def generate(
        self,
        prompts: Sequence[Mapping[str, Any] | Sequence[int]],
        *,
        samples: int = 1,
        decoding: str | None = None,
        **options: Any,
    ) -> list[list[Completion]]:
        """Completions of the base for canonical rows or token ids, by the recipe's decoder or the one named."""
        return self.shop.generate(prompts, samples=samples, decoding=decoding, **options)

    def score(self, prepared: Any) -> list[torch.Tensor]:
        """Target log-probabilities of prepared rows under the base, one tensor per row."""
        return self.shop.score(prepared)

    def row_likelihood(
        self, rows: Sequence[Mapping[str, Any]], *, ends: bool = True, last: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sum of target log-probabilities (nats) and number of targets of canonical rows under the base, both [R].

        Rendered and masked as in training; 0 of 0 for a row that is too long or has no target. Kept on disk, so that
        a stage that goes through its rows block by block continues where it was killed.

        Args:
            rows: canonical rows.
            ends: whether the tokens that end an answer count.
            last: only the last answer of a conversation counts.
        """
        return row_likelihood(self.shop, rows, ends=ends, last=last)

    def judge(self, rows: Any, completions: Any, verifier: Any = None) -> list[float | None]:
        """One score per completion by a verifier as a recipe writes it, or the recipe's own."""
        return self.shop.judge(rows, completions, verifier)

    def identity(self) -> dict[str, str]:
        """Which base, in which type, and which rendering give the numbers, as hashes and names."""
        loaded = self.shop.loaded
        kind = str(next(loaded.model.parameters()).dtype).removeprefix("torch.")
        return {"model": loaded.fingerprint, "dtype": kind, "rendering": self.renderer.fingerprint}

    def report(self, values: Any, name: str = "report.json") -> None:
        """Keep JSON beside the rows; the run shows it under ``data/``."""
        assert self.folder is not None
        write_json(self.folder / name, values)


def run_stage(rows: Any, choice: Any, plan: Any, renderer: Any, folder: Path | None = None) -> Any:
    """The rows after a data stage, kept on disk by the content of rows, options and the method's code.

    What the stage wrote besides rows is copied to ``data/<stage>`` of the run's folder, if one is given.

    Raises:
        UserError: the stage leaves no row.
    """
    import pyarrow as pa

    from luthier.data.layouts import SCHEMA
    from luthier.data.read import Rows, open_arrow
    from luthier.models.load import fingerprint, resolve

    # Of the code: the stage's own file, and the pure functions that any of them may stand on.
    own = Path(inspect.getsourcefile(choice.method.target) or "")
    code = [own, *sorted(Path(functional.__path__[0]).glob("*.py"))]
    # What a stage makes may depend on the base model and on how rows are rendered for it.
    model = [plan.recipe.model.model_dump(), fingerprint(resolve(plan.recipe.model.id)), renderer.fingerprint]
    stage, context = choice.build(), StageContext(plan, renderer)
    further = list(stage.reads(context)) if hasattr(stage, "reads") else []
    key = content_hash(rows.fingerprint, choice.slug, choice.options, plan.recipe.seed, model, further, *code)

    def make(folder: Path) -> None:
        context.folder = folder
        found = stage.run(rows.dataset, context) if hasattr(stage, "run") else stage(rows.dataset, context)
        with pa.ipc.new_stream(folder / "rows.arrow", SCHEMA) as writer:
            for table in found.with_format("arrow").iter(STAGE_BATCH):
                writer.write_table(table.cast(SCHEMA))

    made = Store().get_or_make("stages", key, make)
    if folder is not None:
        for file in made.iterdir():
            if file.name != "rows.arrow":
                (folder / "data" / choice.slug).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, folder / "data" / choice.slug / file.name)
    dataset = open_arrow(made / "rows.arrow", key)
    if len(dataset) == 0:
        raise UserError(f"the data stage '{choice.slug}' leaves no row to train on.", where=choice.place)
    report = replace(rows.report, rows=len(dataset), stages=[*rows.report.stages, f"{choice.slug}: {len(dataset):,}"])
    return Rows(dataset, rows.layout, rows.labels, report, key)
