"""One-token rollout: at every target the model draws next tokens itself and learns by whether they are the data's.

    q_n = softmax(z_n / kappa)                    no gradient; of the same forward pass
    a_1 .. a_K ~ q_n                              with replacement
    J_n = 1/K sum_j sg(R(a_j)) log p_n(a_j),      R(a) = 1 if a = x_n, else beta
        = k_n/K log p_n(x_n) + beta/K (sum of log p_n(a) over the other draws)
    loss = - sum_n m_n J_n / sum_n m_n

``z_n`` [V] the logits that predict target ``x_n``, ``p_n = softmax(z_n)`` (temperature 1), K ``samples``, kappa
``temperature``, beta ``wrong_reward``, ``k_n`` how many draws are the target, ``m_n`` [N] position weights, ``sg`` no
gradient. It is one step of a policy gradient on ordinary rows: no sequence is generated, the prefix is the data's. The
first term is plain fine-tuning weighted by how likely the model finds the target, the second pushes down wrong tokens
that the model would say. In expectation, at kappa = 1 and beta = 0, the gradient is that of 1 - p
(``beyond-log-likelihood: p``).

``estimator: expected`` puts q(v) in place of the share of draws, for every v. ``unbiased_temperature`` multiplies the
term of each draw by sg(p/q), so that kappa no longer changes the expectation. ``baseline: expected`` subtracts
q(x) + beta (1 - q(x)) from every reward. ``sft_mix`` adds plain likelihood: loss = mix (-log p(x)) + (1 - mix) (-J).
Draws are a function of (seed, step, row, place in the row): accumulation and processes do not change them.

Paper: "One-Token Rollout: Guiding Supervised Fine-Tuning of LLMs with Policy Gradient", 2025, arXiv 2509.26313. No
official repository was found. The defaults of K, kappa and beta are the paper's as remembered, not checked against it;
normaliser, estimator, correction, baseline, filters and mix are this library's.

Example::

    objective:
      one-token-rollout: {samples: 256, temperature: 1.3, wrong_reward: -0.1}
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Batch, Context, Loss, Needs, Outputs
from luthier.core.registry import objective
from luthier.functional.draws import draw, support_floor, tempered

SLUG = "one-token-rollout"
WATCHED_STEPS = 10
# With fewer targets drawn than this there is hardly anything to learn from but wrong draws.
FEW_HITS = 0.1
_OF_THE_TOKENIZER = ("end", "special")


@dataclass
class Rollout:
    """What the draws of each position [N] amount to.

    Attributes:
        hit: the part of J from draws of the target, with a graph.
        wrong: the part from all others, with a graph.
        hit_share: share of the draws that are the target; q of the target with ``estimator: expected``.
        q: probability of the target under q.
        entropy: of p, in nats; from finitely many draws an estimate.
    """

    hit: torch.Tensor
    wrong: torch.Tensor
    hit_share: torch.Tensor
    q: torch.Tensor
    entropy: torch.Tensor


@objective(
    "one-token-rollout",
    identity={"sft_mix": 1.0},
    example={"samples": 8},
    conflicts={"objective:label-smoothing": "a draw is right or wrong by one target, which smoothing spreads out"},
    paper="One-Token Rollout: Guiding Supervised Fine-Tuning of LLMs with Policy Gradient, 2025, arXiv 2509.26313",
)
class OneTokenRollout:
    """One-token rollout: the model draws next tokens itself and is rewarded for those of the data."""

    def __init__(
        self,
        *,
        samples: Annotated[int, Field(ge=1, description="K, draws at every position")] = 256,
        temperature: Annotated[
            float, Field(gt=0, description="kappa, of the draws; log-probabilities in the loss are at temperature 1")
        ] = 1.3,
        wrong_reward: Annotated[
            float, Field(le=1, description="beta, reward of a draw that is not the target; 0 ignores such draws")
        ] = -0.1,
        estimator: Annotated[
            Literal["sample", "expected"],
            Field(description="draw, or take the expectation over all draws (small vocabularies)"),
        ] = "sample",
        unbiased_temperature: Annotated[
            bool, Field(description="weight each draw by p/q, so that the temperature changes the noise alone")
        ] = False,
        baseline: Annotated[
            Literal["none", "expected"], Field(description="expected: subtract the expected reward from every reward")
        ] = "none",
        top_k: Annotated[int | None, Field(ge=1, description="draw from this many most likely tokens only")] = None,
        top_p: Annotated[
            float | None, Field(gt=0, le=1, description="draw from the most likely tokens that reach this probability")
        ] = None,
        sft_mix: Annotated[float, Field(ge=0, le=1, description="share of plain likelihood in the loss; 1 is sft")] = 0,
        exclude: Annotated[
            list[str] | None,
            Field(
                description="targets with plain likelihood instead: end (the end token), special (all special tokens), "
                "or a group of positions that a transform names"
            ),
        ] = None,
    ) -> None:
        if wrong_reward > 0:
            warnings.warn(f"{SLUG}: wrong_reward {wrong_reward:g} is above 0: errors are rewarded.", stacklevel=2)
        self.samples, self.temperature, self.wrong_reward = samples, temperature, wrong_reward
        self.estimator, self.unbiased, self.baseline = estimator, unbiased_temperature, baseline == "expected"
        self.top_k, self.top_p, self.sft_mix, self.exclude = top_k, top_p, sft_mix, list(exclude or [])
        self._excluded_ids: torch.Tensor | None = None
        self._early: tuple[Any, Any] | None = None

    @property
    def needs(self) -> Needs:
        """Log-probabilities and a look at the vocabulary, position by position."""
        return Needs(statistics=("logp",), positionwise=True, vocabulary=self.sft_mix < 1)

    def prepare(self, ctx: Context, dataset: Any) -> None:
        """Find the ids of excluded tokens.

        Raises:
            UserError: the task or the tokenizer has none.
        """
        chosen = [name for name in _OF_THE_TOKENIZER if name in self.exclude]
        if not chosen:
            return
        if ctx.task.name != "causal-lm":
            raise UserError(f"{SLUG}: exclude: {chosen[0]} names tokens, and targets of {ctx.task.name} are classes.")
        end = ctx.processor.eos_token_id
        if end is None and "end" in chosen:
            raise UserError(f"{SLUG}: exclude: end, but the tokenizer has no end token; remove it.")
        ids = [*([end] if "end" in chosen else []), *(ctx.processor.all_special_ids if "special" in chosen else [])]
        self._excluded_ids = torch.tensor(sorted(set(ids)), dtype=torch.long)

    def loss(self, out: Outputs, batch: Batch, ctx: Context) -> Loss:
        """Sum of weighted -J over the positions; the weight is the sum of the position weights."""
        weight_N = batch.weight_N
        if self.sft_mix == 1:
            return Loss(sum=-(out.logp_N * weight_N).sum(), weight=weight_N.sum())
        found = self._expected(out, batch) if self.estimator == "expected" else self._sampled(out, batch, ctx)
        loss_N = -(found.hit + found.wrong)
        if self.sft_mix:
            loss_N = self.sft_mix * -out.logp_N + (1 - self.sft_mix) * loss_N
        counted_N = weight_N
        if self.exclude:
            plain_N = self._plain(batch)
            loss_N = torch.where(plain_N, -out.logp_N, loss_N)
            counted_N = weight_N * ~plain_N
        return Loss(sum=(loss_N * weight_N).sum(), weight=weight_N.sum(), metrics=self._report(found, counted_N, ctx))

    # -- the two estimators

    def _sampled(self, out: Outputs, batch: Batch, ctx: Context) -> Rollout:
        """J from K draws, with the logits of the drawn tokens alone in its graph."""
        uniform_NK = self._uniform(batch, ctx)

        def chosen(logits_CV: torch.Tensor, index_C: torch.Tensor) -> torch.Tensor:
            """Logit, probability under q and hit [C, 3, K + 1] of the draws, and behind them of the target."""
            target_C = batch.target_N[index_C]
            ids_Ck, q_Ck = draw(
                logits_CV.detach(),
                uniform_NK[index_C],
                target_C,
                self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
            )
            return torch.stack([logits_CV.gather(1, ids_Ck), q_Ck, (ids_Ck == target_C[:, None]).to(q_Ck.dtype)], 1)

        # Where wrong draws have no part in J, it depends on the logits through log p of the target alone.
        pushes = self.wrong_reward != 0 or self.baseline
        with torch.set_grad_enabled(torch.is_grad_enabled() and pushes):
            z_Nk, q_Nk, hit_Nk = out.over_vocabulary(chosen).unbind(1)
        logp_N = out.logp_N
        # The normaliser is known from the target, so that no further pass over the vocabulary is needed for it.
        logp_NK = z_Nk[:, :-1] - z_Nk[:, -1:] + logp_N[:, None]
        q_Nk, hit_NK = q_Nk.detach(), hit_Nk.detach()[:, :-1]
        q_N = q_Nk[:, -1]
        ratio_NK = logp_NK.detach().exp() / q_Nk[:, :-1]
        each = (ratio_NK if self.unbiased else 1.0) / self.samples
        right_N, wrong_N = self._rewards(q_N)
        return Rollout(
            hit=(each * hit_NK).sum(1) * right_N * logp_N,
            wrong=(each * (1 - hit_NK) * logp_NK).sum(1) * wrong_N if pushes else torch.zeros_like(q_N),
            hit_share=hit_NK.mean(1),
            q=q_N,
            entropy=-(ratio_NK * logp_NK.detach()).mean(1),
        )

    def _expected(self, out: Outputs, batch: Batch) -> Rollout:
        """The expectation of J over the draws, a sum over the vocabulary."""

        def parts(logits_CV: torch.Tensor, index_C: torch.Tensor) -> torch.Tensor:
            fixed_CV, target_C1 = logits_CV.detach(), batch.target_N[index_C, None]
            floor_C1 = support_floor(fixed_CV, self.temperature, top_k=self.top_k, top_p=self.top_p)
            q_CV = tempered(fixed_CV, self.temperature, floor_C1)
            logp_CV = torch.log_softmax(logits_CV, -1)
            p_CV = logp_CV.detach().exp()
            each_CV = p_CV * (q_CV > 0) if self.unbiased else q_CV
            q_C = q_CV.gather(1, target_C1).squeeze(1)
            right_C, wrong_C = self._rewards(q_C)
            hit_C = (each_CV * logp_CV).gather(1, target_C1).squeeze(1)
            wrong = ((each_CV * logp_CV).sum(1) - hit_C) * wrong_C
            return torch.stack([right_C * hit_C, wrong, q_C, -(p_CV * logp_CV.detach()).sum(1)], 1)

        hit_N, wrong_N, q_N, entropy_N = out.over_vocabulary(parts).unbind(1)
        return Rollout(hit_N, wrong_N, hit_share=q_N.detach(), q=q_N.detach(), entropy=entropy_N.detach())

    def _rewards(self, q_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a draw of the target and any other draw [N] are worth, after the baseline."""
        base_N = q_N + self.wrong_reward * (1 - q_N) if self.baseline else torch.zeros_like(q_N)
        return 1 - base_N, self.wrong_reward - base_N

    # -- parts

    def _uniform(self, batch: Batch, ctx: Context) -> torch.Tensor:
        """Numbers in [0, 1) [N, K], each row's from its own stream, whatever part of the batch this is."""
        sequence_N = batch.sequence_N.cpu()
        whole_N, index_N = sequence_N, torch.arange(sequence_N.numel())
        if batch.part_of is not None:
            whole_N, index_N = batch.part_of[0].sequence_N.cpu(), batch.part_of[1].cpu()
        # Where each position of the whole batch stands among those of its row.
        count_B = torch.bincount(whole_N, minlength=batch.examples)
        order_N = torch.argsort(whole_N, stable=True)
        place_N = torch.empty_like(order_N)
        place_N[order_N] = torch.arange(whole_N.numel()) - (count_B.cumsum(0) - count_B)[whole_N[order_N]]
        rows, counts, row_B = sequence_N.unique(), count_B.tolist(), batch.row_B.tolist()
        drawn = [
            torch.rand(counts[b], self.samples, generator=ctx.rng("rollout", SLUG, ctx.step, row_B[b]))
            for b in rows.tolist()
        ]
        start_B = torch.zeros_like(count_B)
        start_B[rows] = count_B[rows].cumsum(0) - count_B[rows]
        uniform_NK = torch.cat([torch.empty(0, self.samples), *drawn])[start_B[sequence_N] + place_N[index_N]]
        return uniform_NK.to(batch.target_N.device)

    def _plain(self, batch: Batch) -> torch.Tensor:
        """Which positions [N] keep plain likelihood."""
        plain_N = torch.zeros_like(batch.target_N, dtype=torch.bool)
        if self._excluded_ids is not None:
            plain_N |= torch.isin(batch.target_N, self._excluded_ids.to(plain_N.device))
        for name in self.exclude:
            if name in _OF_THE_TOKENIZER:
                continue
            flag_N = batch.columns.get(f"{name}_N")
            if not isinstance(flag_N, torch.Tensor) or flag_N.dtype != torch.bool:
                groups = [k[:-2] for k, v in batch.columns.items() if getattr(v, "dtype", None) == torch.bool]
                raise UserError(
                    f"{SLUG}: exclude: no transform of this run names a group of positions '{name}'. Accepted: "
                    f"{', '.join([*_OF_THE_TOKENIZER, *groups])}."
                )
            plain_N |= flag_N
        return plain_N

    def _report(self, found: Rollout, counted_N: torch.Tensor, ctx: Context) -> dict[str, tuple[Any, Any]]:
        """What is logged beside the plain loss."""
        count = counted_N.sum()
        size_N = found.wrong.detach().abs()
        reward_N = found.hit_share + self.wrong_reward * (1 - found.hit_share)
        metrics: dict[str, tuple[Any, Any]] = {
            "hit_share": ((found.hit_share * counted_N).sum(), count),
            "rollout_probability": ((found.q * counted_N).sum(), count),
            "reward": ((reward_N * counted_N).sum(), count),
            "wrong_share": ((size_N * counted_N).sum(), ((size_N + found.hit.detach().abs()) * counted_N).sum()),
            "entropy": ((found.entropy * counted_N).sum(), count),
        }
        if self.estimator == "sample":
            metrics["no_hit"] = (((found.hit_share == 0) * counted_N).sum(), count)
            self._watch(*metrics["no_hit"], ctx)
        return metrics

    def _watch(self, missed: torch.Tensor, count: torch.Tensor, ctx: Context) -> None:
        """Warn once where the first steps hardly ever drew a target."""
        if self.sft_mix:
            return
        if ctx.step < WATCHED_STEPS:
            before = self._early or (0.0, 0.0)
            self._early = (before[0] + missed, before[1] + count)
        elif self._early is not None:
            share = float(self._early[0]) / max(float(self._early[1]), 1e-12)
            self._early = None
            if share > 1 - FEW_HITS:
                warnings.warn(
                    f"{SLUG}: at {100 * share:.0f}% of the positions of the first {WATCHED_STEPS} steps no draw was "
                    "the target: the model finds this data too unlikely to learn it so. Set sft_mix above 0, or "
                    "wrong_reward to 0 so that at least nothing is pushed down.",
                    stacklevel=4,
                )
