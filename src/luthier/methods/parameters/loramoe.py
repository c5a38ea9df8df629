"""LoRAMoE: several routed low-rank experts beside each feed-forward map of a frozen base, kept apart by a loss.

    y = W0 x + sum_n w_n s B_n A_n x      w = softmax(G x)  over the N experts, s = alpha / rank
    L = L_objective + balance_weight * sum over maps of  dispersion(Z)
    Q[m, n] = sum over tokens t of example m of w_n(t)      Z[m, n] = Q[m, n] (1 +- contrast)

A_n [r, in], B_n [out, r] and G [N, in] are trained, one router for every map. All experts act on every token. Every
example has a type, and so has every expert (equal groups one after another, in the order of ``types``); the sign is +
where they agree. ``dispersion`` is the squared coefficient of variation (released code) or variance over mean (paper),
over the B * N values of a micro-batch. At its minimum an example's mass goes to experts of its own type and to the
others as (1 - contrast) : (1 + contrast): the two types prefer different halves, and which is which is measured
(``first_group_share`` of each type is logged), never assumed. ``contrast: 0`` balances all experts alike,
``balance_weight: 0`` leaves the loss out and needs no types.

The statistic is that of a micro-batch: one of a single example can only compare experts, and accumulation changes it.
``over: example`` (not in the paper) takes the dispersion over the experts of each example, and then depends on neither.
Padding is left out; the released code counts it (``count_padding``). The released script ships with contrast and weight
0, under the names blc_alpha and blc_weight; the values here are starting points.

Paper: "LoRAMoE: Alleviate World Knowledge Forgetting in Large Language Models via MoE-Style Plugin", ACL 2024, arXiv
2312.09979; released code Ablustrund/LoRAMoE.

Example::

    parameters:
      - loramoe: {type_column: task, types: [facts, "*"]}      # "*": any other value
    training: {learning_rate: 2.0e-4}
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core.errors import LuthierError, UserError, did_you_mean
from luthier.core.protocols import Batch, Context, Loss, Needs
from luthier.core.registry import parameters
from luthier.functional.adapters import feed_forward_targets, named_targets
from luthier.functional.expert_routing import balance, importance, mass
from luthier.methods.parameters._adapters import FREEZES, Adapter, alone, common, drawing

ANY = "*"
_ROWS = 4096


def expert_layers(model: torch.nn.Module) -> dict[str, Any]:
    """Path in the base -> the wrapped map with its router."""
    return {str(module.key): module for module in model.modules() if hasattr(module, "loramoe_router")}


def type_index(value: Any, types: list[str], row: int, column: str) -> int:
    """Which type a row's value is.

    Raises:
        UserError: the row has none, or one that is not among the types.
    """
    if value is None:
        raise UserError(
            f"loramoe: row {row} of the prepared data has no '{column}', which tells its type. Add the column, name "
            "another as type_column, or set balance_weight: 0."
        )
    if str(value) in types:
        return types.index(str(value))
    if ANY in types:
        return types.index(ANY)
    raise UserError(
        f"loramoe: row {row} of the prepared data has {column} = '{value}', which is not among the types."
        f"{did_you_mean(str(value), types)} Types: {', '.join(types)} ('{ANY}' would stand for any other)."
    )


@parameters(
    "loramoe",
    example={"experts": 4, "rank": 2, "dropout": 0.0, "over": "example", "type_column": "kind", "types": ["pair", ANY]},
    conflicts={**FREEZES, **alone("loramoe")},
    paper="LoRAMoE: Alleviate World Knowledge Forgetting in Large Language Models via MoE-Style Plugin, ACL 2024, "
    "arXiv 2312.09979",
)
class LoRAMoE(Adapter):
    """LoRAMoE: routed low-rank experts beside the feed-forward maps, of which some are kept for some kinds of rows."""

    slug, marks = "loramoe", ("loramoe_",)
    unmergeable = "its experts are weighed anew for every token, so it leaves an adapter"

    def __init__(
        self,
        *,
        experts: Annotated[int, Field(ge=1, description="number of experts N of each map")] = 8,
        rank: Annotated[int, Field(ge=1, description="rank r of an expert")] = 4,
        alpha: Annotated[float, Field(gt=0, description="scale numerator")] = 32.0,
        dropout: Annotated[float, Field(ge=0, lt=1, description="dropout on the input of each expert")] = 0.05,
        target_modules: Annotated[
            list[str] | None,
            Field(min_length=1, description="linear maps; by default those of the feed-forward layers"),
        ] = None,
        top_k: Annotated[
            int | None, Field(ge=1, description="only so many experts act on a token; all by default")
        ] = None,
        balance_weight: Annotated[
            float, Field(ge=0, description="weight of the balancing loss (the paper's beta)")
        ] = 0.1,
        contrast: Annotated[
            float, Field(ge=0, le=1, description="how far the types are driven apart (the paper's delta)")
        ] = 0.1,
        dispersion: Annotated[
            Literal["cv2", "index"],
            Field(description="variance over squared mean (released code) or over mean (paper)"),
        ] = "cv2",
        reduce: Annotated[Literal["sum", "mean"], Field(description="over the maps")] = "sum",
        over: Annotated[Literal["batch", "example"], Field(description="what the dispersion is taken over")] = "batch",
        count_padding: Annotated[bool, Field(description="let padding count, as the released code does")] = False,
        type_column: Annotated[
            str, Field(min_length=1, description="column of the data with a row's type")
        ] = "task_type",
        types: Annotated[
            list[int | str],
            Field(
                min_length=1, description="values of that column, in the order of the experts' groups; '*' is any other"
            ),
        ] = [1, 0],  # noqa: B006
        expert_types: Annotated[
            list[int | str] | None, Field(description="the type of each expert; equal groups by default")
        ] = None,
    ) -> None:
        self.types = [str(value) for value in types]
        if len(set(self.types)) < len(self.types):
            raise UserError(f"loramoe: types: {', '.join(self.types)}: one is there twice.")
        if balance_weight and experts == 1:
            raise UserError("loramoe: one expert cannot be balanced; set balance_weight: 0, or more experts.")
        if balance_weight and expert_types is None and experts % len(self.types):
            raise UserError(
                f"loramoe: {experts} experts cannot be divided among {len(self.types)} types; choose a multiple, or "
                "give expert_types."
            )
        if top_k is not None and top_k > experts:
            raise UserError(f"loramoe: top_k: there are only {experts} experts, not {top_k}.")
        group = max(experts // len(self.types), 1)
        given = [str(v) for v in expert_types] if expert_types else [t for t in self.types for _ in range(group)]
        if expert_types and (len(given) != experts or set(given) - set(self.types)):
            raise UserError(
                f"loramoe: expert_types: give one of {', '.join(self.types)} for each of {experts} experts."
            )
        self.groups_of_experts = [self.types.index(t) for t in given]
        self.shape = {"experts": experts, "rank": rank, "alpha": alpha, "dropout": dropout, "top_k": top_k}
        self.target_modules, self.balance_weight, self.contrast = target_modules, balance_weight, contrast
        self.dispersion, self.reduce, self.over, self.count_padding = dispersion, reduce, over, count_padding
        self.type_column = type_column

    @property
    def needs(self) -> Needs:
        """The column with the types, where there is a loss that reads it."""
        return Needs(columns=(self.type_column,) if self.balance_weight else ())

    @staticmethod
    def adapter_type() -> Any:
        """Make the adapter type known to peft; its configuration class."""
        from luthier.models.tuners.loramoe import LoRAMoEConfig

        return LoRAMoEConfig

    def apply(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """The model with experts and routers, drawn from the ``init`` stream; only they (and a new head) are open."""
        import peft

        chosen = self.target_modules
        targets = named_targets(model, chosen, self.slug) if chosen else feed_forward_targets(model, self.slug)
        config = self.adapter_type()(**common(model, ctx), target_modules=targets, **self.shape)
        with drawing(ctx, self.slug):
            adapted = peft.get_peft_model(model, config)
        for layer in expert_layers(adapted).values():
            layer.recorded = self.balance_weight > 0
        return adapted

    def prepare(self, ctx: Context, dataset: Any) -> None:
        """Refuse rows without a type before the first step."""
        for start in range(0, len(dataset) if self.balance_weight else 0, _ROWS):
            rows = range(start, min(start + _ROWS, len(dataset)))
            values = dataset.fetch(rows).get(self.type_column, [None] * len(rows))
            for row, value in zip(rows, values, strict=True):
                type_index(value, self.types, row, self.type_column)

    def counts(self, batch: Batch, ctx: Context) -> dict[str, float]:
        """Nothing of its own; forgets routing of passes that led to no loss, for this comes before a step's losses."""
        for layer in expert_layers(ctx.model).values():
            layer.routing = None
        return {}

    def auxiliary(self, model: Any, batch: Batch, ctx: Context) -> Loss:
        """The balancing loss of a micro-batch, from the routing of the objective's (first) pass over it.

        Raises:
            LuthierError: that pass was over other inputs than the batch's.
        """
        unit, count = ("batch", 1.0) if self.over == "batch" else ("sequence", float(batch.examples))
        if not self.balance_weight:
            return Loss(sum=batch.weight_N.new_zeros(()), weight=count, unit=unit)  # type: ignore[arg-type]
        layers = expert_layers(model)
        routing = [layer.routing for layer in layers.values()]
        for layer in layers.values():
            layer.routing = None
        size = batch.inputs.get("attention_mask", next(iter(batch.inputs.values()))).shape[:2]
        if any(r is None or r.shape[:2] != size for r in routing):
            raise LuthierError("loramoe: the objective did not run the model over the batch itself; balance_weight: 0.")
        mask_BT = None if self.count_padding else batch.inputs.get("attention_mask")
        mass_MBN = mass(torch.stack(routing), mask_BT)
        example_B = torch.tensor(
            [
                type_index(value, self.types, int(row), self.type_column)
                for value, row in zip(batch.columns[self.type_column], batch.row_B, strict=True)
            ],
            device=mass_MBN.device,
        )
        expert_N = torch.tensor(self.groups_of_experts, device=mass_MBN.device)
        terms_M = balance(
            mass_MBN, importance(example_B, expert_N, self.contrast), kind=self.dispersion, over=self.over
        )
        total = terms_M.sum() if self.reduce == "sum" else terms_M.mean()
        used = float(bool(batch.weight_N.any()))
        metrics = first_group_shares(mass_MBN.detach(), example_B, expert_N, self.types)
        return Loss(self.balance_weight * used * total, used * count, unit, metrics)  # type: ignore[arg-type]


def first_group_shares(
    mass_MBN: torch.Tensor, example_B: torch.Tensor, expert_N: torch.Tensor, types: list[str]
) -> dict[str, tuple[Any, Any]]:
    """For each type, the share of its examples' routing mass that the first group of experts gets: (sum, weight)."""
    first_B = mass_MBN[..., expert_N == 0].sum((0, 2))
    all_B = mass_MBN.sum((0, 2))
    return {
        f"first_group_share/{name}": (first_B[example_B == i].sum(), all_B[example_B == i].sum())
        for i, name in enumerate(types)
    }
