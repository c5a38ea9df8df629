"""Which kinds of rows use which experts of a LoRAMoE model.

    share[type, g] = mass of the experts of group g / mass of all, over the real tokens of the rows of a type
    entropy[type]  = -sum_n s_n ln s_n,   s_n the share of expert n

for every map with a router, on held-out rows. Groups are those of the training's ``types``; with their types the paper
shows that knowledge and other tasks prefer different groups. Which group is whose is read here, not assumed.

Paper: "LoRAMoE: Alleviate World Knowledge Forgetting in Large Language Models via MoE-Style Plugin", ACL 2024, arXiv
2312.09979.

Example::

    parameters:
      - loramoe: {type_column: task, types: [facts, "*"]}
    analysis: [loramoe]
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Table
from luthier.core.registry import analysis
from luthier.functional.expert_routing import mass
from luthier.methods.parameters.loramoe import expert_layers, type_index

COLUMNS = ("run", "module", "type", "quantity", "value", "n")


def routing_mass(
    model: Any, batches: Iterable[Any], types: list[str], column: str, run: Any
) -> dict[str, torch.Tensor]:
    """What each expert of each map gets of the rows of each type: path -> [types, N], float64.

    Args:
        model: with experts, in evaluation mode.
        batches: of rows that carry ``column``.
        types: the values of the column, ``*`` for any other.
        column: the column with a row's type.
        run: called with each batch, runs the model over it.
    """
    layers = expert_layers(model)
    found: dict[str, torch.Tensor] = {}
    try:
        for batch in batches:
            for layer in layers.values():
                layer.routing, layer.watched = None, True
            run(batch)
            values = zip(batch.columns[column], batch.row_B, strict=True)
            type_B = torch.tensor([type_index(value, types, int(row), column) for value, row in values])
            for path, layer in layers.items():
                mass_BN = mass(layer.routing.detach()[None], batch.inputs.get("attention_mask"))[0].double().cpu()
                of_type = torch.zeros(len(types), mass_BN.shape[1], dtype=torch.float64).index_add(0, type_B, mass_BN)
                found[path] = found.get(path, 0.0) + of_type
    finally:
        for layer in layers.values():
            layer.routing, layer.watched = None, False
    return found


@analysis(
    "loramoe",
    requires={"parameters:loramoe": "it looks at the routers of that method"},
    paper="LoRAMoE: Alleviate World Knowledge Forgetting in Large Language Models via MoE-Style Plugin, ACL 2024, "
    "arXiv 2312.09979",
)
class RoutingTable:
    """Which kinds of rows use which experts: the share of routing mass per expert group, by module and type."""

    def __init__(self, *, rows: Annotated[int, Field(ge=1, description="held-out rows looked at")] = 512) -> None:
        self.rows = rows

    def run(self, runs: Iterable[Any], ctx: Any) -> Table:
        """One table over all runs.

        Args:
            runs: finished runs; each has a ``folder`` and a ``model``.
            ctx: gives ``plan``, ``data.test`` and ``shop.session(model)``.

        Raises:
            UserError: there are no held-out rows.
        """
        if ctx.data.test is None:
            raise UserError("loramoe: the analysis needs held-out rows; name some under data.test.")
        method = next(c for c in ctx.plan.parameters if c.slug == "loramoe").build()
        if not method.balance_weight:
            raise UserError("loramoe: without balance_weight no types are known, so none can be told apart.")
        rows: list[tuple[Any, ...]] = []
        for run in runs:
            session = ctx.shop.session(run.model)
            session.model.eval()
            prepared, size = ctx.data.test.prepared, ctx.plan.recipe.evaluation.batch_rows
            stops = range(0, min(self.rows, len(prepared)), size)
            index = [range(start, min(start + size, self.rows, len(prepared))) for start in stops]
            batches = (
                session.to_device(session.task.collate(prepared.fetch(i), i, (method.type_column,))) for i in index
            )

            def encode(batch: Any, session: Any = session) -> Any:
                return session.evaluate_batch(batch, ())

            found = routing_mass(run.model, batches, method.types, method.type_column, encode)
            for path, mass_KN in found.items():
                for kind, mass_N in zip(method.types, mass_KN, strict=True):
                    for quantity, value in describe(mass_N, method.groups_of_experts, method.types).items():
                        rows.append((run.folder.name, path, kind, quantity, value, float(mass_N.sum())))
        return Table(
            title="Which types use which experts",
            columns=COLUMNS,
            rows=tuple(rows),
            units={"value": "share, or nats", "n": "tokens"},
            notes=("Mass of routing, over real tokens; the groups are those of the training's types, in their order.",),
        )


def describe(mass_N: torch.Tensor, group_N: list[int], types: list[str]) -> dict[str, float]:
    """The share of each group of experts and the entropy over experts, of a type that has any mass."""
    if not float(mass_N.sum()):
        return {}
    share_N = mass_N / mass_N.sum()
    index = torch.tensor(group_N)
    shares = {f"group of {name}": float(share_N[index == g].sum()) for g, name in enumerate(types)}
    return shares | {"entropy": float(torch.special.entr(share_N).sum())}
