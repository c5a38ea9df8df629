"""Planted truths that a comparison must find, or must not: is a difference called one at the nominal rate?

The design: lab:nano is tuned with plain SFT on 600 rows of lab:strings (first and last letters), one epoch of batches of 16 at
1e-3, with sixteen seeds. A hundred times three of the runs are drawn as "the method" and three others as "plain SFT", and compared
at 95%: both are plain SFT, so at most about five in a hundred may be called different (the hundred draws share sixteen runs, so they
are not independent; the required bound is 10). Beside them a method handicapped on purpose, SFT at a hundredth of the learning
rate, must be called worse on the loss of the target. The design was stated before anything was run.
"""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np

from luthier.comparison import measures
from luthier.comparison.collect import verdict
from luthier.comparison.measures import Measured
from luthier.comparison.run import Comparison

RESULT = Path(__file__).resolve().parents[2] / "docs" / "measured" / "compare.json"
DATA = "lab:strings?skill=first,last&difficulty=2"
RECIPE = {
    "model": "lab:nano",
    "data": {"train": DATA, "test": DATA, "limit": 600},
    "training": {"learning_rate": 1e-3, "batch_rows": 16, "epochs": 1, "log_steps": 10, "threads": 1},
    "evaluation": {"max_new_tokens": 8, "limit": 128},
}
SLOW = "sft[training.learning_rate=1e-5]"
NAMES = ("target/score", "target/loss", "keep/lab:mixture/loss", "calibration/ece", "drift/kl")


def false_alarms(runs, metrics, draws, seed=0):
    """By metric, how often three runs of plain SFT are called different from three others."""
    rng = np.random.default_rng(seed)
    found = dict.fromkeys(metrics, 0)
    for _ in range(draws):
        drawn = rng.permutation(len(runs))[:6]
        method, plain = [runs[i] for i in drawn[:3]], [runs[i] for i in drawn[3:]]
        for name, metric in metrics.items():
            result = measures.compare(metric, method, plain, confidence=0.95)
            found[name] += verdict(result, result.p_value, metric.direction, 0.95) != "same"
    return found


def experiment(folder, *, seeds=16, draws=100):
    plain = Comparison(RECIPE, methods=(), seeds=seeds, output=folder)
    made = plain.run()
    trials = [folder / t["folder"] for t in made["entries"][1]["trials"]]
    runs = [Measured(t, "causal-lm") for t in trials]
    base = Measured(folder / made["entries"][0]["trials"][0]["folder"], "causal-lm")
    metrics = {m.name: m for m in measures.metrics_of(base, ["lab:mixture"]) if m.name in NAMES}
    alarms = false_alarms(runs, metrics, draws)
    handicapped = Comparison(RECIPE, methods=SLOW, seeds=3, output=folder).run()
    slow = handicapped["entries"][2]["vs_sft"]
    same = [measures.compare(m, runs[:3], runs[:3], confidence=0.95).value for m in metrics.values()]
    spread = {name: [measures.value(m, run) for run in runs] for name, m in metrics.items()}
    return {
        "method": "compare",
        "design": __doc__,
        "seeds": seeds,
        "draws": draws,
        "false alarms in a hundred": alarms,
        "spread over seeds": {
            n: {"mean": float(np.mean(v)), "std": float(np.std(v, ddof=1))} for n, v in spread.items()
        },
        "handicapped": {name: slow[name] for name in ("target/loss", "target/score")},
        "claims": {
            "plain SFT with other seeds is called different at most 10 times in 100, by every metric": all(
                count <= draws / 10 for count in alarms.values()
            ),
            "plain SFT with the same seeds never is": all(v == 0 for v in same),
            "SFT at a hundredth of the rate is called worse on the loss": slow["target/loss"]["verdict"] == "worse",
        },
    }


def test_planted_truths(tmp_path):
    found = experiment(tmp_path / "comparison")
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert len(list(combinations(range(found["seeds"]), 6))) > found["draws"]
    assert found["claims"]["plain SFT with the same seeds never is"]
    assert found["claims"]["SFT at a hundredth of the rate is called worse on the loss"]
