"""Do the policy-gradient objectives learn, and does the divergence term hold them back?

The design, settled before it ran: a fresh transformer (width 32, two layers) over ten digits; prompts of three random digits;
the reward of a completion of at most 8 tokens is its share of sevens (an empty one earns 0). 100 steps of 8 prompts with 8
completions each, AdamW at 3e-3, temperature 1. Arms: grpo, dapo, dr_grpo, gspo (grpo with the ratio of the completion), rloo
and ppo (two updates per rollout for the last, so that ratios move), all without a divergence; grpo with beta 0.5; and
plain SFT on all rollouts, whatever they earned, as the control that must not learn. Measured on 512 fresh completions: mean
reward, and the divergence from the starting model in nats per token. Claims: every arm but the control rises from below 0.15
to above 0.9; with beta 0.5 the divergence is at least three times smaller than with beta 0.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path

import numpy as np
import torch
from token_worlds import Words, mean_of, network, rows_of, session_of, train, write

from luthier.methods.objectives.grpo import GroupRelativePolicyOptimization as GRPO
from luthier.methods.objectives.ppo import ProximalPolicyOptimization as PPO
from luthier.methods.objectives.rloo import ReinforceLeaveOneOut as RLOO
from luthier.methods.objectives.sft import SupervisedFineTuning
from luthier.methods.transforms.rollouts import Rollouts
from luthier.tasks.causal_lm import CausalLM

RESULT = Path(__file__).resolve().parents[2] / "docs" / "measured" / "grpo.json"
WORLD = Words([str(d) for d in range(10)])
SEVEN, MOST, STEPS = 10, 8, 100
REWARD = """
def sevens(rows, completions, ctx):
    return [t.split().count("7") / max(len(t.split()), 1) for t in completions]
"""
ARMS = {
    "grpo": (lambda: GRPO(beta=0.0), {}),
    "dapo": (lambda: GRPO(loss="dapo", beta=0.0), {}),
    "dr_grpo": (lambda: GRPO(loss="dr_grpo", beta=0.0), {"advantages": "none"}),
    "gspo": (lambda: GRPO(ratio="sequence", beta=0.0), {}),
    "rloo": (RLOO, {"advantages": "rloo"}),
    "ppo": (PPO, {"advantages": "gae", "updates": 2}),
    "grpo, beta 0.5": (lambda: GRPO(beta=0.5), {}),
    "control: plain SFT on the rollouts": (SupervisedFineTuning, {}),
}


def prompts(seed, count):
    rng = np.random.default_rng(seed)
    return [[1, *rng.integers(3, 13, size=3).tolist()] for _ in range(count)]


def measured(model, base, seed):
    """Mean reward and divergence from the base per token, over fresh completions."""
    asked = prompts(seed + 1000, 512)
    found = write(model, WORLD, asked, most=MOST, temperature=1.0, seed=seed)
    said = [[t for t in done.token_ids if t > 2] for (done,) in found]
    whole = rows_of([(p, list(done.token_ids)) for p, (done,) in zip(asked, found, strict=True)])
    batch = CausalLM(WORLD).collate(whole.fetch(range(len(whole))), range(len(whole)))
    width = batch.inputs["input_ids"].shape[1]
    # The end that the rows add behind a completion is not the model's.
    own = batch.position_N % width + 1 < torch.tensor([4 + len(d.token_ids) for (d,) in found])[batch.sequence_N]
    with torch.no_grad():
        both = [m(**batch.inputs).logits.view(-1, len(WORLD)).log_softmax(-1)[batch.position_N] for m in (model, base)]
    policy, start = (logp.gather(1, batch.target_N[:, None]).squeeze(1)[own] for logp in both)
    return {
        "reward": float(np.mean([s.count(SEVEN) / max(len(s), 1) for s in said])),
        "kl_per_token": float((policy - start).mean()),
    }


def run(seed, arm, reward):
    objective, options = ARMS[arm]
    model = network(seed, len(WORLD), width=32).eval()
    base = copy.deepcopy(model)
    updates = options.get("updates", 1)
    made = Rollouts(reward=reward, samples=8, max_new_tokens=MOST, **options)
    session = session_of(model, WORLD, seed=seed, objective=objective(), transforms=[made])
    rows = rows_of([(p, [3]) for p in prompts(seed, 8 * STEPS)])
    before, began = measured(base, base, seed)["reward"], time.perf_counter()
    train(session, rows, batch_rows=8, max_steps=STEPS * updates, learning_rate=3e-3 / updates, log_steps=50)
    seconds = time.perf_counter() - began
    session.stack.call("finish_model", model, WORLD)
    return {"reward_before": before, **measured(model.eval(), base, seed), "seconds": seconds}


def experiment(folder, seeds=(0, 1, 2)):
    (folder / "sevens.py").write_text(REWARD)
    reward = f"{folder / 'sevens.py'}:sevens"
    arms = {arm: {str(seed): run(seed, arm, reward) for seed in seeds} for arm in ARMS}

    def rises(arm):
        return all(r["reward_before"] < 0.15 and r["reward"] > 0.9 for r in arms[arm].values())

    learners = [a for a in ARMS if not a.startswith("control") and "beta" not in a]
    kl = [arms["grpo, beta 0.5"][s]["kl_per_token"] < arms["grpo"][s]["kl_per_token"] / 3 for s in arms["grpo"]]
    return {
        "method": "grpo",
        "design": __doc__,
        "seeds": list(seeds),
        "arms": arms,
        "claims": {
            **{f"{a}: from below 0.15 to above 0.9 on every seed": rises(a) for a in learners},
            "with beta 0.5 the divergence is at least three times smaller, on every seed": all(kl),
            "the control does not learn": all(
                r["reward"] < 0.3 for r in arms["control: plain SFT on the rollouts"].values()
            ),
        },
        "mean": mean_of(arms),
    }


def test_policy_gradients_learn_what_is_rewarded(tmp_path):
    found = experiment(tmp_path)
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    mean = found["mean"]
    assert all(mean[a]["reward"] > mean[a]["reward_before"] for a in ARMS if not a.startswith("control"))
