"""Half fine-tuning: train a random half of the weight matrices of every block, keep the other half as it was.

    theta <- theta - step(M * grad L(theta)),   M = 1 on chosen tensors, 0 elsewhere

M is drawn per layer and category: 2 of the 4 attention matrices, 1 or 2 of the 3 feed-forward matrices (half overall),
1 of the 2 norms; a bias goes with its matrix. Embeddings, output head and final norm are trained as in full
fine-tuning unless frozen by option; a newly added head always is. Frozen tensors carry no gradient, no optimiser state
and no weight decay, and stay bit-identical. A new M is drawn for every stage of a procedure.

``level: element`` draws M entry by entry; it and parts of fused matrices are held by masking the gradient and putting
the entries back after each step, so they save no memory.

Paper: "HFT: Half Fine-Tuning for Large Language Models", 2024, arXiv 2404.18466 (ACL 2025). No official code is known;
training the embeddings by default is this library's reading of the paper.

Example::

    parameters:
      - half-ft: {fraction: 0.5, level: category}
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core.errors import UserError, did_you_mean
from luthier.core.protocols import Batch, Context
from luthier.core.registry import parameters
from luthier.core.rng import stream
from luthier.functional import tensor_selection as selection
from luthier.functional.masked_update import MaskedUpdate, forget
from luthier.functional.parameter_selector import find_fused
from luthier.functional.tensor_selection import Fused, Unit

FIXED = ("attention", "ffn", "lower", "upper", "alternate")


@parameters(
    "half-ft",
    identity={"fraction": 1.0},
    example={"fraction": 0.5},
    conflicts={
        "parameters:full": "both claim every tensor; name half-ft alone (it also trains embeddings and head)",
        "parameters:lora": "half-ft freezes base tensors, and lora has already frozen all of them; use one of the two",
    },
    paper="HFT: Half Fine-Tuning for Large Language Models, 2024, arXiv 2404.18466",
)
class HalfFineTuning:
    """Half fine-tuning: a random half of the weight matrices of every block is trained, the other half kept."""

    def __init__(
        self,
        *,
        fraction: Annotated[float, Field(gt=0, le=1, description="share of the block tensors that is trained")] = 0.5,
        level: Annotated[
            Literal["category", "layer", "model", "element"],
            Field(description="choose per category and layer, whole layers, any tensors by size, or single entries"),
        ] = "category",
        resample: Annotated[
            str,
            Field(
                pattern=r"^(stage|epoch|never|steps:[1-9][0-9]*)$",
                description="when a new choice is drawn: stage, epoch, steps:N or never",
            ),
        ] = "stage",
        balance: Annotated[
            Literal["count", "size"],
            Field(description="half by number of matrices, or the subset of that number nearest to half by size"),
        ] = "count",
        embeddings: Annotated[
            Literal["train", "freeze"], Field(description="input embeddings and language-model head")
        ] = "train",
        final_norm: Annotated[Literal["train", "freeze"], Field(description="norms outside the blocks")] = "train",
        split_fused: Annotated[
            bool, Field(description="choose q, k, v (gate, up) of a fused matrix one by one")
        ] = True,
        mask_seed: Annotated[
            int | None, Field(ge=0, description="seed of the choice; the run's seed by default")
        ] = None,
        fixed_selection: Annotated[
            str | list[str] | None,
            Field(description="attention, ffn, lower, upper, alternate, or a list of module names (* allowed)"),
        ] = None,
    ) -> None:
        if isinstance(fixed_selection, str) and fixed_selection not in FIXED:
            raise UserError(
                f"half-ft: unknown fixed_selection '{fixed_selection}'.{did_you_mean(fixed_selection, FIXED)} "
                f"Accepted: {', '.join(FIXED)}, or a list of module names."
            )
        if fixed_selection is not None and level == "element":
            raise UserError("half-ft: fixed_selection names whole tensors; remove level: element.")
        self.fraction, self.level, self.resample, self.balance = fraction, level, resample, balance
        self.embeddings, self.final_norm, self.split_fused = embeddings, final_norm, split_fused
        self.mask_seed, self.fixed_selection = mask_seed, fixed_selection
        self._model: torch.nn.Module | None = None
        self._units: list[Unit] = []
        self._fused: dict[str, Fused] = {}
        self._chosen: set[str] = set()
        self._masked = MaskedUpdate({}, who="half-ft")
        self._left: set[str] = set()
        self._shares: dict[str, float] = {}
        self._seed, self._stage, self._round = 0, 0, 0

    # -- the extension point

    def apply(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Choose the tensors and open them."""
        self._model = model
        self._fused, unknown = find_fused(model) if self.split_fused else ({}, [])
        for path in unknown:
            warnings.warn(f"half-ft: the layout of the fused {path} is not known; it is one unit.", stacklevel=2)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._units = selection.block_units(shapes, self._fused)
        if not self._units:
            first = ", ".join(list(shapes)[:3])
            raise UserError(
                "half-ft: found no transformer blocks (a numbered list of modules with attention matrices) in "
                f"{type(model).__name__}; its tensors begin with {first}. Use 'full' for this model."
            )
        if self.resample == "epoch" or self.resample.startswith("steps:"):
            self._refuse_many()
        self._seed = ctx.seed if self.mask_seed is None else self.mask_seed
        # Procedures number their training stages; a single run is stage 0.
        self._stage = 0 if self.resample == "never" else int(getattr(ctx, "stage", 0))
        self._round, self._left = 0, set()
        self._choose()
        return model

    def groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """Opened tensors only, so that frozen ones have neither weight decay nor optimiser state."""
        return [{"params": [p for p in model.parameters() if p.requires_grad]}]

    def before_step(self, batches: Sequence[Batch], ctx: Context) -> None:
        """Draw a new choice when it is due, so that it holds for this step already."""
        due = self._round
        if self.resample == "epoch":
            due = int(ctx.epoch)
        elif self.resample.startswith("steps:"):
            due = ctx.step // int(self.resample.split(":")[1])
        if due == self._round:
            return
        model = self._applied()
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        self._round = due
        self._choose()
        self._left = (self._left | trained) - {n for n, p in model.named_parameters() if p.requires_grad}
        # Tensors that leave lose the optimiser's state with the optimiser; entries that leave must lose it here.
        for name, mask in self._masked.masks.items():
            forget(ctx.optimizer, model.get_parameter(name), mask)

    def on_grad(self, model: torch.nn.Module, ctx: Context) -> None:
        """Clear the gradient of entries that are held."""
        self._masked.on_grad(model)

    def on_step(self, model: torch.nn.Module, ctx: Context) -> None:
        """Put held entries back (weight decay and old momentum move them)."""
        self._masked.on_step(model)
        ctx.log(**self._shares)

    def state(self) -> dict[str, Any]:
        """Settings, position, the chosen units, and the tensors that only an earlier choice trained."""
        named = dict(self._applied().named_parameters()) if self._left else {}
        return {
            "left": {name: named[name].detach() for name in sorted(self._left)},
            "settings": self._settings(),
            "stage": self._stage,
            "round": self._round,
            "chosen": sorted(self._chosen),
        }

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`, after :meth:`apply`.

        Raises:
            UserError: the checkpoint was made with another selection.
        """
        for key, value in self._settings().items():
            if state["settings"].get(key) != value:
                raise UserError(
                    f"half-ft: the checkpoint was trained with {key} = {state['settings'].get(key)!r}, this recipe "
                    f"says {value!r}. Resume with the same options, or start a new run."
                )
        self._stage, self._round = int(state["stage"]), int(state["round"])
        self._choose()
        if sorted(self._chosen) != list(state["chosen"]):
            raise UserError("half-ft: the checkpoint's trained tensors do not fit this model; resume the same model.")
        named = dict(self._applied().named_parameters())
        self._left = set(state["left"])
        with torch.no_grad():
            for name, value in state["left"].items():
                named[name].copy_(value)

    def export(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model itself: an ordinary checkpoint."""
        return model

    def trained_tensors(self) -> dict[str, Any]:
        """What is trained, for ``trained_tensors.json``: names, sizes, seed, level, fraction and shares by category."""
        model = self._applied()
        parts = selection.shares(self._units, lambda unit: unit.name in self._chosen)
        if self.level == "element":
            parts = {k: (round(total * self.fraction), total) for k, (_, total) in parts.items()}
        total = sum(p.numel() for p in model.parameters())
        inside = {name for unit in self._units for name in unit.tensors}
        outside = sum(p.numel() for n, p in model.named_parameters() if n not in inside and p.requires_grad)
        return {
            "stage": self._stage,
            "round": self._round,
            "seed": self._seed,
            **{k: getattr(self, k) for k in ("fraction", "level", "balance", "resample")},
            "tensors": {u.name: u.size for u in self._units if u.name in self._chosen},
            "share_by_category": {name: some / whole for name, (some, whole) in parts.items()},
            "share_of_blocks": sum(s for s, _ in parts.values()) / sum(w for _, w in parts.values()),
            "trainable_share": (sum(s for s, _ in parts.values()) + outside) / total,
        }

    def record(self) -> dict[str, Any]:
        """For the run's ``methods.json``: the tensors that are trained."""
        return self.trained_tensors()

    # -- the choice

    def _refuse_many(self) -> None:
        # DDP and FSDP fix the set of tensors they synchronise when they wrap the model.
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            raise UserError(
                f"half-ft: resample: {self.resample} changes what is trained within a run, which several processes "
                "cannot follow. Use resample: stage or never."
            )

    def _settings(self) -> dict[str, Any]:
        names = ("fraction", "level", "resample", "balance", "embeddings", "final_norm", "split_fused")
        fixed = self.fixed_selection
        return {**{n: getattr(self, n) for n in names}, "seed": self._seed, "fixed_selection": fixed}

    def _applied(self) -> torch.nn.Module:
        assert self._model is not None, "apply comes first"
        return self._model

    def _draw(self) -> set[str]:
        everything = {u.name for u in self._units}
        if self.level == "element" or (self.fraction == 1.0 and self.fixed_selection is None):
            return everything
        number = self._stage + self._round
        if isinstance(self.fixed_selection, list):
            chosen, idle = selection.matching(self._units, self.fixed_selection)
            if idle:
                known = sorted(everything)
                raise UserError(
                    f"half-ft: fixed_selection '{idle[0]}' fits no module of the blocks.{did_you_mean(idle[0], known)} "
                    f"Modules are named like {known[0]}."
                )
            return chosen
        if self.fixed_selection == "alternate":
            first = selection.select(
                self._units,
                self.fraction,
                stream(self._seed, "init", "half-ft"),
                level=self.level,
                balance=self.balance,
            )
            return first if number % 2 == 0 else everything - first
        if self.fixed_selection is not None:
            return selection.fixed(self._units, self.fixed_selection, self.fraction)
        generator = stream(self._seed, "init", "half-ft", self._stage, self._round)
        chosen = selection.select(self._units, self.fraction, generator, level=self.level, balance=self.balance)
        if self.level == "category":
            for category in ("attention", "ffn"):
                members = {u.name for u in self._units if u.category == category}
                if members and not members & chosen:
                    raise UserError(
                        f"half-ft: fraction {self.fraction:g} leaves no {category} matrix to train in any layer; "
                        "use a larger fraction, or level: element."
                    )
        return chosen

    def _choose(self) -> None:
        """Draw, set requires_grad, and set up masks for tensors that are held in part."""
        model = self._applied()
        self._chosen = self._draw()
        by_tensor: dict[str, list[Unit]] = {}
        for unit in self._units:
            for name in unit.tensors:
                by_tensor.setdefault(name, []).append(unit)
        masks: dict[str, torch.Tensor] = {}
        outside = self._outside(model)
        for name, parameter in model.named_parameters():
            units = by_tensor.get(name)
            if units is None:
                parameter.requires_grad_(outside[name])
                continue
            chosen = [u for u in units if u.name in self._chosen]
            parameter.requires_grad_(bool(chosen))
            if chosen and len(chosen) < len(units):
                masks[name] = self._rows_mask(chosen, parameter)
            elif self.level == "element" and self.fraction < 1:
                generator = stream(self._seed, "init", "half-ft", self._stage, self._round, name)
                masks[name] = torch.rand(parameter.shape, generator=generator) < self.fraction
        self._masked = MaskedUpdate(masks, who="half-ft")
        report = self.trained_tensors()
        self._shares = {"trainable_share": report["trainable_share"]}
        self._shares |= {f"trainable_share_{name}": share for name, share in report["share_by_category"].items()}

    def _rows_mask(self, chosen: list[Unit], parameter: torch.Tensor) -> torch.Tensor:
        """A mask that broadcasts over the tensor: true on the rows of the chosen parts."""
        fused = self._fused[selection.module_of(chosen[0].tensors[0])]
        dim = fused.dim if parameter.dim() > 1 else 0
        shape = [1] * parameter.dim()
        shape[dim] = parameter.shape[dim]
        mask = torch.zeros(parameter.shape[dim], dtype=torch.bool)
        for unit in chosen:
            assert unit.part is not None
            mask[fused.rows[unit.part]] = True
        return mask.view(shape)

    def _outside(self, model: torch.nn.Module) -> dict[str, bool]:
        """For tensors in no block: whether they are trained. Heads that are not the language model's always are."""
        find: Any = getattr(model, "get_output_embeddings", None)
        head = find() if find is not None else None
        words = {id(p) for p in head.parameters()} if head is not None else set()
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                words |= {id(p) for p in module.parameters()}
        found = {}
        for name, parameter in model.named_parameters():
            if id(parameter) in words or "embed" in name:
                found[name] = self.embeddings == "train"
            elif selection.is_norm(selection.module_of(name)):
                found[name] = self.final_norm == "train"
            else:
                found[name] = True
        return found
