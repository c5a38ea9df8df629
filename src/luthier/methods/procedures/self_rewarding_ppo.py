"""Self-rewarding PPO: fine-tune on demonstrations, then go on alone, rewarded by what the fine-tuning has changed.

::

    1  p_sft = the base p_pt fine-tuned on the demonstrations (plain loss, ``sft``)
    2  prompts: those of the demonstrations and, from ``prompts``, further ones without answers
    3  train p_sft by the recipe's objective (``ppo``; ``grpo`` and ``rloo`` work too) on its own answers y,
       r(x, y) = log p_sft(y | x) - log p_pt(y | x)          the reward of the same name, in the transform ``rollouts``

p_pt and p_sft stay frozen; p_sft is the reference of ``kl_in_reward``. The critic reads the policy's own hidden states.

Paper: "Self-Rewarding PPO: Aligning Large Language Models with Demonstrations Only", COLM 2025, arXiv 2510.21090. No
official repository was found; coefficients and schedules are this library's.

Example::

    procedure: {self-rewarding-ppo: {prompts: unlabelled.jsonl, sft: {epochs: 2, learning_rate: 1.0e-5}}}
    objective: ppo
    transforms: [rollouts: {reward: self-rewarding-ppo, samples: 1, advantages: gae, kl_in_reward: 0.05, updates: 4}]
"""

from __future__ import annotations

import warnings
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Artefact
from luthier.core.registry import procedure
from luthier.functional.rows import prepared_rows

SLUG = "self-rewarding-ppo"
MEMORISED = 0.1


@procedure(
    "self-rewarding-ppo",
    requires={"transform:rollouts": "it learns from its own answers (reward: self-rewarding-ppo)"},
    tasks=("causal-lm",),
    paper="Self-Rewarding PPO: Aligning Large Language Models with Demonstrations Only, COLM 2025, arXiv 2510.21090",
)
def self_rewarding_ppo(
    ctx: Any,
    *,
    prompts: Annotated[
        str | None, Field(min_length=1, description="a source of further prompts; answers unread")
    ] = None,
    limit: Annotated[int | None, Field(ge=1, description="only this many further prompts")] = None,
    sft: Annotated[
        dict[str, Any] | None, Field(description="keys of the training section for the fine-tuning before")
    ] = None,
) -> Artefact:
    """Fine-tune on demonstrations, then train on own answers, rewarded by what the fine-tuning has changed."""
    base = ctx.loaded.model
    first = ctx.train(ctx.data.train, stage="sft", plain=True, training=sft)
    if unchanged(base, first.model):
        raise UserError(
            f"{SLUG}: the fine-tuned model equals the base, so the reward is 0 everywhere; train it longer."
        )
    loss = first.metrics.get("loss")
    if loss is not None and loss < MEMORISED:
        warnings.warn(f"{SLUG}: the fine-tuned model knows its rows by heart (loss {loss:.2f}).", stacklevel=2)
    source = ctx.data.train
    if prompts is not None:
        source = ctx.source(joined(prepared_rows(source), ctx.rows(prompts, limit=limit)), SLUG)
    return ctx.train(source, start=first, models={"pretrained": base})


def unchanged(base: Any, tuned: Any) -> bool:
    """Whether two models have the same weights."""
    other = dict(tuned.named_parameters())
    own = dict(base.named_parameters())
    return own.keys() == other.keys() and all(torch.equal(p, other[name]) for name, p in own.items())


def joined(rows: Any, further: Any) -> Any:
    """Canonical rows and further ones behind them."""
    from datasets import concatenate_datasets

    return concatenate_datasets([rows, further.cast(rows.features)])
