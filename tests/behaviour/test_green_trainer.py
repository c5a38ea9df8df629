"""At half of the operations: does choosing by importance beat the last tensors and random ones of the same cost?

The design: a Llama of 4 layers and width 64 on 64 tokens, pretrained for 350 steps on a random Markov chain A, then
fine-tuned for 150 steps of 16 walks of 32 tokens on B, which is A with half of its rows drawn anew; AdamW at 1e-3,
cosine, choices every 2 of about 5 epochs. Arms: full fine-tuning; green-trainer at flops 0.5; the last tensors that the
same budget pays for; a random set that it pays for, drawn anew at every choice (random importances under the same exact
selection); green-trainer at 0.4, 0.6 and 0.8 beside them. The loss is that on fresh walks of B. Shares of the operations
are those that the cost model predicts; the energy of a step is taken to be in proportion to them.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
from markov_chains import chain, changed, loss_on, rows_of, train, transformer

from luthier.functional.backward_costs import best_set
from luthier.methods.parameters import green_trainer
from luthier.methods.parameters.green_trainer import GreenTrainer

RESULT = Path(__file__).resolve().parents[2] / "docs" / "measured" / "green-trainer.json"
PRETRAINING, STEPS = 350, 150


def last_ones(importance, costs, share, **options):
    """As many of the last tensors as the budget pays for."""
    n = len(importance)
    sets = (np.arange(n) >= first for first in range(n))
    return next(s for s in sets if costs.of(s) <= share * costs.backward)


def random_ones(seed):
    rng = np.random.default_rng(seed)

    def pick(importance, costs, share, **options):
        return best_set(rng.uniform(0.1, 1.0, len(importance)), costs, share, **options)

    return pick


def experiment(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    language = chain(rng)
    task = changed(language, rng, 32)
    base = transformer(seed)
    train(base, rows_of(language, rng, 2000), steps=PRETRAINING, seed=seed)
    rows, fresh = rows_of(task, rng, 480), rows_of(task, rng, 256)
    arms = {
        "plain sft": (1.0, best_set),
        "green-trainer 0.5": (0.5, best_set),
        "last tensors 0.5": (0.5, last_ones),
        "random tensors 0.5": (0.5, random_ones(seed)),
        **{f"green-trainer {share}": (share, best_set) for share in (0.4, 0.6, 0.8)},
    }
    found = {"base": {"loss": loss_on(base, fresh), "flops_share": 0.0}}
    for arm, (share, pick) in arms.items():
        monkeypatch.setattr(green_trainer, "best_set", pick)
        method = GreenTrainer(flops=share, reselect_epochs=2)
        model = train(copy.deepcopy(base), rows, method=method, steps=STEPS, seed=seed).model
        shares = [c["flops_share"] for c in method.record()["choices"]] or [1.0]
        found[arm] = {"loss": loss_on(model, fresh), "flops_share": float(np.mean(shares))}
    return found


def test_what_half_of_the_operations_reach(monkeypatch):
    seeds = (0, 1, 2)
    runs = {str(s): experiment(s, monkeypatch) for s in seeds}
    of = lambda arm, key: np.array([runs[str(s)][arm][key] for s in seeds])  # noqa: E731
    half, full = of("green-trainer 0.5", "loss"), of("plain sft", "loss")
    found = {
        "method": "green-trainer",
        "design": __doc__,
        "seeds": list(seeds),
        "runs": runs,
        "claims": {
            "loss at 0.5 within 5% of full fine-tuning on average": bool(half.mean() <= 1.05 * full.mean()),
            "lower than the last tensors on average": bool(half.mean() < of("last tensors 0.5", "loss").mean()),
            "lower than random tensors on average": bool(half.mean() < of("random tensors 0.5", "loss").mean()),
        },
        "mean": {arm: {key: float(of(arm, key).mean()) for key in ("loss", "flops_share")} for arm in runs["0"]},
    }
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for s in seeds:
        assert all(runs[str(s)][arm]["loss"] < runs[str(s)]["base"]["loss"] for arm in runs["0"] if arm != "base")
