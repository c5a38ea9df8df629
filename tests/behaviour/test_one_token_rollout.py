"""One-token rollout under label noise: what survives of the base, and what other skills lose.

Modular addition, as the specification states it: the target is (a + b) mod 31; two embeddings of width 128 are summed and pass
two layers of 256; the base sees 3,500 random examples in 3,500 steps of 64 with AdamW at 2e-3. It is then tuned on 500 new
examples, 600 steps of 64, three seeds, in three settings: 25% random labels at 3e-4, 50% at 3e-4, 50% at 1e-3. Arms: plain
fine-tuning, the probability objective, and the rollout with K = 64 and temperature 1.3, with wrong draws rewarded -0.1 or 0.
Measured on 1,000 clean random examples: accuracy, mean probability, and the mean divergence KL(base | tuned). Expected: at 3e-4
the rollout and `p` above plain fine-tuning; at 1e-3 the rollout above plain fine-tuning and above `p`.

Lab: lab:nano, which answers sums and differences of one digit in part (its accuracy is recorded), is tuned on 1,000 of them, once
clean and once with a quarter of the answers exchanged for those of other rows; two epochs of batches of 16 at 3e-4, three seeds of
order, the same arms with K = 32. Measured: accuracy on 200 fresh rows, the divergence from the base, and the loss on the four other
skills of the base minus the base's own. Expected: it grows less than with plain fine-tuning. Both designs were fixed before
anything was run.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from modular_addition import Adder, Sums, predictions, tune

import luthier
from luthier import lab

RESULT = Path(__file__).resolve().parents[2] / "docs" / "measured" / "one-token-rollout.json"
SETTINGS = {
    "noise 25%, rate 3e-4": (0.25, 3e-4),
    "noise 50%, rate 3e-4": (0.5, 3e-4),
    "noise 50%, rate 1e-3": (0.5, 1e-3),
}
OTHER = ("strings", "facts", "text", "sentences")
LAB_NOISE = 0.25


def arms(samples):
    """The objectives by name."""
    rollout = {"samples": samples, "temperature": 1.3}
    return {
        "sft": {"sft": {}},
        "p": {"beyond-log-likelihood": {"objective": "p"}},
        "rollout": {"one-token-rollout": {**rollout, "wrong_reward": -0.1}},
        "rollout beta 0": {"one-token-rollout": {**rollout, "wrong_reward": 0.0}},
    }


# -- modular addition


def addition(seed, *, base_steps, steps):
    """The base and every arm in every setting at one seed."""
    rng = np.random.default_rng(seed)
    seen, asked = Sums(3500, rng), Sums(1000, rng)
    tuned_on = {noise: Sums(500, rng, noise) for noise in (0.25, 0.5)}
    torch.manual_seed(seed)
    base = tune(Adder(), seen, {"sft": {}}, seed=seed, steps=base_steps, rate=2e-3)
    target, before = torch.from_numpy(asked.label), predictions(base, asked)

    def measured(model):
        own = predictions(model, asked)
        return {
            "accuracy": float((own.argmax(-1) == target).double().mean()),
            "mean_probability": float(own.gather(1, target[:, None]).exp().mean()),
            "divergence": float((before.exp() * (before - own)).sum(-1).mean()),
        }

    return {"base": measured(base)} | {
        name: {
            arm: measured(tune(base, tuned_on[noise], objective, seed=seed, steps=steps, rate=rate))
            for arm, objective in arms(64).items()
        }
        for name, (noise, rate) in SETTINGS.items()
    }


# -- the lab


def rows(split, count, noise=0.0):
    """Sums and differences of one digit; of a share of them the answers are exchanged."""
    made = lab.dataset("arithmetic", split=split, n=count, skill="add,subtract", difficulty=1)
    rng = np.random.default_rng(7)
    chosen = np.flatnonzero(rng.random(count) < noise)
    answers = [made[i]["completion"] for i in np.roll(chosen, 1)]
    for i, answer in zip(chosen, answers, strict=True):
        made[i] = {**made[i], "completion": answer, "answer": answer}
    return made


def language(folder, seed, objective, noise, *, count, epochs, asked):
    """One arm on the lab."""
    started = time.perf_counter()
    run = luthier.tune(
        model="lab:nano",
        data={
            "train": rows("train", count, noise),
            "test": rows("test", asked),
            "keep": [f"lab:mixture?part={name}" for name in OTHER],
            "keep_limit": asked,
            "verifier": "numeric",
        },
        objective=objective,
        training={"epochs": epochs, "batch_rows": 16, "learning_rate": 3e-4, "log_steps": 10},
        evaluation={"before": True, "limit": asked, "max_new_tokens": 8},
        output=str(folder),
        seed=seed,
        quiet=True,
    )
    before, after = run.metrics["before"], run.metrics["after"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    grown = {
        name: after["keep"][f"lab:mixture?part={name}: loss"]["value"]
        - before["keep"][f"lab:mixture?part={name}: loss"]["value"]
        for name in OTHER
    }
    return {
        "base_accuracy": before["target"]["score"]["value"],
        "accuracy": after["target"]["score"]["value"],
        "loss": after["target"]["loss"]["value"],
        "forgetting": float(np.mean(list(grown.values()))),
        "forgetting_by_skill": grown,
        "kl_to_base": [r["kl_to_base"] for r in lines if "kl_to_base" in r][-1],
        "no_hit": next((r["no_hit"] for r in lines if "no_hit" in r), None),
        "wall_seconds": round(time.perf_counter() - started, 1),
    }


# -- the whole


def mean(runs, arm, key):
    return float(np.mean([found[arm][key] for found in runs.values()]))


def experiment(folder, seeds=(0, 1, 2), *, base_steps=3500, steps=600, count=1000, epochs=2.0, asked=200):
    """Both designs at every seed, with what was expected of them."""
    sums = {str(seed): addition(seed, base_steps=base_steps, steps=steps) for seed in seeds}
    sizes = {"count": count, "epochs": epochs, "asked": asked}
    told = {
        label: {
            str(seed): {
                arm: language(folder / f"{label}-{seed}-{i}", seed, objective, noise, **sizes)
                for i, (arm, objective) in enumerate(arms(32).items())
            }
            for seed in seeds
        }
        for label, noise in (("clean", 0.0), ("noisy", LAB_NOISE))
    }
    by_setting = {name: {seed: found[name] for seed, found in sums.items()} for name in SETTINGS}
    claims = {}
    for name, (_, rate) in SETTINGS.items():
        of = {arm: mean(by_setting[name], arm, "accuracy") for arm in arms(64)}
        claims[f"addition, {name}: rollout more accurate than sft"] = of["rollout"] > of["sft"]
        claims[f"addition, {name}: rollout at least as accurate as with beta 0"] = of["rollout"] >= of["rollout beta 0"]
        if rate < 1e-3:
            claims[f"addition, {name}: p more accurate than sft"] = of["p"] > of["sft"]
        else:
            claims[f"addition, {name}: rollout more accurate than p"] = of["rollout"] > of["p"]
    for label, runs in told.items():
        for key, better in (("forgetting", np.less), ("accuracy", np.greater)):
            claims[f"lab, {label}: {key} of rollout better than sft"] = bool(
                better(mean(runs, "rollout", key), mean(runs, "sft", key))
            )
    means = {
        f"addition: {key}": {
            "base": {name: float(np.mean([found["base"][key] for found in sums.values()])) for name in SETTINGS},
            **{arm: {name: mean(by_setting[name], arm, key) for name in SETTINGS} for arm in arms(64)},
        }
        for key in ("accuracy", "divergence")
    }
    shown = ("accuracy", "forgetting", "kl_to_base")
    for label, runs in told.items():
        means[f"lab, {label}"] = {"base": {"accuracy": mean(runs, "sft", "base_accuracy")}} | {
            arm: {key: mean(runs, arm, key) for key in shown} for arm in arms(32)
        }
    return {
        "method": "one-token-rollout",
        "design": __doc__,
        "seeds": list(seeds),
        "base_steps": base_steps,
        "steps": steps,
        **sizes,
        "addition": sums,
        "lab": told,
        "claims": claims,
        "mean": means,
    }


def test_what_the_model_would_say_itself_decides_what_is_learnt(tmp_path):
    found = experiment(tmp_path)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    # What must hold for the comparison to be one; what came out of it is in the file.
    assert all(run["base"]["accuracy"] > 0.9 for run in found["addition"].values())
    told = [run for runs in found["lab"].values() for run in runs.values()]
    assert all(0.1 < arm["base_accuracy"] < 0.9 for run in told for arm in run.values())
    assert all(run["rollout"]["no_hit"] < 0.9 for run in told)
