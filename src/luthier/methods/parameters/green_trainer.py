"""Fine-tuning at a chosen share of the training operations: every few epochs the tensors whose training pays most.

    maximise sum_{k in S} I_k   such that   T_bp(S) = sum_{k in S} t_dw[k] + sum_{k >= first of S} t_dy[k] <= budget
    I_k = -<grad_k at w1, w1 - w0>,   w1 = w0 after one real step of the optimiser on the same rows

T_bp counts what it really costs to train a tensor: its own gradient, and passing gradients down to it. ``flops`` is the
wanted share of forward and backward together; the forward pass cannot be saved, so the backward share is
rho_bp = rho (1 + c) - c with c = forward / backward. At or below zero it becomes 0.05, with a warning.

The probe uses the rows of the step at which it is made, once at w0 and once at w1; weights, moments and step count of
the optimiser are then as before. Frozen tensors have no gradient, no step and no decay; their moments wait until they
come back. The first choice is made before the first step.

Paper: "Towards Green AI in Fine-tuning Large Language Models via Adaptive Backpropagation", ICLR 2024, arXiv
2309.13192; released code pittisl/GreenTrainer. Different from the release: the selection is exact (its dynamic program
is greedy and never selects the deepest tensor), the optimiser's state is restored after the probe, and costs are
counted by hooks on the model at hand, without padding. The probe's step is not clipped.

Example::

    parameters:
      - green-trainer: {flops: 0.5}
    training: {epochs: 4}
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Batch, Context
from luthier.core.registry import parameters
from luthier.functional.backward_costs import Costs, Recorder, best_set, reachable
from luthier.functional.parameter_selector import Site, choose, sites

# The backward share where the forward pass alone takes up the budget.
_LEAST = 0.05


def importances(
    before: Sequence[torch.Tensor], after: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None]
) -> np.ndarray:
    """-<grad at the new weights, change>, divided by the largest size; 0 where there is no gradient."""
    found = np.array(
        [
            0.0 if g is None else -float((g.double() * (b.double() - a.double())).sum())
            for a, b, g in zip(before, after, grads, strict=True)
        ]
    )
    largest = np.abs(found).max(initial=0.0)
    return found / largest if largest > 0 else found


@parameters(
    "green-trainer",
    identity={"flops": 1.0},
    example={"flops": 0.6, "reselect_epochs": 1},
    conflicts={
        "parameters:full": "full trains every tensor at every step",
        "parameters:lora": "costs are counted for tensors of the model itself, which lora freezes",
        "parameters:half-ft": "both decide what is trained; limit green-trainer with candidates instead",
        "parameters:attention": "both decide what is trained; use candidates: [category:attention] instead",
        "parameters:spiel": "spiel looks at the gradients of all its layers",
        "parameters:composable-sparse-ft": "its mask needs the gradients of all its tensors",
        "processes": "what is trained changes within the run, which several processes cannot follow",
    },
    paper="Towards Green AI in Fine-tuning Large Language Models via Adaptive Backpropagation, ICLR 2024, "
    "arXiv 2309.13192",
)
class GreenTrainer:
    """Fine-tuning at a chosen share of the training operations, on the tensors whose training pays most."""

    def __init__(
        self,
        *,
        flops: Annotated[
            float, Field(gt=0, le=1, description="rho, wanted share of full fine-tuning's operations; 1 trains all")
        ] = 0.5,
        reselect_epochs: Annotated[int, Field(ge=1, description="epochs between choices")] = 2,
        reselect_steps: Annotated[
            int | None, Field(ge=1, description="steps between choices, instead of epochs")
        ] = None,
        candidates: Annotated[
            list[str] | None, Field(min_length=1, description="a selection of tensors to choose from; all by default")
        ] = None,
        levels: Annotated[int, Field(ge=10, description="Tq, steps into which costs are quantised")] = 1000,
        rounding: Annotated[
            Literal["floor", "ceil"], Field(description="tiny tensors are free, or the budget is never exceeded")
        ] = "floor",
        coarse: Annotated[bool, Field(description="choose a module's weight and bias together")] = False,
    ) -> None:
        self.flops, self.reselect_epochs, self.reselect_steps = flops, reselect_epochs, reselect_steps
        self.candidates, self.levels, self.rounding, self.coarse = candidates, levels, rounding, coarse
        self._sites: list[Site] = []
        self._candidates: list[str] = []
        self._round = -1
        self._chosen: list[str] = []
        self._share = 1.0
        self._decay: dict[str, float] = {}
        self._parked: dict[str, dict[str, torch.Tensor]] = {}
        self._trained: set[str] = set()
        self._choices: list[dict[str, Any]] = []
        self._model: Any = None

    # -- the extension point

    def apply(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Open every candidate; the first choice is made before the first step.

        Raises:
            UserError: several processes, or candidates that name nothing.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1 and self.flops < 1:
            raise UserError("green-trainer changes what is trained within a run; use one process, or flops: 1.")
        self._model, self._sites = model, sites(model)
        terms = self.candidates or ["*"]
        self._candidates = choose(self._sites, terms, where="green-trainer: candidates").names
        self._set(self._candidates)
        return model

    def groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """What is chosen now."""
        return [{"params": [p for p in model.parameters() if p.requires_grad]}]

    def before_step(self, batches: Sequence[Batch], ctx: Context) -> None:
        """Choose anew where it is due."""
        due = ctx.step // self.reselect_steps if self.reselect_steps else ctx.epoch // self.reselect_epochs
        if self.flops == 1.0 or due == self._round:
            return
        if not self._decay:
            self._decay = self._names_of(ctx.optimizer)
        importance, costs = self._probe(batches, ctx)
        if not np.isfinite(importance).all():
            return  # the step itself will say so
        self._round = due
        self._choose(importance, costs, ctx)

    def on_grad(self, model: torch.nn.Module, ctx: Context) -> None:
        """Nothing to do."""

    def on_step(self, model: torch.nn.Module, ctx: Context) -> None:
        """Log the share of the operations."""
        self._trained |= set(self._chosen)
        ctx.log(flops_share=self._share, trained_tensors=len(self._chosen))

    def state(self) -> dict[str, Any]:
        """The choice, tensors that an earlier choice trained, and moments that wait."""
        now = set(self._chosen)
        left = sorted(self._trained - now)
        return {
            "round": self._round,
            "chosen": self._chosen,
            "share": self._share,
            "decay": self._decay,
            "left": {name: self._model.get_parameter(name).detach() for name in left},
            "parked": self._parked,
            "choices": self._choices,
        }

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`, after :meth:`apply`."""
        self._round, self._share = int(state["round"]), float(state["share"])
        self._decay, self._choices = dict(state["decay"]), list(state["choices"])
        self._parked = {name: dict(kept) for name, kept in state["parked"].items()}
        self._set(list(state["chosen"]))
        self._trained = set(state["left"]) | set(self._chosen)
        with torch.no_grad():
            for name, value in state["left"].items():
                self._model.get_parameter(name).copy_(value)

    def export(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model itself."""
        return model

    def record(self) -> dict[str, Any]:
        """Every choice: tensors, shares of backward and of all operations, importance captured."""
        return {"flops": self.flops, "choices": self._choices}

    # -- the probe

    def _probe(self, batches: Sequence[Batch], ctx: Context) -> tuple[np.ndarray, Costs]:
        """Importance of every tensor in forward order, and the costs; weights and optimiser are as before."""
        model = self._model
        before = {name: model.get_parameter(name).requires_grad for name in self._candidates}
        config: Any = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        heads = int(getattr(config, "num_attention_heads", 0) or 0)
        head_dim = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", 0) // heads if heads else 0)
        recorder = Recorder(model, self._sites, heads * int(head_dim))
        with torch.no_grad():
            for batch in batches:
                recorder(batch, partial(ctx.forward, batch, grad=False))
        costs = recorder.costs()
        allowed_N = np.array([name in self._candidates for name in costs.names])
        # What the budget can never reach need not carry a gradient in the probe either.
        wanted_N = allowed_N & reachable(costs, max(self._backward_share(costs), _LEAST))
        wanted = [n for n, w in zip(costs.names, wanted_N, strict=True) if w] or [costs.names[-1]]
        parameters = [model.get_parameter(name) for name in wanted]
        for name in self._candidates:
            model.get_parameter(name).requires_grad_(name in set(wanted))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(ctx.rng("noise", "green-trainer", ctx.step).initial_seed())
            self._gradients(batches, parameters, ctx)
            start = [p.detach().clone() for p in parameters]
            self._trial(wanted, parameters, ctx)
            after = [p.detach().clone() for p in parameters]
            self._gradients(batches, parameters, ctx)
        found = dict(zip(wanted, importances(start, after, [p.grad for p in parameters]), strict=True))
        with torch.no_grad():
            for parameter, value in zip(parameters, start, strict=True):
                parameter.copy_(value)
                parameter.grad = None
        for name, opened in before.items():
            model.get_parameter(name).requires_grad_(opened)
        return np.array([found.get(name, 0.0) for name in costs.names]), costs

    def _gradients(self, batches: Sequence[Batch], parameters: Sequence[torch.Tensor], ctx: Context) -> None:
        """The gradient of the step's loss, at the weights of now."""
        for parameter in parameters:
            parameter.grad = None
        weight = 0.0
        for batch in batches:
            loss = ctx.loss(batch)
            loss.sum.backward()
            weight += float(loss.weight)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(max(weight, 1e-12))

    def _trial(self, names: Sequence[str], parameters: Sequence[torch.Tensor], ctx: Context) -> None:
        """One step by a copy of the optimiser."""
        like = {k: v for k, v in ctx.optimizer.param_groups[0].items() if k not in ("params", "weight_decay", "lr")}
        groups = [
            {**like, "params": [p], "lr": ctx.learning_rate, "weight_decay": self._decay.get(n, 0.0)}
            for n, p in zip(names, parameters, strict=True)
        ]
        trial = type(ctx.optimizer)(groups, lr=ctx.learning_rate)
        for name, parameter in zip(names, parameters, strict=True):
            kept = ctx.optimizer.state.get(parameter) or self._parked.get(name)
            if kept:
                trial.state[parameter] = {k: v.clone() if torch.is_tensor(v) else v for k, v in kept.items()}
        trial.step()

    def _names_of(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Weight decay by tensor name, as the engine has set it."""
        names = {id(p): n for n, p in self._model.named_parameters()}
        return {names[id(p)]: float(g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}

    # -- the choice

    def _backward_share(self, costs: Costs) -> float:
        share = costs.backward_share(self.flops)
        return share if share > 0 else _LEAST

    def _choose(self, importance: np.ndarray, costs: Costs, ctx: Context) -> None:
        if costs.backward_share(self.flops) <= 0:
            c = costs.forward / costs.backward
            warnings.warn(
                f"green-trainer: the forward pass alone takes flops: {self.flops:g}; the least that can be had is "
                f"{(_LEAST + c) / (1 + c):.2f}, which is used.",
                stacklevel=2,
            )
        share = self._backward_share(costs)
        try:
            chosen_N = self._select(importance, costs, share)
        except ValueError as error:
            c = costs.forward / costs.backward
            least = (float(str(error)) + c) / (1 + c)
            raise UserError(
                f"green-trainer: with flops: {self.flops:g} not even the last tensor can be trained; the least is "
                f"{least:.3f}."
            ) from error
        names = [name for name, chosen in zip(costs.names, chosen_N, strict=True) if chosen]
        optimizer, coming = ctx.optimizer, set(names) - set(self._chosen)
        for name in set(self._chosen) - set(names):
            if kept := optimizer.state.get(self._model.get_parameter(name)):
                self._parked[name] = dict(kept)
        for name in coming & set(self._parked):
            optimizer.state[self._model.get_parameter(name)] = self._parked.pop(name)
        self._set(names)
        self._share = costs.share(chosen_N)
        positive = importance[importance > 0].sum()
        self._choices.append(
            {
                "step": ctx.step,
                "tensors": names,
                "backward_share": costs.of(chosen_N) / costs.backward,
                "flops_share": self._share,
                "importance_captured": float(importance[chosen_N].sum() / positive) if positive > 0 else 0.0,
            }
        )

    def _select(self, importance: np.ndarray, costs: Costs, share: float) -> np.ndarray:
        options: dict[str, Any] = {"levels": self.levels, "rounding": self.rounding}
        if not self.coarse:
            return best_set(importance, costs, share, **options)
        modules = {site.name: site.module for site in self._sites}
        order = list(dict.fromkeys(modules[name] for name in costs.names))
        of_N = np.array([order.index(modules[name]) for name in costs.names])
        summed = [
            np.bincount(of_N, weights=values, minlength=len(order)) for values in (costs.dy, costs.dw, importance)
        ]
        joined = Costs(tuple(order), summed[0], summed[1], costs.forward)
        return best_set(summed[2], joined, share, **options)[of_N]

    def _set(self, names: Sequence[str]) -> None:
        self._chosen, now = list(names), set(names)
        for name in self._candidates:
            self._model.get_parameter(name).requires_grad_(name in now)
