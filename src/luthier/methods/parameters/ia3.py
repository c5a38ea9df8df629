"""IA3: one trained factor per channel of the keys, the values and the inside of the feed-forward layers.

    k' = l_k * k      v' = l_v * v      FFN(x) = W_2 (l_ff * f(W_1 x))       l = 1 at the start

The base is frozen. The adapter is peft's; ``merge`` multiplies the factors into the weights. Factors are not decayed:
decay would draw them to 0, which switches a channel off. In a fused query-key-value matrix the queries get factors too.

Paper: "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", 2022, arXiv
2205.05638.

Example::

    parameters: [ia3]
    training: {learning_rate: 1.0e-2}
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Context
from luthier.core.registry import parameters
from luthier.functional.adapters import linear_modules, named_targets, shortened
from luthier.functional.affine_sites import find_sites
from luthier.methods.parameters._adapters import FREEZES, Adapter, alone, common

_KEY_OR_VALUE = re.compile(r"(^|_)[kv](_|$)|key|value|qkv|c_attn|W_pack")


def default_targets(model: torch.nn.Module) -> tuple[list[str], list[str]]:
    """Paths of (the maps to keys and values, the last map of each feed-forward layer).

    Raises:
        UserError: the model's blocks are not recognised.
    """
    sites = find_sites(model)
    attention = [p for p, s in sites.items() if s == "qkv" and _KEY_OR_VALUE.search(p.rpartition(".")[2])]
    feed_forward = [p for p, s in sites.items() if s == "fc2"]
    if not attention or not feed_forward:
        raise UserError(
            f"ia3: found no keys, values or feed-forward layers in transformer blocks of {type(model).__name__}; name "
            "them in target_modules and feed_forward_modules."
        )
    return attention, feed_forward


@parameters(
    "ia3",
    conflicts={**FREEZES, **alone("ia3")},
    paper="Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, 2022, "
    "arXiv 2205.05638",
)
class ChannelFactors(Adapter):
    """IA3: a trained factor per channel of keys, values and feed-forward activations; the base is frozen."""

    slug, marks = "ia3", ("ia3_",)

    def __init__(
        self,
        *,
        target_modules: Annotated[
            list[str] | None, Field(min_length=1, description="linear maps whose outputs get factors; keys and values")
        ] = None,
        feed_forward_modules: Annotated[
            list[str] | None,
            Field(min_length=1, description="linear maps whose inputs get factors; the last of the FFN"),
        ] = None,
        merge: Annotated[bool, Field(description="save the merged model instead of the adapter")] = False,
    ) -> None:
        if (target_modules is None) != (feed_forward_modules is None):
            raise UserError("ia3: name both target_modules and feed_forward_modules, or neither.")
        self.target_modules, self.feed_forward_modules, self.merge = target_modules, feed_forward_modules, merge

    def apply(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """The model with factors of 1; only they (and a new head) are open."""
        import peft

        if self.target_modules is None or self.feed_forward_modules is None:
            linear = linear_modules(model)
            outputs, inputs = (shortened(paths, linear) for paths in default_targets(model))
        else:
            outputs, inputs = (named_targets(model, n, "ia3") for n in (self.target_modules, self.feed_forward_modules))
        config = peft.IA3Config(
            **common(model, ctx, merge=self.slug if self.merge else ""),
            target_modules=[*outputs, *inputs],
            feedforward_modules=inputs,
        )
        return peft.get_peft_model(model, config)

    def groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """The factors, not decayed, and the head."""
        opened = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        return [
            {"params": [p for n, p in opened if "ia3_" in n], "weight_decay": 0.0},
            {"params": [p for n, p in opened if "modules_to_save" in n]},
        ]
