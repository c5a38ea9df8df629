"""Slerp: go from one model to another along the arc between their weights instead of the straight line.

    cos(omega) = <a, b> / (|a| |b|)                      per tensor, over all of its entries
    theta = sin((1 - t) omega) / sin(omega) a + sin(t omega) / sin(omega) b

a is this model at t = 0, b the other one at t = 1; with no other model named, a is the base and b this model. Where the
two directions are nearly the same or opposite (|cos| above 0.9995, as in mergekit) or one tensor is zero, the straight
line is taken.

Source: K. Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985; as a merge of models it is known from
mergekit.

Example::

    weights:
      - slerp: {models: [runs/b/model], t: 0.5}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.registry import weight_op
from luthier.functional.task_vectors import pieces

PARALLEL = 0.9995


def slerp_factors(dot: float, square_a: float, square_b: float, t: float) -> tuple[float, float]:
    """The factors of a and b at ``t``.

    Args:
        dot: <a, b>.
        square_a: <a, a>.
        square_b: <b, b>.
        t: 0 is a, 1 is b.
    """
    norms = math.sqrt(square_a * square_b)
    cosine = dot / norms if norms > 0 else 1.0
    if abs(cosine) > PARALLEL:
        return 1.0 - t, t
    omega = math.acos(cosine)
    return math.sin((1.0 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)


@weight_op(
    "slerp",
    identity={"t": 1.0},
    example={"t": 0.5},
    paper="K. Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985",
)
class Slerp:
    """Slerp: interpolate between two models along an arc, tensor by tensor."""

    count, elementwise = (1, 2), True

    def __init__(
        self,
        *,
        models: Annotated[
            Annotated[list[str], Field(max_length=1)] | None,
            Field(description="the other model; left out, the arc is from the base to this one"),
        ] = None,
        t: Annotated[float, Field(ge=0, le=1, description="0 is this model (or the base), 1 the other")] = 0.5,
    ) -> None:
        self.sources = {folder: folder for folder in models or ()}
        self.t, self.needs_base = t, False
        self.recipe: dict[str, Any] = {}

    def prepare(self, sources: Mapping[str, Any], ctx: Any) -> None:
        """Measure the angle between the two in every tensor.

        Raises:
            UserError: only one model and no base.
        """
        tuned = [label for label in sources if label != "base"]
        if len(tuned) == 1 and "base" not in sources:
            raise UserError("slerp needs two models, or one and its base.")
        self.ends = tuned if len(tuned) == 2 else ["base", *tuned]
        self.needs_base = "base" in self.ends
        a, b = (sources[label] for label in self.ends)
        self.factors: dict[str, tuple[float, float]] = {}
        for name in a.names():
            if name in set(b.names()) and a.piece(name, 0, 0).is_floating_point():
                dot = square_a = square_b = 0.0
                for _, piece in pieces({"a": a, "b": b}, name):
                    x, y = piece["a"].to(torch.float64), piece["b"].to(torch.float64)
                    dot, square_a, square_b = dot + float(x @ y), square_a + float(x @ x), square_b + float(y @ y)
                self.factors[name] = slerp_factors(dot, square_a, square_b, self.t)
        self.recipe = {"from": self.ends[0], "to": self.ends[1], "t": self.t}

    def tensor(self, name: str, tensors: Mapping[str, torch.Tensor], ctx: Any) -> torch.Tensor:
        """The entries on the arc, in float64."""
        one, two = self.factors[name]
        a, b = (tensors[label].to(torch.float64) for label in self.ends)
        return a * one + b * two
