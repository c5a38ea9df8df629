"""LiNeS: shrink what fine-tuning changed in shallow layers and keep it in deep ones, by a straight line in depth.

    tau = theta - theta_0                                the change; theta a tuned or merged model
    theta' = theta_0 + lambda_l tau,   lambda_l = alpha + beta l / (L - 1)

l = 0..L-1 numbers the blocks from input to output (each list of an encoder-decoder by itself); with L = 1, lambda is
alpha + beta. Tensors outside the blocks get alpha, the smallest scale (``outside: alpha``, as in the paper); ``keep``
leaves them as tuned, which matters where the task needs new embeddings or a new head; ``interp`` gives embeddings alpha
and the final norm and head alpha + beta.

One tuned model: beta = 1 - alpha; alpha = 1 is the tuned model. Without ``alpha`` it is chosen on held-out rows, from 1
down to 0 in tenths: largest target_weight * target / target of theta + mean_c control_c / control_c of theta_0, with
accuracies on the target's rows and on those of ``data.keep``.

Several models, merged by the operation before: alpha = (1/N) |sum_i tau_i|_1 / |tau|_1, which is 1/N for a plain sum,
and beta is given or chosen among 0, 0.1, ..., 1 on the held-out rows.

Paper: "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging", ICLR 2025, arXiv 2410.17146.
Released code: wang-kee/LiNeS.

Example::

    weights:
      - lines: {alpha: 0.3}
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.registry import weight_op
from luthier.functional.task_vectors import difference, floating, pieces, weighted_sum

_NUMBERED = re.compile(r"(?=\.(\d+)\.)")
_FRONT = re.compile(r"embed|wte|wpe|patch|position|cls_token|class_token|pre_layrnorm|pre_layernorm", re.IGNORECASE)
CURVES = {
    "linear": lambda x: x,
    "constant": lambda x: 0.0,
    "reverse": lambda x: 1.0 - x,
    "quadratic": lambda x: x * x,
    "sqrt": math.sqrt,
}
GRID = tuple(round(0.1 * i, 1) for i in range(10, -1, -1))


def block_lists(shapes: Mapping[str, tuple[int, ...]], prefix: str | None = None) -> dict[str, int]:
    """Prefix of each list of blocks -> its length L.

    A list is a dotted prefix followed by the numbers 0..L-1. Lists inside a block (experts, modules of an MLP) are not
    counted, nor are lists with less than a quarter of the elements of the largest one.

    Args:
        shapes: names and shapes of the tensors.
        prefix: the list, where it is known.

    Raises:
        UserError: there is none.
    """
    if any("albert_layer_groups" in name for name in shapes):
        raise UserError("lines: the blocks of this model share their weights, so that no depth can be scaled.")
    numbers: dict[str, set[int]] = {}
    size: dict[str, int] = {}
    for name, shape in shapes.items():
        # The outermost number that is a place in a list decides: what lies deeper is inside a block.
        for match in _NUMBERED.finditer(name):
            found = name[: match.start()]
            if prefix is None or found == prefix:
                numbers.setdefault(found, set()).add(int(match[1]))
                size[found] = size.get(found, 0) + math.prod(shape)
                break
    lists = {p: len(n) for p, n in numbers.items() if n == set(range(len(n)))}
    largest = max((size[p] for p in lists), default=0)
    lists = {p: count for p, count in lists.items() if 4 * size[p] >= largest}
    if not lists:
        some = ", ".join(sorted(numbers)[:3]) or "none is numbered"
        raise UserError(
            f"lines: found no list of blocks numbered from 0 among the tensors ({some}). Name its prefix, such as "
            "blocks: model.layers."
        )
    return lists


def scales(
    shapes: Mapping[str, tuple[int, ...]],
    lists: Mapping[str, int],
    alpha: float,
    beta: float,
    *,
    curve: str = "linear",
    outside: str = "alpha",
) -> dict[str, float]:
    """Lambda of every tensor."""
    found = {}
    for name in shapes:
        home = next((p for p in lists if name.startswith(p + ".")), None)
        if home is not None:
            block, last = int(name[len(home) + 1 :].split(".")[0]), lists[home] - 1
            found[name] = alpha + beta * CURVES[curve](block / last if last else 1.0)
        elif outside == "keep":
            found[name] = 1.0
        else:
            found[name] = alpha if outside == "alpha" or _FRONT.search(name) else alpha + beta
    return found


def scaled(tuned: torch.Tensor, base: torch.Tensor, scale: float) -> torch.Tensor:
    """theta_0 + scale * (theta - theta_0), in float64; exactly the tuned tensor at 1."""
    return tuned if scale == 1.0 else base.to(torch.float64).add(difference(tuned, base), alpha=scale)


class _Scaled(Mapping[str, "torch.Tensor"]):
    """The scaled model, each tensor formed when it is read."""

    def __init__(self, tuned: Any, base: Any, factors: Mapping[str, float]) -> None:
        self._tuned, self._base, self._factors = tuned, base, factors
        self._names, self._known = tuned.names(), set(base.names())

    def __getitem__(self, name: str) -> torch.Tensor:
        own = self._tuned.tensor(name)
        if name not in self._known or not own.is_floating_point():
            return own
        return scaled(own, self._base.tensor(name), self._factors[name]).to(own.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@weight_op(
    "lines",
    identity={"alpha": 1.0},
    example={"alpha": 0.5},
    paper="LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging, ICLR 2025, "
    "arXiv 2410.17146",
)
class LayerIncreasingScaling:
    """LiNeS: keep what fine-tuning changed in deep layers and shrink it in shallow ones, so that less is forgotten."""

    needs_base, elementwise, count = True, True, (1, 1)

    def __init__(
        self,
        *,
        alpha: Annotated[
            float | None, Field(ge=0, description="scale of the first block; chosen or computed where left out")
        ] = None,
        beta: Annotated[
            float | None, Field(description="what the last block has more; 1 - alpha, or chosen after a merge")
        ] = None,
        outside: Annotated[
            Literal["alpha", "keep", "interp"],
            Field(description="embeddings, final norm and head: alpha, 1, or both ends"),
        ] = "alpha",
        curve: Annotated[
            Literal["linear", "constant", "reverse", "quadratic", "sqrt"],
            Field(description="how the scale grows in depth"),
        ] = "linear",
        blocks: Annotated[str | None, Field(description="prefix of the list of blocks, where it is not found")] = None,
        target_weight: Annotated[
            float, Field(gt=0, description="weight of the target against control tasks in the choice of alpha")
        ] = 2.0,
    ) -> None:
        self.alpha, self.beta, self.outside, self.curve, self.blocks = alpha, beta, outside, curve, blocks
        self.target_weight = target_weight
        self.recipe: dict[str, Any] = {}

    @property
    def needs_rows(self) -> bool:
        """Whether alpha is chosen by a score (unless several models are merged before)."""
        return self.alpha is None

    def prepare(self, sources: Mapping[str, Any], ctx: Any) -> None:
        """Find the blocks, and alpha and beta where they are left open."""
        tuned, base = sources["tuned"], sources["base"]
        self.shapes = tuned.shapes()
        self.lists = block_lists(self.shapes, self.blocks)
        if 1 in self.lists.values():
            warnings.warn("lines: a list of one block has no depth; it is scaled by alpha + beta.", stacklevel=2)
        self.recipe = {"blocks": dict(self.lists), "outside": self.outside, "curve": self.curve}
        merged = len(ctx.models) > 1
        alpha, beta = self.alpha, self.beta
        if merged and alpha is None:
            alpha = l1_ratio(tuned, base, ctx.models)
        if alpha is None:
            alpha = self._search_alpha(tuned, base, ctx)
        if beta is None:
            beta = self._search_beta(tuned, base, alpha, ctx) if merged else 1.0 - alpha
        self.factors = self._factors(alpha, beta)
        self.recipe |= {"alpha": alpha, "beta": beta, "scales": self._by_block(self.factors)}
        self.squares: dict[str, float] = {}

    def tensor(self, name: str, tensors: Mapping[str, torch.Tensor], ctx: Any) -> torch.Tensor:
        """The base's entries with the scaled change."""
        tuned, base, scale = tensors["tuned"], tensors["base"], self.factors[name]
        change = difference(tuned, base)
        part = self._part(name)
        self.squares[part] = self.squares.get(part, 0.0) + float(change.reshape(-1) @ change.reshape(-1))
        self.recipe["norms"] = {p: math.sqrt(square) for p, square in self.squares.items()}
        return tuned if scale == 1.0 else change.mul_(scale).add_(base)

    # -- parts

    def _factors(self, alpha: float, beta: float) -> dict[str, float]:
        return scales(self.shapes, self.lists, alpha, beta, curve=self.curve, outside=self.outside)

    def _part(self, name: str) -> str:
        home = next((p for p in self.lists if name.startswith(p + ".")), None)
        return "outside" if home is None else f"{home}.{name[len(home) + 1 :].split('.')[0]}"

    def _by_block(self, factors: Mapping[str, float]) -> dict[str, float]:
        return {self._part(name): factor for name, factor in factors.items()}

    def _search_alpha(self, tuned: Any, base: Any, ctx: Any) -> float:
        plain = _Scaled(tuned, base, dict.fromkeys(self.shapes, 0.0))
        target_of_tuned = ctx.accuracy(_Scaled(tuned, base, dict.fromkeys(self.shapes, 1.0)))
        controls_of_base = ctx.controls(plain)
        table, best, chosen = [], -math.inf, 1.0
        for alpha in GRID:
            model = _Scaled(tuned, base, self._factors(alpha, 1.0 - alpha))
            target, controls = ctx.accuracy(model), ctx.controls(model)
            row = {"alpha": alpha, "target": target, "control": sum(controls.values()) / max(len(controls), 1)}
            row["target_normalised"] = target / max(target_of_tuned, 1e-12)
            row["control_normalised"] = sum(
                value / max(controls_of_base[name], 1e-12) for name, value in controls.items()
            ) / max(len(controls), 1)
            row["score"] = self.target_weight * row["target_normalised"] + row["control_normalised"]
            table.append(row)
            if row["score"] > best:
                best, chosen = row["score"], alpha
        self.recipe["search"] = table
        return chosen

    def _search_beta(self, tuned: Any, base: Any, alpha: float, ctx: Any) -> float:
        table, best, chosen = [], -math.inf, 0.0
        for beta in reversed(GRID):
            target = ctx.accuracy(_Scaled(tuned, base, self._factors(alpha, beta)))
            table.append({"beta": beta, "target": target})
            if target > best:
                best, chosen = target, beta
        self.recipe["search"] = table
        return chosen


def l1_ratio(merged: Any, base: Any, models: Mapping[str, Any]) -> float:
    """(1/N) |sum_i tau_i|_1 / |tau_M|_1 over all weights that the base has too.

    Args:
        merged: source of the merged model.
        base: source of the base.
        models: the N sources that were merged.

    Raises:
        UserError: the merged model is the base.
    """
    summed = own = 0.0
    for name in floating(merged, base):
        for _, piece in pieces({"merged": merged, "base": base, **models}, name):
            start = piece["base"]
            taus = [difference(piece[label], start) for label in models]
            summed += float(weighted_sum(taus, [1.0] * len(taus)).abs().sum())
            own += float(difference(piece["merged"], start).abs().sum())
    if own == 0.0:
        raise UserError("lines: the merged model equals its base, so that there is no change to scale.")
    return summed / own / len(models)
