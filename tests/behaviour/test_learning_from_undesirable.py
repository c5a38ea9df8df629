"""Learning from the undesirable on little data: forgetting, sensitivity to the prompt, resistance to contrary tuning.

The design: lab:nano, trained on 128 rows that ask for the last of four to six letters, in one wording, for 20 epochs in batches
of 16 with learning rate 1e-3; three seeds of rows and order. The base was taught this task for two to four of the letters a to
j. Arms: plain SFT; the method with low-rank additions (rank 4, alpha 0.5) and with steering vectors (0.05 of the mean norm of
the hidden states), both with weight 1; low-rank additions in a random direction; and the wrong stop gradient, which pulls the
model to its twin. Measured: accuracy on 200 fresh rows of the task; mean and standard deviation of accuracy over five wordings
that were not trained (the base knows two of them); the loss on four other parts of what the base was taught, minus that of the
base; and the steps of plain SFT (learning rate 5e-4, batches of 16) on rows whose answer is the first letter, until accuracy on
100 fresh rows is below half of what it was. Claimed: lower forgetting, lower deviation and more steps than SFT at no lower
accuracy, the random direction between. What is claimed is recorded as it came out. The task is the one of
nine that plain SFT learnt best from so few rows; the first choice, capitals of four to six letters, it did not learn at all.
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
from luthier.engine.stack import Setup
from luthier.models.load import load
from luthier.tasks.causal_lm import CausalLM

RESULT = Path(__file__).resolve().parents[2] / "docs" / "measured" / "learning-from-undesirable.json"
TRAINED = "last letter of {s}\n"
UNSEEN = (
    "which letter is last in {s}?\n",
    "the last of {s}\n",
    "final letter of {s}\n",
    "name the last letter of {s}\n",
    "{s} ends with\n",
)
OTHER = ("arithmetic", "facts", "text", "sentences")
LOW_RANK = {"aux": "lora", "aux_rank": 4, "alpha": 0.5, "consistency_weight": 1.0}
ARMS = {
    "sft": "sft",
    "lora": {"learning-from-undesirable": LOW_RANK},
    "steer": {"learning-from-undesirable": {"aux": "steer", "alpha": 0.05, "consistency_weight": 1.0}},
    "random direction": {"learning-from-undesirable": {**LOW_RANK, "direction": "random"}},
    "wrong stop gradient": {"learning-from-undesirable": {**LOW_RANK, "stop_gradient": "twin"}},
}


def words(split, n, seed):
    """Strings of four to six letters, none of which is in the other split."""
    rows = lab.dataset("strings", split=split, n=n, seed=seed, skill="last", difficulty=2)
    wordings = [w.split("{s}") for w in (TRAINED, *UNSEEN[:2])]
    found = [
        row["prompt"][len(before) : -len(after)]
        for row in rows
        for before, after in wordings
        if row["prompt"].startswith(before) and row["prompt"].endswith(after)
    ]
    assert len(found) == n
    return found


def pairs(strings, wording, letter=-1):
    return [{"kind": "pair", "prompt": wording.format(s=s), "completion": s[letter]} for s in strings]


class Model:
    """A saved model that answers, and can be tuned on by a loop written by hand."""

    def __init__(self, folder):
        loaded = load(folder, task="causal-lm")
        self.model, self.task = loaded.model, CausalLM(loaded.processor)
        self.renderer = Renderer(loaded.processor, task="causal-lm")
        self.context = Setup(seed=0, task="causal-lm", processor=loaded.processor)
        self.greedy = registry.get("decoding", "greedy").build({"max_new_tokens": 10})

    def accuracy(self, rows):
        """Share of rows answered exactly."""
        self.model.eval()
        prompts = [self.renderer.prompt_ids(row) for row in rows]
        said = self.greedy.generate(self.model, prompts, self.context)
        return float(np.mean([c.text.strip() == r["completion"] for c, r in zip(said, rows, strict=True)]))

    def steps_to_flip(self, contrary, asked, *, most, each=2, batch=16, seed=0):
        """Steps of contrary tuning until accuracy on what is asked is below half of what it was; ``most`` if never."""
        rendered = self.renderer.render_batch(contrary)
        columns = [(np.asarray(r.input_ids), np.asarray(r.spans).reshape(-1)) for r in rendered]
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-4, weight_decay=0.0)
        rng = np.random.default_rng(seed)
        at_first = self.accuracy(asked)
        for step in range(0, most, each):
            if self.accuracy(asked) < at_first / 2:
                return step
            self.model.train()
            for _ in range(each):
                chosen = [columns[i] for i in rng.choice(len(columns), batch, replace=False)]
                ids, spans = zip(*chosen, strict=True)
                rows = self.task.collate({"input_ids": ids, "spans": spans}, range(batch))
                logits = self.model(**rows.inputs, use_cache=False).logits.flatten(0, 1)[rows.position_N]
                torch.nn.functional.cross_entropy(logits, rows.target_N).backward()
                optimizer.step()
                optimizer.zero_grad()
        return most


def other_losses(measured):
    return {name: measured["keep"][f"lab:mixture?part={name}: loss"]["value"] for name in OTHER}


def run(folder, seed, objective, *, rows, epochs, asked, most):
    """One arm: train, then measure."""
    started = time.perf_counter()
    train = [{k: r[k] for k in ("prompt", "completion")} for r in pairs(words("train", rows, seed), TRAINED)]
    tuned = luthier.tune(
        model="lab:nano",
        data={"train": train, "keep": [f"lab:mixture?part={name}" for name in OTHER], "keep_limit": asked},
        objective=objective,
        training={"epochs": epochs, "batch_rows": 16, "learning_rate": 1e-3, "log_steps": 10},
        evaluation={"before": True, "generate": False, "limit": asked, "calibration": False},
        output=str(folder),
        seed=seed,
        quiet=True,
    )
    seconds = time.perf_counter() - started
    fresh = words("test", asked, seed)
    model = Model(folder / "model")
    accuracy = {wording: model.accuracy(pairs(fresh, wording)) for wording in (TRAINED, *UNSEEN)}
    before, after = other_losses(tuned.metrics["before"]), other_losses(tuned.metrics["after"])
    unseen = [accuracy[w] for w in UNSEEN]
    contrary = pairs(words("train", 64, seed + 100), TRAINED, letter=0)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    ratios = [line["gradient_ratio"] for line in lines if "gradient_ratio" in line]
    return {
        "accuracy": accuracy[TRAINED],
        "unseen_mean": float(np.mean(unseen)),
        "unseen_deviation": float(np.std(unseen)),
        "accuracy_by_wording": accuracy,
        "forgetting": float(np.mean([after[name] - before[name] for name in OTHER])),
        "loss_increase": {name: after[name] - before[name] for name in OTHER},
        "steps_to_flip": model.steps_to_flip(contrary, pairs(fresh[:100], TRAINED), most=most, seed=seed),
        "gradient_ratio": float(np.mean(ratios)) if ratios else None,
        "wall_seconds": round(seconds, 1),
    }


def experiment(folder, seeds=(0, 1, 2), *, rows=128, epochs=20, asked=200, most=120):
    """Every arm at every seed, with what was claimed."""
    sizes = {"rows": rows, "epochs": epochs, "asked": asked, "most": most}
    arms = {
        arm: {str(seed): run(folder / f"{number}-{seed}", seed, objective, **sizes) for seed in seeds}
        for number, (arm, objective) in enumerate(ARMS.items())
    }
    measures = ("accuracy", "unseen_mean", "unseen_deviation", "forgetting", "steps_to_flip", "wall_seconds")
    mean = {a: {m: float(np.mean([r[m] for r in runs.values()])) for m in measures} for a, runs in arms.items()}
    claims = {}
    for arm in ("lora", "steer"):
        own, plain, control = mean[arm], mean["sft"], mean["random direction"]
        claims |= {
            f"{arm}: accuracy no lower than sft": own["accuracy"] >= plain["accuracy"],
            f"{arm}: less forgetting than sft": own["forgetting"] < plain["forgetting"],
            f"{arm}: lower deviation over wordings than sft": own["unseen_deviation"] < plain["unseen_deviation"],
            f"{arm}: more steps to flip than sft": own["steps_to_flip"] > plain["steps_to_flip"],
            f"{arm}: less forgetting than the random direction": own["forgetting"] < control["forgetting"],
        }
    return {
        "method": "learning-from-undesirable",
        "design": __doc__,
        "seeds": list(seeds),
        **sizes,
        "mean": mean,
        "claims": claims,
        "arms": arms,
    }


def test_arms_on_little_data(tmp_path):
    found = experiment(tmp_path)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert all(r["gradient_ratio"] is None for r in found["arms"]["sft"].values())
    assert all(r["gradient_ratio"] > 0 for r in found["arms"]["lora"].values())
