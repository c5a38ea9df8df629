"""Anchored supervised fine-tuning: token losses weighted by the model's own probabilities, and a pull to the start.

    loss = sum_n m_n (sg(p_n) (-log p_n) + lambda K_n) / sum_n m_n
    K_n  = sum_v q_n(v) (log q_n(v) - log p_n(v))

``p_n`` [N] probability of the target, ``sg`` no gradient, ``p_n(v)`` and ``q_n(v)`` the predictions of the model and of
the frozen reference over the whole vocabulary, ``m_n`` [N] position weights, lambda is ``anchor_weight``. The first
term is dynamic fine-tuning, which drifts away from its start; K, the Kullback-Leibler divergence from the model as it
was when the run began, holds it there. Prompts and padding have no part in either term. The four modes::

    sft     -log p               sft+kl  -log p + lambda K
    dft     sg(p) (-log p)       asft    sg(p) (-log p) + lambda K

K is KL(reference | model), which covers all of the reference: so computes the official code, although its text speaks
of the divergence of the model from the base (``kl_direction: reverse``). With adapters the reference is the same model
without them, otherwise a frozen copy; it is in evaluation mode and sees the same inputs, corrupted ones too. Before the
first step K is measured and must be 0. ``cache_top_k`` keeps the reference's k most likely tokens of every position on
disk and takes all others as one outcome: cheaper, no larger than K, and exact where k is the whole vocabulary. Rows
whose inputs a transform changed are compared with the live reference.

Paper: "Anchored Supervised Fine-Tuning", 2025, arXiv 2509.23753. Official repository: zhuchichi56/ASFT; its function's
default of lambda is 0.1, its example's 0.05. It accepts clipping of the weight and does not use it; here
``weight_floor`` and ``weight_cap`` act, and are off by default.

Example::

    objective:
      anchored-sft: {anchor_weight: 0.05}
    training: {learning_rate: 2.0e-5, epochs: 3}
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from luthier.core.errors import LuthierError, UserError
from luthier.core.protocols import Batch, Context, Loss, Needs, Outputs
from luthier.core.registry import objective
from luthier.core.store import Store, content_hash, write_json
from luthier.functional.divergences import coarse_divergence, divergence, largest
from luthier.functional.probability_losses import Member, detached_weight, parse, weight_histogram, weight_report

# Before the first step the reference is compared with the model at this many positions of the first rows.
PROBE_ROWS, PROBE_POSITIONS = 8, 64
# In float32, and where the logits were computed in bfloat16 (adapters that start at zero may still round there).
AT_START, AT_START_BF16 = 1e-6, 1e-3
# Log-probabilities of the same reference on other hardware.
SAME_REFERENCE, SAME_REFERENCE_BF16 = 1e-2, 0.3
SCORED_ROWS = 32
_ADAPTERS = ("lora_", "modules_to_save")


@objective(
    "anchored-sft",
    identity={"mode": "sft"},
    example={"anchor_weight": 0.5},
    conflicts={"objective:label-smoothing": "the weight is the probability of one target, which smoothing spreads out"},
    paper="Anchored Supervised Fine-Tuning, 2025, arXiv 2509.23753",
)
class AnchoredSFT:
    """Anchored fine-tuning: token losses weighted by the model's own probability, and a KL term to the start."""

    def __init__(
        self,
        *,
        mode: Annotated[
            Literal["sft", "dft", "sft+kl", "asft"],
            Field(description="asft has both the weight (dft) and the anchor (kl)"),
        ] = "asft",
        anchor_weight: Annotated[float, Field(ge=0, description="lambda, the weight of the divergence")] = 0.05,
        kl_direction: Annotated[
            Literal["forward", "reverse"],
            Field(description="forward is KL(reference | model), reverse is KL(model | reference)"),
        ] = "forward",
        p_power: Annotated[float, Field(ge=0, description="exponent of the probability in the weight")] = 1.0,
        member: Annotated[
            str | None,
            Field(description="weight of a member of beyond-log-likelihood in place of p^p_power, such as top_p-0.3"),
        ] = None,
        weight_floor: Annotated[float | None, Field(ge=0, description="smallest weight; none by default")] = None,
        weight_cap: Annotated[float | None, Field(gt=0, description="largest weight; none by default")] = None,
        weight_level: Annotated[
            Literal["token", "sequence"],
            Field(description="p of each token, or the geometric mean of p over its response"),
        ] = "token",
        reference: Annotated[
            str,
            Field(
                min_length=1,
                description="start: the model as the run begins; adapter-off: the base beneath the adapters; else the "
                "name of a further model of the run",
            ),
        ] = "start",
        cache_top_k: Annotated[
            int | None,
            Field(ge=1, description="tokens per position of which the reference's prediction is kept on disk"),
        ] = None,
        histogram_steps: Annotated[int, Field(ge=1, description="log a histogram of the weights every so often")] = 100,
    ) -> None:
        self.weighted = mode in ("dft", "asft")
        # Without the term there is no reference to be made, held or run.
        self.anchored = mode in ("sft+kl", "asft") and anchor_weight > 0
        given = {"member": member, "weight_floor": weight_floor, "weight_cap": weight_cap}
        if not self.weighted and (
            p_power != 1 or weight_level != "token" or any(v is not None for v in given.values())
        ):
            raise UserError(
                f"anchored-sft: mode {mode} has no weight; remove p_power, member, weight_floor, weight_cap and "
                "weight_level, or use mode dft or asft."
            )
        if member is not None and p_power != 1:
            raise UserError("anchored-sft: member takes the place of p_power; give one of the two.")
        if weight_floor is not None and weight_cap is not None and weight_floor > weight_cap:
            raise UserError(
                f"anchored-sft: weight_floor {weight_floor:g} is above weight_cap {weight_cap:g}; exchange them."
            )
        if mode in ("sft", "dft") and (cache_top_k is not None or reference != "start"):
            raise UserError(f"anchored-sft: mode {mode} has no reference; remove reference and cache_top_k.")
        try:
            self.member = Member("general", alpha=p_power) if member is None else parse(member)
        except ValueError as error:
            raise UserError(f"anchored-sft: member: {error}.") from None
        self.anchor_weight, self.direction = anchor_weight, kl_direction
        self.floor, self.cap, self.level = weight_floor, weight_cap, weight_level
        self.reference, self.cache_top_k, self.histogram_steps = reference, cache_top_k, histogram_steps
        self._table: ReferenceTable | None = None
        self._probe: torch.Tensor | None = None
        self._low = False

    @property
    def model(self) -> str:
        """The reference's name in the run."""
        return "reference" if self.reference in ("start", "adapter-off") else self.reference

    @property
    def needs(self) -> Needs:
        """The whole vocabulary and the reference where there is an anchor; the weight of a response joins positions."""
        models = (self.model,) if self.anchored else ()
        return Needs(
            statistics=("logp",),
            positionwise=not self.weighted or self.level == "token",
            vocabulary=self.anchored,
            models=models,
        )

    # -- before the first step

    @torch.no_grad()
    def prepare(self, ctx: Context, dataset: Any) -> None:
        """Compare the reference with the model on the first rows, and score all rows where they are to be cached.

        Raises:
            UserError: the two have different vocabularies, or differ where they must be the same.
        """
        if not self.anchored:
            return
        if self.reference == "adapter-off" and not hasattr(ctx.model, "disable_adapter"):
            raise UserError(
                "anchored-sft: reference: adapter-off needs adapters, and the parameters of this recipe add none; "
                "use reference: start."
            )
        was_training = ctx.model.training
        ctx.model.eval()
        try:
            self._compare(ctx, dataset)
            if self.cache_top_k is not None:
                self._table = ReferenceTable.open(ctx, dataset, self.model, self.cache_top_k)
        finally:
            ctx.model.train(was_training)

    def _compare(self, ctx: Context, dataset: Any) -> None:
        batch = collated(ctx, dataset, range(min(PROBE_ROWS, len(dataset))))
        batch = batch.positions(torch.arange(min(PROBE_POSITIONS, batch.target_N.numel()), device=ctx.device))
        own_NV = ctx.forward(batch, grad=False).over_vocabulary(_rows)
        reference_NV = ctx.forward(batch, self.model).over_vocabulary(_rows)
        if own_NV.shape != reference_NV.shape:
            raise UserError(
                f"anchored-sft: the reference predicts {reference_NV.shape[1]} tokens and the model "
                f"{own_NV.shape[1]}; both need the same vocabulary."
            )
        self._low = torch.equal(own_NV, own_NV.bfloat16().to(own_NV.dtype))
        worst = float(divergence(own_NV.double(), reference_NV.double(), self.direction).amax())
        if self.reference == "start" and not worst <= (AT_START_BF16 if self._low else AT_START):
            raise UserError(
                f"anchored-sft: before the first step the divergence from the reference is {worst:.2g} and must be 0: "
                "the parameters of this recipe change the model's outputs before training (an adapter that does not "
                "start at zero, virtual tokens, a resized vocabulary). Use parameters that start at the base, or "
                "reference: adapter-off to anchor to the base beneath the adapters."
            )
        logp_N = reference_NV.double().log_softmax(-1).gather(1, batch.target_N[:, None]).squeeze(1)
        self._probe = logp_N.float().cpu()

    def state(self) -> dict[str, Any]:
        """The reference's log-probabilities of the first targets: by these it is known again."""
        return {"reference": self._probe}

    def load(self, state: dict[str, Any]) -> None:
        """Check that a resumed run has the reference it was begun with.

        Raises:
            LuthierError: it has another.
        """
        saved = state["reference"]
        if self._probe is None or saved is None:
            return
        limit = SAME_REFERENCE_BF16 if self._low else SAME_REFERENCE
        if saved.shape != self._probe.shape or float((saved - self._probe).abs().amax()) > limit:
            raise LuthierError(
                "anchored-sft: the reference is not the one this run was begun with. It is the model the recipe names, "
                "as it was before training: resume with the same model folder and the same data."
            )

    # -- a step

    def loss(self, out: Outputs, batch: Batch, ctx: Context) -> Loss:
        """Sum of the token losses and lambda K over the positions; the weight is the sum of the position weights."""
        counted_N = batch.weight_N
        # K first: while its chunk's logits are there they need not be computed again.
        kl_N = self._divergence(out, batch, ctx) if self.anchored else None
        logp_N = out.logp_N
        metrics: dict[str, tuple[Any, Any]] = {}
        total = -(logp_N * counted_N).sum()
        if self.weighted:
            weight_N = detached_weight(
                self.member,
                logp_N,
                floor=self.floor,
                cap=self.cap,
                sequence_N=batch.sequence_N if self.level == "sequence" else None,
                counted_N=counted_N != 0,
            )
            total = -(weight_N * logp_N * counted_N).sum()
            metrics |= weight_report(logp_N, weight_N, counted_N)
            if ctx.step % self.histogram_steps == 0:
                metrics |= weight_histogram(weight_N, counted_N)
        metrics["token_loss"] = (total.detach(), counted_N.sum())
        if kl_N is not None:
            kl = (kl_N * counted_N).sum()
            metrics["kl"] = (kl.detach(), counted_N.sum())
            total = total + self.anchor_weight * kl
        return Loss(sum=total, weight=counted_N.sum(), metrics=metrics)

    def _divergence(self, out: Outputs, batch: Batch, ctx: Context) -> torch.Tensor:
        """K [N], from the cache where it holds these positions, else against the live reference."""
        kept = self._table.rows(batch) if self._table is not None else None
        if kept is None:

            def exact(logits_CV: torch.Tensor, index_C: torch.Tensor) -> torch.Tensor:
                reference = ctx.forward(batch.positions(index_C), self.model)
                return divergence(logits_CV, reference.over_vocabulary(_rows), self.direction)

            return out.over_vocabulary(exact)
        ids_Nk, reference_Nk, rest_N = kept
        wanted = torch.cat([ids_Nk, batch.target_N[:, None]], 1)
        chosen = out.over_vocabulary(lambda logits_CV, index_C: logits_CV.gather(1, wanted[index_C]))
        # The normaliser is known from the target, so that no pass over the vocabulary is needed for it.
        logp_Nk = chosen[:, :-1] - chosen[:, -1:] + out.logp_N[:, None]
        return coarse_divergence(logp_Nk, reference_Nk, rest_N, self.direction)


def _rows(logits_CV: torch.Tensor, index_C: torch.Tensor) -> torch.Tensor:
    return logits_CV


def collated(ctx: Context, dataset: Any, rows: range) -> Batch:
    """A batch of prepared rows on the run's device."""
    index_B = list(rows)
    batch = ctx.task.collate(dataset.fetch(index_B), index_B)
    moved = {k: v.to(ctx.device) for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    return dataclasses.replace(batch, inputs={k: v.to(ctx.device) for k, v in batch.inputs.items()}, **moved)


def _token_offsets(batch: Batch) -> torch.Tensor:
    """[N] which token of its row predicts each target; 0 where a row is predicted as a whole."""
    if batch.supervised_BT is None:
        return torch.zeros_like(batch.position_N)
    return batch.position_N - batch.sequence_N * batch.inputs["input_ids"].shape[1]


class ReferenceTable:
    """What the reference predicts at every supervised position of the prepared rows, on disk and memory-mapped.

    Per position the ids of its k most likely tokens, their log-probabilities and the logarithm of the remaining mass,
    in the order of rows and tokens; 8 k + 12 bytes.

    Args:
        folder: as written by :meth:`open`.
    """

    def __init__(self, folder: Path) -> None:
        k = json.loads((folder / "about.json").read_text(encoding="utf-8"))["k"]
        # Row number times 2^32 plus the token within the row, ascending.
        self.place = np.memmap(folder / "place.bin", np.int64, "r")
        self.ids = np.memmap(folder / "ids.bin", np.int32, "r").reshape(-1, k)
        self.logp = np.memmap(folder / "logp.bin", np.float32, "r").reshape(-1, k)
        self.rest = np.memmap(folder / "rest.bin", np.float32, "r")

    @classmethod
    def open(cls, ctx: Context, dataset: Any, model: str, k: int) -> ReferenceTable:
        """The table of these rows under this reference; scored once and kept by the hash of both.

        Raises:
            UserError: the weights are sharded, so that no process can hash them.
        """

        def make(folder: Path) -> None:
            with (
                (folder / "place.bin").open("wb") as place,
                (folder / "ids.bin").open("wb") as ids,
                (folder / "logp.bin").open("wb") as logp,
                (folder / "rest.bin").open("wb") as rest,
            ):
                width = 0
                for start in range(0, len(dataset), SCORED_ROWS):
                    batch = collated(ctx, dataset, range(start, min(start + SCORED_ROWS, len(dataset))))
                    found: list[tuple[torch.Tensor, ...]] = []

                    def keep(logits_CV: torch.Tensor, index_C: torch.Tensor) -> torch.Tensor:
                        found.append(largest(logits_CV, k))  # noqa: B023
                        return index_C

                    ctx.forward(batch, model).over_vocabulary(keep)
                    ids_Nk, logp_Nk, rest_N = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
                    width = ids_Nk.shape[1]
                    where_N = (batch.row_B[batch.sequence_N] << 32) + _token_offsets(batch)
                    place.write(where_N.cpu().numpy().tobytes())
                    ids.write(ids_Nk.to(torch.int32).numpy().tobytes())
                    logp.write(logp_Nk.float().numpy().tobytes())
                    rest.write(rest_N.float().numpy().tobytes())
            write_json(folder / "about.json", {"k": width})

        key = content_hash("anchored-sft", model, weights_hash(ctx.model), list(dataset.keys), ctx.task.name, k)
        return cls(Store().get_or_make("reference-top-k", key, make))

    def rows(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Ids [N, k], log-probabilities [N, k] and the logarithm of the rest [N]; None for rows not as prepared."""
        if batch.keys_B is None:
            return None
        where_N = ((batch.row_B[batch.sequence_N] << 32) + _token_offsets(batch)).cpu().numpy()
        at_N = np.searchsorted(self.place, where_N).clip(max=len(self.place) - 1)
        if not np.array_equal(self.place[at_N], where_N):
            return None
        device = batch.target_N.device
        ids_Nk, logp_Nk, rest_N = (torch.from_numpy(part[at_N]).to(device) for part in (self.ids, self.logp, self.rest))
        return ids_Nk.long(), logp_Nk, rest_N


def weights_hash(model: torch.nn.Module) -> str:
    """A hash of the weights beneath the adapters.

    Raises:
        UserError: they are spread over processes.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if hasattr(tensor, "full_tensor"):
            raise UserError(
                "anchored-sft: cache_top_k does not work with training.sharding: fsdp2; use ddp, or leave it out."
            )
        if not any(part in name for part in _ADAPTERS):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
