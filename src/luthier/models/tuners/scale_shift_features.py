"""The adapter type of ``scale-shift-features``: a scale and a shift per channel behind chosen operations.

Stored is what is added: the scale minus 1, so that decay draws towards the base, and the shift.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig

from luthier.functional.affine_sites import affine, channels, folded, norm_offset, unfolded
from luthier.models.peft_types import SiteLayer, Tuner, register

SCALE, SHIFT = "scale_shift_features_scale", "scale_shift_features_shift"


@dataclass
class ScaleShiftConfig(PeftConfig):
    """Where the affines are.

    Attributes:
        target_modules: paths of the operations.
        modules_to_save: heads trained in full.
        scale: whether there are scales.
        unshifted: paths of operations without a shift.
        followers: paths of embedding tables that are scaled as another operation is, and not shifted -> its path.
        bias_flags: settings of the model's configuration that the merged weights need.
        spread: standard deviation of the start.
    """

    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    scale: bool = True
    unshifted: list[str] = field(default_factory=list)
    followers: dict[str, str] = field(default_factory=dict)
    bias_flags: list[str] = field(default_factory=list)
    spread: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE


class ScaleShiftLayer(SiteLayer):
    """An operation and the affine behind it."""

    adapter_layer_names = (SCALE, SHIFT)
    leader: tuple[ScaleShiftLayer, ...] = ()
    made_bias = False

    def update_layer(self, adapter_name: str, config: ScaleShiftConfig) -> None:
        """Draw scale and shift from torch's global generator, around the identity."""
        base = self.get_base_layer()
        size, self.axis = channels(base, self.key)
        wanted = {SCALE: config.scale, SHIFT: self.key not in config.unshifted}
        for name, there in wanted.items():
            if there and self.key not in config.followers:
                dtype = torch.promote_types(base.weight.dtype, torch.float32)
                value = torch.randn(size, dtype=dtype, device=base.weight.device) * config.spread
                getattr(self, name)[adapter_name] = torch.nn.Parameter(value)
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    def values(self, adapter_name: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(scale, shift) of an adapter, None where it has none."""
        if self.leader:
            return self.leader[0].values(adapter_name)[0], None
        scale, shift = (getattr(self, name) for name in (SCALE, SHIFT))
        return 1.0 + scale[adapter_name] if adapter_name in scale else None, shift.get(adapter_name)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The operation's output, scaled and shifted."""
        name = self.acting
        y = self.base_layer(*args, **kwargs)
        return y if name is None else affine(y, *self.values(name), self.axis)

    @torch.no_grad()
    def fold(self, adapter_name: str, sign: int) -> None:
        """Into the operation's weight and bias (made where there is none), or out of them."""
        base = self.get_base_layer()
        scale_C, shift_C = self.values(adapter_name)
        embedding = isinstance(base, torch.nn.Embedding)
        dim = 1 if embedding or type(base).__name__ == "Conv1D" else 0
        # A table has no bias: what is added to each of its rows is added to its weight.
        bias = None if embedding else getattr(base, "bias", None)
        offset = norm_offset(base) if "Norm" in type(base).__name__ else 0.0
        change = folded if sign > 0 else unfolded
        weight = base.weight
        if embedding and sign < 0 and shift_C is not None:
            weight = weight - shift_C.to(weight.dtype)
        weight, made = change(weight, bias, scale_C, None if embedding else shift_C, dim=dim, offset=offset)
        if embedding and sign > 0 and shift_C is not None:
            weight = weight + shift_C.to(weight.dtype)
        base.weight.data = weight.to(base.weight.dtype)
        if made is not None and bias is None:
            base.bias, self.made_bias = torch.nn.Parameter(made, requires_grad=False), True
        elif sign < 0 and self.made_bias:
            base.bias = None
        elif made is not None:
            base.bias.data = made


class ScaleShiftTuner(Tuner):
    """Puts the affines where the configuration says, and takes them into the weights."""

    prefix = "scale_shift_features_"
    tuner_layer_cls = ScaleShiftLayer

    def _post_injection_hook(self, model: torch.nn.Module, config: ScaleShiftConfig, adapter_name: str) -> None:
        for path, leader in config.followers.items():
            # In a tuple the leader is no submodule, so its tensors are there once.
            site: Any = model.get_submodule(path)
            site.leader = (model.get_submodule(leader),)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """The plain model; its configuration says which biases it now has, and those nothing was added to are zero."""
        flags = [flag for config in self.peft_config.values() for flag in config.bias_flags]
        merged = super().merge_and_unload(*args, **kwargs)
        for flag in flags:
            setattr(merged.config, flag, True)
        if flags:
            with torch.device("meta"):
                like = type(merged)(merged.config)
            own = dict(merged.named_modules())
            for path, module in like.named_modules():
                if getattr(module, "bias", None) is not None and own[path].bias is None:
                    weight = own[path].weight
                    own[path].bias = torch.nn.Parameter(weight.new_zeros(weight.shape[0]), requires_grad=False)
        return merged


PEFT_TYPE = register("scale-shift-features", ScaleShiftConfig, ScaleShiftTuner)
