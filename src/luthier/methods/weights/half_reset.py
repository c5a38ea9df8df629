"""Half reset: put a random half of a tuned model's tensors back to the base's values, without any training.

    theta_i = base_i if i in R else tuned_i

R is a random share of the tensors of the transformer blocks, drawn per layer and category as in half fine-tuning (or by
whole layers, or over all blocks). Tensors outside the blocks keep their tuned values. How much general knowledge comes
back, and how much of the tuned ability stays, is the probe that motivates half fine-tuning.

Paper: "HFT: Half Fine-Tuning for Large Language Models", 2024, arXiv 2404.18466 (ACL 2025). No official code is known.

Example::

    weights:
      - half-reset: {fraction: 0.5, seed: 0}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core.errors import LuthierError, UserError
from luthier.core.registry import weight_op
from luthier.core.rng import stream
from luthier.functional import tensor_selection as selection


def reset_names(
    shapes: selection.Shapes, fraction: float, *, seed: int, level: str = "category", balance: str = "count"
) -> set[str]:
    """Names of the tensors that go back to the base; none at fraction 0, all of the blocks at 1.

    Raises:
        UserError: no transformer blocks among the names.
    """
    units = selection.block_units(shapes)
    if not units:
        raise UserError("half-reset: found no transformer blocks among the tensors of the model.")
    chosen = selection.select(units, fraction, stream(seed, "init", "half-reset"), level=level, balance=balance)
    return {name for unit in units if unit.name in chosen for name in unit.tensors}


def half_reset(
    tuned: Mapping[str, torch.Tensor],
    base: Mapping[str, torch.Tensor],
    fraction: float = 0.5,
    *,
    seed: int = 0,
    level: str = "category",
    balance: str = "count",
) -> dict[str, torch.Tensor]:
    """The state dict in which a random share of the block tensors of ``tuned`` is replaced by those of ``base``."""
    names = reset_names({n: tuple(t.shape) for n, t in base.items()}, fraction, seed=seed, level=level, balance=balance)
    return {name: base[name] if name in names else tensor for name, tensor in tuned.items()}


@weight_op(
    "half-reset",
    identity={"fraction": 0.0},
    example={"fraction": 0.5},
    paper="HFT: Half Fine-Tuning for Large Language Models, 2024, arXiv 2404.18466",
)
class HalfReset:
    """Half reset: a random half of the tuned tensors goes back to the base, to see what knowledge returns."""

    needs_base, elementwise, count = True, True, (1, 1)

    def __init__(
        self,
        *,
        fraction: Annotated[float, Field(ge=0, le=1, description="share of the block tensors that is reset")] = 0.5,
        level: Annotated[
            Literal["category", "layer", "model"],
            Field(description="choose per category and layer, whole layers, or any tensors by size"),
        ] = "category",
        balance: Annotated[Literal["count", "size"], Field(description="half by number or nearest by size")] = "count",
        seed: Annotated[int, Field(ge=0, description="seed of the choice")] = 0,
    ) -> None:
        self.fraction, self.level, self.balance, self.seed = fraction, level, balance, seed
        self.names: set[str] | None = None

    def prepare(self, sources: Mapping[str, Any], ctx: Any) -> None:
        """Choose from the base's names and shapes."""
        self.names = reset_names(
            sources["base"].shapes(), self.fraction, seed=self.seed, level=self.level, balance=self.balance
        )

    def tensor(self, name: str, tensors: Mapping[str, torch.Tensor], ctx: Any) -> torch.Tensor:
        """The base's tensor where chosen, else the tuned one."""
        if self.names is None:
            raise LuthierError("half-reset: prepare must run before tensor.")
        return tensors["base"] if name in self.names else tensors["tuned"]
