"""Sparse fine-tuning within a budget of single weights, which are dropped and grown elsewhere while training.

    W_eff = W + scatter(delta_K, eta_K)                      W frozen; eta: flat positions, delta: trained values

    every S steps, after a phase of gamma steps, in every layer of K entries, r = floor(p K):
      drop   the r entries with the smallest |delta|
      grow   ag: the r candidates with the largest |sum of gradients| over the phase; their Adam moments start at what
                 the phase has seen. Candidates are the K largest gradients of its first micro-batch.
             ma: the r free positions with the largest (row accumulator) * (column accumulator) of SM3
    p = 1 at the first closing (all positions are random until then), p = p0 (1 - t/T) later; or
    p = p0 (1 + cos(pi t/T)) / 2 always

Adam keeps an age for every delta, and adds epsilon before the bias correction. Weight decay pulls deltas to zero, that
is weights to the base. A grown delta starts at zero, a dropped weight returns to its base value. Trained and optimiser
memory are proportional to the budget; of a dense gradient there is never more than one layer's.

Default budget: ``density`` of the entries of the MODEL, spread over all linear maps of the backbone by their size (the
language-model head is not one of them; a new classification head is trained in full). The base may be quantised; the
saved model then has the dequantised weights with the deltas added, which loses nothing.

Paper: "Scaling Sparse Fine-Tuning to Large Language Models", 2024, arXiv 2401.16405; released code AlanAnsell/peft
("rigl" is ag, "sm3" is ma). Two behaviours of the release differ from what is right, and can be had by option:
``accumulation_scaling: released`` averages the gradients of micro-batches, so that seeded moments are too small by the
accumulation factor (by default the gradients of one optimiser step are one sample); ``seed_age: released``, the
default, gives a seeded delta the age n of its samples at its next step although that is gradient n + 1 (``exact``
counts it). With accumulation, ag's candidates still come from the first micro-batch.

Example::

    parameters:
      - spiel: {algorithm: ag, density: 0.01}
    training: {learning_rate: 1.0e-3}
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Batch, Context
from luthier.core.registry import TOKEN_TASKS, parameters
from luthier.functional import sparse_deltas as deltas
from luthier.functional.differences import Sparse
from luthier.functional.parameter_selector import Site, choose, is_linear, sites
from luthier.functional.sparse_deltas import Candidates
from luthier.functional.sparse_linear import SparseLinear, is_quantised, merged, weight_shape, wrap
from luthier.functional.tensor_selection import module_of

_OLD = 3  # an entry that has outlived so many reselections is called old
_SM3_EPSILON, _ADAM_EPSILON = 1e-8, 1e-6


@parameters(
    "spiel",
    example={"algorithm": "ma", "density": 0.05, "reselect_every": 3, "accumulate": 2},
    conflicts={
        "parameters:full": "full trains every tensor, and spiel freezes the base",
        "parameters:lora": "both add to the same linear maps",
        "parameters:half-ft": "half-ft trains base tensors, which spiel freezes",
        "parameters:attention": "attention trains base tensors, which spiel freezes",
        "optimizer:sgd": "spiel moves its deltas with an AdamW (ag) or SM3 (ma) of its own",
        "sharding:fsdp2": "spiel picks single entries of whole weights",
    },
    paper="Scaling Sparse Fine-Tuning to Large Language Models, 2024, arXiv 2401.16405",
)
class SparseIterativeFineTuning:
    """Sparse fine-tuning of a fixed budget of single weights whose positions are revised while training."""

    def __init__(
        self,
        *,
        algorithm: Annotated[
            Literal["ag", "ma"],
            Field(description="grow by accumulated gradients (ag, AdamW) or by SM3's accumulators (ma)"),
        ] = "ag",
        density: Annotated[
            float | None, Field(gt=0, le=1, description="budget as a share of the model's entries; 0.01 by default")
        ] = None,
        num_weights: Annotated[int | None, Field(ge=1, description="budget in entries")] = None,
        rank_equivalent: Annotated[
            int | None, Field(ge=1, description="budget of a LoRA of this rank on the same layers")
        ] = None,
        target_modules: Annotated[
            list[str] | None,
            Field(min_length=1, description="a selection of linear maps; by default all of the backbone"),
        ] = None,
        reselect_every: Annotated[int, Field(ge=2, description="S, steps between reselections")] = 20,
        accumulate: Annotated[int, Field(ge=1, description="gamma, steps of a selection phase")] = 5,
        reselect_rate: Annotated[
            float, Field(ge=0, le=1, description="p0, share that is replaced; 0 keeps the first positions")
        ] = 0.2,
        rate_policy: Annotated[
            Literal["linear", "cosine"], Field(description="how the replaced share falls over the run")
        ] = "linear",
        delta_dtype: Annotated[
            Literal["float32", "bfloat16"], Field(description="type of the deltas; moments are float32")
        ] = "float32",
        beta1: Annotated[float, Field(ge=0, lt=1, description="decay of the first moment (ag)")] = 0.9,
        beta2: Annotated[float, Field(ge=0, lt=1, description="decay of the second moment (ag)")] = 0.999,
        epsilon: Annotated[
            float | None, Field(gt=0, description="added to the denominator; 1e-6 for ag, 1e-8 for ma")
        ] = None,
        weight_decay: Annotated[float, Field(ge=0, description="decay of the deltas towards zero")] = 0.0,
        accumulation_scaling: Annotated[
            Literal["correct", "released"],
            Field(description="what one sample is (ag): the gradient of a step, or of a micro-batch as released"),
        ] = "correct",
        seed_age: Annotated[
            Literal["released", "exact"], Field(description="age of a grown delta (ag): its samples, or one more")
        ] = "released",
    ) -> None:
        if accumulate >= reselect_every:
            raise UserError(
                f"spiel: accumulate ({accumulate}) must be less than reselect_every ({reselect_every}): a phase ends "
                "before the next one begins."
            )
        budgets = {"density": density, "num_weights": num_weights, "rank_equivalent": rank_equivalent}
        given = [name for name, value in budgets.items() if value is not None]
        if len(given) > 1:
            raise UserError(f"spiel: {' and '.join(given)} both state the budget; keep one.")
        self.algorithm, self.target_modules = algorithm, target_modules
        self.density = 0.01 if not given else density
        self.num_weights, self.rank_equivalent = num_weights, rank_equivalent
        self.reselect_every, self.accumulate = reselect_every, accumulate
        self.reselect_rate, self.rate_policy = reselect_rate, rate_policy
        self.delta_dtype, self.beta1, self.beta2 = delta_dtype, beta1, beta2
        self.epsilon = epsilon if epsilon is not None else _ADAM_EPSILON if algorithm == "ag" else _SM3_EPSILON
        self.weight_decay = weight_decay
        self.accumulation_scaling, self.seed_age = accumulation_scaling, seed_age
        self.layers: dict[str, SparseLinear] = {}
        self._heads: list[Site] = []
        # Of all layers one behind the other: the moments and ages of ag, and when each entry came in.
        self.m_K = self.v_K = self.age_K = self.born_K = torch.empty(0)
        self.accumulators: dict[str, dict[str, torch.Tensor]] = {}
        self._open = False
        self._seen: dict[str, Candidates] = {}
        self._step: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._micro_batches = 1
        self._reselections: list[dict[str, float]] = []

    # -- the extension point

    def apply(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Wrap the linear maps, with random positions and zero deltas.

        Raises:
            UserError: no such module, one without a matrix of its own, a budget larger than the weights, or several
                processes with ``ag``.
        """
        self._refuse_many()
        every = sites(model)
        targets = self._targets(model, every)
        counts = self._counts(model, targets)
        dtype = torch.float32 if self.delta_dtype == "float32" else torch.bfloat16
        self.layers = {}
        for (path, module), count in zip(targets.items(), counts, strict=True):
            if count:
                rows, columns = weight_shape(module)
                drawn = torch.randperm(rows * columns, generator=ctx.rng("init", "spiel", path))[:count]
                self.layers[path] = wrap(model, path, drawn.sort().values, dtype)
        total = sum(self.sizes)
        self.born_K = torch.zeros(total, dtype=torch.int32)
        if self.algorithm == "ag":
            self.m_K, self.v_K, self.age_K = torch.zeros(total), torch.zeros(total), torch.ones(total)
        else:
            self.accumulators = {
                path: {"row": torch.zeros(layer.shape[0]), "column": torch.zeros(layer.shape[1])}
                for path, layer in self.layers.items()
            }
        self._open = self.algorithm == "ag" and self.reselect_rate > 0
        task = str(getattr(ctx.task, "name", ctx.task))
        self._heads = [] if task in TOKEN_TASKS else [s for s in every if s.category == "head"]
        for site in self._heads:
            model.get_parameter(site.name).requires_grad_(True)
        return model

    def groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """The deltas, which :meth:`update` moves, and a new head, which the engine's optimiser moves."""
        values = [layer.values for layer in self.layers.values()]
        heads = [model.get_parameter(site.name) for site in self._heads]
        return [{"params": values, "weight_decay": 0.0}, {"params": heads}]

    def before_step(self, batches: Sequence[Batch], ctx: Context) -> None:
        """Look at dense gradients while a phase is open."""
        self._micro_batches, self._step = len(batches), {}
        for path, layer in self.layers.items():
            layer.watch = partial(self._see, path) if self._open else None

    def on_grad(self, model: torch.nn.Module, ctx: Context) -> None:
        """The gradients of the step's micro-batches become samples of the candidates."""
        for path, (sum_C, square_C) in self._step.items():
            seen, factor = self._seen[path], ctx.grad_factor
            seen.sum_C += factor * sum_C
            if self.accumulation_scaling == "correct":
                seen.square_C += (factor * sum_C).square()
                seen.samples += 1
            else:
                seen.square_C += factor**2 * square_C
                seen.samples += self._micro_batches
        self._step = {}

    @torch.no_grad()
    def update(self, model: torch.nn.Module, ctx: Context) -> None:
        """One step of AdamW with ages, or of SM3."""
        layers = list(self.layers.items())
        grads = [torch.zeros_like(x.values) if x.values.grad is None else x.values.grad for _, x in layers]
        if self.algorithm == "ag":
            moved = deltas.adamw_with_ages(
                torch.cat([layer.values for _, layer in layers]).float(),
                torch.cat(grads).float(),
                *(self._on(name) for name in ("m_K", "v_K", "age_K")),
                lr=ctx.learning_rate,
                beta1=self.beta1,
                beta2=self.beta2,
                epsilon=self.epsilon,
                weight_decay=self.weight_decay,
            ).split(self.sizes)
        else:
            moved = tuple(
                deltas.sm3(
                    layer.values.float(),
                    grad.float(),
                    layer.index_K,
                    *self._accumulators(path),
                    lr=ctx.learning_rate,
                    epsilon=self.epsilon,
                    weight_decay=self.weight_decay,
                )
                for (path, layer), grad in zip(layers, grads, strict=True)
            )
        for (_, layer), value_K in zip(layers, moved, strict=True):
            layer.values.copy_(value_K)
            layer.values.grad = None

    def on_step(self, model: torch.nn.Module, ctx: Context) -> None:
        """Close a phase and replace positions, open the next one."""
        done = ctx.step + 1
        total = ctx.total_steps or done
        if self.reselect_rate > 0 and done <= total and deltas.closes(done, self.reselect_every, self.accumulate):
            self._reselect(done, total)
            ctx.log(**self._reselections[-1])
        if self.algorithm == "ag" and self.reselect_rate > 0 and deltas.opens(done, self.reselect_every):
            self._open, self._seen = True, {}
        if self.layers:
            ctx.log(mean_delta=float(torch.cat([x.values.detach().abs().float() for x in self.layers.values()]).mean()))

    def state(self) -> dict[str, Any]:
        """Positions, moments and ages (or accumulators), and what an open phase has seen."""
        moments = {"m": self.m_K, "v": self.v_K, "age": self.age_K} if self.algorithm == "ag" else {}
        return {
            "algorithm": self.algorithm,
            "index": {path: layer.index.clone() for path, layer in self.layers.items()},
            "born": self.born_K,
            **moments,
            "accumulators": self.accumulators,
            "open": self._open,
            "seen": {path: vars(seen) for path, seen in self._seen.items()},
            "reselections": self._reselections,
        }

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`, after :meth:`apply`.

        Raises:
            UserError: the checkpoint has other layers, other counts or the other algorithm.
        """
        own = {path: layer.values.numel() for path, layer in self.layers.items()}
        theirs = {path: index.numel() for path, index in state["index"].items()}
        if state["algorithm"] != self.algorithm or own != theirs:
            raise UserError(
                f"spiel: the checkpoint trains {sum(theirs.values()):,} weights of {len(theirs)} layers with "
                f"{state['algorithm']}, this recipe {sum(own.values()):,} of {len(own)} with {self.algorithm}. Resume "
                "with the same options, or start a new run."
            )
        for path, layer in self.layers.items():
            layer.index.copy_(state["index"][path])
        self.born_K = state["born"].clone()
        if self.algorithm == "ag":
            self.m_K, self.v_K, self.age_K = (state[key].clone() for key in ("m", "v", "age"))
        self.accumulators = {p: {k: t.clone() for k, t in a.items()} for p, a in state["accumulators"].items()}
        self._open = bool(state["open"])
        self._seen = {
            path: Candidates(s["index_C"], s["sum_C"].clone(), s["square_C"].clone(), int(s["samples"]))
            for path, s in state["seen"].items()
        }
        self._reselections = list(state["reselections"])

    def export(self, model: torch.nn.Module) -> torch.nn.Module:
        """A copy with the deltas added into plain linear maps."""
        quantised = any(is_quantised(layer.base_layer) for layer in self.layers.values())
        made: Any = merged(model)
        if quantised:
            warnings.warn(
                "spiel: the base is quantised; the saved model has dequantised weights with the deltas added. Its "
                "deltas alone are in delta/.",
                stacklevel=2,
            )
            if hasattr(made.config, "quantization_config"):
                del made.config.quantization_config
        return made

    def delta(self, model: torch.nn.Module) -> tuple[dict[str, Sparse], dict[str, torch.Tensor]]:
        """The deltas by tensor name, and the values of a new head."""
        parts = {}
        for path, layer in self.layers.items():
            order = torch.argsort(layer.index_K)
            parts[f"{path}.weight"] = Sparse(layer.shape, layer.index_K[order], layer.values.detach()[order])
        return parts, {site.name: model.get_parameter(site.name).detach() for site in self._heads}

    def record(self) -> dict[str, Any]:
        """Counts of every layer, bytes of what is trained and remembered, and every reselection."""
        return {
            "algorithm": self.algorithm,
            "weights": {path: layer.values.numel() for path, layer in self.layers.items()},
            "bytes": self.bytes(),
            "reselections": self._reselections,
        }

    def bytes(self) -> dict[str, int]:
        """Memory of the trained deltas with their positions, and of what the optimiser remembers."""
        size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
        layers = self.layers.values()
        moments = [self.m_K, self.v_K, self.age_K] if self.algorithm == "ag" else []
        moments += [t for a in self.accumulators.values() for t in a.values()]
        return {"deltas": size([x.values for x in layers] + [x.index for x in layers]), "optimizer": size(moments)}

    @property
    def sizes(self) -> list[int]:
        """Entries of each layer; they never change."""
        return [layer.values.numel() for layer in self.layers.values()]

    # -- what is trained

    def _refuse_many(self) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.algorithm == "ag" and distributed and torch.distributed.get_world_size() > 1:
            raise UserError(
                "spiel: with algorithm: ag every process would see other gradients and choose other positions. Use "
                "algorithm: ma, whose choice follows from what all share, or one process."
            )

    def _targets(self, model: torch.nn.Module, every: list[Site]) -> dict[str, torch.nn.Module]:
        if self.target_modules is None:
            chosen = [s for s in every if s.category != "head"]
        else:
            picked = choose(every, self.target_modules, where="spiel: target_modules")
            if picked.parts:
                raise UserError(f"spiel: target_modules: {next(iter(picked.parts))} can only be named as a whole.")
            chosen = list(picked.sites)
        owners = {s.name: [model.get_submodule(module_of(name)) for name in s.names] for s in chosen}
        linear = [s for s in chosen if s.name.endswith(".weight") and any(map(is_linear, owners[s.name]))]
        if self.target_modules is None:
            linear = [s for s in linear if s.category != "embedding"]
        if not linear:
            names = ", ".join(self.target_modules or ["this model"])
            raise UserError(f"spiel: target_modules: {names} holds no linear map with a matrix of its own.")
        for site in linear:
            if len(site.names) > 1:
                raise UserError(
                    f"spiel: {' and '.join(site.names)} are one tensor, and its deltas would be counted twice. Leave "
                    f'it out of target_modules ("!{site.module}").'
                )
        return {s.module: owners[s.name][0] for s in linear}

    def _counts(self, model: torch.nn.Module, targets: dict[str, torch.nn.Module]) -> list[int]:
        shapes = [weight_shape(module) for module in targets.values()]
        numels = [rows * columns for rows, columns in shapes]
        if self.rank_equivalent is not None:
            budget = sum(self.rank_equivalent * (rows + columns) for rows, columns in shapes)
        elif self.num_weights is not None:
            budget = self.num_weights
        else:
            packed = {id(m.weight): r * c for m, (r, c) in zip(targets.values(), shapes, strict=True)}
            budget = int(self.density * sum(packed.get(id(p), p.numel()) for p in model.parameters()))  # type: ignore[operator]
        if budget > sum(numels):
            raise UserError(
                f"spiel: the budget of {budget:,} weights is larger than the {sum(numels):,} weights of the targeted "
                "linear maps. Lower density, num_weights or rank_equivalent."
            )
        counts = deltas.layer_counts(numels, budget)
        if not any(counts):
            raise UserError(f"spiel: a budget of {budget:,} weights leaves none for any of {len(counts)} layers.")
        if empty := [path for path, count in zip(targets, counts, strict=True) if not count]:
            warnings.warn(
                f"spiel: {len(empty)} layers are too small for the budget and stay: {empty[0]}.", stacklevel=3
            )
        return counts

    # -- the phase and its end

    def _see(self, path: str, grad_OI: torch.Tensor) -> None:
        """The dense gradient of a layer for one micro-batch."""
        if path not in self._seen:
            index_C = deltas.candidates(grad_OI, self.layers[path].values.numel())
            zeros = lambda: torch.zeros(index_C.numel(), device=index_C.device)  # noqa: E731
            self._seen[path] = Candidates(index_C, zeros(), zeros())
        grad_C = grad_OI.reshape(-1)[self._seen[path].index_C.to(grad_OI.device)].float()
        sum_C, square_C = self._step.get(path, (torch.zeros_like(grad_C), torch.zeros_like(grad_C)))
        self._step[path] = (sum_C + grad_C, square_C + grad_C.square())

    @torch.no_grad()
    def _reselect(self, done: int, total: int) -> None:
        share = deltas.replaced_share(self.rate_policy, self.reselect_rate, done, total, self.accumulate)
        replaced, start = 0, 0
        for path, layer in self.layers.items():
            index_K, value_K = layer.index_K, layer.values
            count = int(value_K.numel() * share)
            if self.algorithm == "ag":
                seen = self._seen.get(path)
                if seen is None or seen.samples == 0:  # the layer was not used in any forward pass of the phase
                    start += value_K.numel()
                    continue
                slot_R, place_R = deltas.choose_accumulated(index_K, value_K, seen, count)
                new_R = seen.index_C[place_R]
                scale = 1 if self.accumulation_scaling == "correct" else self._micro_batches
                age = seen.samples / scale
                m_R, v_R = deltas.seeded_moments(seen, place_R, age, self.beta1, self.beta2)
                at = start + slot_R
                self.m_K[at], self.v_K[at] = m_R, v_R
                self.age_K[at] = age + (1.0 if self.seed_age == "exact" else 0.0)
            else:
                slot_R, new_R = deltas.choose_by_accumulators(index_K, value_K, *self._accumulators(path), count)
            layer.index[slot_R] = new_R.to(layer.index)
            value_K[slot_R] = 0.0
            self.born_K[start + slot_R.cpu()] = len(self._reselections) + 1
            replaced += slot_R.numel()
            start += value_K.numel()
        number = len(self._reselections) + 1
        self._reselections.append(
            {
                "reselection": number,
                "replaced": replaced,
                "replaced_share": replaced / max(start, 1),
                "support_initial": float((self.born_K == 0).float().mean()),
                "support_old": float((number - self.born_K >= _OLD).float().mean()),
            }
        )
        self._open, self._seen = False, {}

    def _accumulators(self, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.layers[path].values.device
        self.accumulators[path] = {key: t.to(device) for key, t in self.accumulators[path].items()}
        return self.accumulators[path]["row"], self.accumulators[path]["column"]

    def _on(self, name: str) -> torch.Tensor:
        """A state tensor on the device of the deltas."""
        setattr(self, name, getattr(self, name).to(next(iter(self.layers.values())).values.device))
        found: torch.Tensor = getattr(self, name)
        return found
