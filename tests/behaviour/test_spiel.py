"""Does a support that moves find the few weights that matter, where a fixed random one cannot?

The design: one 64 x 64 linear layer; the teacher is the layer with 41 of its 4,096 entries moved by N(0, 0.5^2), and the
student learns its outputs (squared error, summed over outputs, mean over a batch of 32 Gaussian inputs). Budget 82
entries, 200 steps, learning rate 0.02 constant, reselection every 10 steps after phases of 3, p0 = 0.3 linear. Arms:
SpIEL-AG, SpIEL-MA, the same budget with its first random positions for good (the paper's control), and plain training
of all entries with AdamW. Reported: share of the 41 entries that is in the support at the end, what is left of the
squared weight error, and the loss on fresh inputs over that of the base. Bytes trained and remembered stand beside.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from fakes import FakeContext

from luthier.functional.sparse_linear import merged
from luthier.methods.parameters.spiel import SparseIterativeFineTuning as Spiel

RESULT = Path(__file__).resolve().parents[2] / "docs" / "measured" / "spiel.json"
SIZE, MOVED, BUDGET, BATCH, STEPS, LR = 64, 41, 82, 32, 200, 0.02
OPTIONS = {"num_weights": BUDGET, "reselect_every": 10, "accumulate": 3, "reselect_rate": 0.3}
ARMS = {
    "spiel ag": OPTIONS,
    "spiel ma": {**OPTIONS, "algorithm": "ma"},
    "fixed random support": {**OPTIONS, "reselect_rate": 0.0},
}


class Student(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.lin = torch.nn.Linear(SIZE, SIZE, bias=False)
        self.lin.weight.data.copy_(weight)


def world(seed):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5
    places = torch.randperm(SIZE * SIZE, generator=generator)[:MOVED]
    teacher = base.clone()
    teacher.view(-1)[places] += 0.5 * torch.randn(MOVED, generator=generator)
    return base, teacher, places, generator


def error(model, teacher, generator):
    x = torch.randn(BATCH, SIZE, generator=generator)
    return (model.lin(x) - x @ teacher.t()).square().sum(1).mean()


def run(seed, options):
    base, teacher, places, generator = world(seed)
    model = Student(base)
    method = None
    if options is not None:
        method = Spiel(**options)
        model = method.apply(model.requires_grad_(False), FakeContext(seed=seed))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    ctx = FakeContext(seed=seed, total_steps=STEPS)
    ctx.learning_rate, ctx.grad_factor = LR, 1.0
    for step in range(STEPS):
        ctx.step = step
        if method is None:
            optimizer.zero_grad()
            error(model, teacher, generator).backward()
            optimizer.step()
            continue
        method.before_step([None], ctx)
        error(model, teacher, generator).backward()
        for hook in (method.on_grad, method.update, method.on_step):
            hook(model, ctx)
    plain = model if method is None else merged(model)
    weight = plain.lin.weight.detach()
    support = set(range(SIZE * SIZE)) if method is None else set(model.lin.index_K.tolist())
    with torch.no_grad():
        fresh = torch.Generator().manual_seed(10_000 + seed)
        left = float(error(plain, teacher, fresh))
        start = float(error(Student(base), teacher, torch.Generator().manual_seed(10_000 + seed)))
    whole = 4 * SIZE * SIZE
    return {
        "found": len(support & set(places.tolist())) / MOVED,
        "weight_error_left": float((weight - teacher).square().sum() / (base - teacher).square().sum()),
        "loss_left": left / start,
        "bytes": method.bytes() if method else {"deltas": whole, "optimizer": 2 * whole},
    }


def test_the_support_that_moves_against_one_that_does_not():
    seeds = (0, 1, 2)
    arms = {name: [run(s, o) for s in seeds] for name, o in {**ARMS, "plain sft": None}.items()}
    of = lambda arm, key: np.array([r[key] for r in arms[arm]])  # noqa: E731
    chance = BUDGET / SIZE**2
    found = {
        "method": "spiel",
        "design": __doc__,
        "seeds": list(seeds),
        "arms": {arm: {str(s): r for s, r in zip(seeds, runs, strict=True)} for arm, runs in arms.items()},
        "claims": {
            "AG ends at a lower loss than the fixed support on every seed": bool(
                (of("spiel ag", "loss_left") < of("fixed random support", "loss_left")).all()
            ),
            "AG finds more than half of the true support on every seed": bool((of("spiel ag", "found") > 0.5).all()),
            "MA ends at a lower loss than the fixed support on every seed": bool(
                (of("spiel ma", "loss_left") < of("fixed random support", "loss_left")).all()
            ),
        },
        "found_expected_by_chance": chance,
        "mean": {
            arm: {key: float(of(arm, key).mean()) for key in ("found", "weight_error_left", "loss_left")}
            for arm in arms
        },
    }
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert all(np.isfinite(of(arm, "loss_left")).all() for arm in arms)
    assert all(r["found"] == 1.0 for r in arms["plain sft"])
