"""Intruder dimensions: new directions of high rank that a fine-tuning put into the weights, beside their noise floor.

    tuned direction j of the k largest is an intruder iff max_i |<u1_j, u0_i>| < eps

for every matrix of the transformer blocks (adapters are merged first); see :mod:`luthier.functional.intruders`. Many
intruders with large singular values mean that the task was learnt in directions of its own, which goes with forgetting
and with trouble in sequential training: lower the learning rate, raise the rank with ``rslora``, or shrink them with
the weight operation of the same name. Degenerate spectra give false alarms: the noise floor is the same count for the
base plus noise as large as the change.

Paper: "LoRA vs Full Fine-tuning: An Illusion of Equivalence", NeurIPS 2025, arXiv 2410.21228. Official repository:
reeceshuttle/intruder-dimensions (left singular vectors, as here by default).

Example::

    analysis: [{lora-illusion: {k: 10, eps: 0.5}}]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Table
from luthier.core.registry import analysis
from luthier.functional import intruders as spectra
from luthier.functional import tensor_selection as selection
from luthier.functional.intruders import Side

SLUG = "lora-illusion"
COLUMNS = (
    *("run", "matrix", "intruders", "noise floor", "largest intruder", "least cosine", "effective rank of the change"),
    *("stable rank of the change", "relative change"),
)


def matrices(base: Any, tuned: Any) -> list[str]:
    """Names of the matrices of transformer blocks that both have.

    Raises:
        UserError: there are none.
    """
    units = selection.block_units(base.shapes())
    known = set(tuned.names())
    shapes = base.shapes()
    found = [n for unit in units for n in unit.tensors if len(shapes[n]) == 2 and n in known]
    if not found:
        raise UserError(f"{SLUG}: base and tuned model have no matrix of a transformer block in common.")
    return found


@analysis(
    "lora-illusion",
    example={"k": 2},
    paper="LoRA vs Full Fine-tuning: An Illusion of Equivalence, NeurIPS 2025, arXiv 2410.21228",
)
class IntruderDimensions:
    """Count the directions of high rank that the tuned weights have and the base has not."""

    def __init__(
        self,
        *,
        k: Annotated[int, Field(ge=1, description="largest tuned directions that are looked at")] = 10,
        eps: Annotated[
            float, Field(gt=0, le=1, description="least cosine with a base direction that is no intruder")
        ] = (0.5),
        side: Annotated[
            Side, Field(description="singular vectors: left, right, or the mean of both products")
        ] = "left",
        modules: Annotated[
            str | None, Field(min_length=1, description="only matrices that this path or pattern names")
        ] = None,
        curve: Annotated[
            list[float] | None, Field(min_length=1, description="further values of eps whose totals are noted")
        ] = None,
    ) -> None:
        self.k, self.eps, self.side, self.modules, self.curve = k, eps, side, modules, curve or []

    def run(self, runs: Iterable[Any], ctx: Any) -> Table:
        """A row for every matrix, and one for the whole model.

        Raises:
            UserError: no matrix in common, other shapes, or a number that is not finite.
        """
        rows: list[tuple[Any, ...]] = []
        notes: list[str] = []
        for run in runs:
            sources: Mapping[str, Any] = ctx.sources(run)
            base, tuned = sources["base"], sources["tuned"]
            names = [n for n in matrices(base, tuned) if self.modules is None or selection.fits(n, self.modules)]
            if not names:
                raise UserError(f"{SLUG}: no matrix of the model fits modules: '{self.modules}'.")
            label = run.folder.name
            totals, floor, curve = 0, 0, [0] * len(self.curve)
            for name in names:
                row, cosine_R = self.matrix(label, name, base.tensor(name), tuned.tensor(name), ctx)
                rows.append(row)
                totals, floor = totals + row[2], floor + row[3]
                curve = [c + int((cosine_R[: self.k] < e).sum()) for c, e in zip(curve, self.curve, strict=True)]
            rows.append((label, "all", totals, floor, None, None, None, None, None))
            notes += [f"{label}: eps {e:g} finds {c} intruders" for e, c in zip(self.curve, curve, strict=True)]
            if floor * 2 >= totals > 0:
                notes.append(
                    f"{label}: noise as large as the change gives {floor} of {totals}, so the base's spectrum is too "
                    "flat for this k and eps; lower k."
                )
        return Table(
            title="Intruder dimensions",
            columns=COLUMNS,
            rows=tuple(rows),
            units={
                "intruders": "directions",
                "largest intruder": "singular value",
                "relative change": "share of ||W0||",
            },
            direction={"intruders": "lower"},
            notes=tuple(notes),
        )

    def matrix(
        self, label: str, name: str, base: torch.Tensor, tuned: torch.Tensor, ctx: Any
    ) -> tuple[tuple[Any, ...], torch.Tensor]:
        """The row of one matrix, and the cosines of its directions."""
        w0, w1 = spectra.oriented(base, name), spectra.oriented(tuned, name)
        found = spectra.spectrum(w0, w1, self.side, name)
        which = spectra.intruders(found, self.k, self.eps)
        noisy = spectra.spectrum(w0, spectra.noise_like(w0, w1, ctx.rng("noise", SLUG, name)), self.side, name)
        change = torch.linalg.svdvals(w1.double() - w0.double())
        size = float(w0.double().norm())
        row = (
            label,
            name,
            len(which),
            len(spectra.intruders(noisy, self.k, self.eps)),
            float(found.s[which[0]]) if which else None,
            float(found.cosine_R[: self.k].min()),
            spectra.effective_rank(change),
            spectra.stable_rank(change),
            float(change.norm()) / size if size else None,
        )
        return row, found.cosine_R
