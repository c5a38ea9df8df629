"""Three tasks in sequence: does training a random half of the tensors for each keep more of what was known before?

The design: a Llama of 4 layers and width 64 on 64 tokens, pretrained for 350 steps on a random Markov chain A; then three
tasks one after the other, each A with 16 other rows drawn anew, 50 steps each of 16 walks of 32 tokens, AdamW at 1e-3
(cosine, fresh for each task). Arms: full fine-tuning; half fine-tuning with a new choice for every task; half
fine-tuning with one choice for all of them, which is the paper's ablation. Measured after the sequence on fresh walks:
loss on A, on tasks 1 and 2, and on the newest task, in nats per token; seconds of the three trainings.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path

import numpy as np
from markov_chains import chain, changed, loss_on, rows_of, train, transformer

from luthier.methods.parameters.half_ft import HalfFineTuning

RESULT = Path(__file__).resolve().parents[2] / "docs" / "measured" / "half-ft.json"
PRETRAINING, STEPS, TASKS = 350, 50, 3
ARMS = {
    "plain sft": lambda seed, task: None,
    "half-ft, new for each task": lambda seed, task: HalfFineTuning(mask_seed=100 * seed + task),
    "half-ft, one for all": lambda seed, task: HalfFineTuning(mask_seed=100 * seed),
}


def experiment(seed):
    rng = np.random.default_rng(seed)
    language = chain(rng)
    tasks = [changed(language, rng, 16) for _ in range(TASKS)]
    base = transformer(seed)
    train(base, rows_of(language, rng, 2000), steps=PRETRAINING, seed=seed)
    fresh = {"A": rows_of(language, rng, 256), **{f"task {i + 1}": rows_of(t, rng, 256) for i, t in enumerate(tasks)}}
    rows = [rows_of(t, rng, 800) for t in tasks]
    found = {}
    for arm, make in ARMS.items():
        model, started = copy.deepcopy(base), time.perf_counter()
        for number, task in enumerate(rows):
            train(model, task, method=make(seed, number), steps=STEPS, seed=seed)
        seconds = time.perf_counter() - started
        found[arm] = {name: loss_on(model, r) for name, r in fresh.items()} | {"seconds": round(seconds, 2)}
    found["base"] = {name: loss_on(base, r) for name, r in fresh.items()}
    return found


def test_what_is_kept_over_three_tasks():
    seeds = (0, 1, 2)
    runs = {str(s): experiment(s) for s in seeds}
    of = lambda arm, key: np.array([runs[str(s)][arm][key] for s in seeds])  # noqa: E731
    full, half = "plain sft", "half-ft, new for each task"
    keys = ("A", "task 1", "task 2", "task 3", "seconds")
    lower = {key: bool(of(half, key).mean() < of(full, key).mean()) for key in ("A", "task 1", "task 2")}
    behind = float((of(half, "task 3") - of(full, "task 3")).mean())
    found = {
        "method": "half-ft",
        "design": __doc__,
        "seeds": list(seeds),
        "runs": runs,
        "claims": {
            **{f"lower loss on {key} than full fine-tuning on average": holds for key, holds in lower.items()},
            "within 0.1 nat of full fine-tuning on the newest task": behind < 0.1,
            "not slower": bool(of(half, "seconds").mean() <= of(full, "seconds").mean()),
        },
        "mean": {
            arm: {key: float(of(arm, key).mean()) for key in keys if key in runs["0"][arm]} for arm in (*ARMS, "base")
        },
        "spread": {arm: {key: float(of(arm, key).std(ddof=1)) for key in keys[:4]} for arm in ARMS},
    }
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    # Sanity: the base knows A, and every arm has learnt its newest task.
    for s in seeds:
        assert runs[str(s)]["base"]["A"] < np.log(64) - 0.5
        assert all(runs[str(s)][arm]["task 3"] < runs[str(s)]["base"]["task 3"] for arm in ARMS)
