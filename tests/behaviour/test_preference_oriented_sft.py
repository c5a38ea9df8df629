"""Preference-oriented SFT on an instruction set of which 40% of the answers are random: what is learnt of the clean part?

The design: reverse, uppercase and first letter of strings of two to four letters a to j
(lab:strings, difficulty 1). 2,000 training rows, of which 40% have the answer of another row of the same instruction, never the
right one. The base is lab:nano, whose accuracy is recorded as `base`. The aligned model is the same base after plain
fine-tuning on 500 other, clean rows (six epochs); its accuracy is recorded as `scorer`. Arms, all from the base at equal steps:
plain SFT, PoFT at beta 1, 5 and 10, and at beta 1 the two ablations: one score 0 for all rows (reference free) and the static
weight sigmoid(beta S). Six epochs in batches of 16 at 1e-3 (cosine), three seeds of data and order. After each epoch: exact
match of the greedy answers on 200 clean test rows; and the mean weight c of the noisy and of the clean rows in that epoch.

The instructions are the second choice: with reverse, sort and double, of which the base knows nothing, 500 rows made an aligned
model that answered 6%, and a tiny trial of every arm answered nothing. Of these three, and of a mix of five (46%), only the
aligned model was tried before choosing; it answers about half.

Claims, recorded as they came out: PoFT's accuracy above that of plain SFT in the last two epochs, on each beta and seed; the
mean c of noisy rows below that of clean rows in every epoch; and PoFT above both ablations on average. Nothing was tuned.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch

import luthier
from luthier import lab
from luthier.core import registry
from luthier.data.render import Renderer
from luthier.engine import checkpoint
from luthier.engine.stack import Setup
from luthier.models.load import load

RESULT = Path(__file__).resolve().parents[2] / "docs" / "measured" / "preference-oriented-sft.json"
SLUG = "preference-oriented-sft"
ARMS = {
    "sft": "sft",
    "poft 1": {SLUG: {"beta": 1.0}},
    "poft 5": {SLUG: {"beta": 5.0}},
    "poft 10": {SLUG: {"beta": 10.0}},
    "reference free": {SLUG: {"beta": 1.0, "variant": "reference_free"}},
    "quality weight": {SLUG: {"beta": 1.0, "variant": "quality_weight"}},
}
BATCH = 16
SKILLS = {"skill": "reverse,uppercase,first", "difficulty": 1}


def rows(count, seed, noise=0.0, split="train"):
    """Rows of the task; a share of them has the answer of another row of the same instruction."""
    made = lab.dataset("strings", split=split, n=count, seed=seed, **SKILLS)
    rng = np.random.default_rng([seed, 17])
    answers = {
        skill: [row["completion"] for row in made if row["skill"] == skill] for skill in {r["skill"] for r in made}
    }
    found = []
    for row, wrong in zip(made, rng.random(count) < noise, strict=True):
        answer = row["completion"]
        while wrong and answer == row["completion"]:
            answer = str(rng.choice(answers[row["skill"]]))
        found.append({"prompt": row["prompt"], "completion": answer, "quality": bool(not wrong)})
    return found


def trained(folder, data, objective, seed, *, epochs, stages=()):
    """A run that keeps the model of every epoch."""
    per_epoch = -(-len(data) // BATCH)
    return luthier.tune(
        model="lab:nano",
        data={"train": data, "keep": "none", "stages": list(stages)},
        objective=objective,
        training={
            "epochs": epochs,
            "batch_rows": BATCH,
            "learning_rate": 1e-3,
            "log_steps": per_epoch,
            "save_steps": per_epoch,
            "keep_checkpoints": epochs,
            "threads": 1,
        },
        evaluation={"before": False, "generate": False, "calibration": False},
        output=str(folder),
        seed=seed,
        quiet=True,
    )


def accuracy(model, processor, asked):
    """Exact match of the greedy answers."""
    renderer = Renderer(processor, task="causal-lm")
    prompts = [renderer.prompt_ids({"kind": "pair", "separator": None, **row}) for row in asked]
    decoder = registry.get("decoding", "greedy").build({"max_new_tokens": 12, "batch_rows": 100})
    found = decoder.generate(model, prompts, Setup(seed=0, task="causal-lm", processor=processor))
    return float(np.mean([c.text.strip() == row["completion"] for c, row in zip(found, asked, strict=True)]))


def by_epoch(run, asked):
    """Accuracy after each epoch, from the checkpoints."""
    found = []
    own = dict(run.model.named_parameters())
    folders = sorted((run.folder / "checkpoints").glob("step-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    for folder in folders:
        with torch.no_grad():
            for name, value in checkpoint.load(folder)[0].items():
                own[name].copy_(value)
        found.append(accuracy(run.model, run.processor, asked))
    return found


def one_seed(folder, seed, *, train, clean, tests, epochs):
    """Base, aligned model and every arm at one seed."""
    asked = rows(tests, seed, split="test")
    scorer = trained(folder / f"scorer-{seed}", rows(clean, seed + 1000), "sft", seed, epochs=epochs)
    noisy = rows(train, seed, 0.4)
    kept = folder / f"scores-{seed}.jsonl"
    stage = {SLUG: {"scorers": [str(scorer.folder / "model")], "score_file": str(kept)}}
    base = load("lab:nano")
    found = {
        "base": accuracy(base.model, base.processor, asked),
        "scorer": accuracy(scorer.model, scorer.processor, asked),
        "arms": {},
    }
    for arm, objective in ARMS.items():
        started = time.perf_counter()
        place = folder / f"{arm.replace(' ', '-')}-{seed}"
        run = trained(place, noisy, objective, seed, epochs=epochs, stages=[stage])
        lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        found["arms"][arm] = {
            "accuracy": by_epoch(run, asked),
            "weight_noisy": [line.get("quality_weight_poor") for line in lines],
            "weight_clean": [line.get("quality_weight_good") for line in lines],
            "nll": [line["nll"] for line in lines],
            "kl_to_base": [line["kl_to_base"] for line in lines],
            "steps": run.metrics["training"]["steps"],
            "wall_seconds": round(time.perf_counter() - started, 1),
        }
    # Rows are told by their text, so those that occur twice with the same answer are one line.
    scores = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    values = [held["logp"] / held["tokens"] for line in scores for held in line["scores"].values()]
    found["scores"] = {"lines": len(values), "mean": float(np.mean(values))}
    return found


def experiment(folder, seeds=(0, 1, 2), *, train=2000, clean=500, tests=200, epochs=6):
    """Every arm at every seed, with what is claimed of them."""
    sizes = {"train": train, "clean": clean, "tests": tests, "epochs": epochs}
    runs = {str(seed): one_seed(folder, seed, **sizes) for seed in seeds}

    def late(arm):
        return np.array([np.mean(run["arms"][arm]["accuracy"][-2:]) for run in runs.values()])

    pofts = [arm for arm in ARMS if arm.startswith("poft")]
    claims = {}
    for arm in pofts:
        lower = [
            noisy < clean_
            for run in runs.values()
            for noisy, clean_ in zip(run["arms"][arm]["weight_noisy"], run["arms"][arm]["weight_clean"], strict=True)
        ]
        claims |= {
            f"{arm}: accuracy of the last two epochs above plain sft on every seed": bool(
                (late(arm) > late("sft")).all()
            ),
            f"{arm}: mean c of noisy rows below that of clean rows in every epoch": all(lower),
        }
        for other in ("reference free", "quality weight"):
            claims[f"{arm}: on average above {other}"] = bool(late(arm).mean() > late(other).mean())
    return {
        "method": SLUG,
        "design": __doc__,
        "seeds": list(seeds),
        "sizes": sizes,
        "runs": runs,
        "claims": claims,
        "mean": summary(list(runs.values())),
    }


def summary(runs):
    """Means over the seeds: what came out in the end, and accuracy and weights by epoch."""

    def mean(arm, key):
        return np.mean([run["arms"][arm][key] for run in runs], axis=0).tolist()

    def epochs(values):
        return {f"epoch {i}": value for i, value in enumerate(values, start=1)}

    end = {name: {"accuracy": float(np.mean([run[name] for run in runs]))} for name in ("base", "scorer")}
    end |= {
        arm: {
            "accuracy": float(np.mean(mean(arm, "accuracy")[-2:])),
            "nll": mean(arm, "nll")[-1],
            "kl_to_base": mean(arm, "kl_to_base")[-1],
            "wall_seconds": mean(arm, "wall_seconds"),
        }
        for arm in ARMS
    }
    weighted = [arm for arm in ARMS if arm != "sft"]
    return {
        "at the end (accuracy of the last two epochs)": end,
        "accuracy": {arm: epochs(mean(arm, "accuracy")) for arm in ARMS},
        "mean c of noisy rows": {arm: epochs(mean(arm, "weight_noisy")) for arm in weighted},
        "mean c of clean rows": {arm: epochs(mean(arm, "weight_clean")) for arm in weighted},
    }


def test_noise_fades_out(tmp_path):
    found = experiment(tmp_path)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    # What must hold for the comparison to mean anything; what came out of it is in the file.
    for run in found["runs"].values():
        assert run["scorer"] > run["base"]
        static = run["arms"]["quality weight"]  # sigmoid(S): how far the scores alone tell noisy rows from clean ones
        assert static["weight_noisy"][0] < static["weight_clean"][0]
        assert len({arm["steps"] for arm in run["arms"].values()}) == 1
        assert all(len(arm["accuracy"]) == 6 for arm in run["arms"].values())
