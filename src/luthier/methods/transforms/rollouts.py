"""Rollouts: turn a batch of prompts into completions that the model writes itself, judged by a reward.

    o_1 .. o_K ~ p(. | x) at temperature T                for every prompt x of the step
    r_i = sum_k w_k r_k(x, o_i)                           one or several rewards
    A_i = (r_i - mean_group) / (std_group + 1e-4)         ``advantages: group``

An objective that reads advantages (``grpo``, ``rloo``, ``ppo``) follows. The sampled token ids are the targets as they
are, nothing is tokenised anew. What is drawn is a function of (seed, step, row), so accumulation and processes do not
change it. ``advantages``::

    group                 as above; 0 where all rewards of the group are equal
    batch                 the same mean, over the standard deviation of all rewards of the step
    none                  r - mean_group                                              (Dr. GRPO)
    rloo                  r - mean of the others of the group
    normalise_then_sum    each reward z-scored in its group, summed, z-scored over the step
    gae                   per token, from the critic of the objective ``ppo``:
                          rho_t = -kl_in_reward (log p - log p_ref) + r at the last token,
                          delta_t = rho_t + gamma V_(t+1) - V_t,  A_t = delta_t + gamma lambda A_(t+1), whitened

With ``updates`` above 1 the same completions serve so many optimiser steps in a row, against the log-probabilities
under which they were drawn; they are kept in the checkpoint. ``kl_in_reward`` subtracts its multiple of
sum_t (log p - log p_ref) from the reward (without ``gae``: of the whole completion). A completion cut at
``max_new_tokens`` may be masked out (``truncated: mask``), though its reward still counts in its group, or punished
(``no_eos_penalty``). ``overlong``: the soft penalty of DAPO over so many tokens before the limit. A reward that does
not apply (None) is left out; where none applies, the advantage is 0.

Sources: "DeepSeekMath", 2024, arXiv 2402.03300; Dr. GRPO, 2025, arXiv 2503.20783; RLOO, 2024, arXiv 2402.14740; PPO,
2017, arXiv 1707.06347; DAPO, 2025, arXiv 2503.14476.

Example::

    objective: grpo
    transforms:
      - rollouts: {reward: numeric, samples: 8, max_new_tokens: 64}
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from luthier.core.errors import LuthierError, UserError
from luthier.core.protocols import Batch, Completion, Context, Needs, Outputs
from luthier.core.registry import transform
from luthier.functional import advantages as adv
from luthier.functional import value_head
from luthier.functional.judging import RewardSpec, built, checked
from luthier.functional.policy_gradient import as_rows, sums
from luthier.functional.rollouts import drawn_logp, moved, spread_counts
from luthier.functional.spans import answer_starts
from luthier.functional.writing import Sampling, completions

# What rewards read of a canonical row.
ROW = ("kind", "prompt", "completion", "system", "messages", "tools", "extra", "source", "row")
SPREAD = {"batch": "scale", "normalise_then_sum": "standardise", "gae": "whiten"}


@transform(
    "rollouts",
    example={
        "reward": {"regex": {"pattern": "[0-4]$"}},
        "samples": 4,
        "max_new_tokens": 6,
    },
    conflicts={
        "packing": "a packed row holds several prompts",
        "sharding:fsdp2": "sharded weights cannot write; use ddp",
        "objective:sft": "the plain loss takes no notice of rewards; use grpo, rloo or ppo",
    },
    tasks=("causal-lm",),
    paper="DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models, 2024, arXiv 2402.03300",
)
class Rollouts:
    """Rollouts: prompts become completions that the model writes itself, judged by a reward."""

    def __init__(
        self,
        *,
        reward: Annotated[
            RewardSpec | list[RewardSpec], Field(description="a reward by name, or {name: options}; or several")
        ],
        reward_weights: Annotated[list[float] | None, Field(description="w, of several rewards; 1 each")] = None,
        samples: Annotated[int, Field(ge=1, description="K, completions of each prompt")] = 8,
        advantages: Annotated[
            Literal["group", "batch", "none", "rloo", "normalise_then_sum", "gae"],
            Field(description="how rewards become advantages"),
        ] = "group",
        temperature: Annotated[float, Field(gt=0, description="T, of sampling and of the objective")] = 1.0,
        top_p: Annotated[float, Field(gt=0, le=1, description="probability the kept tokens hold; 1 keeps all")] = 1.0,
        top_k: Annotated[int, Field(ge=0, description="number of tokens kept; 0 keeps all")] = 0,
        min_p: Annotated[float, Field(ge=0, le=1, description="least share of the top probability; 0 keeps all")] = 0.0,
        max_new_tokens: Annotated[int, Field(ge=1, description="longest completion, in tokens")] = 64,
        batch_rows: Annotated[int, Field(ge=1, description="completions written together")] = 256,
        updates: Annotated[int, Field(ge=1, description="optimiser steps that the same completions serve")] = 1,
        kl_in_reward: Annotated[
            float, Field(ge=0, description="weight of the divergence from the starting model in the reward")
        ] = 0.0,
        gamma: Annotated[float, Field(gt=0, le=1, description="advantages: gae, discount")] = 1.0,
        gae_lambda: Annotated[float, Field(ge=0, le=1, description="advantages: gae, lambda")] = 0.95,
        whiten: Annotated[bool, Field(description="advantages: gae, to mean 0 and variance 1 over the step")] = True,
        truncated: Annotated[
            Literal["keep", "mask"], Field(description="completions cut at max_new_tokens: learn from them, or not")
        ] = "keep",
        no_eos_penalty: Annotated[float, Field(ge=0, description="taken from the reward of a cut completion")] = 0.0,
        overlong: Annotated[
            int, Field(ge=0, description="tokens before the limit over which a penalty grows to 1; 0 for none")
        ] = 0,
    ) -> None:
        specs = reward if isinstance(reward, list) else [reward]
        self.rewards = [built(spec, "rollouts") for spec in specs]
        weights = [1.0] * len(specs) if reward_weights is None else list(reward_weights)
        if len(weights) != len(specs):
            raise UserError(f"rollouts: reward_weights holds {len(weights)} numbers for {len(specs)} rewards.")
        if samples < 2 and advantages != "gae":
            raise UserError(
                f"rollouts: samples: {samples} makes groups of one, and advantages: {advantages} compares the "
                "completions of a group. Use 2 or more, or advantages: gae with the objective ppo."
            )
        self.reward_weights = torch.tensor(weights, dtype=torch.float64)
        self.samples, self.kind, self.batch_rows, self.updates = samples, advantages, batch_rows, updates
        self.sampling, self.max_new_tokens = Sampling(temperature, top_p, top_k, min_p), max_new_tokens
        self.kl_in_reward, self.gamma, self.gae_lambda, self.whiten = kl_in_reward, gamma, gae_lambda, whiten
        self.truncated, self.no_eos_penalty, self.overlong = truncated, no_eos_penalty, overlong
        # The completions of the current rollout: (its number, rows of the micro-batch -> what was sampled).
        self._kept: tuple[int, dict[str, dict[str, Any]]] = (-1, {})

    @property
    def repeats(self) -> int:
        """Every step's rows stand for so many optimiser steps."""
        return self.updates

    @property
    def needs(self) -> Needs:
        """What rewards read, and the models they ask."""
        asked = [getattr(reward, "needs", Needs()) for _, reward in self.rewards]
        models = ("reference",) if self.kl_in_reward else ()
        return Needs(
            statistics=("logp",),
            vocabulary=self.sampling.temperature != 1.0,
            hidden=self.kind == "gae",
            generation=True,
            models=tuple(dict.fromkeys([*models, *(m for n in asked for m in n.models)])),
            columns=tuple(dict.fromkeys([*ROW, *(c for n in asked for c in n.columns)])),
        )

    # -- hooks of the engine

    def prepare(self, ctx: Context, dataset: Any) -> None:
        """Look at the model before the first step.

        Raises:
            UserError: its weights are sharded.
        """
        if any(hasattr(p, "full_tensor") for p in ctx.model.parameters()):
            raise UserError("rollouts: sharded weights cannot write completions; use training.sharding: ddp.")
        dropout = [m for m in ctx.model.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
        if dropout and self.updates > 1:
            warnings.warn(
                f"rollouts: {len(dropout)} dropout layers make log-probabilities differ from those of sampling, so the "
                "ratios are not 1 at the first update. Set the model's dropout to 0.",
                stacklevel=2,
            )
        for _, reward in self.rewards:
            if hasattr(reward, "prepare"):
                reward.prepare(ctx, dataset)

    def counts(self, batch: Batch, ctx: Context) -> dict[str, float]:
        """What the spread of advantages over the whole step is computed from, where it is asked for."""
        how = SPREAD.get(self.kind)
        if how is None or (self.kind == "gae" and not self.whiten):
            return {}
        if self.kind == "gae":
            return spread_counts(how, batch.columns["advantage_N"], batch.weight_N)
        return spread_counts(how, batch.columns["spread"], batch.columns["sequence_weight"])

    def state(self) -> dict[str, Any]:
        """The completions that further updates will use."""
        return {"rollout": self._kept[0], "kept": self._kept[1]}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        self._kept = (int(state["rollout"]), dict(state["kept"]))

    def __call__(self, batch: Batch, ctx: Context) -> Batch:
        """The batch of completions, K for each prompt one after the other.

        Raises:
            UserError: a reward has the wrong length or is not a number, or a prompt leaves no room for an answer.
        """
        weight_B = torch.zeros(batch.examples, device=batch.weight_N.device).scatter_reduce(
            0, batch.sequence_N, batch.weight_N, "amax"
        )
        if not bool(weight_B.any()):
            return self._filler(batch)
        rollout, key = ctx.step // self.updates, ",".join(map(str, batch.row_B.tolist()))
        if self._kept[0] != rollout:
            self._kept = (rollout, {})
        held = self._kept[1].get(key)
        if held is None:
            if ctx.step % self.updates:
                raise LuthierError(
                    "rollouts: the completions of these rows are not in the checkpoint. Resume with the accumulation "
                    "and the number of processes that the run began with."
                )
            return self._sampled(batch, weight_B, key, ctx)
        made = self._collated(batch, held["ids"].tolist(), held["length"].tolist(), held["start"].tolist(), ctx)
        columns = {name: value.to(made.weight_N.device) for name, value in held["columns"].items()}
        return replace(made, weight_N=columns.pop("weight_N"), columns=columns)

    # -- sampling

    def _sampled(self, batch: Batch, weight_B: torch.Tensor, key: str, ctx: Context) -> Batch:
        prompts = prompts_of(batch)
        written = self._write(prompts, batch, ctx)
        ids = [[*p, *c.token_ids] for p, c in zip(repeated(prompts, self.samples), written, strict=True)]
        starts = [len(p) for p in repeated(prompts, self.samples)]
        made = self._collated(batch, [i for row in ids for i in row], [len(row) for row in ids], starts, ctx)
        device, K = made.weight_N.device, self.samples
        finished_B = torch.tensor([c.finished for c in written], dtype=torch.float32, device=device)
        sequence_B = weight_B.repeat_interleave(K)
        kept_B = sequence_B * finished_B if self.truncated == "mask" else sequence_B
        made = made.with_weights(kept_B[made.sequence_N])
        made.columns.update(
            sequence_weight=sequence_B,
            finished=finished_B,
            room=torch.full_like(finished_B, self.max_new_tokens),
            temperature=torch.full_like(finished_B, self.sampling.temperature),
        )
        rows = [{name: batch.columns[name][b] for name in self.needs.columns if name in batch.columns}
                for b in range(batch.examples)]  # fmt: skip
        self._judge(made, repeated(rows, K), written, ctx)
        if self.updates > 1:
            self._keep(key, ids, starts, made)
        return made

    def _write(self, prompts: list[list[int]], batch: Batch, ctx: Context) -> list[Completion]:
        """K completions of each prompt by the policy, each row's from a stream of its own."""
        K, step = self.samples, ctx.step // self.updates
        uniform = [
            torch.rand(K, self.max_new_tokens, generator=ctx.rng("rollout", "rollouts", step, row))
            for row in batch.row_B.tolist()
        ]
        written = completions(
            ctx.model,
            repeated(prompts, K),
            ctx,
            batch_rows=self.batch_rows,
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            uniform_PT=torch.cat(uniform),
        )
        if any(not c.token_ids for c in written):
            raise UserError(
                "rollouts: a prompt fills the model's context, so that nothing can be written for it. Set "
                "data.max_length below the context, with data.truncation: drop."
            )
        return written

    def _collated(self, batch: Batch, ids: list[int], lengths: list[int], starts: list[int], ctx: Context) -> Batch:
        """A batch whose targets are the sampled tokens."""
        flat, edges = np.asarray(ids, dtype=np.int64), np.cumsum([0, *lengths])
        rows = {
            "input_ids": [flat[a:b] for a, b in itertools.pairwise(edges)],
            "spans": [np.asarray([s, n]) for s, n in zip(starts, lengths, strict=True)],
        }
        made = ctx.task.collate(rows, np.repeat(batch.row_B.cpu().numpy(), self.samples))
        return moved(made, batch.weight_N.device)

    def _filler(self, batch: Batch) -> Batch:
        """A batch that only fills a place where other processes still have rows: nothing is written for it."""
        zero_N, zero_B = torch.zeros_like(batch.weight_N), batch.weight_N.new_zeros(batch.examples)
        one_B = torch.ones_like(zero_B)
        columns = {"advantage_N": zero_N, "reward": zero_B, "sequence_weight": zero_B, "finished": zero_B,
                   "no_signal": zero_B, "spread": zero_B, "room": one_B * self.max_new_tokens,
                   "temperature": one_B * self.sampling.temperature}  # fmt: skip
        if self._looks:
            columns |= {"old_logp_N": zero_N}
        if self.kind == "gae":
            columns |= {"value_N": zero_N, "return_N": zero_N}
        return replace(batch, columns=columns, keys_B=None)

    # -- rewards and advantages

    @property
    def _looks(self) -> bool:
        """Whether the policy reads its completions once more before the first update."""
        return self.updates > 1 or self.kl_in_reward > 0 or self.kind == "gae"

    def _judge(self, made: Batch, rows: list[dict[str, Any]], written: Sequence[Completion], ctx: Context) -> None:
        """Put rewards and advantages into the columns."""
        columns, B, device = made.columns, made.examples, made.weight_N.device
        before, old_N = self._forward(made, ctx) if self._looks else (None, None)
        reward_N = torch.zeros_like(made.weight_N)
        given = []
        for (slug, reward), weight in zip(self.rewards, self.reward_weights.tolist(), strict=True):
            if hasattr(reward, "per_token"):
                each_N = reward.per_token(made, ctx)
                given.append(sums(each_N, made.sequence_N, B).double())
                reward_N = reward_N + weight * each_N
            else:
                given.append(checked(slug, reward(rows, [c.text for c in written], ctx), rows).to(device))
        rewards_RB = torch.stack(given)
        reward_B = adv.combined(rewards_RB, self.reward_weights.to(device))
        penalty_B = self._penalty(made).double()
        reward_PK = reward_B.view(-1, self.samples)
        columns["reward"] = reward_B.float()
        columns["no_signal"] = (adv.group_std(reward_PK) == 0).float().expand_as(reward_PK).reshape(-1)
        if old_N is not None:
            columns["old_logp_N"] = old_N
        reference_N = old_N
        if self.kl_in_reward:
            with torch.no_grad():
                reference_N = drawn_logp(ctx.forward(made, "reference", grad=False), made)
        if self.kind == "gae":
            assert before is not None
            assert old_N is not None
            assert reference_N is not None
            text_B = adv.combined(torch.stack([torch.zeros_like(reward_B) if hasattr(r, "per_token") else g
                                               for (_, r), g in zip(self.rewards, given, strict=True)]),
                                  self.reward_weights.to(device))  # fmt: skip
            score_B = (text_B.nan_to_num(0.0) + penalty_B).float()
            self._generalised(made, reward_N, score_B, old_N, reference_N, value_head.values(ctx.model, before))
            return
        if self.kl_in_reward:
            assert old_N is not None
            assert reference_N is not None
            penalty_B = penalty_B - self.kl_in_reward * sums(old_N - reference_N, made.sequence_N, B).double()
        reward_PK = (reward_B + penalty_B).view(-1, self.samples)
        if self.kind == "normalise_then_sum":
            advantage_PK = adv.normalised_then_summed(
                rewards_RB.view(len(given), -1, self.samples), self.reward_weights.to(device)
            )
            columns["spread"] = advantage_PK.reshape(-1).masked_fill(reward_B.isnan(), torch.nan)
        else:
            how = {"group": adv.normalised, "rloo": adv.leave_one_out}.get(self.kind, adv.centred)
            advantage_PK = how(reward_PK)
        if self.kind == "batch":
            columns["spread"] = reward_PK.reshape(-1)
        columns["advantage_N"] = advantage_PK.reshape(-1).float()[made.sequence_N]

    def _penalty(self, made: Batch) -> torch.Tensor:
        """What a completion loses for its length [B]."""
        penalty_B = -self.no_eos_penalty * (1 - made.columns["finished"])
        if self.overlong:
            length_B = torch.bincount(made.sequence_N, minlength=made.examples)
            penalty_B = penalty_B + adv.overlong_penalty(length_B, self.max_new_tokens, self.overlong)
        return penalty_B

    @torch.no_grad()
    def _forward(self, made: Batch, ctx: Context) -> tuple[Outputs, torch.Tensor]:
        """The policy's outputs on what it wrote, without dropout, and its log-probabilities."""
        training = ctx.model.training
        ctx.model.eval()
        try:
            out = ctx.forward(made, grad=False)
            return out, drawn_logp(out, made).detach()
        finally:
            ctx.model.train(training)

    @torch.no_grad()
    def _generalised(
        self,
        made: Batch,
        reward_N: torch.Tensor,
        score_B: torch.Tensor,
        old_N: torch.Tensor,
        reference_N: torch.Tensor,
        value_N: torch.Tensor,
    ) -> None:
        """Advantages of each token, from the critic."""

        def rows(value_N: torch.Tensor) -> torch.Tensor:
            return as_rows(value_N, made.sequence_N, made.examples)[0]

        value_N = value_N.detach()
        mask_BT = as_rows(value_N, made.sequence_N, made.examples)[1]
        rho_BT = rows(reward_N) + adv.at_last_token(score_B, mask_BT)
        rho_BT = adv.token_rewards(rho_BT, rows(old_N), rows(reference_N), mask_BT, self.kl_in_reward)
        advantage_BT, return_BT = adv.generalised(
            rho_BT, rows(value_N), mask_BT, gamma=self.gamma, lambda_=self.gae_lambda
        )
        made.columns.update(advantage_N=advantage_BT[mask_BT], return_N=return_BT[mask_BT], value_N=value_N)

    # -- further updates

    def _keep(self, key: str, ids: list[list[int]], starts: list[int], made: Batch) -> None:
        """Keep a micro-batch for the steps to come; every process keeps those of all, for one of them saves."""
        own = {
            "ids": torch.tensor([i for row in ids for i in row]),
            "length": torch.tensor([len(row) for row in ids]),
            "start": torch.tensor(starts),
            "columns": {n: v.cpu() for n, v in {**made.columns, "weight_N": made.weight_N}.items()},
        }
        found: list[Any] = [{key: own}]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            found = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(found, {key: own})
        for some in found:
            self._kept[1].update(some)


def prompts_of(batch: Batch) -> list[list[int]]:
    """The token ids of each row before its last answer."""
    starts = answer_starts(batch)[1].tolist()
    return [ids[:start].tolist() for ids, start in zip(batch.inputs["input_ids"], starts, strict=True)]


def repeated(values: Sequence[Any], times: int) -> list[Any]:
    """Each value so many times, one after the other."""
    return [value for value in values for _ in range(times)]
