"""UDS: of the rows offered at each step, train on the few that are informative and unlike what was learned lately.

    s_i = u_i + alpha * v_i               the K = max(1, round(keep_fraction * B)) largest of B candidates are trained
    u_i = nuclear norm of Z_i             the sum of its singular values; no gradient, no softmax
    v_i = mean over q in Q of ||e_i - q|| 0 while Q is empty
    e_i = sketch of Z_i, [rows * columns] of those chosen the sketches enter the first-in-first-out memory Q

``Z_i`` [L, V] are the logits of example i at its L positions. The sketch is a two-sided random cosine transform whose
signs and frequencies are drawn once and kept in the checkpoint; norm and sketch are computed exactly and without
forming Z (:mod:`luthier.functional.logit_matrices`), but where logits are soft-capped or come from a classifier.
The engine offers ``round(1 / keep_fraction)`` times the rows of a step as one batch, to every process alike, so all
processes choose the same rows and keep the same memory. In the released code each process chooses within micro-batches
of 4: ``candidates: 4`` chooses within random groups of that many, one after the other, and each group's choice is in Q
before the next one is compared with it.

``score`` replaces the rule by one to compare with: ``random``, ``max_loss`` (mean token loss), ``grad_norm`` (of the
output embedding, for the mean token loss) or ``full`` (all candidates).

Paper: "Utility-Diversity Aware Online Batch Selection for LLM Supervised Fine-tuning", 2025, arXiv 2510.16882.
Official repository: gfyddha/UDS. The released code counts the padding of its micro-batch too (``positions: all``) and
scores with dropout on (``score_in_train_mode: true``); T, the longest row, is 512 there, and alpha is on that scale.

Example::

    selection:
      uds: {keep_fraction: 0.25, alpha: 2.5e-3}
    parameters: [lora]                       # with a frozen output embedding scoring is cheapest
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core.errors import LuthierError, UserError
from luthier.core.protocols import Batch, Context, Needs
from luthier.core.registry import selection
from luthier.functional.logit_matrices import (
    OutputMap,
    cosine_rows,
    last_layer_gradient_norm,
    mean_distance,
    nuclear_norm_of,
    output_map,
    push,
    random_signs,
    widened,
)
from luthier.functional.per_example import by_example, each_example, mean_loss

TOKEN_TASKS = ("causal-lm", "token-classification")


@selection(
    "uds",
    identity={"keep_fraction": 1.0},
    example={"keep_fraction": 0.5, "alpha": 0.01, "memory": 16, "columns": 8, "rows": 2},
    conflicts={
        "packing": "a packed row holds several examples, and one score cannot stand for them",
    },
    paper="Utility-Diversity Aware Online Batch Selection for LLM Supervised Fine-tuning, 2025, arXiv 2510.16882",
)
class UtilityDiversitySampling:
    """Utility-diversity sampling: train on the offered rows that are informative and unlike those learned lately."""

    needs = Needs(statistics=("logp",), vocabulary=True)

    def __init__(
        self,
        *,
        keep_fraction: Annotated[
            float, Field(gt=0, le=1, description="share of the candidates that is trained")
        ] = 0.25,
        alpha: Annotated[float, Field(ge=0, description="weight of diversity beside utility")] = 2.5e-3,
        candidates: Annotated[
            int | None, Field(ge=1, description="choose within random groups of this many; by default within the step")
        ] = None,
        score: Annotated[
            Literal["uds", "random", "max_loss", "grad_norm", "full"],
            Field(description="the rule of choice; those but uds are for comparison"),
        ] = "uds",
        utility: Annotated[
            Literal["nuclear_norm", "none"], Field(description="none leaves diversity alone to choose")
        ] = "nuclear_norm",
        utility_normalise: Annotated[
            Literal["none", "per_token", "sqrt_tokens"],
            Field(description="divide the utility by the number of positions or its square root"),
        ] = "none",
        positions: Annotated[
            Literal["non_pad", "response", "all"],
            Field(description="rows of Z that count; all includes the padding, as the released code"),
        ] = "non_pad",
        memory: Annotated[int, Field(ge=1, description="capacity M of the memory of sketches")] = 1024,
        columns: Annotated[int, Field(ge=1, description="columns of the sketch, over the vocabulary (r2)")] = 128,
        rows: Annotated[int, Field(ge=1, description="rows of the sketch, over the positions (r1)")] = 8,
        max_length: Annotated[
            int | None, Field(ge=1, description="positions T of the sketch; the longest training row by default")
        ] = None,
        start_step: Annotated[int, Field(ge=0, description="before this step all candidates are trained")] = 0,
        score_in_train_mode: Annotated[
            bool, Field(description="leave dropout on while scoring, as the released code")
        ] = False,
        scoring_rows: Annotated[int, Field(ge=1, description="candidates of one scoring pass, to bound memory")] = 64,
    ) -> None:
        if score == "uds" and utility == "none" and alpha == 0:
            raise UserError("uds: utility: none with alpha: 0 leaves nothing to choose by; give alpha a value above 0.")
        self.keep_fraction, self.alpha, self.candidates, self.score = keep_fraction, alpha, candidates, score
        self.utility, self.utility_normalise, self.positions = utility, utility_normalise, positions
        self.memory, self.columns, self.rows = memory, columns, rows
        self.max_length, self.start_step = max_length, start_step
        self.score_in_train_mode, self.scoring_rows = score_in_train_mode, scoring_rows
        self.oversample = max(1, round(1 / keep_fraction))
        # What the checkpoint keeps: drawn at the first scoring, and the memory.
        self.drawn: dict[str, torch.Tensor] = {}
        self.queue_MD: torch.Tensor | None = None
        self.pointer, self.count = 0, 0
        # What is computed from these and from the model.
        self._longest: int | None = max_length
        self._cosines: tuple[torch.Tensor, torch.Tensor] | None = None
        self._known: tuple[Any, OutputMap, list[torch.Tensor]] | None = None

    def prepare(self, ctx: Context, dataset: Any) -> None:
        """Settle T, and refuse or warn about what the task cannot give."""
        per_token = ctx.task.name in TOKEN_TASKS
        if self._longest is None:
            self._longest = int(max(dataset.lengths)) if per_token else 1
        if self.score == "grad_norm" and ctx.task.name != "causal-lm":
            raise UserError(
                f"uds: score: grad_norm reads the output embedding, which {ctx.task.name} has not; use max_loss or uds."
            )
        if self.score == "uds" and ctx.task.name != "causal-lm" and self.keep_fraction < 1:
            what = "few classes" if per_token else "one position per example, so its nuclear norm is its length"
            warnings.warn(f"uds was made for language models; the logits of {ctx.task.name} have {what}.", stacklevel=2)

    @torch.no_grad()
    def select(self, batch: Batch, ctx: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of the chosen examples in the order of the batch, each with weight 1."""
        offered, device = batch.examples, batch.row_B.device
        if self.keep_fraction == 1.0 or self.score == "full" or ctx.step < self.start_step:
            ctx.log(rows_scored=0, rows_kept=offered)
            index_b = torch.arange(offered, device=device)
            return index_b, torch.ones(offered, device=batch.weight_N.device)
        started = time.perf_counter()
        utility_B, sketch_BD = self._scores(batch, ctx)
        diversity_B = torch.zeros_like(utility_B)
        kept: list[torch.Tensor] = []
        for group in self._groups(offered, ctx):
            group = group.to(utility_B.device)
            score_b = utility_B[group]
            if sketch_BD is not None:
                queue_MD = self._queue(sketch_BD)
                diversity_B[group] = mean_distance(sketch_BD[group], queue_MD[: self.count]).double()
                score_b = score_b + self.alpha * diversity_B[group]
            best = torch.argsort(score_b, descending=True, stable=True)[: self.kept_of(group.numel())]
            kept.append(group[best.sort().values])
            if sketch_BD is not None:
                self.pointer, self.count = push(queue_MD, self.pointer, self.count, sketch_BD[kept[-1]])
        index_b = torch.cat(kept).sort().values.to(device)
        self._log(batch, ctx, index_b, utility_B, diversity_B, started)
        return index_b, torch.ones(index_b.numel(), device=batch.weight_N.device)

    def kept_of(self, candidates: int) -> int:
        """K of B candidates."""
        return max(1, round(self.keep_fraction * candidates))

    def state(self) -> dict[str, Any]:
        """Signs and frequencies of the sketch, and the memory with its pointer and count."""
        return {
            "drawn": dict(self.drawn),
            "queue": None if self.queue_MD is None else self.queue_MD.cpu(),
            "pointer": self.pointer,
            "count": self.count,
        }

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        self.drawn, self.queue_MD = dict(state["drawn"]), state["queue"]
        self.pointer, self.count = state["pointer"], state["count"]
        self._cosines = self._known = None

    # -- scores

    def _groups(self, offered: int, ctx: Context) -> Iterator[torch.Tensor]:
        """Indices that compete with each other."""
        if self.candidates is None or self.candidates >= offered:
            yield torch.arange(offered)
        else:
            # The offered rows come sorted by length, and neighbours would compete with their like only.
            shuffled = torch.randperm(offered, generator=ctx.rng("data", "uds", "groups", ctx.step))
            yield from shuffled.split(self.candidates)

    def _scores(self, batch: Batch, ctx: Context) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is compared without the memory, [B] in float64, and the sketches [B, D] where diversity counts."""
        if self.score == "random":
            generator = ctx.rng("noise", "uds", "random", ctx.step)
            return torch.rand(batch.examples, generator=generator, dtype=torch.float64), None
        rule = {"max_loss": self._losses, "grad_norm": self._gradient_norms}.get(self.score, self._utilities)
        pieces = [batch]
        if batch.examples > self.scoring_rows:
            every = torch.arange(batch.examples, device=batch.row_B.device)
            pieces = [batch.take(index_b) for index_b in every.split(self.scoring_rows)]
        with self._mode(ctx):
            found = [rule(piece, ctx) for piece in pieces]
        value_B = torch.cat([value for value, _ in found])
        sketches = [sketch for _, sketch in found if sketch is not None]
        # -inf is the loss of an example without supervised weight, which is never chosen before others.
        if bool((value_B.isnan() | value_B.isposinf()).any()):
            raise _not_finite(batch, ctx)
        return value_B, torch.cat(sketches) if sketches else None

    @contextmanager
    def _mode(self, ctx: Context) -> Iterator[None]:
        """Evaluation mode, or dropout that is a function of the step whatever has been drawn before."""
        if self.score_in_train_mode:
            with torch.random.fork_rng([ctx.device] if ctx.device.type == "cuda" else []):
                torch.manual_seed(ctx.rng("noise", "uds", "dropout", ctx.step).initial_seed())
                yield
            return
        was_training = ctx.model.training
        ctx.model.eval()
        try:
            yield
        finally:
            ctx.model.train(was_training)

    def _losses(self, batch: Batch, ctx: Context) -> tuple[torch.Tensor, torch.Tensor | None]:
        logp_N = ctx.forward(batch, grad=False).logp_N
        return mean_loss(logp_N, batch.weight_N, batch.sequence_N, batch.examples).double(), None

    def _utilities(self, batch: Batch, ctx: Context) -> tuple[torch.Tensor, torch.Tensor | None]:
        scored = counted(batch, self.positions)
        rank_N = ranks(scored, padded=self.positions == "all")
        out = ctx.forward(scored, grad=False)
        parts = by_example(scored.sequence_N, batch.examples)
        utility_B = torch.zeros(batch.examples, dtype=torch.float64, device=rank_N.device)
        columns_NR: torch.Tensor | None = None
        wants_norm, wants_sketch = self.utility != "none", self.alpha > 0
        if ctx.task.name == "causal-lm" and softcap(ctx.model) is None:
            weight_VH, bias_V, factor = ctx.output_layer()
            x_NH = widened(out.hidden(-1), factor, bias_V is not None)
            if not bool(torch.isfinite(x_NH).all()):
                raise _not_finite(batch, ctx)
            map_ = self._output_map(weight_VH, bias_V, ctx)
            if wants_norm:
                for b, index_n in enumerate(parts):
                    utility_B[b] = map_.nuclear_norm(x_NH[index_n])
            if wants_sketch:
                columns_NR = map_.columns(x_NH)
        else:
            if wants_sketch:
                columns_NR = torch.zeros(rank_N.numel(), self.columns, device=rank_N.device)

            def score(b: int, logits_LV: torch.Tensor, index_n: torch.Tensor) -> None:
                if not bool(torch.isfinite(logits_LV).all()):
                    raise _not_finite(batch, ctx)
                if wants_norm:
                    utility_B[b] = nuclear_norm_of(logits_LV)
                if columns_NR is not None:
                    cosine_RV = self._cosine(logits_LV.shape[1], logits_LV.device, ctx)[0]
                    columns_NR[index_n] = logits_LV.float() @ cosine_RV.t()

            each_example(out, scored.sequence_N, batch.examples, score)
        power = {"none": 0.0, "per_token": 1.0, "sqrt_tokens": 0.5}[self.utility_normalise]
        count_B = torch.tensor([max(1, len(index_n)) for index_n in parts], device=utility_B.device)
        utility_B = utility_B / count_B.double() ** power
        return utility_B, None if columns_NR is None else self._sketches(columns_NR, rank_N, parts)

    def _sketches(self, columns_NR: torch.Tensor, rank_N: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor:
        """[B, rows * columns], row-major, from ``Z C2`` and the place of each position in its row."""
        length, longest = int(rank_N.max()) + 1 if rank_N.numel() else 0, self._longest
        assert self._cosines is not None
        if longest is not None and length > longest:
            raise UserError(
                f"uds: a row has {length} tokens, but max_length is {longest}; raise it, or leave it out to take the "
                "longest training row."
            )
        time_TR = self._cosines[1]
        return torch.stack([(time_TR[:, rank_N[n]] @ columns_NR[n]).flatten() for n in parts])

    def _gradient_norms(self, batch: Batch, ctx: Context) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of the gradient of each example's mean token loss by the output embedding and its bias."""
        out = ctx.forward(batch, grad=False)
        _, bias_V, factor = ctx.output_layer()
        x_NH, cap = widened(out.hidden(-1), factor, bias_V is not None), softcap(ctx.model)
        norm_B = torch.zeros(batch.examples, dtype=torch.float64, device=x_NH.device)

        def score(b: int, logits_LV: torch.Tensor, index_n: torch.Tensor) -> None:
            weight_L = batch.weight_N[index_n].double()
            error_LV = torch.softmax(logits_LV.double(), dim=-1)
            error_LV[torch.arange(len(index_n)), batch.target_N[index_n]] -= 1
            if cap is not None:
                error_LV *= 1 - (logits_LV.double() / cap).square()
            error_LV *= (weight_L / weight_L.sum().clamp(min=1e-30))[:, None]
            norm_B[b] = last_layer_gradient_norm(error_LV, x_NH[index_n])

        each_example(out, batch.sequence_N, batch.examples, score)
        return norm_B, None

    # -- what is kept between steps

    def _cosine(self, vocabulary: int, device: torch.device, ctx: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """``C2^T`` [columns, V] and ``C1`` [rows, T] of the signs and frequencies of this run."""
        if not self.drawn:
            if self._longest is None:
                raise LuthierError("uds: select was called before prepare, and max_length is not given.")
            sizes = {"vocabulary": (vocabulary, self.columns), "time": (self._longest, self.rows)}
            for axis, (size, outputs) in sizes.items():
                generator = ctx.rng("init", "uds", axis)
                self.drawn[f"{axis}_signs"] = random_signs(size, generator)
                self.drawn[f"{axis}_frequencies"] = torch.randint(size, (outputs,), generator=generator)
        if self._cosines is None:
            drawn = {name: value.to(device) for name, value in self.drawn.items()}
            self._longest = drawn["time_signs"].numel()
            self._cosines = (
                cosine_rows(drawn["vocabulary_signs"], drawn["vocabulary_frequencies"]),
                cosine_rows(drawn["time_signs"], drawn["time_frequencies"]),
            )
        return self._cosines

    def _output_map(self, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, ctx: Context) -> OutputMap:
        """The map of the output embedding, made once while it is frozen and at each step while it is trained."""
        tensors = [t for t in (weight_VH, bias_V) if t is not None]
        # A tensor may be opened, trained and frozen again; its version then tells that it has changed.
        trained = any(t.requires_grad for t in tensors)
        key = (ctx.step if trained else None, *((id(t), t._version) for t in tensors))
        if self._known is not None and self._known[0] == key:
            return self._known[1]
        # Sharded weights are gathered.
        weight_VH, *rest = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]
        cosine_RV = self._cosine(weight_VH.shape[0], weight_VH.device, ctx)[0] if self.alpha > 0 else None
        map_ = output_map(weight_VH, rest[0] if rest else None, cosine_RV, gram=self.utility != "none")
        self._known = (key, map_, tensors)  # the tensors are held so that their ids stay theirs
        return map_

    def _queue(self, sketch_BD: torch.Tensor) -> torch.Tensor:
        if self.queue_MD is None:
            self.queue_MD = sketch_BD.new_zeros(self.memory, sketch_BD.shape[1])
        self.queue_MD = self.queue_MD.to(sketch_BD)
        return self.queue_MD

    def _log(
        self,
        batch: Batch,
        ctx: Context,
        index_b: torch.Tensor,
        utility_B: torch.Tensor,
        diversity_B: torch.Tensor,
        started: float,
    ) -> None:
        chosen_B = torch.zeros(batch.examples, dtype=torch.bool)
        chosen_B[index_b.cpu()] = True
        mask = batch.inputs.get("attention_mask")
        known: dict[str, torch.Tensor] = {"utility" if self.score == "uds" else self.score: utility_B.cpu()}
        if self.score == "uds" and self.alpha > 0:
            known["diversity"] = diversity_B.cpu().double()
        if mask is not None:
            known["length"] = mask.sum(dim=1).cpu().double()
        values = {}
        for name, value_B in known.items():
            if not bool(value_B.isfinite().all()):
                continue
            values[f"{name}_kept"] = float(value_B[chosen_B].mean())
            if not bool(chosen_B.all()):
                values[f"{name}_dropped"] = float(value_B[~chosen_B].mean())
        if "diversity" in known and float(known["utility"].mean()) > 0:
            values["diversity_to_utility"] = self.alpha * float(known["diversity"].mean() / known["utility"].mean())
        ctx.log(
            rows_scored=0 if self.score == "random" else batch.examples,
            rows_kept=index_b.numel(),
            scoring_seconds=time.perf_counter() - started,
            **values,
        )


def counted(batch: Batch, positions: str) -> Batch:
    """The batch whose positions are the rows of Z that count; one without tokens is left as it is."""
    if positions == "response" or batch.supervised_BT is None:
        return batch
    if positions == "non_pad":
        return batch.every_token()
    ids_BT = batch.inputs["input_ids"]
    return replace(
        batch,
        position_N=torch.arange(ids_BT.numel(), device=ids_BT.device),
        target_N=ids_BT.flatten(),
        weight_N=torch.ones(ids_BT.numel(), device=ids_BT.device),
        sequence_N=torch.arange(ids_BT.shape[0], device=ids_BT.device).repeat_interleave(ids_BT.shape[1]),
        columns={k: v for k, v in batch.columns.items() if not k.endswith("_N")},
        keys_B=None,
    )


def ranks(batch: Batch, *, padded: bool) -> torch.Tensor:
    """int64 [N], the place of each position in its row: among the real tokens, or in the padded row."""
    mask = batch.inputs.get("attention_mask")
    if mask is None or batch.supervised_BT is None:
        return torch.zeros_like(batch.position_N)
    if padded:
        return batch.position_N % mask.shape[1]
    # Counted over the mask, so that padding on the left shifts nothing.
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0).flatten()[batch.position_N]


def softcap(model: Any) -> float | None:
    """The bound of tanh-capped logits (Gemma), or None."""
    config = (model.get_base_model() if hasattr(model, "get_base_model") else model).config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "final_logit_softcapping", None)


def _not_finite(batch: Batch, ctx: Context) -> LuthierError:
    rows = ", ".join(str(int(r)) for r in batch.row_B)
    return LuthierError(
        f"uds: scores of step {ctx.step + 1} are not finite. Prepared rows offered: {rows}. Lower "
        "training.learning_rate, or use precision fp32."
    )
