"""Fault-aware fine-tuning on programs of one to three lines: does more weight on the deciding operator teach it sooner?

The design: a language of short programs with descriptions in words (small_programs.py). The base is a Llama of two blocks and
width 64, trained on 4,000 descriptions with programs whose operators are drawn at random, three epochs in batches of 16 at 3e-3:
it writes programs of the right form with the right operands and does not know what the operators are called. Its own scores are
stated. It is then tuned on 1,500 further descriptions with the correct programs; the data stage puts one wrong operator into
each (faults of comparison and arithmetic, judged by running both programs on 64 inputs). Three epochs in batches of 16 at a
constant 1e-3 for all arms, three seeds of base, data and order. Arms: plain SFT; dynamic weights with a = 2, lines and tokens;
static weights; dynamic weights on lines only; on tokens only. Measured after each epoch on 300 descriptions seen by neither:
pass@1 of the greedy program, accuracy at the flagged operator given what is before it, and the mean loss at all tokens that
no flag covers.

Claimed of dynamic weights, after the first epoch and after the last: higher pass@1 than SFT, higher accuracy at the flagged
operator, and a loss elsewhere within 0.01 nats. The base alone was looked at beforehand; the arms were fixed before any of them
ran at full size. What came out is recorded either way.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from small_programs import distinct, random_generator, results, shown, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import make_session, settings
from luthier.core.rng import stream
from luthier.data.layouts import SCHEMA
from luthier.data.prepare import prepare
from luthier.data.render import Renderer
from luthier.engine.loop import Trainer
from luthier.functional.error_sensitive import SENSITIVE, WRONG
from luthier.methods.data.fault_aware_ft import WrongVariants
from luthier.methods.objectives.fault_aware_ft import FaultAwareFineTuning
from luthier.methods.objectives.sft import SupervisedFineTuning

RESULT = Path(__file__).resolve().parents[2] / "docs" / "measured" / "fault-aware-ft.json"
JUDGE = f"{Path(__file__).with_name('small_programs.py')}:judge"
ARMS = {
    "sft": None,
    "dynamic": {"mode": "dynamic"},
    "static": {"mode": "static"},
    "line only": {"mode": "dynamic", "granularity": "line"},
    "token only": {"mode": "dynamic", "granularity": "token"},
}
EMPHASIS, LONGEST, ELSEWHERE = 2.0, 32, 0.01


def canonical(pairs):
    """Canonical rows."""
    rows = [
        {"kind": "pair", "source": "made", "row": i + 1, "key": str(i), "prompt": p, "completion": c, "extra": "{}"}
        for i, (p, c) in enumerate(pairs)
    ]
    return Dataset(pa.table({name: [r.get(name) for r in rows] for name in SCHEMA.names}, schema=SCHEMA))


def fresh(seed, vocabulary):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=96,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


@torch.no_grad()
def greedy(model, prompts, processor):
    """Greedy continuations of prompts of token ids, those of one length together."""
    found = {}
    model.eval()
    for length in sorted({len(p) for p in prompts}):
        chosen = [i for i, p in enumerate(prompts) if len(p) == length]
        ids = torch.tensor([prompts[i] for i in chosen])
        for _ in range(LONGEST):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
            if bool((ids[:, length:] == 2).any(dim=1).all()):
                break
        for i, row in zip(chosen, ids[:, length:].tolist(), strict=True):
            found[i] = shown(row[: row.index(2)] if 2 in row else row, processor)
    return [found[i] for i in range(len(prompts))]


def measured(session, asked, pairs, renderer):
    """pass@1, accuracy at the flagged token, and loss at the tokens without a flag."""
    rows = renderer.render_batch([{"kind": "pair", "prompt": p, "completion": c} for p, c in pairs])
    written = greedy(session.model, [r.input_ids[: r.prompt_length] for r in rows], renderer.processor)
    passed = [results(text) == results(program) for text, (_, program) in zip(written, pairs, strict=True)]
    form = [results(text)[0] is not None for text in written]
    right, at_flag, elsewhere = 0, 0, []
    session.model.eval()
    for start in range(0, len(asked), 50):
        index = list(range(start, min(start + 50, len(asked))))
        fetched = asked.fetch(index)
        batch = session.task.collate(fetched, index)
        out = session.evaluate_batch(batch, ("logp", "top1"))
        token_N = (batch.position_N + 1 - batch.sequence_N * batch.inputs["input_ids"].shape[1]).tolist()
        flags = [{t for some in f["token"] for t in some} for f in fetched[SENSITIVE]]
        flagged_N = torch.tensor([t in flags[b] for t, b in zip(token_N, batch.sequence_N.tolist(), strict=True)])
        right += int((out.top1_N == batch.target_N)[flagged_N].sum())
        at_flag += int(flagged_N.sum())
        elsewhere += (-out.logp_N[~flagged_N]).tolist()
    return {
        "pass_at_1": float(np.mean(passed)),
        "well_formed": float(np.mean(form)),
        "accuracy_at_the_flag": right / at_flag,
        "loss_elsewhere": float(np.mean(elsewhere)),
    }


def at_seed(folder, seed, *, taught, tuned, tests, base_epochs, epochs):
    """The base and every arm at one seed."""
    processor, taken = tokenizer(), set()
    renderer = Renderer(processor, task="causal-lm")
    context = SimpleNamespace(processor=processor, renderer=renderer, rng=lambda name, *keys: stream(seed, name, *keys))
    stage = WrongVariants(verifier=JUDGE, mutations=["comparison", "arithmetic"], candidates=12)
    pairs = distinct(random_generator(seed, "tests"), tests, taken)
    lesson = distinct(random_generator(seed, "lesson"), taught, taken, random_operators=True)
    gold = distinct(random_generator(seed, "gold"), tuned, taken)
    options = {"columns": [SENSITIVE, WRONG], "cache": folder / "cache", "progress": False}
    asked = prepare(stage.run(canonical(pairs), context), renderer, **options)
    rows = prepare(stage.run(canonical(gold), context), renderer, **options)

    session = make_session(fresh(seed, len(processor)), seed=seed)
    lesson_rows = prepare(canonical(lesson), renderer, **options)
    Trainer(session, lesson_rows, settings(learning_rate=3e-3, batch_rows=16, epochs=base_epochs)).run()
    base = {name: p.detach().clone() for name, p in session.model.state_dict().items()}
    found = {"base": [measured(session, asked, pairs, renderer)]}
    for arm, how in ARMS.items():
        started = time.perf_counter()
        method = SupervisedFineTuning() if how is None else FaultAwareFineTuning(emphasis=EMPHASIS, **how)
        model = fresh(seed, len(processor))
        model.load_state_dict(base)
        session = make_session(model, seed=seed, objective=method)
        seen: list[dict] = []
        steps = -(-tuned // 16)

        def look(event, values, session=session, seen=seen, steps=steps):
            if event in ("step", "tick") and values["step"] % steps == 0:
                seen.append(measured(session, asked, pairs, renderer))
                session.model.train()

        training = settings(learning_rate=1e-3, batch_rows=16, epochs=epochs, schedule="constant", log_steps=steps)
        Trainer(session, rows, training, observe=look).run()
        found[arm] = [{**values, "epoch": k + 1} for k, values in enumerate(seen)]
        found[arm][-1]["wall_seconds"] = round(time.perf_counter() - started, 1)
    paired = sum(bool(w) for w in rows.fetch(range(len(rows)))[WRONG])
    return {**found, "rows_with_a_pair": paired}


def experiment(folder, seeds=(0, 1, 2), *, taught=4000, tuned=1500, tests=300, base_epochs=3, epochs=3):
    """Every arm at every seed, with what was claimed of them."""
    sizes = {"taught": taught, "tuned": tuned, "tests": tests, "base_epochs": base_epochs, "epochs": epochs}
    runs = {str(seed): at_seed(folder, seed, **sizes) for seed in seeds}

    def of(arm, key, epoch):
        return np.array([run[arm][epoch][key] for run in runs.values()])

    claims = {}
    for name, epoch in (("first", 0), ("last", -1)):
        for arm in [a for a in ARMS if a != "sft"]:
            for key in ("pass_at_1", "accuracy_at_the_flag"):
                more = of(arm, key, epoch).mean() > of("sft", key, epoch).mean()
                claims[f"{arm}, after the {name} epoch: higher {key} than sft"] = bool(more)
            gap = of(arm, "loss_elsewhere", epoch).mean() - of("sft", "loss_elsewhere", epoch).mean()
            claims[f"{arm}, after the {name} epoch: loss elsewhere within {ELSEWHERE} of sft"] = bool(
                abs(gap) <= ELSEWHERE
            )
    keys = ("pass_at_1", "accuracy_at_the_flag", "loss_elsewhere")
    return {
        "method": "fault-aware-ft",
        "design": __doc__,
        "seeds": list(seeds),
        **sizes,
        "runs": runs,
        "claims": claims,
        "mean": {
            f"after epoch {k + 1}": {
                "base, before": {key: float(of("base", key, 0).mean()) for key in keys},
                **{arm: {key: float(of(arm, key, k).mean()) for key in keys} for arm in ARMS},
            }
            for k in range(epochs)
        },
        "spread": {arm: {key: float(np.ptp(of(arm, key, -1))) for key in keys} for arm in ARMS},
    }


def test_more_weight_on_the_deciding_operator(tmp_path):
    found = experiment(tmp_path)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    # What must hold for the comparison to be one: the base has the form and not the operators, every arm ran, SFT learnt.
    for run in found["runs"].values():
        (base,) = run["base"]
        assert base["well_formed"] > 0.9
        assert base["accuracy_at_the_flag"] < 0.6
        assert run["rows_with_a_pair"] > 0.95 * found["tuned"]
        assert all(len(run[arm]) == found["epochs"] for arm in ARMS)
        assert run["sft"][-1]["accuracy_at_the_flag"] > base["accuracy_at_the_flag"]
