"""Self-rewarding PPO: does the log-ratio of fine-tuned to pretrained model make a better policy than more fine-tuning?

The design, settled before it ran: words of letters of a 16-letter alphabet; the base (width 64, two layers) is pretrained for
2,500 steps of 32 rows on words of 3 to 8 letters, each answered in one of four formats at random: as it is, reversed, in
brackets, reversed in brackets. Demonstrations: 60 words of 3 to 6 letters, reversed in brackets. Stage 1: plain SFT on them,
12 steps of 20 rows (three passes), AdamW at 3e-4. Stage 2 of the method: PPO with the reward log p_sft - log p_pt at the last
token, on 60 demonstrated and 600 further prompts with words of 3 to 8 letters, 64 rollouts a step of at most 12 tokens, 40
rollouts of 2 updates, AdamW at 3e-4, divergence 0.1 in the reward, clip of the score at 20. Control: SFT on the demonstrations
for as many steps in all. Measured on 128 held-out words each of 3 to 6 and of 7 to 8 letters: exact answers at temperature 1 and
greedy; reward and divergence from p_sft of the sampled answers, their length. Claims of the specification: sampled accuracy at
least 10 points above SFT (of stage 1, and of the same total steps), greedy at least as good, longer words at least 3 points
better, divergence below 20 nats an answer, length within 10%.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import torch
from token_worlds import Words, mean_of, network, right, rows_of, session_of, train, write

from luthier.methods.objectives.ppo import ProximalPolicyOptimization as PPO
from luthier.methods.transforms.rollouts import Rollouts
from luthier.tasks.causal_lm import CausalLM

RESULT = Path(__file__).resolve().parents[2] / "docs" / "measured" / "self-rewarding-ppo.json"
WORLD = Words([*"abcdefghijklmnop", "[", "]", "="])
FIRST, OPEN, CLOSE, SEPARATOR, MOST = 3, 19, 20, 21, 12
UPDATES = 80


def answers(word):
    """The four formats; the last one is the task's."""
    back = word[::-1]
    return [word, back, [OPEN, *word, CLOSE], [OPEN, *back, CLOSE]]


def words(rng, count, low, high):
    return [rng.integers(FIRST, FIRST + 16, size=int(rng.integers(low, high + 1))).tolist() for _ in range(count)]


def task(some):
    return [([1, *w, SEPARATOR], answers(w)[3]) for w in some]


def logp(model, prompts, found):
    """Log-probability of each completion, and its number of tokens."""
    rows = rows_of([(p, list(c.token_ids)) for p, (c,) in zip(prompts, found, strict=True)])
    batch = CausalLM(WORLD).collate(rows.fetch(range(len(rows))), range(len(rows)))
    width = batch.inputs["input_ids"].shape[1]
    ends = torch.tensor([len(p) + len(c.token_ids) for p, (c,) in zip(prompts, found, strict=True)])
    own = batch.position_N % width + 1 < ends[batch.sequence_N]  # the rows' own end is not the model's
    with torch.no_grad():
        z = model(**batch.inputs).logits.view(-1, len(WORLD)).log_softmax(-1)[batch.position_N]
    each = z.gather(1, batch.target_N[:, None]).squeeze(1) * own
    return torch.zeros(len(rows)).index_add(0, batch.sequence_N, each)


def measured(model, base, sft, pairs, seed):
    values = {}
    for name, some in pairs.items():
        asked, golds = [p for p, _ in some], [a for _, a in some]
        drawn = write(model.eval(), WORLD, asked, most=MOST, temperature=1.0, samples=4, seed=seed)
        values[f"sampled, {name}"] = float(right(drawn, golds).mean())
        values[f"greedy, {name}"] = float(right(write(model, WORLD, asked, most=MOST), golds).mean())
        if name == "3 to 6":
            first = [some[:1] for some in drawn]
            policy, fine, pretrained = (logp(m, asked, first) for m in (model, sft, base))
            values["reward"] = float((fine - pretrained).mean())
            values["divergence from sft"] = float((policy - fine).mean())
            values["length"] = float(np.mean([len(c.token_ids) for (c,) in first]))
    return values


def run(seed):
    rng = np.random.default_rng(seed)
    base = network(seed, len(WORLD))
    mixture = [([1, *w, SEPARATOR], answers(w)[int(rng.integers(4))]) for w in words(rng, 12000, 3, 8)]
    train(session_of(base, WORLD, seed=seed), rows_of(mixture), batch_rows=32, epochs=20, max_steps=2500, learning_rate=1e-3,
          log_steps=500)  # fmt: skip
    shown, more = task(words(rng, 60, 3, 6)), task(words(rng, 600, 3, 8))
    pairs = {"3 to 6": task(words(rng, 128, 3, 6)), "7 to 8": task(words(rng, 128, 7, 8))}
    sft = copy.deepcopy(base)
    train(session_of(sft, WORLD, seed=seed), rows_of(shown), batch_rows=20, epochs=4, learning_rate=3e-4)
    longer = copy.deepcopy(base)
    train(session_of(longer, WORLD, seed=seed), rows_of(shown), batch_rows=20, epochs=400, max_steps=12 + UPDATES,
          learning_rate=3e-4)  # fmt: skip
    policy = copy.deepcopy(sft)
    made = Rollouts(
        reward={"self-rewarding-ppo": {"clip": 20.0}}, samples=1, advantages="gae", updates=2, kl_in_reward=0.1,
        max_new_tokens=MOST,
    )  # fmt: skip
    session = session_of(
        policy, WORLD, seed=seed, objective=PPO(), transforms=[made], models={"pretrained": copy.deepcopy(base)}
    )
    train(
        session, rows_of([*shown, *more]), batch_rows=64, epochs=20, max_steps=UPDATES, learning_rate=3e-4, log_steps=20
    )
    session.stack.call("finish_model", policy, WORLD)
    for model in (base, sft, longer):
        model.eval()
    arms = {"base": base, "sft": sft, "sft, same total steps": longer, "self-rewarding ppo": policy}
    return {arm: measured(model, base, sft, pairs, seed) for arm, model in arms.items()}


def experiment(seeds=(0, 1, 2)):
    arms = {}
    for seed in seeds:
        for arm, values in run(seed).items():
            arms.setdefault(arm, {})[str(seed)] = values
    mean = mean_of(arms)
    ours, sft, longer = (mean[a] for a in ("self-rewarding ppo", "sft", "sft, same total steps"))
    return {
        "method": "self-rewarding-ppo",
        "design": __doc__,
        "seeds": list(seeds),
        "arms": arms,
        "claims": {
            "sampled accuracy at least 10 points above sft": ours["sampled, 3 to 6"] >= sft["sampled, 3 to 6"] + 0.1,
            "and above sft of the same total steps": ours["sampled, 3 to 6"] >= longer["sampled, 3 to 6"] + 0.1,
            "greedy at least as good as sft": ours["greedy, 3 to 6"] >= sft["greedy, 3 to 6"],
            "longer words at least 3 points better than sft": ours["sampled, 7 to 8"] >= sft["sampled, 7 to 8"] + 0.03,
            "divergence from sft below 20 nats an answer": ours["divergence from sft"] < 20,
            "length within 10% of that of sft": abs(ours["length"] / sft["length"] - 1) < 0.1,
        },
        "mean": mean,
    }


def test_the_log_ratio_as_reward():
    found = experiment()
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    mean = found["mean"]
    assert abs(mean["base"]["reward"]) < 50
    assert mean["self-rewarding ppo"]["reward"] > mean["sft"]["reward"]
