"""Weight operations after training: tensor by tensor from shards to shards, the result opened again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from luthier.core.errors import UserError
from luthier.core.protocols import Batch, Outputs
from luthier.core.store import atomic_folder, write_json
from luthier.models.info import read_json
from luthier.models.shards import Shards, ShardWriter
from luthier.runs.measure import batches, quick_loss


class ModelSource:
    """A model folder as a weight operation sees it.

    Args:
        folder: a folder in transformers' format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._shards = folder, Shards(folder)

    def names(self) -> list[str]:
        """Names of its tensors."""
        return list(self._shards.names())

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, read now."""
        return self._shards.tensor(name)

    @cached_property
    def base_fingerprint(self) -> str | None:
        """Hash of the base it was fine-tuned from, where its run says so."""
        manifest = self.folder.parent / "manifest.json"
        return read_json(manifest).get("model", {}).get("fingerprint") if manifest.is_file() else None


class WeightContext:
    """What a weight operation may ask while it prepares: scores and gradients on held-out rows.

    Args:
        shop: the run.
        model: a model of the right architecture, whose weights are replaced as needed.
    """

    def __init__(self, shop: Any, model: Any) -> None:
        self.shop, self.model, self.seed = shop, model, shop.seed
        self.device = shop.processes.device
        self.session = shop.session(model)

    @property
    def _rows(self) -> Any:
        source = self.shop.data.select or self.shop.data.test
        if source is None:
            raise UserError(
                "this weight operation chooses by a score on held-out rows: name some under data.select (or data.test)."
            )
        return source.prepared

    def batches(self) -> Iterator[Batch]:
        """Held-out batches."""
        return batches(self.session, self._rows, self.shop.plan.recipe.evaluation.batch_rows)

    def evaluate(self, tensors: Mapping[str, torch.Tensor]) -> float:
        """Accuracy of the model with these weights on held-out rows; for language models the negative loss."""
        own = self.model.state_dict()
        with torch.no_grad():
            for name in tensors:
                own[name].copy_(tensors[name])
        found = quick_loss(self.session, self._rows, self.shop.plan.recipe.evaluation.batch_rows)
        return found.get("accuracy", -found["loss"])

    def forward(self, batch: Batch, *, parameters: Mapping[str, torch.Tensor], grad: bool = True) -> Outputs:
        """A forward pass under other weights."""
        return self.session.forward(batch, grad=grad, parameters=parameters)


def apply_weights(plan: Any, shop: Any, folder: Path) -> Any:
    """Run the recipe's weight operations on ``folder/model`` in order; the trained weights stay in ``model-trained``.

    Returns:
        The resulting model, opened.

    Raises:
        UserError: the run left an adapter, or an operation's sources do not fit.
    """
    from luthier.models.load import load
    from luthier.models.save import write_processor

    target = folder / "model"
    if (target / "adapter_config.json").exists():
        raise UserError(
            "weight operations work on whole models, and this run left an adapter: merge it first "
            "(parameters: [{lora: {merge: true}}]) or leave `weights` out."
        )
    trained = folder / "model-trained"
    if not trained.exists():
        shutil.copytree(target, trained)
    tuned = trained
    for number, choice in enumerate(plan.weights):
        op = choice.build()
        further = getattr(op, "sources", {})
        sources = {"base": ModelSource(shop.loaded.base or shop.loaded.folder), "tuned": ModelSource(tuned)}
        sources |= {label: ModelSource(Path(place)) for label, place in further.items()}
        context = WeightContext(shop, load(tuned, task=plan.task).model)
        if hasattr(op, "prepare"):
            op.prepare(sources, context)
        combine = op.tensor if hasattr(op, "tensor") else op
        aside = folder / f".weights-{number}"
        with atomic_folder(aside) as made, ShardWriter(made) as writer:
            for name in sources["tuned"].names():
                tensors = {label: s.tensor(name) for label, s in sources.items() if name in set(s.names())}
                writer.add(name, combine(name, tensors, context))
            for file in tuned.iterdir():
                if file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
                    shutil.copyfile(file, made / file.name)
            write_processor(shop.loaded.processor, made)
        if recipe := getattr(op, "recipe", None):
            write_json(folder / f"weights-{choice.slug}.json", recipe)
        tuned = aside
    with atomic_folder(target) as made:
        shutil.copytree(tuned, made, dirs_exist_ok=True)
    for number in range(len(plan.weights)):
        shutil.rmtree(folder / f".weights-{number}", ignore_errors=True)
    return load(target, task=plan.task).model
