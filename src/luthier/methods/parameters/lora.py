"""Low-rank adaptation: the base is frozen and each linear map of the blocks gets a trained low-rank addition.

    y = W x + s B A x,   A [r, in], B [out, r],   s = alpha / r   (alpha / sqrt(r) with rslora)

W frozen, A and B trained; B starts at zero (or B A = 0), so training starts at the base. ``dora`` also learns the norm
of each row of W + s B A. The adapter is peft's: the saved folder opens in plain peft and in vLLM, and ``merge`` adds it
into the base instead. A classification head is trained in full and saved with the adapter.

Papers: "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv 2106.09685; rank-stabilised scaling: "A Rank
Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023, arXiv 2312.03732; "DoRA: Weight-Decomposed Low-Rank
Adaptation", 2024, arXiv 2402.09353.

Example::

    parameters:
      - lora: {rank: 16, alpha: 32}
    training: {learning_rate: 2.0e-4}          # about ten times that of full fine-tuning
"""

from __future__ import annotations

import copy
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core.errors import UserError, did_you_mean
from luthier.core.protocols import Context
from luthier.core.registry import parameters
from luthier.functional.tensor_selection import block_units

_TASK_TYPES = {
    "causal-lm": "CAUSAL_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
}


@parameters(
    "lora",
    example={"rank": 4, "alpha": 8.0},
    conflicts={
        "parameters:full": "full trains every tensor and lora freezes the base; name one of the two",
    },
    paper="LoRA: Low-Rank Adaptation of Large Language Models, 2021, arXiv 2106.09685",
)
class LowRankAdaptation:
    """Low-rank adaptation: a frozen base with small trained matrices beside each linear map."""

    def __init__(
        self,
        *,
        rank: Annotated[int, Field(ge=1, description="rank r of the addition")] = 16,
        alpha: Annotated[float | None, Field(gt=0, description="scale numerator; twice the rank by default")] = None,
        dropout: Annotated[float, Field(ge=0, lt=1, description="dropout on the adapter's input")] = 0.0,
        target_modules: Annotated[
            list[str] | None,
            Field(min_length=1, description="names of linear modules; by default all linear maps of the blocks"),
        ] = None,
        rslora: Annotated[bool, Field(description="scale by alpha / sqrt(rank) instead of alpha / rank")] = False,
        dora: Annotated[bool, Field(description="learn the norm of each row beside its direction")] = False,
        init: Annotated[
            Literal["default", "gaussian", "orthogonal"],
            Field(description="how A and B start; all leave the base's weights and outputs as they are"),
        ] = "default",
        merge: Annotated[bool, Field(description="save the merged model instead of the adapter")] = False,
    ) -> None:
        if init == "orthogonal" and rank % 2:
            raise UserError(f"lora: init: orthogonal needs an even rank, got {rank}.")
        self.rank, self.alpha, self.dropout = rank, float(alpha if alpha is not None else 2 * rank), dropout
        self.target_modules, self.rslora, self.dora = target_modules, rslora, dora
        self.init, self.merge = init, merge

    def apply(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """The model with adapters, drawn from the ``init`` stream; only they (and a new head) are open."""
        import peft

        task = str(getattr(ctx.task, "name", ctx.task))
        config = peft.LoraConfig(
            task_type=_TASK_TYPES.get(task),
            r=self.rank,
            # peft annotates an integer but computes with any number.
            lora_alpha=int(self.alpha) if self.alpha.is_integer() else self.alpha,
            lora_dropout=self.dropout,
            target_modules=self._targets(model),
            modules_to_save=None if task == "causal-lm" else heads(model),
            use_rslora=self.rslora,
            use_dora=self.dora,
            init_lora_weights=True if self.init == "default" else self.init,
        )
        # peft draws from the global generator: lend it our stream and give it back untouched.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(ctx.rng("init", "lora").initial_seed())
            return peft.get_peft_model(model, config)

    def groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """The adapter's matrices, the row norms of dora and the head."""
        own = ("lora_", "modules_to_save")
        opened = [p for n, p in model.named_parameters() if p.requires_grad and any(part in n for part in own)]
        return [{"params": opened}]

    def on_grad(self, model: torch.nn.Module, ctx: Context) -> None:
        """Nothing to do."""

    def on_step(self, model: torch.nn.Module, ctx: Context) -> None:
        """Nothing to do."""

    def state(self) -> dict[str, Any]:
        """No state beside the weights."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def export(self, model: torch.nn.Module) -> torch.nn.Module:
        """The peft model, saved as a standard adapter; with ``merge`` a copy with the adapter added into the base."""
        if not self.merge:
            return model
        # Merging unloads the adapter, and training may go on.
        merged: Any = copy.deepcopy(model)
        return merged.merge_and_unload(safe_merge=True)

    def _targets(self, model: torch.nn.Module) -> list[str]:
        linear = linear_modules(model)
        if self.target_modules is None:
            return block_targets(model)
        for name in self.target_modules:
            if not any(path == name or path.endswith(f".{name}") for path in linear):
                known = sorted({path.rpartition(".")[2] for path in linear})
                raise UserError(
                    f"lora: target_modules: no linear module is called '{name}'.{did_you_mean(name, known)} "
                    f"This model has: {', '.join(known)}."
                )
        return list(self.target_modules)


def linear_modules(model: torch.nn.Module) -> list[str]:
    """Paths of the linear maps (also transformers' transposed ``Conv1D``)."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
    ]


def block_targets(model: torch.nn.Module) -> list[str]:
    """Names of the linear maps inside the transformer blocks, short where the short name means nothing else.

    Raises:
        UserError: the model has no recognisable blocks.
    """
    inside = {u.name for u in block_units({n: tuple(p.shape) for n, p in model.named_parameters()})}
    linear = linear_modules(model)
    wanted = [path for path in linear if path in inside]
    if not wanted:
        raise UserError(
            f"lora: found no linear maps in transformer blocks of {type(model).__name__}; name them in target_modules."
        )
    short = sorted({path.rpartition(".")[2] for path in wanted})
    ambiguous = any(path.rpartition(".")[2] in short for path in linear if path not in inside)
    return wanted if ambiguous else short


def heads(model: torch.nn.Module) -> list[str]:
    """Names of the modules outside the backbone that hold weights: a classification head."""
    backbone = getattr(model, "base_model_prefix", "")
    return [
        name for name, child in model.named_children() if name != backbone and any(True for _ in child.parameters())
    ]
