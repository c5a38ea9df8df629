"""Self-rewarding PPO's reward: how much more the fine-tuned model likes an answer than the pretrained one did.

    r(x, y) = sum_t [ log p_sft(y_t | x, y_<t) - log p_pt(y_t | x, y_<t) ]       over the sampled tokens, end included

It needs no judge and no given answer. ``p_sft`` is the run's reference, the model training starts from; ``p_pt`` the
model ``pretrained``, which the procedure of the same name gives. Both score at temperature 1. ``placement: eos``
gives the sum once, at the last token; ``token`` spreads it over the tokens (the same sum). This library's:
``normalise: length`` divides by the number of tokens, ``clip`` bounds the score, ``scale`` multiplies it, and with
``exclude_end`` the end token is left out: a pretrained model has seldom seen it, so its log-ratio can outweigh all
others (its share is logged).

Maximising scale * r - kl * KL(p || p_ref) leads to p_ref (p_sft / p_pt)^(scale / kl): with the pretrained model as the
prior and scale = kl that is p_sft itself.

Paper: "Self-Rewarding PPO: Aligning Large Language Models with Demonstrations Only", COLM 2025, arXiv 2510.21090. No
official repository was found.

Example::

    procedure: self-rewarding-ppo
    objective: ppo
    transforms: [rollouts: {reward: self-rewarding-ppo, samples: 1, advantages: gae, kl_in_reward: 0.05, updates: 4}]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Batch, Context, Needs
from luthier.core.registry import reward
from luthier.functional.policy_gradient import sums

SLUG, PRETRAINED = "self-rewarding-ppo", "pretrained"


def placed(
    ratio_N: torch.Tensor, sequence_N: torch.Tensor, examples: int, *, scale: float, clip: float | None,
    per_length: bool, at_end: bool,
) -> torch.Tensor:  # fmt: skip
    """The reward of each token [N] from the log-ratios of the tokens: the score at the last token, or spread.

    Args:
        ratio_N: log p_sft - log p_pt; the tokens of a completion stand together, completions in order.
        sequence_N: which completion.
        examples: how many.
        scale: factor on the score.
        clip: bound on the absolute score, before the factor.
        per_length: divide the score by the number of tokens.
        at_end: at the last token alone.
    """
    count_B = torch.bincount(sequence_N, minlength=examples)
    score_B = sums(ratio_N, sequence_N, examples)
    wanted_B = score_B / count_B.clamp(min=1) if per_length else score_B
    if clip is not None:
        wanted_B = wanted_B.clamp(-clip, clip)
    wanted_B = scale * wanted_B
    if at_end:
        last_N = torch.zeros_like(ratio_N)
        last_N[(count_B.cumsum(0) - 1)[count_B > 0]] = wanted_B[count_B > 0]
        return last_N
    # What the score loses by clipping and scaling every token loses alike.
    return ratio_N + ((wanted_B - score_B) / count_B.clamp(min=1))[sequence_N]


@reward(
    "self-rewarding-ppo",
    paper="Self-Rewarding PPO: Aligning Large Language Models with Demonstrations Only, COLM 2025, arXiv 2510.21090",
)
class LogRatioReward:
    """Self-rewarding: how much more the fine-tuned model likes an answer than the pretrained one did."""

    needs = Needs(models=("reference", PRETRAINED))

    def __init__(
        self,
        *,
        placement: Annotated[Literal["eos", "token"], Field(description="at the last token, or spread")] = "eos",
        normalise: Annotated[Literal["none", "length"], Field(description="divide by the number of tokens")] = "none",
        clip: Annotated[float | None, Field(gt=0, description="bound on the absolute score, such as 20")] = None,
        scale: Annotated[float, Field(gt=0, description="factor on the score")] = 1.0,
        exclude_end: Annotated[bool, Field(description="leave out the end token's log-ratio")] = False,
    ) -> None:
        self.placement, self.normalise, self.clip, self.scale = placement, normalise, clip, scale
        self.exclude_end = exclude_end

    def __call__(self, rows: Sequence[Mapping[str, Any]], completions: Sequence[str], ctx: Any) -> list[float | None]:
        """Not for texts.

        Raises:
            UserError: always; the reward is one of sampled tokens.
        """
        raise UserError(f"{SLUG}: the reward is of sampled tokens under two models; use it in the transform rollouts.")

    @torch.no_grad()
    def per_token(self, batch: Batch, ctx: Context) -> torch.Tensor:
        """The reward of each sampled token [N]."""
        ratio_N = ctx.forward(batch, "reference", grad=False).logp_N - ctx.forward(batch, PRETRAINED, grad=False).logp_N
        count_B = torch.bincount(batch.sequence_N, minlength=batch.examples)
        end_N = torch.zeros_like(ratio_N, dtype=torch.bool)
        end_N[(count_B.cumsum(0) - 1)[(count_B > 0) & (batch.columns["finished"] > 0)]] = True
        ctx.log(end_token_log_ratio=float(ratio_N[end_N].mean()) if bool(end_N.any()) else 0.0)
        if self.exclude_end:
            ratio_N = ratio_N * ~end_N
        return placed(
            ratio_N,
            batch.sequence_N,
            batch.examples,
            scale=self.scale,
            clip=self.clip,
            per_length=self.normalise == "length",
            at_end=self.placement == "eos",
        )
