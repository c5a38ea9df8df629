"""QLoRA: low-rank adaptation of a base whose linear maps are kept in four bits.

    y = dequantise(W_4bit) x + s B A x      W_4bit frozen (NF4, the scales of its blocks themselves in eight bits)

The linear maps of the blocks are quantised when training begins, through bitsandbytes; embeddings, norms and the head
stay as they are. What is saved is an ordinary adapter for the base as it was: it then works beside the unrounded
weights, which are near the rounded ones it was trained with and not equal to them. ``merge_dequantized`` is consent to
the other way: a whole model of the rounded weights with the addition in them, which is exactly what was trained.

bitsandbytes also runs on a CPU: four-bit products are then made by rounding back and multiplying, which saves memory
and no time. There (release 0.50) it gives back wrong values where a map's width is no multiple of 64. Each map is
therefore compared with what comes back; one that is off by more than rounding stays as it is, with a warning and a line
in ``methods.json``.

Paper: "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, arXiv 2305.14314.

Example::

    parameters:
      - qlora: {rank: 16, alpha: 32}
    training: {learning_rate: 2.0e-4}
"""

from __future__ import annotations

import copy
import warnings
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Context
from luthier.core.registry import parameters
from luthier.functional.adapters import block_targets, linear_modules, quantized
from luthier.methods.parameters._adapters import FREEZES, Adapter, alone
from luthier.methods.parameters.lora import LowRankAdaptation

BLOCK = 64


def rounds_only(weight: torch.Tensor, back: torch.Tensor) -> bool:
    """Whether a weight that was quantised in blocks of 64 comes back off by no more than rounding.

    No two neighbours of the sixteen values are further apart than a third of the block's largest entry; half of that,
    and a little for rounding the scales, is what rounding can do.
    """
    weight = weight.detach()
    flat = weight.flatten().float()
    pad = -len(flat) % BLOCK
    flat, off = (
        torch.nn.functional.pad(t, (0, pad)).view(-1, BLOCK) for t in (flat, (back - weight).flatten().float())
    )
    return bool((off.abs().amax(1) <= 0.2 * flat.abs().amax(1) + 1e-6).all())


def quantize(model: Any, paths: list[str], kind: str, double: bool) -> list[str]:
    """Replace linear maps by their four-bit form; returns the paths of those that had to stay.

    Args:
        model: gets ``is_loaded_in_4bit``, by which peft knows, and a ``quantization_config``.
        paths: of ``torch.nn.Linear`` modules.
        kind: ``nf4`` or ``fp4``.
        double: quantise the scales of the blocks as well.
    """
    import bitsandbytes

    stayed = []
    for path in paths:
        old = model.get_submodule(path)
        dtype, device = old.weight.dtype, old.weight.device
        new = bitsandbytes.nn.Linear4bit(
            old.in_features, old.out_features, old.bias is not None, dtype, double, kind, device="meta"
        )
        new.weight = bitsandbytes.nn.Params4bit(
            old.weight.detach().clone(), requires_grad=False, quant_type=kind, compress_statistics=double
        )
        new.bias = old.bias
        new = new.to(device)  # quantised on the way
        # Its form for fast products on some CPUs would change what is stored in evaluation mode.
        new.support_avx512bf16_for_cpu = False
        if not rounds_only(
            old.weight, bitsandbytes.functional.dequantize_4bit(new.weight.data, new.weight.quant_state)
        ):
            stayed.append(path)
            continue
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)
    model.is_loaded_in_4bit = True
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "quant_type": kind}
    return stayed


def dequantized(model: Any) -> Any:
    """A plain copy of a peft model over four-bit maps: each map's rounded weight with the addition in it."""
    import bitsandbytes

    made = copy.deepcopy(model)
    base = made.get_base_model()
    for path, module in list(base.named_modules()):
        own = getattr(module, "base_layer", module)
        if not isinstance(own, bitsandbytes.nn.Linear4bit) or path.endswith(".base_layer"):
            continue
        weight = bitsandbytes.functional.dequantize_4bit(own.weight.data, own.weight.quant_state).to(own.compute_dtype)
        if own is not module:
            weight = weight + module.get_delta_weight(module.active_adapters[0]).detach().to(weight.dtype)
        plain = torch.nn.Linear(own.in_features, own.out_features, own.bias is not None, device="meta")
        plain.weight, plain.bias = torch.nn.Parameter(weight), own.bias
        parent, _, name = path.rpartition(".")
        setattr(base.get_submodule(parent), name, plain)
    del base.config.quantization_config, base.is_loaded_in_4bit
    return made.merge_and_unload()  # unpacks what is left: a classification head


@parameters(
    "qlora",
    example={"rank": 4, "alpha": 8.0, "merge_dequantized": True},
    packages={"bitsandbytes": "bitsandbytes"},
    conflicts={
        **FREEZES,
        **alone("qlora"),
        "sharding:fsdp2": "four-bit weights cannot be sharded; use lora, or one process for each model",
    },
    paper="QLoRA: Efficient Finetuning of Quantized LLMs, 2023, arXiv 2305.14314",
)
class QuantizedLowRank(Adapter):
    """QLoRA: low-rank adaptation beside a base kept in four bits."""

    slug, marks = "qlora", ("lora_",)

    def __init__(
        self,
        *,
        rank: Annotated[int, Field(ge=1, description="rank r of the addition")] = 16,
        alpha: Annotated[float | None, Field(gt=0, description="scale numerator; twice the rank by default")] = None,
        dropout: Annotated[float, Field(ge=0, lt=1, description="dropout on the adapter's input")] = 0.0,
        target_modules: Annotated[
            list[str] | None,
            Field(min_length=1, description="linear modules that get an adapter; by default all of the blocks"),
        ] = None,
        quantization: Annotated[Literal["nf4", "fp4"], Field(description="the sixteen values of four bits")] = "nf4",
        double_quantization: Annotated[bool, Field(description="quantise the scales of the blocks too")] = True,
        merge_dequantized: Annotated[
            bool, Field(description="save a whole model of the rounded weights instead of the adapter")
        ] = False,
    ) -> None:
        self.adaptation = LowRankAdaptation(rank=rank, alpha=alpha, dropout=dropout, target_modules=target_modules)
        self.quantization, self.double, self.merge = quantization, double_quantization, merge_dequantized
        self._record: dict[str, list[str]] = {}

    def prepare_model(self, model: Any, processor: Any) -> None:
        """Quantise the linear maps of the blocks.

        Raises:
            UserError: they are quantised already, or are no plain linear maps.
        """
        if quantized(model):
            raise UserError("qlora: the base is quantised already. Use 'lora', which trains beside quantised weights.")
        names = block_targets(model, self.slug)
        paths = [p for p in linear_modules(model) if any(p == n or p.endswith(f".{n}") for n in names)]
        odd = [p for p in paths if type(model.get_submodule(p)) is not torch.nn.Linear]
        if odd:
            kind = type(model.get_submodule(odd[0])).__name__
            raise UserError(f"qlora: '{odd[0]}' is a {kind}, which bitsandbytes cannot hold in four bits. Use 'lora'.")
        stayed = quantize(model, paths, self.quantization, self.double)
        if stayed:
            warnings.warn(
                f"qlora: {len(stayed)} of {len(paths)} linear maps stay in full precision, such as '{stayed[0]}': what "
                "bitsandbytes gives back of them on this machine is wrong.",
                stacklevel=2,
            )
        self._record = {"quantized": [p for p in paths if p not in stayed], "in_full_precision": stayed}

    def apply(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """The model with adapters, drawn from the ``init`` stream; only they (and a new head) are open."""
        return self.adaptation.apply(model, ctx)

    def record(self) -> dict[str, list[str]]:
        """For the run's ``methods.json``: the maps in four bits, and those that stay in full precision."""
        return self._record

    def export(self, model: torch.nn.Module) -> torch.nn.Module:
        """The adapter; with ``merge_dequantized`` a plain copy of the rounded weights with the addition in them."""
        return dequantized(model) if self.merge else model
