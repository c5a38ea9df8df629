"""TruthRL on made-up facts: does abstention come where the model knows nothing, and only there?

The design, settled before it ran: entities have one of 40 values each, asked in four wordings of which one, another for
each entity, is never trained. 200 known entities, 100 in training whose facts cannot be known (asked, never told), and 100
further ones never seen. A transformer (width 64, two layers) is fine-tuned on the known ones for 60 epochs, with the answer
of every twentieth row replaced by "idk", so that the phrase exists. From that checkpoint 150 steps each of: (a) plain SFT on
the gold answers of all 300 training entities, (b) GRPO with the binary reward, (c) GRPO with TruthRL's ternary one (16
prompts, 8 completions of at most 3 tokens, beta 0.01, AdamW at 5e-4 for all three). Greedy answers to the held-out wordings.
The probe draws 64 samples of each question from the checkpoint. Claims, of the specification: abstention on unseen entities
above 80% for (c) and below 20% for (a) and (b); accuracy of (c) on known ones within 10 points of (b); truthfulness of (c)
over known and unseen together more than 20 points above both; the probe marks at least 90% of the unseen and at most 10% of
the known ones. The model is twenty times smaller than the specification's.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
from token_worlds import Words, mean_of, network, rows_of, session_of, train, write

from luthier.functional.truthfulness import rates
from luthier.methods.objectives.grpo import GroupRelativePolicyOptimization as GRPO
from luthier.methods.rewards.truth_rl import TruthReward
from luthier.methods.transforms.rollouts import Rollouts

RESULT = Path(__file__).resolve().parents[2] / "docs" / "measured" / "truth-rl.json"
KNOWN, HIDDEN, UNSEEN, VALUES, WORDINGS = 200, 100, 100, 40, 4
WORLD = Words(
    ["idk", *(f"v{i}" for i in range(VALUES)), *(f"w{i}" for i in range(WORDINGS)),
     *(f"e{i}" for i in range(KNOWN + HIDDEN + UNSEEN))]
)  # fmt: skip
IDK, VALUE, WORDING, ENTITY = 3, 4, 4 + VALUES, 4 + VALUES + WORDINGS
OPTIONS = {"form": "whole", "phrases": ["idk"], "answer": "completion"}


def world(seed):
    """(prompt, answer) by group and by whether the wording is trained."""
    rng = np.random.default_rng(seed)
    facts = rng.integers(VALUES, size=KNOWN + HIDDEN + UNSEEN)
    groups = {
        "known": range(KNOWN),
        "hidden": range(KNOWN, KNOWN + HIDDEN),
        "unseen": range(KNOWN + HIDDEN, len(facts)),
    }
    return {
        (name, held): [
            ([1, WORDING + w, ENTITY + e], [VALUE + int(facts[e])])
            for e in members
            for w in range(WORDINGS)
            if (w == e % WORDINGS) == held
        ]
        for name, members in groups.items()
        for held in (False, True)
    }


def texts(pairs):
    """The rows' gold answers as words, which the reward reads."""
    return [WORLD.decode(a) for _, a in pairs]


def answers(model, pairs):
    """Labels of greedy answers."""
    found = write(model.eval(), WORLD, [p for p, _ in pairs], most=3)
    rows = [{"prompt": "", "completion": gold} for gold in texts(pairs)]
    return TruthReward(**OPTIONS).labels(rows, [c.text for (c,) in found], None)


def unknown_share(model, pairs, seed):
    """Share of questions that 64 samples never answer."""
    found = write(model, WORLD, [p for p, _ in pairs], most=3, temperature=1.0, samples=64, seed=seed)
    golds = texts(pairs)
    return float(np.mean([all(c.text != g for c in some) for some, g in zip(found, golds, strict=True)]))


def run(seed):
    data = world(seed)
    taught = data["known", False]
    mixed = [(p, [IDK] if i % 20 == 0 else a) for i, (p, a) in enumerate(taught)]
    start = network(seed, len(WORLD))
    train(
        session_of(start, WORLD, seed=seed), rows_of(mixed), batch_rows=64, epochs=60, learning_rate=3e-3, log_steps=100
    )
    pairs = [*taught, *data["hidden", False]]
    arms = {"start": start}
    for arm, variant in (("sft on gold", None), ("binary grpo", "binary"), ("truth-rl", "ternary")):
        model = copy.deepcopy(start)
        if variant is None:
            session = session_of(model, WORLD, seed=seed)
        else:
            reward = {"truth-rl": {**OPTIONS, "variant": variant}}
            made = Rollouts(reward=reward, samples=8, max_new_tokens=3)
            session = session_of(model, WORLD, seed=seed, objective=GRPO(beta=0.01), transforms=[made])
        rows = rows_of(pairs)
        rows.columns["completion"] = texts(pairs)
        train(session, rows, batch_rows=16, epochs=10, max_steps=150, learning_rate=5e-4, log_steps=50)
        arms[arm] = model
    measured = {}
    for arm, model in arms.items():
        known, unseen = answers(model, data["known", True]), answers(model, data["unseen", True])
        measured[arm] = {
            "accuracy on known": rates(known)["accuracy"],
            "abstention on known": rates(known)["abstention"],
            "abstention on unseen": rates(unseen)["abstention"],
            "truthfulness": rates([*known, *unseen])["truthfulness"],
        }
    probe = {name: unknown_share(start.eval(), data[name, True], seed) for name in ("known", "unseen")}
    return measured, probe


def experiment(seeds=(0, 1, 2)):
    arms, probes = {}, {}
    for seed in seeds:
        measured, probes[str(seed)] = run(seed)
        for arm, values in measured.items():
            arms.setdefault(arm, {})[str(seed)] = values
    mean = mean_of(arms)
    ours, binary, sft = (mean[a] for a in ("truth-rl", "binary grpo", "sft on gold"))
    unseen, better = "abstention on unseen", [ours["truthfulness"] - o["truthfulness"] for o in (binary, sft)]
    return {
        "method": "truth-rl",
        "design": __doc__,
        "seeds": list(seeds),
        "arms": arms,
        "out_of_knowledge_by_the_probe": probes,
        "claims": {
            "truth-rl abstains on more than 80% of the unseen entities": ours[unseen] > 0.8,
            "sft and binary grpo abstain on less than 20% of them": max(sft[unseen], binary[unseen]) < 0.2,
            "accuracy on known entities within 10 points of binary grpo": ours["accuracy on known"]
            > binary["accuracy on known"] - 0.1,
            "truthfulness more than 20 points above both": min(better) > 0.2,
            "the probe marks at least 90% of the unseen entities": all(p["unseen"] >= 0.9 for p in probes.values()),
            "the probe marks at most 10% of the known ones": all(p["known"] <= 0.1 for p in probes.values()),
        },
        "mean": mean,
    }


def test_abstention_where_nothing_is_known():
    found = experiment()
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert all(0 <= v <= 1 for arm in found["mean"].values() for k, v in arm.items() if k != "truthfulness")
    assert found["mean"]["start"]["accuracy on known"] > 0.2
