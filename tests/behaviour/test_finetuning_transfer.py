"""Fine-tuning transfer between checkpoints of one pretraining: does an old fine-tuning serve a newer base?

The design: one pretraining of 1,600 steps of 32 rows on four digit tasks, learning rate 2e-3 decaying to zero; its states at
50%, 75% and 100% are three versions of a base. A new task, every digit plus three with a token of its own, is tuned for 150
steps at 1e-3. Carried over to the last version without training: the change of the 75% and of the 50% version. Beside it:
tuning the last version itself, a random change of the same norm per tensor, and the change added to an unrelated
initialisation. Then training goes on for up to 150 steps from the plain and from the transferred start (steps 10, 25, 50,
150). Last, three versions with 50 steps of tuning each, the change carried along, against 50 steps from each version. 512
test rows; exact match.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from digit_tasks import PRETRAINED, accuracy, fresh, logits, loss_of, rows, state, train, with_weights

from luthier.functional.averaging import barrier, interpolate
from luthier.methods.weights.finetuning_transfer import transferred

RESULT = Path(__file__).resolve().parents[2] / "docs" / "measured" / "finetuning-transfer.json"
TASK, STEPS, AT = "add 3", 150, (10, 25, 50, 150)


def tuned(model, start, seed, steps=STEPS, watch=None):
    other = with_weights(model, start)
    train(other, [TASK], steps, 1e-3, 100 + seed, watch=watch)
    return state(other)


def carried(fine, old, new, scale=1.0):
    return {n: transferred(fine[n], old[n], new[n], scale).float() for n in new}


def random_change(fine, old, new, seed):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for n, start in new.items():
        drawn = torch.randn(start.shape, generator=generator)
        found[n] = start + drawn * (fine[n] - old[n]).norm() / drawn.norm()
    return found


def curve(model, start, seed):
    found = {}
    watch = {step: lambda m, step=step: found.update({step: accuracy(m, TASK)}) for step in AT}
    tuned(model, start, seed, watch=watch)
    return found


def one(seed, steps=1600):
    model = fresh(seed)
    versions = list(train(model, PRETRAINED, steps, 2e-3, seed, at=(steps // 2, steps * 3 // 4, steps)).values())
    old, middle, new = versions
    fine = [tuned(model, v, seed) for v in versions]

    def of(tensors, task=TASK):
        return accuracy(with_weights(model, tensors), task)

    def kept(tensors):
        return float(np.mean([of(tensors, task) for task in PRETRAINED]))

    transfer = carried(fine[1], middle, new)
    unrelated = state(fresh(1000 + seed))
    arms = {
        "last version, untouched": new,
        "change of the 75% version": transfer,
        "change of the 50% version": carried(fine[0], old, new),
        "last version, tuned": fine[2],
        "random change of that norm": random_change(fine[1], middle, new, seed),
        "change on an unrelated start": carried(fine[1], middle, unrelated),
    }
    ids = rows([TASK], 512, np.random.default_rng(7))
    ts = [i / 10 for i in range(11)]
    path = [{n: interpolate(fine[1][n], fine[2][n], t) for n in new} for t in ts]
    losses = [float(loss_of(logits(with_weights(model, p), ids), ids)) for p in path]
    carried_along, alone, change = [], [], None
    for version in versions:
        start = version if change is None else {n: version[n] + change[n] for n in version}
        result = tuned(model, start, seed, 50)
        change = {n: result[n] - version[n] for n in version}
        carried_along.append(of(result))
        alone.append(of(tuned(model, version, seed, 50)))
    return {
        "arms": {name: {"new task": of(t), "old tasks": kept(t)} for name, t in arms.items()},
        "curves": {"plain": curve(model, new, seed), "transferred": curve(model, transfer, seed)},
        "iterative": {"carried along": carried_along, "from each version": alone},
        "barrier between the tuned versions (nats)": barrier(losses, ts),
    }


def experiment(seeds=(0, 1, 2), **options):
    runs = {str(seed): one(seed, **options) for seed in seeds}
    every = list(runs.values())

    def values(arm, key="new task"):
        return np.array([r["arms"][arm][key] for r in every])

    def at(name, step):
        return np.array([r["curves"][name][step] for r in every])

    base, plain = values("last version, untouched"), values("last version, tuned")
    moved = values("change of the 75% version")
    along = np.array([r["iterative"]["carried along"] for r in every])
    alone = np.array([r["iterative"]["from each version"] for r in every])
    mean = {
        "without training": {
            arm: {"new_task": values(arm).mean(), "old_tasks": values(arm, "old tasks").mean()}
            for arm in every[0]["arms"]
        },
        "accuracy after further steps": {
            name: {str(step): at(name, step).mean() for step in AT} for name in ("plain", "transferred")
        },
        "50 steps at each of three versions": {
            name: {f"version_{i + 1}": found[:, i].mean() for i in range(3)}
            for name, found in (("carried along", along), ("from each version", alone))
        },
    }
    return {
        "method": "finetuning-transfer",
        "design": __doc__,
        "seeds": list(seeds),
        "runs": runs,
        "mean": mean,
        "claims": {
            "without training at least 80% of the tuned last version, on seeds": int((moved >= 0.8 * plain).sum()),
            "far above the untouched last version (0.3), on seeds": int((moved > base + 0.3).sum()),
            "at least as good as the plain start after every number of steps, on seeds": int(
                np.all([at("transferred", s) >= at("plain", s) for s in AT], axis=0).sum()
            ),
            "no gain on an unrelated start (0.05), on seeds": int(
                (values("change on an unrelated start") < 0.05).sum()
            ),
            "no gain from a random change (0.05), on seeds": int(
                (values("random change of that norm") < base + 0.05).sum()
            ),
            "carried along at least as good as from each version, at every version, on seeds": int(
                (along >= alone).all(1).sum()
            ),
        },
    }


def test_versions_of_one_base():
    found = experiment()
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for run in found["runs"].values():
        assert run["arms"]["last version, tuned"]["new task"] > run["arms"]["last version, untouched"]["new task"]
        assert run["arms"]["last version, untouched"]["old tasks"] > 0.2
