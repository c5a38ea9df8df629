"""Learning from the undesirable: stay close to a twin of the model that took one step towards a worse loss.

    phi    = alpha * g / ||g||_2,   g = gradient of L(theta + phi) at phi = 0              a step of gradient ascent
    L_cons = 1/(T K) sum_t sum_l || sg(h_lt) - h'_lt ||^2                                  mean over the rows
    loss   = L(theta) + consistency_weight * L_cons

``theta`` are the trained weights. ``phi`` is a temporary addition to the model, new at each step and never saved:
``lora`` adds ``B_l A_l`` to the linear maps of every block (A random, B zero, so only B moves), ``steer`` a vector
``d_l`` [H] to the output of every block. ``h_lt`` [H] is the hidden state of token t behind block l of K, before the
final norm, ``h'_lt`` that of the twin theta + phi with phi constant; T counts the tokens of a row, prompt and response,
without padding. ``sg`` stops the gradient: the twin's states are pulled to the model's, never the reverse. ``L`` is
plain SFT or any other objective (``base_objective``).

Both passes see the same dropout. With ``twin_per: batch`` each micro-batch (and each rank) has its own twin, as in the
paper, so accumulation changes the numbers; with ``twin_per: example`` each row has its own and it does not.
``fused`` takes g from the same backward pass as the gradient of L; otherwise g has a backward pass of its own.

Paper: "Learning from the Undesirable: Robust Adaptation of Language Models without Forgetting", AAAI 2026, arXiv
2511.13052. Step length and weight are not known from the paper; the defaults here are this library's.

Example::

    objective:
      learning-from-undesirable: {aux: lora, alpha: 0.1, consistency_weight: 0.1}
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core import registry
from luthier.core.errors import LuthierError, UserError
from luthier.core.protocols import Batch, Context, Loss, Needs, Outputs
from luthier.core.registry import objective
from luthier.functional.representation_shift import normalised_step, row_distance, row_mean, with_gradients
from luthier.functional.temporary_additions import Addition, Places, hooked, places

SLUG = "learning-from-undesirable"


@dataclass
class Seen:
    """A forward pass of the model with additions of zero.

    Attributes:
        inputs: the tensors the model was given.
        dropout: state of the random generators at its start, on the CPU and on the model's device.
        noise: the random stream of A.
        states: hidden states [B, T, H] behind each block.
        additions: by module.
    """

    inputs: list[torch.Tensor]
    dropout: tuple[torch.Tensor, torch.Tensor | None]
    noise: torch.Generator
    states: list[torch.Tensor] = field(default_factory=list)
    additions: dict[int, Addition] = field(default_factory=dict)


class _Function:
    """An objective registered as a function of log-probabilities and position weights."""

    needs = Needs()

    def __init__(self, function: Any) -> None:
        self.function = function

    def loss(self, out: Outputs, batch: Batch, ctx: Context) -> Loss:
        return Loss(sum=self.function(out.logp_N, batch.weight_N).sum(), weight=batch.weight_N.sum())


def base(spec: str | Mapping[str, Any]) -> Any:
    """The objective that is regularised, from its name or a mapping from the name to its options.

    Raises:
        UserError: no such objective, options it refuses, or a loss that is no mean over tokens or rows of the step.
    """
    if not isinstance(spec, str) and len(spec) != 1:
        raise UserError(f"{SLUG}: base_objective: give one name, or one name with its options, not {len(spec)} names.")
    name, options = (spec, None) if isinstance(spec, str) else next(iter(spec.items()))
    if name == SLUG:
        raise UserError(f"{SLUG}: base_objective: it cannot be its own base; name another objective, such as sft.")
    try:
        built = registry.get("objective", name).build(options or {})
    except ValueError as error:  # pydantic's: one line of it is for the user
        said = error.errors()[0] if hasattr(error, "errors") else {"loc": (), "msg": str(error)}
        place = ".".join([name, *map(str, said["loc"])])
        raise UserError(f"{SLUG}: base_objective: {place}: {said['msg']}.") from None
    made = _Function(built) if isinstance(built, partial) else built
    if not made.needs.fixed_weight:
        raise UserError(
            f"{SLUG}: base_objective: '{name}' divides by a count that depends on the model; choose a fixed "
            "denominator in its options, or another objective."
        )
    return made


def whole(gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The gradients as dense tensors: a tied embedding that the loss reaches alone gives its own by rows."""
    return [g.to_dense() if g is not None and g.is_sparse else g for g in gradients]


@objective(
    "learning-from-undesirable",
    identity={"consistency_weight": 0.0},
    example={"aux_rank": 4, "twin_per": "example"},
    conflicts={
        "weighted_sum": "it takes its own loss apart to build the twin; name the other loss as its base_objective",
        "gradient_checkpointing": "its additions are gone when a block is computed again in the backward pass",
        "sharding:fsdp2": "gradients of sharded weights cannot be formed outside the backward pass of the engine",
    },
    paper="Learning from the Undesirable: Robust Adaptation of Language Models without Forgetting, AAAI 2026, "
    "arXiv 2511.13052",
)
class LearningFromUndesirable:
    """Stay close to a twin that took one step towards a worse loss: less forgetting from small data."""

    def __init__(
        self,
        *,
        base_objective: Annotated[
            str | dict[str, dict[str, Any] | None],
            Field(description="the loss L: the name of an objective, or the name with its options"),
        ] = "sft",
        aux: Annotated[
            Literal["lora", "steer"],
            Field(description="what the twin differs by: low-rank additions to linear maps, or a vector per block"),
        ] = "lora",
        aux_rank: Annotated[int, Field(ge=1, description="lora: rank r of the addition")] = 8,
        aux_scale: Annotated[float, Field(gt=0, description="lora: factor on the low-rank product")] = 1.0,
        aux_targets: Annotated[
            list[str] | None,
            Field(min_length=1, description="lora: names of linear maps; by default all those of the blocks"),
        ] = None,
        alpha: Annotated[
            float | None, Field(ge=0, description="length of the step; by default 0.1 for lora, 0.05 for steer")
        ] = None,
        alpha_relative: Annotated[
            bool | None,
            Field(description="alpha in units of the mean norm of the hidden states; by default for steer only"),
        ] = None,
        consistency_weight: Annotated[float, Field(ge=0, description="the paper's lambda; 0 only measures")] = 0.1,
        reduction: Annotated[
            Literal["mean_dim", "sum_dim"], Field(description="squared distance over H, divided by H or not")
        ] = "mean_dim",
        distance: Annotated[
            Literal["mse", "cosine"], Field(description="squared Euclidean distance, or one minus the cosine")
        ] = "mse",
        layer_norm_targets: Annotated[
            bool, Field(description="divide each block's squared distance by its mean squared norm")
        ] = False,
        norm_scope: Annotated[
            Literal["global", "per_layer"], Field(description="one norm over all additions, or one for each block")
        ] = "global",
        tokens: Annotated[
            Literal["all", "response"], Field(description="tokens whose hidden states are compared")
        ] = "all",
        layers: Annotated[
            list[int] | None,
            Field(min_length=1, description="blocks that are compared, the first is 1; by default all"),
        ] = None,
        direction: Annotated[
            Literal["ascent", "random", "descent"], Field(description="where the step goes; random is the control")
        ] = "ascent",
        stop_gradient: Annotated[
            Literal["original", "twin", "none"],
            Field(description="whose hidden states are constant; all but original are ablations"),
        ] = "original",
        twin_per: Annotated[
            Literal["batch", "example"], Field(description="one twin for a micro-batch, or one for each of its rows")
        ] = "batch",
        every: Annotated[int, Field(ge=1, description="regularise every n-th step, the others are plain")] = 1,
        fused: Annotated[bool, Field(description="take the step's gradient from the backward pass of L")] = True,
        twin_loss: Annotated[
            bool, Field(description="log the NLL of the twin: one more pass of the output layer")
        ] = True,
    ) -> None:
        if aux == "steer" and aux_targets is not None:
            raise UserError(f"{SLUG}: aux_targets name linear maps, and aux: steer adds to blocks; remove them.")
        if distance == "cosine" and layer_norm_targets:
            raise UserError(f"{SLUG}: distance: cosine has no scale to divide by; remove layer_norm_targets.")
        self.base = base(base_objective)
        self.aux, self.aux_rank, self.aux_scale, self.aux_targets = aux, aux_rank, aux_scale, aux_targets
        self.alpha = alpha if alpha is not None else {"lora": 0.1, "steer": 0.05}[aux]
        self.alpha_relative = alpha_relative if alpha_relative is not None else aux == "steer"
        self.consistency_weight, self.tokens, self.layers = consistency_weight, tokens, layers
        self.measure = partial(
            row_distance, distance=distance, mean_dim=reduction == "mean_dim", relative=layer_norm_targets
        )
        self.norm_scope, self.direction, self.stop_gradient = norm_scope, direction, stop_gradient
        self.twin_per, self.every, self.fused, self.twin_loss = twin_per, every, fused, twin_loss
        self._where = Places((), ())
        self._watching = ExitStack()
        self._recording: tuple[Any, ExitStack] | None = None
        self._seen: Seen | None = None
        self._busy = False

    @property
    def needs(self) -> Needs:
        """What the base objective needs; the loss joins positions."""
        needs: Needs = replace(self.base.needs, positionwise=False)
        return needs

    # -- hooks of a run

    def check_data(self, dataset: Any) -> None:
        """The base objective's hook."""
        self._pass_on("check_data", dataset)

    def prepare_model(self, model: Any, processor: Any) -> None:
        """The base objective's hook."""
        self._pass_on("prepare_model", model, processor)

    def prepare(self, ctx: Context, dataset: Any) -> None:
        """Find the places for additions and watch the model's forward passes.

        Raises:
            UserError: the model has no such places, or no such blocks.
        """
        self._pass_on("prepare", ctx, dataset)
        model: Any = ctx.model
        found = places(model, self.aux_targets, who=SLUG)
        self._where = found if self.aux == "lora" else replace(found, maps=())
        wrong = [n for n in self.layers or () if not 1 <= n <= len(found.blocks)]
        if wrong:
            raise UserError(
                f"{SLUG}: layers: there is no block {wrong[0]}: the model has {len(found.blocks)}; name 1 to that."
            )
        if any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
            raise UserError(f"{SLUG}: it cannot run with gradient checkpointing; switch that off.")
        self._watching.close()
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        # Tasks enter a model at the top or at its decoder; the outermost of the two starts a recording.
        for root in {id(m): m for m in (model, inner.get_decoder())}.values():
            before = root.register_forward_pre_hook(partial(self._begin, ctx), with_kwargs=True)
            after = root.register_forward_hook(self._end, always_call=True)
            self._watching.callback(before.remove)
            self._watching.callback(after.remove)

    def finish_model(self, model: Any, processor: Any) -> None:
        """Stop watching: the model is as it came."""
        self._watching.close()
        self._pass_on("finish_model", model, processor)

    def state(self) -> dict[str, Any]:
        """That of the base objective; the additions live for one step."""
        return self._pass_on("state") or {}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        self._pass_on("load", state)

    def _pass_on(self, hook: str, *arguments: Any) -> Any:
        return getattr(self.base, hook)(*arguments) if hasattr(self.base, hook) else None

    # -- the pass of the model itself, with additions of zero

    def _begin(self, ctx: Any, root: Any, arguments: Any, named: Any) -> None:
        if self._busy or self._recording or not torch.is_grad_enabled() or ctx.step % self.every:
            return
        device = ctx.device if ctx.device.type == "cuda" else None
        seen = self._seen = Seen(
            inputs=[v for v in (*arguments, *named.values()) if isinstance(v, torch.Tensor)],
            dropout=(torch.get_rng_state(), None if device is None else torch.cuda.get_rng_state(device)),
            noise=ctx.rng("noise", SLUG, ctx.step),
        )

        def add(key: int, block: int, x: Any, out: torch.Tensor) -> torch.Tensor:
            if x is None and self.aux == "lora":
                return out
            if key not in seen.additions:
                seen.additions[key] = self._zero(seen, block, x, out)
            return seen.additions[key].probe(x, out)

        def see(state: torch.Tensor) -> None:
            seen.states.append(state.detach() if self.stop_gradient == "original" else state)

        stack = ExitStack()
        stack.enter_context(hooked(self._where, add, see))
        self._recording = root, stack

    def _end(self, root: Any, arguments: Any, out: Any) -> None:
        if self._recording is not None and self._recording[0] is root:
            self._recording[1].close()
            self._recording = None

    def _zero(self, seen: Seen, block: int, x: Any, out: torch.Tensor) -> Addition:
        """An addition that changes nothing yet, in float32 or wider."""
        wide = torch.promote_types(out.dtype, torch.float32)
        rows = len(seen.inputs[0]) if self.twin_per == "example" else 1
        if rows > 1 and (out.dim() != 3 or len(out) != rows):
            raise UserError(
                f"{SLUG}: twin_per: example needs additions whose input is [rows, tokens, width], and one here gives "
                f"{list(out.shape)}; choose aux: steer, other aux_targets, or twin_per: batch."
            )
        learns = self.direction != "random"
        if self.aux == "steer":
            up = torch.zeros(rows, 1, out.shape[-1], dtype=wide, device=out.device, requires_grad=learns)
            return Addition(block, up)
        down = torch.empty(self.aux_rank, x.shape[-1], dtype=wide)
        torch.nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=seen.noise)
        up = torch.zeros(rows, out.shape[-1], self.aux_rank, dtype=wide, device=out.device, requires_grad=learns)
        return Addition(block, up, down.to(out.device), self.aux_scale)

    # -- the loss

    def loss(self, out: Outputs, batch: Batch, ctx: Context) -> Loss:
        """The base objective's loss and the twin's distance, the latter in the same units as a mean over rows.

        Raises:
            LuthierError: the outputs are not of the pass that was watched, or the gradient of the step is not finite.
        """
        if ctx.step % self.every or not torch.is_grad_enabled():
            return self._plain(out, batch, ctx)
        seen, self._seen = self._seen, None
        given = {id(v) for v in batch.inputs.values()}
        if seen is None or not any(id(v) in given for v in seen.inputs):
            raise LuthierError(f"{SLUG}: it has not seen the forward pass of these outputs; was prepare() called?")
        self._busy = True
        try:
            return self._regularised(out, batch, ctx, seen)
        finally:
            self._busy = False

    def _plain(self, out: Outputs, batch: Batch, ctx: Context) -> Loss:
        """L, where it can be without keeping logits for its backward pass."""

        def of(part_out: Outputs, part: Batch) -> Loss:
            loss: Loss = self.base.loss(part_out, part, ctx)
            return loss

        # Without `fused` two backward passes go through it, and a gradient formed with the loss serves one.
        once = self.base.needs.positionwise and self.fused
        return out.positionwise(batch, of) if once else of(out, batch)

    def _regularised(self, out: Outputs, batch: Batch, ctx: Context, seen: Seen) -> Loss:
        loss = self._plain(out, batch, ctx)
        plain = loss.sum.detach()
        trained = [p for p in ctx.model.parameters() if p.requires_grad]
        moving = [a.up for a in seen.additions.values() if a.up.requires_grad]
        through = [*(trained if self.fused else ()), *moving]
        keep = not self.fused or self.stop_gradient != "original"
        first = whole(torch.autograd.grad(loss.sum, through, retain_graph=keep, allow_unused=True)) if through else []
        ascent = [first.pop() for _ in moving][::-1]
        if moving and all(g is None for g in ascent):
            raise LuthierError(f"{SLUG}: the loss does not come from the forward pass it has watched.")
        started = time.perf_counter()
        twin, metrics = self._twin(seen, ascent, batch, ctx, loss)
        distance_LB, measured = self._distances(seen, twin, batch, ctx)
        # A batch without any weight stands in for a rank that has no rows.
        alive = (batch.weight_N != 0).any().to(distance_LB)
        rows = alive * batch.examples
        apart = distance_LB.mean(0).sum() * alive
        factor = self.consistency_weight * ctx.totals[loss.unit] / max(ctx.totals["sequence"], 1e-12)
        metrics |= {"base_loss": (plain, loss.weight), "consistency": (apart.detach(), rows), **measured}
        compared = self.layers or range(1, len(self._where.blocks) + 1)
        for number, block_B in zip(compared, distance_LB.detach(), strict=True):
            metrics[f"consistency_block_{number}"] = (block_B.sum() * alive, rows)
        total = plain + factor * apart.detach()
        if not self.fused:
            value = loss.sum + factor * apart if self.consistency_weight else loss.sum
        else:
            second: list[Any] = [None] * len(trained)
            if self.consistency_weight:
                second = whole(torch.autograd.grad(factor * apart, trained, allow_unused=True))
                metrics["gradient_ratio"] = (_norm(second) / _norm(first).clamp(min=1e-30), 1.0)
            value = with_gradients(total, *_joined(trained, first, second))
        metrics["twin_seconds"] = (time.perf_counter() - started, 1.0)
        return replace(loss, sum=value, metrics={**loss.metrics, **metrics})

    def _twin(
        self, seen: Seen, ascent: Sequence[Any], batch: Batch, ctx: Context, loss: Loss
    ) -> tuple[dict[int, Addition], dict[str, tuple[Any, Any]]]:
        """The additions after their one step, as constants, and what is logged about the step."""
        additions = seen.additions
        ups = [a.up for a in additions.values()]
        if self.direction == "random":
            keys = batch.row_B.tolist() if len(ups[0]) > 1 else [int(batch.row_B[0])]
            streams = [ctx.rng("noise", SLUG, "direction", ctx.step, key) for key in keys]
            gradients = [
                torch.stack([torch.randn(up.shape[1:], generator=s, dtype=up.dtype) for s in streams]).to(up.device)
                for up in ups
            ]
        else:
            count = torch.as_tensor(loss.weight, device=ups[0].device).clamp(min=1e-12)
            gradients = [
                torch.zeros_like(up) if g is None else g / count.to(g) for up, g in zip(ups, ascent, strict=True)
            ]
        size_S = torch.full_like(ups[0].flatten(1).sum(1), self.alpha).detach()
        if self.alpha_relative:
            size_S = size_S * self._mean_norm(seen, batch, len(size_S))
        groups = [a.block if self.norm_scope == "per_layer" else 0 for a in additions.values()]
        steps, norm_S = normalised_step(gradients, groups, -size_S if self.direction == "descent" else size_S)
        metrics: dict[str, tuple[Any, Any]] = {}
        if self.direction != "random":
            if not bool(norm_S.isfinite().all()) and bool(loss.sum.detach().isfinite()):
                raise LuthierError(
                    f"{SLUG}: the gradient of the additions is not finite at step {ctx.step + 1}, though the loss is "
                    f"{float(loss.sum.detach()):g}; use precision fp32 or a lower training.learning_rate."
                )
            metrics["ascent_norm"] = (norm_S.sum(), len(norm_S))
            # No gradient means no step, and the distance is zero.
            metrics["ascent_missing"] = ((norm_S == 0).sum(), len(norm_S))
        moved = {key: replace(a, up=step) for (key, a), step in zip(additions.items(), steps, strict=True)}
        return moved, metrics

    def _mean_norm(self, seen: Seen, batch: Batch, twins: int) -> torch.Tensor:
        """Mean L2 norm of the hidden states over tokens and blocks, for each twin, [S]."""
        found = []
        for state in seen.states:
            norm_BT, mask_BT = state.detach().to(torch.promote_types(state.dtype, torch.float32)).norm(dim=-1), None
            mask_BT = self._mask(batch, norm_BT, "all")
            found.append(row_mean(norm_BT.reshape(twins, -1), mask_BT.reshape(twins, -1)))
        return torch.stack(found).mean(0)

    def _mask(self, batch: Batch, like_BT: torch.Tensor, tokens: str) -> torch.Tensor:
        """The tokens that count."""
        mask_BT = batch.inputs.get("attention_mask") if tokens == "all" else batch.supervised_BT
        if mask_BT is None and tokens == "response":
            raise UserError(f"{SLUG}: tokens: response needs tokens that are targets; use tokens: all for this task.")
        return torch.ones_like(like_BT, dtype=torch.bool) if mask_BT is None else mask_BT.bool()

    def _distances(
        self, seen: Seen, twin: dict[int, Addition], batch: Batch, ctx: Context
    ) -> tuple[torch.Tensor, dict[str, tuple[Any, Any]]]:
        """Run the twin: distance of each compared block and row [L, B], and its NLL."""
        found: list[torch.Tensor] = []
        originals = iter(enumerate(seen.states, 1))

        def add(key: int, block: int, x: Any, out: torch.Tensor) -> torch.Tensor:
            return twin[key](x, out) if key in twin else out

        def see(state_BTH: torch.Tensor) -> None:
            number, target_BTH = next(originals)
            if self.layers is None or number in self.layers:
                state_BTH = state_BTH.detach() if self.stop_gradient == "twin" else state_BTH
                found.append(self.measure(state_BTH, target_BTH, self._mask(batch, state_BTH[..., 0], self.tokens)))

        generator, on_device = seen.dropout
        with torch.random.fork_rng(devices=[] if on_device is None else [ctx.device]):
            torch.set_rng_state(generator)
            if on_device is not None:
                torch.cuda.set_rng_state(on_device, ctx.device)
            with hooked(self._where, add, see):
                out = ctx.forward(batch)
        metrics: dict[str, tuple[Any, Any]] = {}
        if self.twin_loss:
            with torch.no_grad():
                nll = out.positionwise(batch, lambda o, b: Loss(-(o.logp_N * b.weight_N).sum(), b.weight_N.sum()))
            metrics["twin_nll"] = (nll.sum, nll.weight)
        return torch.stack(found), metrics


def _norm(gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """L2 norm over all tensors."""
    return torch.stack(torch._foreach_norm([g for g in gradients if g is not None])).norm()


def _joined(
    trained: Sequence[torch.Tensor], first: list[Any], second: list[Any]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Trained tensors that have a gradient, and the sum of their two; the given lists are emptied on the way."""
    tensors, sums = [], []
    for index, tensor in enumerate(trained):
        a, b = first[index], second[index]
        first[index] = second[index] = None  # lets go of each pair as its sum is made
        if a is not None or b is not None:
            tensors.append(tensor)
            sums.append(a if b is None else b if a is None else a + b)
    return tensors, sums
