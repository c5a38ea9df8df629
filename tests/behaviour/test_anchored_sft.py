"""Anchored fine-tuning under label noise: what survives of the base, and what is learnt.

Modular addition, as the specification states it: the target is (a + b) mod 31; two embeddings of width 128 are summed and pass
two layers of 256; the base sees 3,500 random examples in 3,500 steps of 64 with AdamW at 2e-3. It is then tuned on 500 new
examples of which a quarter has a random label, 600 steps of 64 at 1e-3, three seeds. Measured on 1,000 clean random examples:
accuracy, and the mean divergence KL(base | tuned). Required: the anchored loss below plain fine-tuning, dynamic fine-tuning and
plain fine-tuning with the same anchor, in divergence and in lost accuracy.

Lab: lab:nano, which answers sums and differences of one digit in part (its accuracy is recorded as `base`), is tuned on 1,000 of
them, once clean and once with a quarter of the answers exchanged for those of other rows; two epochs of batches of 16 at 1e-3,
three seeds of order. Measured: accuracy on 200 fresh rows, and the loss on the other tasks of the base minus the base's own.
Required: with clean answers the anchored loss at 0.05 improves on the base. The rest is recorded as it came out. Both designs
were fixed before anything was run.
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

RESULT = Path(__file__).resolve().parents[2] / "docs" / "measured" / "anchored-sft.json"
ARMS = {
    "sft": {"sft": {}},
    "dft": {"dynamic-ft": {}},
    "sft+kl 0.05": {"anchored-sft": {"mode": "sft+kl", "anchor_weight": 0.05}},
    "sft+kl 0.5": {"anchored-sft": {"mode": "sft+kl", "anchor_weight": 0.5}},
    "asft 0.05": {"anchored-sft": {"anchor_weight": 0.05}},
    "asft 0.5": {"anchored-sft": {"anchor_weight": 0.5}},
}
NOISE = 0.25


# -- modular addition


def addition(seed, *, base_steps, steps):
    """Every arm at one seed."""
    rng = np.random.default_rng(seed)
    seen, noisy, asked = Sums(3500, rng), Sums(500, rng, NOISE), Sums(1000, rng)
    torch.manual_seed(seed)
    base = tune(Adder(), seen, {"sft": {}}, seed=seed, steps=base_steps, rate=2e-3)
    target = torch.from_numpy(asked.label)

    def measured(model):
        own, before = predictions(model, asked), predictions(base, asked)
        return {
            "accuracy": float((own.argmax(-1) == target).double().mean()),
            "divergence": float((before.exp() * (before - own)).sum(-1).mean()),
            "mean_probability": float(own.gather(1, target[:, None]).exp().mean()),
        }

    found = {"base": measured(base)}
    for arm, objective in ARMS.items():
        found[arm] = measured(tune(base, noisy, objective, seed=seed, steps=steps, rate=1e-3))
    return found


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
            "keep": ["lab:mixture?part=strings,facts,text,sentences"],
            "keep_limit": asked,
            "verifier": "numeric",
        },
        objective=objective,
        training={"epochs": epochs, "batch_rows": 16, "learning_rate": 1e-3, "log_steps": 10},
        evaluation={"before": True, "limit": asked, "max_new_tokens": 8},
        output=str(folder),
        seed=seed,
        quiet=True,
    )
    before, after = run.metrics["before"], run.metrics["after"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "base_accuracy": before["target"]["score"]["value"],
        "accuracy": after["target"]["score"]["value"],
        "loss": after["target"]["loss"]["value"],
        "forgetting": after["keep"]["loss"]["value"] - before["keep"]["loss"]["value"],
        "kl_at_the_end": next((r["kl"] for r in reversed(lines) if "kl" in r), None),
        "wall_seconds": round(time.perf_counter() - started, 1),
    }


# -- the whole


def mean(runs, arm, key):
    return float(np.mean([found[arm][key] for found in runs.values()]))


def experiment(folder, seeds=(0, 1, 2), *, base_steps=3500, steps=600, count=1000, epochs=2.0, asked=200):
    """Both settings at every seed, with what was required of them."""
    sums = {str(seed): addition(seed, base_steps=base_steps, steps=steps) for seed in seeds}
    sizes = {"count": count, "epochs": epochs, "asked": asked}
    told = {
        label: {
            str(seed): {
                arm: language(folder / f"{label}-{seed}-{i}", seed, objective, noise, **sizes)
                for i, (arm, objective) in enumerate(ARMS.items())
            }
            for seed in seeds
        }
        for label, noise in (("clean", 0.0), ("noisy", NOISE))
    }
    claims = {}
    for weight in ("0.05", "0.5"):
        others = ("sft", "dft", f"sft+kl {weight}")
        for key, better in (("divergence", np.less), ("accuracy", np.greater)):
            own = mean(sums, f"asft {weight}", key)
            claims[f"addition: {key} of asft {weight} better than sft, dft and sft+kl {weight}"] = bool(
                all(better(own, mean(sums, other, key)) for other in others)
            )
    anchored, base = mean(told["clean"], "asft 0.05", "accuracy"), mean(told["clean"], "asft 0.05", "base_accuracy")
    claims["lab, clean: asft 0.05 improves on the base"] = bool(anchored > base)
    for key, better in (("forgetting", np.less), ("accuracy", np.greater)):
        claims[f"lab, noisy (reported): {key} of asft 0.05 better than sft"] = bool(
            better(mean(told["noisy"], "asft 0.05", key), mean(told["noisy"], "sft", key))
        )
    return {
        "method": "anchored-sft",
        "design": __doc__,
        "seeds": list(seeds),
        "base_steps": base_steps,
        "steps": steps,
        **sizes,
        "addition": sums,
        "lab": told,
        "claims": claims,
        "mean": {
            "addition": {arm: {k: mean(sums, arm, k) for k in ("accuracy", "divergence")} for arm in ("base", *ARMS)},
            **{
                label: {arm: {k: mean(runs, arm, k) for k in ("accuracy", "forgetting")} for arm in ARMS}
                | {"base": {"accuracy": mean(runs, "sft", "base_accuracy")}}
                for label, runs in told.items()
            },
        },
    }


def test_the_anchor_keeps_what_noise_would_take(tmp_path):
    found = experiment(tmp_path)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert all(run["base"]["accuracy"] > 0.9 for run in found["addition"].values())
    anchored = [r for runs in found["lab"]["noisy"].values() for arm, r in runs.items() if arm not in ("sft", "dft")]
    assert all(r["kl_at_the_end"] > 0 for r in anchored)
