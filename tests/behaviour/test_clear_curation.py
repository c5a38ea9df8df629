"""CLEAR on planted noise: does the base's own consistency find wrong answers, and does dropping or correcting them help?

The design: a transformer of two layers and width 48 is pretrained on 4,000 rows, of which 7 in 8 reverse six digits and 1 in 8
adds 1 to each of six digits (modulo 10); 30 passes of batches of 64 at 3e-3. It is tuned on 600 rows of the second task of which
35% have a random answer: 10 passes of batches of 32 at 1e-3. CLEAR with beta 1, similarity = share of equal positions, k = 5, the
consistency judge and eta 0.8. Arms: all rows, as many random ones as the filter keeps, the filter, filter and correct. Measured on
300 fresh clean rows: exact answers. Recorded besides: area under the ROC curve of the confidence for planted errors, and the
share of replaced answers that are right. Nothing was tuned; what is required of the method is recorded as it came out.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

import luthier

RESULT = Path(__file__).resolve().parents[2] / "docs" / "measured" / "clear-curation.json"
QUIET = {"before": False, "generate": False, "calibration": False}
CLEAR = {"samples": 5, "beta": 1.0, "similarity": "positions", "max_new_tokens": 10}


def digits(rng):
    return "".join(map(str, rng.integers(0, 10, size=6)))


def added(text):
    return "".join(str((int(c) + 1) % 10) for c in text)


def plus(text, answer=None):
    return {"prompt": f"+{text}=", "completion": answer or added(text), "answer": added(text)}


def backwards(text):
    return {"prompt": f"<{text}=", "completion": text[::-1], "answer": text[::-1]}


def fresh(folder, seed):
    """A transformer with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from luthier.lab.tokenizer import tokenizer

    words = tokenizer(32)
    torch.manual_seed(seed)
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=48,
        intermediate_size=144,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        initializer_range=0.05,
        **ends,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def tuned(folder, model, rows, *, epochs, rate, batch, seed, test=None, stages=(), procedure="sft"):
    return luthier.tune(
        model=str(model),
        data={"train": rows, "keep": "none", "stages": list(stages), **({"test": test} if test else {})},
        procedure=procedure,
        training={"epochs": epochs, "batch_rows": batch, "learning_rate": rate, "log_steps": 50},
        evaluation={**QUIET, **({"generate": True, "max_new_tokens": 10, "limit": None} if test else {})},
        output=str(folder),
        seed=seed,
        quiet=True,
    )


def accuracy(run):
    return run.metrics["after"]["target"]["score"]["value"]


def auroc(confidence, wrong):
    """Probability that a right row is more confident than a wrong one, ties by half."""
    right, bad = confidence[~wrong], confidence[wrong]
    return float((right[:, None] > bad).mean() + 0.5 * (right[:, None] == bad).mean())


def one_seed(folder, seed, *, pretraining=4000, passes=30, rows=600, tests=300, epochs=10):
    rng = np.random.default_rng(seed)
    first = [plus(digits(rng)) if i % 8 == 0 else backwards(digits(rng)) for i in range(pretraining)]
    base = tuned(folder / "pre", fresh(folder / "fresh", seed), first, epochs=passes, rate=3e-3, batch=64, seed=seed)
    model = Path(base.folder) / "model"
    wrong = rng.random(rows) < 0.35
    train = [plus(digits(rng), digits(rng) if w else None) for w in wrong]
    test = [plus(digits(rng)) for _ in range(tests)]
    how = {"epochs": epochs, "rate": 1e-3, "batch": 32, "seed": seed, "test": test}
    arms = {
        "all rows": {},
        "random": {"stages": [{"clear-curation": {**CLEAR, "arm": "random"}}]},
        "filter": {"stages": [{"clear-curation": CLEAR}]},
        "filter and correct": {"procedure": {"clear-curation": CLEAR}},
    }
    runs = {name: tuned(folder / name.replace(" ", "-"), model, train, **how, **more) for name, more in arms.items()}
    lines = (runs["filter and correct"].folder / "clear-curation.jsonl").read_text().splitlines()
    table = {line["row"] - 1: line for line in map(json.loads, lines)}
    confidence = np.array([table[i]["confidence"] for i in range(rows)])
    replaced = [i for i in range(rows) if table[i]["decision"] == "corrected"]
    good = [table[i]["candidate"].strip() == train[i]["answer"] for i in replaced]
    found = {name: {"accuracy": accuracy(run)} for name, run in runs.items()}
    about = {
        "auroc": auroc(confidence, wrong),
        "replaced": len(replaced),
        "replaced and right": float(np.mean(good)) if good else None,
    }
    return found, about


def experiment(folder, seeds=(0, 1, 2), **sizes):
    """Every arm at every seed, with what is required of them."""
    arms, about = {}, {}
    for seed in seeds:
        found, about[str(seed)] = one_seed(folder / str(seed), seed, **sizes)
        for name, values in found.items():
            arms.setdefault(name, {})[str(seed)] = values

    def of(name):
        return np.array([arms[name][str(s)]["accuracy"] for s in seeds])

    told = list(about.values())
    return {
        "method": "clear-curation",
        "design": __doc__,
        "seeds": list(seeds),
        "arms": arms,
        "confidence": about,
        "claims": {
            "area under the curve at least 0.85 on every seed": all(a["auroc"] >= 0.85 for a in told),
            "the filter beats all rows on seeds": f"{int((of('filter') > of('all rows')).sum())} of {len(seeds)}",
            "the filter beats random rows on seeds": f"{int((of('filter') > of('random')).sum())} of {len(seeds)}",
            "correcting is not below the filter (within 0.02) on seeds": (
                f"{int((of('filter and correct') >= of('filter') - 0.02).sum())} of {len(seeds)}"
            ),
            "at least 80% of replaced answers are right": all((a["replaced and right"] or 0) >= 0.8 for a in told),
        },
        "mean": {name: {"accuracy": float(of(name).mean()), "spread": float(np.ptp(of(name)))} for name in arms},
    }


def test_clear_curation(tmp_path):
    found = experiment(tmp_path)
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert all(0 <= v["accuracy"] <= 1 for some in found["arms"].values() for v in some.values())
