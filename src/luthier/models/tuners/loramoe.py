"""The adapter type of ``loramoe``: low-rank experts and a router beside a linear map."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from torch.nn import functional

from luthier.functional.expert_routing import soft_routing
from luthier.functional.recording import recording
from luthier.models.peft_types import SiteLayer, Tuner, register


@dataclass
class LoRAMoEConfig(PeftConfig):
    """The experts.

    Attributes:
        target_modules: the linear maps.
        modules_to_save: heads trained in full.
        experts: N.
        rank: of each expert.
        alpha: the experts are scaled by alpha / rank.
        dropout: on each expert's input.
        top_k: experts that act on a token; None for all.
    """

    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    experts: int = 8
    rank: int = 4
    alpha: float = 32.0
    dropout: float = 0.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE


class LoRAMoELayer(SiteLayer):
    """A linear map, N experts and their router: A [N * r, in], B [out, N * r] and G [N, in], experts one after another.

    Attributes:
        recorded: keep the routing [B, T, N] (float32) of a training pass in ``routing``, until it is set to None.
        watched: keep that of any pass.
    """

    adapter_layer_names = ("loramoe_A", "loramoe_B", "loramoe_router")

    def update_layer(self, adapter_name: str, config: LoRAMoEConfig) -> None:
        """Draw A and G as torch draws a linear map, from its global generator; B is 0."""
        self.config, self.recorded, self.watched = config, False, False
        self.routing: torch.Tensor | None = None
        weight = self.get_base_layer().weight
        inner, outer = weight.shape if type(self.get_base_layer()).__name__ == "Conv1D" else weight.shape[::-1]
        wide = config.experts * config.rank
        sizes = {"loramoe_A": (wide, inner), "loramoe_B": (outer, wide), "loramoe_router": (config.experts, inner)}
        for name, size in sizes.items():
            value = torch.zeros(size, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
            if name != "loramoe_B":
                torch.nn.init.kaiming_uniform_(value, a=math.sqrt(5))
            getattr(self, name)[adapter_name] = torch.nn.Parameter(value)
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The map's output and the experts' weighted sum; the router sees the input without dropout."""
        name = self.acting
        y = self.base_layer(x, *args, **kwargs)
        if name is None:
            return y
        low, up, router = (getattr(self, kind)[name] for kind in self.adapter_layer_names)
        x = x.to(low.dtype)
        weight = soft_routing(functional.linear(x, router), self.config.top_k)
        if self.routing is None and (self.watched or (self.recorded and recording(self))):
            self.routing = weight
        if self.training and self.config.dropout:  # one draw per expert
            parts = low.chunk(self.config.experts)
            inner = torch.cat([functional.linear(functional.dropout(x, self.config.dropout), a) for a in parts], -1)
        else:
            inner = functional.linear(x, low)
        inner = (inner.unflatten(-1, (self.config.experts, -1)) * weight.to(inner.dtype)[..., None]).flatten(-2)
        return y + (functional.linear(inner, up) * (self.config.alpha / self.config.rank)).to(y.dtype)


class LoRAMoETuner(Tuner):
    """Puts the experts where the configuration says. They stay modules: their weights depend on the input."""

    prefix = "loramoe_"
    tuner_layer_cls = LoRAMoELayer
    unmergeable = "loramoe weighs its experts anew for every token, so they cannot be merged into one matrix."

    def _check_merge_allowed(self) -> None:
        raise ValueError(self.unmergeable)


PEFT_TYPE = register("loramoe", LoRAMoEConfig, LoRAMoETuner)
