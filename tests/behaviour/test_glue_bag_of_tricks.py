"""The tricks for classifiers, one by one and together, where labels are few and noisy.

Base: lab:encoder-nano, an encoder of three layers of width 64 pretrained to fill in words, the sentences of this experiment
among others; it has seen no label. Its share of words filled in rightly is recorded, and as `clean` the accuracy that plain
fine-tuning reaches with the same rows without label noise: this must be well above chance.

Data: hotel reviews, positive or negative, plain or with a negation. 200 labelled rows of which 15% have the wrong label; 2,000
test inputs and 200 clean rows for `data.select`, drawn together, without opinions that occur in the labelled rows.

Arms: F0 plain fine-tuning, +F1 transductive, +F2 self-calibrated, +F3 adversarial (sift), all three, and as cheap controls of
F3 random noise of the same length (r3f) and a second dropout mask. Every training, inner ones too, has 400 steps of 16 rows at
1e-3, so that all last models have had as many steps; F0 sees its rows 32 times. F1 and F2 have their defaults; perturbations
have norm 0.8, a tenth of a normalised embedding's. Three seeds of labelled rows, test rows and order.

Measured on the 2,000 test inputs: accuracy; its drop under Gaussian noise of half the standard deviation of each word embedding
and under two swaps of neighbouring words a sentence; the expected calibration error before and after a temperature fitted on
`data.select`. Claimed: F1 and F2 raise accuracy, F3 lowers the drops, the temperature lowers the error of every arm. All
claims are recorded as they came out.

The design was fixed before it was run, but for its length: a trial with a fourth seed, 250 steps at 5e-4, was too short to tell
anything (F0 had no prediction above 0.9, F3 was at chance, while `clean` had 0.997), so steps and rate were raised, once. At the
new length that seed was run to know the cost; nothing was changed after it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch

import luthier
from luthier import lab
from luthier.functional.calibration import expected_calibration_error
from luthier.functional.temperature import fit_temperature, log_softmax

RESULT = Path(__file__).resolve().parents[2] / "docs" / "measured" / "glue-bag-of-tricks.json"
SLUG = "glue-bag-of-tricks"
BASE = "encoder-nano"
LENGTH = 0.8

PLAIN = {"adversarial_weight": 0.0}
SIFT = {"variant": "sift", "radius": LENGTH, "step_size": LENGTH}
# Noise of standard deviation 0.1 in 64 dimensions has norm 0.8.
R3F = {"variant": "r3f", "noise": 0.1, "radius": 2 * LENGTH}
CALIBRATED, TRANSDUCTIVE = {"self_calibrated": True}, {"transductive": True}
ARMS = {
    "clean": (PLAIN, {}),
    "F0": (PLAIN, {}),
    "F0+F1": (PLAIN, TRANSDUCTIVE),
    "F0+F2": (PLAIN, CALIBRATED),
    "F0+F3": (SIFT, {}),
    "all": (SIFT, {**CALIBRATED, **TRANSDUCTIVE}),
    "r3f": (R3F, {}),
    "dropout": ({"variant": "dropout"}, {}),
}
NOISE, SPREAD, SWAPS = 0.15, 0.5, 2
KEYS = ("accuracy", "drop_under_noise", "drop_under_swaps", "ece", "ece_scaled")


@torch.no_grad()
def logits(run, texts, *, spread=0.0, seed=0):
    """Logits [N, C] of a finished run, with noise on its word embeddings."""
    generator = torch.Generator().manual_seed(seed)

    def disturb(module, given, out):
        return out + spread * out.std(-1, keepdim=True, correction=0) * torch.randn(out.shape, generator=generator)

    model = run.model.eval()
    hook = model.get_input_embeddings().register_forward_hook(disturb) if spread else None
    found = []
    for start in range(0, len(texts), 250):
        batch = run.processor(texts[start : start + 250], padding=True, return_tensors="pt")
        found.append(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits)
    if hook is not None:
        hook.remove()
    return torch.cat(found).double().numpy()


def swapped(text, rng):
    """The text with some of its neighbouring words exchanged."""
    words = text.split(" ")
    for _ in range(SWAPS):
        at = int(rng.integers(0, len(words) - 1))
        words[at : at + 2] = words[at + 1], words[at]
    return " ".join(words)


def measure(run, test, select, seed):
    """What is asked of every arm."""
    names = [run.model.config.id2label[i] for i in range(run.model.config.num_labels)]
    truth = np.array([names.index(row["label"]) for row in test])
    texts, rng = [row["text"] for row in test], np.random.default_rng(seed)
    z = logits(run, texts)

    def accuracy(found):
        return float((found.argmax(-1) == truth).mean())

    def ece(temperature):
        log_p = log_softmax(z, temperature)
        return expected_calibration_error(np.exp(log_p.max(-1)), log_p.argmax(-1) == truth)

    temperature = fit_temperature(
        logits(run, [row["text"] for row in select]), [names.index(row["label"]) for row in select]
    )
    own = accuracy(z)
    return {
        "accuracy": own,
        "drop_under_noise": own - accuracy(logits(run, texts, spread=SPREAD, seed=seed)),
        "drop_under_swaps": own - accuracy(logits(run, [swapped(text, rng) for text in texts])),
        "temperature": temperature,
        "ece": ece(1.0),
        "ece_scaled": ece(temperature),
    }


def trial(folder, seed, arm, *, labelled, asked, steps):
    """One arm at one seed."""
    started = time.perf_counter()
    objective, options = ARMS[arm]
    noise = 0.0 if arm == "clean" else NOISE
    train = lab.dataset("sentences", n=labelled, seed=seed, difficulty="1,2", noise=noise)
    held_out = lab.dataset("sentences", split="test", n=asked + labelled, seed=seed, difficulty="1,2")
    test, select = held_out[:asked], held_out[asked:]
    run = luthier.tune(
        model={"id": f"lab:{BASE}", "task": "sequence-classification"},
        data={"train": train, "test": test, "select": select, "test_limit": asked},
        objective={SLUG: objective},
        procedure={SLUG: options},
        training={
            "epochs": 1000.0,
            "max_steps": steps,
            "batch_rows": 16,
            "learning_rate": 1e-3,
            "warmup": 0.1,
            "log_steps": steps,
            "threads": 1,
        },
        evaluation={"before": False, "limit": asked},
        output=str(folder),
        seed=seed,
        quiet=True,
    )
    found = measure(run, test, select, seed)
    assert abs(found["accuracy"] - run.metrics["after"]["target"]["accuracy"]["value"]) < 1e-3
    told = run.metrics["training"].get(SLUG, {})
    seconds = round(time.perf_counter() - started, 1)
    return {**found, "steps": run.metrics["training"]["steps"], "procedure": told, "wall_seconds": seconds}


def experiment(folder, seeds=(0, 1, 2), *, labelled=200, asked=2000, steps=400):
    """Every arm at every seed, with what was claimed of them."""
    runs = {
        str(seed): {
            arm: trial(folder / f"{seed}-{i}", seed, arm, labelled=labelled, asked=asked, steps=steps)
            for i, arm in enumerate(ARMS)
        }
        for seed in seeds
    }
    mean, spread = (
        {arm: {key: float(f([r[arm][key] for r in runs.values()])) for key in KEYS} for arm in ARMS}
        for f in (np.mean, np.std)
    )
    plain = mean["F0"]
    claims = {f"{arm} raises accuracy": mean[arm]["accuracy"] > plain["accuracy"] for arm in ("F0+F1", "F0+F2", "all")}
    for key in ("drop_under_noise", "drop_under_swaps"):
        for arm in ("F0+F3", "all", "r3f", "dropout"):
            claims[f"{arm} lowers the {key.replace('_', ' ')}"] = mean[arm][key] < plain[key]
    claims["the temperature lowers the calibration error of every arm"] = all(
        mean[arm]["ece_scaled"] < mean[arm]["ece"] for arm in ARMS
    )
    return {
        "method": SLUG,
        "design": __doc__,
        "seeds": list(seeds),
        "labelled": labelled,
        "asked": asked,
        "steps": steps,
        "base": {"name": f"lab:{BASE}", "competence": lab.competence(BASE)},
        "runs": runs,
        "mean": mean,
        "standard_deviation": spread,
        "claims": claims,
    }


def test_the_tricks_one_by_one_and_together(tmp_path):
    found = experiment(tmp_path)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert found["mean"]["clean"]["accuracy"] > 0.75
    assert all(r["steps"] == found["steps"] for arms in found["runs"].values() for r in arms.values())
