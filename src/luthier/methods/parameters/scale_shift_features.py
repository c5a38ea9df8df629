"""Scale and shift features: one trained scale and shift per channel behind each operation, folded into the weights.

    y_c = scale_c * op(x)_c + shift_c

for the patch embedding, every norm, and every linear map (and convolution) of the blocks, in its C output channels; the
base is frozen, a classification head is trained in full. Nothing stands behind activations, softmax or residual sums.
After training the affine is folded into the operation's weight and bias, exactly (up to rounding), so the saved model
is a plain one of the same architecture.

The axis of the channels follows from the type of the operation; the released code guesses it from sizes. The start is
scale ~ N(1, 0.02^2), shift ~ N(0, 0.02^2) as in the released code; ``init: identity`` starts at the base exactly and is
better for language models. Scales and shifts are not decayed (nor are they in the released optimiser setup);
``weight_decay`` decays scale - 1 and shift.

For text (not in the paper): every linear map of the blocks, every norm, and the sum of the embedding tables where
positions are learned; with rotary positions there is no such site. A shift needs a bias to go to. Where the
architecture cannot have one (RMSNorm; the feed-forward layers of Qwen) the site is scaled only, and the run's
``methods.json`` says so; behind an RMSNorm nothing is lost where the maps that read it have shifts of their own.

Paper: "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", 2022, arXiv 2210.08823; released
code dongzelian/SSF.

Example::

    parameters:
      - scale-shift-features: {init: identity}
    training: {learning_rate: 1.0e-2}
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Context
from luthier.core.registry import parameters
from luthier.functional.affine_sites import SITES, block_of, find_sites, possible_biases, shared, tables
from luthier.methods.parameters._adapters import FREEZES, Adapter, alone, common, drawing

Site = Literal["embed", "norm", "qkv", "proj", "fc1", "fc2", "conv", "final"]
NOISE = 0.02


def without_bias(model: torch.nn.Module, paths: list[str], biases: dict[str, str]) -> list[str]:
    """The operations of a list to which no bias can be added, so that a shift could not be folded."""
    kept = []
    for path in paths:
        module = model.get_submodule(path)
        has = isinstance(module, torch.nn.Embedding) or getattr(module, "bias", None) is not None
        if not has and path not in biases:
            kept.append(path)
    return kept


@parameters(
    "scale-shift-features",
    example={"init": "identity"},
    conflicts={**FREEZES, **alone("scale-shift-features")},
    paper="Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning, 2022, arXiv 2210.08823",
)
class ScaleShiftFeatures(Adapter):
    """Scale and shift features: one scale and shift per channel behind each operation, folded into plain weights."""

    slug, marks = "scale-shift-features", ("scale_shift_features_",)

    def __init__(
        self,
        *,
        sites: Annotated[
            list[Site] | None, Field(min_length=1, description="kinds of operations that get one; all by default")
        ] = None,
        layers: Annotated[
            list[int] | None,
            Field(min_length=2, max_length=2, description="first and last block, from 0; all by default"),
        ] = None,
        scale_only: Annotated[bool, Field(description="no shifts")] = False,
        shift_only: Annotated[bool, Field(description="no scales")] = False,
        init: Annotated[
            Literal["normal", "identity"], Field(description="start with a noise of 0.02, or exactly at the base")
        ] = "normal",
        weight_decay: Annotated[
            float, Field(ge=0, description="decay of scale - 1 and of the shift; the head's is the training section's")
        ] = 0.0,
        merge: Annotated[bool, Field(description="save the plain model; false saves an adapter for Luthier")] = True,
    ) -> None:
        if scale_only and shift_only:
            raise UserError("scale-shift-features: scale_only and shift_only leave nothing to train; set one of them.")
        if layers is not None and not 0 <= layers[0] <= layers[1]:
            raise UserError(f"scale-shift-features: layers: {layers} is no range; give the first and the last block.")
        self.sites, self.layers, self.scale, self.shift = sites, layers, not shift_only, not scale_only
        self.init, self.weight_decay, self.merge = init, weight_decay, merge
        self._record: dict[str, Any] = {}

    @staticmethod
    def adapter_type() -> Any:
        """Make the adapter type known to peft; its configuration class."""
        from luthier.models.tuners.scale_shift_features import ScaleShiftConfig

        return ScaleShiftConfig

    def apply(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """The model with affines, drawn from the ``init`` stream; only they (and a new head) are open.

        Raises:
            UserError: there is no such site or block, or one module stands in two places.
        """
        import peft

        chosen = self._chosen(model)
        if pairs := shared(model, chosen):
            raise UserError(
                f"scale-shift-features: '{pairs[0][0]}' and '{pairs[0][1]}' are one module, and an affine behind only "
                "one of its uses could not be folded into its weights. Leave its site out of `sites`."
            )
        biases = possible_biases(model) if self.shift else {}
        unshifted = without_bias(model, list(chosen), biases) if self.shift else list(chosen)
        if not self.scale:
            chosen = {path: site for path, site in chosen.items() if path not in unshifted}
        if not chosen:
            raise UserError(
                f"scale-shift-features: shift_only: no chosen operation of {type(model).__name__} can have a bias."
            )
        summed = tables(model)
        followers = {path: summed[0] for path in summed[1:] if summed[0] in chosen and self.scale}
        config = self.adapter_type()(
            **common(model, ctx, merge=self.slug if self.merge else ""),
            target_modules=[*chosen, *followers],
            scale=self.scale,
            unshifted=unshifted,
            followers=followers,
            bias_flags=sorted({biases[path] for path in chosen if path in biases and path not in unshifted}),
            spread=NOISE if self.init == "normal" else 0.0,
        )
        with drawing(ctx, self.slug):
            adapted = peft.get_peft_model(model, config)
        self._record = {"sites": chosen, "scaled_only": sorted(set(unshifted) & set(chosen)) if self.shift else []}
        return adapted

    def groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """The affines with their own decay, and the head."""
        head = [p for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" in n]
        affines = [p for n, p in model.named_parameters() if p.requires_grad and self.marks[0] in n]
        return [{"params": affines, "weight_decay": self.weight_decay}, {"params": head}]

    def record(self) -> dict[str, Any]:
        """For the run's ``methods.json``: the operations by kind, and those that could only be scaled."""
        return self._record

    def _chosen(self, model: torch.nn.Module) -> dict[str, str]:
        found = find_sites(model)
        there = [site for site in SITES if site in found.values()]
        for site in self.sites or ():
            if site not in there:
                raise UserError(
                    f"scale-shift-features: sites: {type(model).__name__} has no '{site}'. It has: {', '.join(there)}."
                )
        if not there:
            raise UserError(f"scale-shift-features: found no operations to scale in {type(model).__name__}.")
        found = {path: site for path, site in found.items() if not self.sites or site in self.sites}
        if self.layers is None:
            return found
        blocks = list(dict.fromkeys(block_of(p) for p, s in find_sites(model).items() if s in ("qkv", "fc1")))
        if self.layers[1] >= len(blocks):
            raise UserError(f"scale-shift-features: layers: there are {len(blocks)} blocks, so the last is "
                            f"{len(blocks) - 1}, not {self.layers[1]}.")  # fmt: skip
        wanted = set(blocks[self.layers[0] : self.layers[1] + 1])
        return {path: site for path, site in found.items() if block_of(path) in wanted}
