"""Sparse fine-tuning of a masked backbone: the difference to the base is a small delta that adds to others.

    theta <- theta - step(b * (grad L + l1/N sign(theta - theta0)))     b: mask over the backbone, theta0: the start

Of the backbone only the entries with b = 1 move; a new head is trained in full. Layer norms and the output matrix of a
language model are frozen (a tied one is first given a copy of its own, so that the delta of the input embedding does
not move the output). The run keeps the difference in ``delta/``, with the fingerprint of its base.

With the procedure of the same name the mask is found by training: a full phase without a mask, the entries that changed
most, everything wound back, a sparse phase. Alone this trains a random mask of the same size, which is the paper's
control. Weight decay does not touch masked entries, and clipping sees masked gradients.

Paper: "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", ACL 2022, arXiv 2110.07560; released code
cambridgeltl/composable-sft. The L1 term is exact in its gradient and is added once per optimiser step, as there.

Example::

    parameters: [{composable-sparse-ft: {proportion: 0.08}}]
    procedure: composable-sparse-ft
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Context
from luthier.core.registry import TOKEN_TASKS, parameters
from luthier.functional.differences import Difference, difference
from luthier.functional.masked_update import MaskedUpdate, top_k_mask
from luthier.functional.parameter_selector import Site, choose, sites
from luthier.functional.tensor_selection import is_norm
from luthier.functional.tying import untie

SLUG = "composable-sparse-ft"
# Smaller differences are left out of the delta.
_TOLERANCE = 1e-7


def l1_gradient(theta: torch.Tensor, theta0: torch.Tensor, coefficient: float, entries: int) -> torch.Tensor:
    """Gradient of ``coefficient / entries * sum |theta - theta0|``; zero where nothing has moved."""
    return torch.sign(theta - theta0) * (coefficient / entries)


def select(
    tuned: Mapping[str, torch.Tensor],
    start: Mapping[str, torch.Tensor],
    k: int,
    taken: Mapping[str, torch.Tensor] | None = None,
    *,
    per_tensor: bool = False,
) -> dict[str, torch.Tensor]:
    """The mask with ``k`` more entries, those with the largest absolute change from the start.

    Args:
        tuned: the tensors after the full phase.
        start: the same at the start.
        k: entries to add.
        taken: the mask so far.
        per_tensor: the same share of every tensor, instead of the largest over all.
    """
    change = {name: (tuned[name].detach() - start[name].detach().to(tuned[name])).abs().cpu() for name in start}
    if not per_tensor:
        return top_k_mask(change, k, taken)
    total = sum(c.numel() for c in change.values())
    masks: dict[str, torch.Tensor] = {}
    for name, values in change.items():
        own = None if taken is None else {name: taken[name]}
        masks |= top_k_mask({name: values}, k * values.numel() // total, own)
    return masks


@parameters(
    "composable-sparse-ft",
    identity={"proportion": 1.0, "freeze_layer_norms": False, "freeze_decoder": False},
    example={"proportion": 0.1},
    conflicts={
        "parameters:full": "full trains every entry, which would leave the mask without meaning",
        "parameters:lora": "the delta would be of the wrong object: lora keeps its change beside the weights",
        "parameters:half-ft": "both claim the backbone; restrict this method with trainable instead",
        "parameters:attention": "both claim attention matrices; use trainable: [category:attention] instead",
        "parameters:spiel": "both are sparse fine-tuning of the same matrices; use one of the two",
        "sharding:fsdp2": "single entries of sharded tensors cannot be held",
    },
    paper="Composable Sparse Fine-Tuning for Cross-Lingual Transfer, ACL 2022, arXiv 2110.07560",
)
class ComposableSparseFineTuning:
    """Sparse fine-tuning of the backbone under a mask, whose deltas to one base can be added to each other."""

    def __init__(
        self,
        *,
        proportion: Annotated[
            float | None, Field(gt=0, le=1, description="share of the maskable entries that is tuned; 0.01 by default")
        ] = None,
        num_entries: Annotated[int | None, Field(ge=1, description="number of entries that is tuned")] = None,
        trainable: Annotated[
            list[str] | None, Field(min_length=1, description="a selection that restricts the maskable tensors")
        ] = None,
        freeze_layer_norms: Annotated[bool, Field(description="keep norms as they are")] = True,
        freeze_embeddings: Annotated[bool, Field(description="keep input embeddings as they are")] = False,
        freeze_head: Annotated[bool, Field(description="keep everything outside the backbone as it is")] = False,
        freeze_decoder: Annotated[bool, Field(description="keep a language model's output matrix as it is")] = True,
        untie: Annotated[
            bool, Field(description="give a tied output matrix a copy of its own; else the delta moves both")
        ] = True,
        full_l1: Annotated[float, Field(ge=0, description="L1 pull towards the start in the full phase")] = 0.0,
        sparse_l1: Annotated[float, Field(ge=0, description="L1 pull towards the start in the sparse phase")] = 0.0,
        l1_scope: Annotated[Literal["trained", "maskable"], Field(description="what the L1 pull acts on")] = "trained",
    ) -> None:
        if proportion is not None and num_entries is not None:
            raise UserError(f"{SLUG}: proportion and num_entries both state the budget; keep one.")
        self.proportion = 0.01 if proportion is None and num_entries is None else proportion
        self.num_entries, self.trainable = num_entries, trainable
        self.freeze_layer_norms, self.freeze_embeddings = freeze_layer_norms, freeze_embeddings
        self.freeze_head, self.freeze_decoder, self.untie = freeze_head, freeze_decoder, untie
        self.l1 = {"full": full_l1, "sparse": sparse_l1}
        self.l1_scope = l1_scope
        self.phase = "sparse"
        self.maskable: list[str] = []
        self.heads: list[str] = []
        self._theta0: dict[str, torch.Tensor] = {}
        self._masked = MaskedUpdate({}, who=SLUG)
        self._tuned, self._prune = 0, False

    # -- what is trained

    def divide(self, model: torch.nn.Module, task: str) -> tuple[list[str], list[str]]:
        """Names of the maskable tensors and of those trained in full.

        Raises:
            UserError: nothing is maskable.
        """
        every = sites(model)
        find: Any = getattr(model, "get_output_embeddings", None)
        output = find() if find is not None else None
        decoder = output.weight if output is not None and task in TOKEN_TASKS else None
        allowed = set(choose(every, self.trainable, where=f"{SLUG}: trainable").names) if self.trainable else None
        maskable, heads = [], []
        for site in every:
            if self._frozen(site):
                continue
            if site.category != "head":
                if allowed is None or site.name in allowed:
                    maskable.append(site.name)
            elif not self.freeze_head and not (self.freeze_decoder and model.get_parameter(site.name) is decoder):
                heads.append(site.name)
        if not maskable:
            raise UserError(f"{SLUG}: trainable and the freeze_ options leave no tensor of the backbone to mask.")
        return maskable, heads

    def budget(self, model: torch.nn.Module, maskable: list[str]) -> int:
        """How many entries are tuned.

        Raises:
            UserError: none, or more than there are.
        """
        there = sum(model.get_parameter(name).numel() for name in maskable)
        wanted = self.num_entries if self.num_entries is not None else int((self.proportion or 0.0) * there)
        if wanted > there:
            raise UserError(f"{SLUG}: num_entries is {wanted:,}, but only {there:,} entries can be masked.")
        if wanted == 0:
            raise UserError(f"{SLUG}: proportion {self.proportion} of {there:,} entries is none; raise it.")
        return wanted

    def _frozen(self, site: Site) -> bool:
        if self.freeze_layer_norms and is_norm(site.module):
            return True
        return self.freeze_embeddings and site.category == "embedding"

    # -- the extension point

    def apply(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Open the maskable tensors and the head, at the values and under the mask that the procedure gives."""
        given = getattr(ctx, "given", {}).get(SLUG, {})
        if self.untie:
            untie(model)
        self.maskable, self.heads = self.divide(model, str(getattr(ctx.task, "name", ctx.task)))
        budget = self.budget(model, self.maskable)
        named = {name: model.get_parameter(name) for name in (*self.maskable, *self.heads)}
        self._theta0 = {name: parameter.detach().clone() for name, parameter in named.items()}
        self.phase, self._prune = given.get("phase", "sparse"), bool(given.get("prune"))
        with torch.no_grad():
            for name, value in given.get("start", {}).items():
                named[name].copy_(value)
        for parameter in named.values():
            parameter.requires_grad_(True)
        masks: dict[str, torch.Tensor] = {}
        self._tuned = sum(self._theta0[name].numel() for name in self.maskable)
        if self.phase == "sparse" and budget < self._tuned:
            masks = given["mask"] if "mask" in given else self._random_mask(budget, ctx)
            self._tuned = sum(int(mask.sum()) for mask in masks.values())
        self._masked = MaskedUpdate(masks, {name: self._theta0[name] for name in masks}, who=SLUG)
        return model

    def _random_mask(self, budget: int, ctx: Context) -> dict[str, torch.Tensor]:
        drawn = {
            name: torch.rand(self._theta0[name].shape, generator=ctx.rng("init", SLUG, name)) for name in self.maskable
        }
        return top_k_mask(drawn, budget)

    def groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """One group of everything that was opened."""
        return [{"params": [p for p in model.parameters() if p.requires_grad]}]

    def on_grad(self, model: torch.nn.Module, ctx: Context) -> None:
        """Add the L1 pull, then clear the gradient of masked entries."""
        if coefficient := self.l1[self.phase]:
            entries, penalty = sum(p.numel() for p in model.parameters()), 0.0
            for name in self.maskable if self.l1_scope == "maskable" else self._theta0:
                parameter = model.get_parameter(name)
                theta0 = self._theta0[name] = self._theta0[name].to(parameter.device)
                if parameter.grad is not None:
                    parameter.grad.add_(l1_gradient(parameter.detach(), theta0, coefficient, entries))
                penalty += float((parameter.detach() - theta0).abs().sum()) * coefficient / entries
            ctx.log(l1=penalty)
        self._masked.on_grad(model)

    def on_step(self, model: torch.nn.Module, ctx: Context) -> None:
        """Masked entries are at their start, whatever the optimiser did; the control prunes after its last step."""
        self._masked.on_step(model)
        if self._prune and ctx.step + 1 == ctx.total_steps:
            tuned = {name: model.get_parameter(name) for name in self.maskable}
            theta0 = {name: self._theta0[name] for name in self.maskable}
            pruned = MaskedUpdate(select(tuned, theta0, self.budget(model, self.maskable)), theta0)
            pruned.on_step(model)
        ctx.log(tuned_entries=self._tuned)

    def state(self) -> dict[str, Any]:
        """What the checkpoint was made with; mask and start come from the procedure or the seed."""
        return {"phase": self.phase, "tuned": self._tuned, "maskable": list(self.maskable)}

    def load(self, state: dict[str, Any]) -> None:
        """Refuse the checkpoint of another selection.

        Raises:
            UserError: other tensors, or another number of entries.
        """
        if (state["phase"], int(state["tuned"]), list(state["maskable"])) != (self.phase, self._tuned, self.maskable):
            raise UserError(
                f"{SLUG}: the checkpoint tunes {int(state['tuned']):,} entries of {len(state['maskable'])} tensors, "
                f"this recipe {self._tuned:,} of {len(self.maskable)}. Resume with the same options."
            )

    def export(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model itself: an ordinary checkpoint."""
        return model

    def delta(self, model: torch.nn.Module) -> tuple[dict[str, Difference], dict[str, torch.Tensor]]:
        """The difference of the backbone to its start, and the head with its full values."""
        found = {
            name: difference(model.get_parameter(name), self._theta0[name], tolerance=_TOLERANCE)
            for name in self.maskable
        }
        parts = {name: part for name, part in found.items() if part is not None}
        return parts, {name: model.get_parameter(name).detach() for name in self.heads}

    def record(self) -> dict[str, Any]:
        """Counts by tensor."""
        chosen = {name: int(mask.sum()) for name, mask in self._masked.masks.items()}
        return {"phase": self.phase, "tuned": self._tuned, "head": self.heads, "entries": chosen}
