"""Batch, rate and early termination: do low rates and large batches win, and do early dynamics tell who will?

The design, as the specification states it: a fresh transformer of two layers and width 64 is pretrained on task B (reverse six
digits) with a fifth of task A (add 1 to each digit) until it answers at least three quarters of A; it is then tuned on 1,500 rows of
A of which a fifth has random targets, three epochs, constant rate, no warm-up: batches of 8, 32 and 128 by rates of 1e-4, 5e-4,
2e-3 and 6e-3, three seeds. The final score is the share of A answered right plus the share of B answered right, on 400 fresh rows
each. The probe is at a tenth of the training; of a batch of 128 that is four steps, so there the first two steps instead of the
first five are left out of the window. Required: low rates and large batches win on the sum; Spearman of the loss with the final
score above 0.5; halving by the combined rule saves at least 40% of the samples with a regret of at most two points on at least two
of three seeds. Reported beside it: every indicator, over all runs and with G ranked within equal rates, whatever its sign.

Stacked against phased: the same base is tuned on 750 clean rows of A and 750 of a task C (subtract 1 from each digit), batch 32 at
1e-3, two epochs: as one union, and A before C without and with a tenth of A repeated. Reported: accuracies of A, B and C.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import MemoryRows, make_session, settings
from luthier.advisor.early import observe, saved_samples, survivors, unhealthy, window
from luthier.engine.loop import Trainer
from luthier.methods.procedures.small_llm_recipe import with_replay

RESULT = Path(__file__).resolve().parents[2] / "docs" / "measured" / "small-llm-recipe.json"
BATCHES, RATES = (8, 32, 128), (1e-4, 5e-4, 2e-3, 6e-3)
ROWS, NOISE, EPOCHS, FRESH = 1500, 0.2, 3, 400
DIGIT, ADD, REVERSE, SUBTRACT, IS = 3, 13, 14, 15, 16
CONSTANT = {"schedule": "constant", "warmup": 0.0, "beta2": 0.95, "log_steps": 1}


def answer(task, digits):
    if task == REVERSE:
        return digits[::-1]
    return (digits + (1 if task == ADD else -1)) % 10


def rows(task, count, rng, noise=0.0):
    """A task token, six digits, a separator, six digits; what follows the separator is supervised."""
    made = []
    for _ in range(count):
        digits = rng.integers(0, 10, 6)
        right = rng.integers(0, 10, 6) if rng.random() < noise else answer(task, digits)
        made.append(([1, task, *(DIGIT + digits), IS, *(DIGIT + right), 2], [9, 16]))
    return made


def fresh_model(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, max_position_embeddings=32, tie_word_embeddings=False, **sizes))


def right(model, data):
    """The share of rows whose every supervised token is the most likely one, which is the share of right greedy answers."""
    session = make_session(model)
    session.model.eval()
    batch = session.task.collate(data.fetch(range(len(data))), np.arange(len(data)))
    out = session.evaluate_batch(batch, ("logp", "top1"))
    wrong = torch.bincount(batch.sequence_N, weights=(out.top1_N != batch.target_N).double(), minlength=len(data))
    return float((wrong == 0).double().mean())


def pretrained(seed, tests):
    """A base that answers at least three quarters of A."""
    rng, model = np.random.default_rng([seed, 9]), fresh_model(seed)
    for _ in range(12):
        mixed = MemoryRows([*rows(REVERSE, 12_800, rng), *rows(ADD, 3_200, rng)])
        trainer = Trainer(
            make_session(model, seed=seed), mixed, settings(batch_rows=64, epochs=1, learning_rate=2e-3, **CONSTANT)
        )
        trainer.run()
        if right(model, tests["A"]) >= 0.75 and right(model, tests["B"]) >= 0.75:
            break
    return model


def tuned(base, data, seed, batch, rate, epochs=EPOCHS):
    """(the model, its records, its steps)."""
    records = []
    trainer = Trainer(
        make_session(copy.deepcopy(base), seed=seed),
        MemoryRows(data),
        settings(batch_rows=batch, learning_rate=rate, epochs=epochs, **CONSTANT),
        observe=lambda event, values: records.append(values) if event == "step" else None,
    )
    trainer.run()
    return trainer.session.model, records, trainer.total


def study(base, seed, tests):
    data = rows(ADD, ROWS, np.random.default_rng([seed, 1]), NOISE)
    runs, final, planned, seen = {}, {}, {}, {}
    for batch in BATCHES:
        for rate in RATES:
            name = f"batch {batch}, rate {rate:g}"
            model, records, total = tuned(base, data, seed, batch, rate)
            probe = math.ceil(0.1 * total)
            runs[name] = window(records, since=0, until=probe, rate=rate)
            final[name] = right(model, tests["A"]) + right(model, tests["B"])
            planned[name], seen[name] = ROWS * EPOCHS, min(probe * batch, ROWS * EPOCHS)
    stopped = {}
    for within in ("all", "rate"):
        kept, _ = survivors(runs, within=within, last_probe=True)
        stopped[within] = {
            "saved": saved_samples(planned, {n: planned[n] if n in kept else seen[n] for n in runs}),
            "regret": max(final.values()) - max(final[n] for n in kept),
        }
    return {
        "runs": {
            n: {"G": r.gradnorm, "Lt": r.loss, "final": final[n], "unhealthy": unhealthy(r, least_drop=0.02)}
            for n, r in runs.items()
        },
        "indicators": {w: observe(runs, final, within=w, seed=seed) for w in ("all", "rate")},
        "halving": stopped,
        "mean by rate": {
            f"{r:g}": float(np.mean([v for n, v in final.items() if n.endswith(f"rate {r:g}")])) for r in RATES
        },
        "mean by batch": {
            str(b): float(np.mean([v for n, v in final.items() if n.startswith(f"batch {b},")])) for b in BATCHES
        },
    }


def orders(base, seed, tests):
    """Accuracies after one union, and after A before C."""
    rng = np.random.default_rng([seed, 2])
    data = [*rows(ADD, ROWS // 2, rng), *rows(SUBTRACT, ROWS // 2, rng)]
    parts = [np.arange(ROWS // 2), np.arange(ROWS // 2, ROWS)]
    found = {}
    for arm, replay in (("stacked", None), ("phased", 0.0), ("phased, replay 0.1", 0.1)):
        model = base
        for index in [np.arange(ROWS)] if replay is None else with_replay(parts, replay, seed):
            model, _, _ = tuned(model, [data[i] for i in index], seed, 32, 1e-3, epochs=2)
        found[arm] = {name: right(model, test) for name, test in tests.items()}
    return found


def experiment(seeds=(0, 1, 2)):
    studied, ordered, bases = {}, {}, {}
    for seed in seeds:
        rng = np.random.default_rng([seed, 3])
        tests = {n: MemoryRows(rows(t, FRESH, rng)) for n, t in (("A", ADD), ("B", REVERSE), ("C", SUBTRACT))}
        base = pretrained(seed, tests)
        bases[str(seed)] = {name: right(base, test) for name, test in tests.items()}
        studied[str(seed)] = study(base, seed, tests)
        ordered[str(seed)] = orders(base, seed, tests)
    every = list(studied.values())

    def mean(values):
        return float(np.mean(list(values)))

    rate = {f"{r:g}": mean(s["mean by rate"][f"{r:g}"] for s in every) for r in RATES}
    batch = {str(b): mean(s["mean by batch"][str(b)] for s in every) for b in BATCHES}
    loss = [s["indicators"]["all"]["loss"]["spearman"] for s in every]
    good = [s["halving"]["all"]["saved"] >= 0.4 and s["halving"]["all"]["regret"] <= 0.02 for s in every]
    return {
        "method": "small-llm-recipe",
        "design": __doc__,
        "seeds": list(seeds),
        "bases": bases,
        "study": studied,
        "orders": ordered,
        "claims": {
            "the two lower rates end higher than the two higher ones": rate["0.0001"] + rate["0.0005"]
            > rate["0.002"] + rate["0.006"],
            "the largest batch ends higher than the smallest": batch["128"] > batch["8"],
            "Spearman of the loss with the final score above 0.5 (mean over seeds)": float(np.mean(loss)) > 0.5,
            "halving saves 40% with a regret of at most 2 points on two of three seeds": sum(good) >= 2,
        },
        "mean": {
            "study": {
                **{f"rate {r}": {"final score": value} for r, value in rate.items()},
                **{f"batch {b}": {"final score": value} for b, value in batch.items()},
            },
            "indicator at a tenth": {
                name: {
                    "Spearman, all runs": mean(s["indicators"]["all"][name]["spearman"] for s in every),
                    "regret, all runs": mean(s["indicators"]["all"][name]["regret"] for s in every),
                    "Spearman, G within rates": mean(s["indicators"]["rate"][name]["spearman"] for s in every),
                    "regret, G within rates": mean(s["indicators"]["rate"][name]["regret"] for s in every),
                }
                for name in ("combined", "loss", "gradnorm")
            },
            "halving": {
                title: {key: mean(s["halving"][within][key] for s in every) for key in ("saved", "regret")}
                for title, within in (("all runs", "all"), ("G within rates", "rate"))
            },
            "order": {
                arm: {name: mean(o[arm][name] for o in ordered.values()) for name in "ABC"}
                for arm in ("stacked", "phased", "phased, replay 0.1")
            },
        },
    }


def test_batches_rates_early_dynamics_and_order():
    found = experiment()
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for one in found["study"].values():
        assert len(one["runs"]) == 12
        assert set(one["indicators"]["all"]) == {"combined", "loss", "gradnorm", "-G", "Lt"}
        assert 0.0 < one["halving"]["all"]["saved"] < 0.9
