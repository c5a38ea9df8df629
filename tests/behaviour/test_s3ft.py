"""S3FT against plain SFT: is the new task learnt as well, and is less lost of what the base could do?

The design: a transformer of two layers and width 64 is pretrained on 10,000 rows in equal parts: copy, reverse, sort and capitalise
five letters, and add two numbers below 50, answered as "the sum is 42"; 12 passes of batches of 64 at 3e-3. It is tuned on 600 other
sums whose given answers are worded otherwise ("=> 042 ."): plain SFT, S3FT, and S3FT without paraphrases (selective self-rehearsal),
all with the same number of steps (120 of 32 at 5e-4), judge: the number. Measured on 300 other sums: the number; on 100 fresh rows of each other skill: exact answers, and the divergence KL(base | tuned) there. Stated with it: how
often the base is right, and from where targets came. Nothing was tuned; what is required is recorded as it came out.
"""

from __future__ import annotations

import json
import string
from pathlib import Path

import numpy as np
import torch

import luthier
from luthier.functional.answers import final_number
from luthier.models.load import load
from luthier.runs import api

RESULT = Path(__file__).resolve().parents[2] / "docs" / "measured" / "s3ft.json"
QUIET = {"before": False, "generate": False, "calibration": False}
SKILLS = {"copy": lambda t: t, "reverse": lambda t: t[::-1], "sort": lambda t: "".join(sorted(t)), "capital": str.upper}
PROMPT = "{question} {answer} again:"
ARMS = {
    "sft": "sft",
    "s3ft": {"s3ft": {"paraphrase_prompt": PROMPT, "max_new_tokens": 24}},
    "s3ft without paraphrase": {"s3ft": {"paraphrase": False, "max_new_tokens": 24}},
}


def skill(name, rng):
    text = "".join(rng.choice(list(string.ascii_lowercase), size=5))
    return {"prompt": f"{name} {text}:", "completion": " " + SKILLS[name](text)}


def summed(a, b, template=" the sum is {}"):
    return {"prompt": f"{a}+{b}:", "completion": template.format(a + b), "answer": str(a + b)}


def fresh(folder, seed):
    """A transformer with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from luthier.lab.tokenizer import tokenizer

    words = tokenizer(64)
    torch.manual_seed(seed)
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.05,
        **ends,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def tuned(folder, model, rows, procedure="sft", *, rate, batch, seed, **training):
    return luthier.tune(
        model=str(model),
        data={"train": rows, "keep": "none", "verifier": "numeric"},
        procedure=procedure,
        training={"batch_rows": batch, "learning_rate": rate, "log_steps": 50, **training},
        evaluation=QUIET,
        output=str(folder),
        seed=seed,
        quiet=True,
    )


def written(model, rows):
    return api.generate(model, [r["prompt"] for r in rows], max_new_tokens=24)


def divergence(base, other, rows):
    """KL(base | other) in nats, mean over the tokens of the rows' answers."""
    models = [load(folder, task="causal-lm") for folder in (base, other)]
    words, total, count = models[0].processor, 0.0, 0
    for row in rows:
        start = [words.bos_token_id] if words("a")["input_ids"][0] == words.bos_token_id else []
        before = start + words(row["prompt"], add_special_tokens=False)["input_ids"]
        after = [*words(row["completion"], add_special_tokens=False)["input_ids"], words.eos_token_id]
        with torch.no_grad():
            ids = torch.tensor([before + after])
            p, q = (m.model.eval()(ids).logits[0, len(before) - 1 : -1].double().log_softmax(-1) for m in models)
        total, count = total + float((p.exp() * (p - q)).sum()), count + len(after)
    return total / count


def measured(base, model, sums, others):
    """Numbers right on sums, exact answers on other skills, and the divergence from the base there."""
    right = [final_number(t) == int(r["answer"]) for t, r in zip(written(model, sums), sums, strict=True)]
    exact = [t.strip() == r["completion"].strip() for t, r in zip(written(model, others), others, strict=True)]
    return {
        "numbers right": float(np.mean(right)),
        "other skills": float(np.mean(exact)),
        "divergence": divergence(base, model, others),
    }


def one_seed(folder, seed, *, pretraining=10_000, passes=12, rows=600, tests=300, each=100, steps=120):
    rng = np.random.default_rng(seed)
    pairs = [(a, b) for a in range(50) for b in range(50)]
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    tests_of, train_of, known = pairs[:tests], pairs[tests : tests + rows], pairs[tests + rows :]
    names = [*SKILLS, "sum"]
    first = [
        summed(*known[rng.integers(len(known))]) if name == "sum" else skill(name, rng)
        for name in (names[i % 5] for i in range(pretraining))
    ]
    run = tuned(folder / "pre", fresh(folder / "fresh", seed), first, epochs=passes, rate=3e-3, batch=64, seed=seed)
    base = Path(run.folder) / "model"
    sums, others = [summed(*p) for p in tests_of], [skill(name, rng) for name in SKILLS for _ in range(each)]
    train = [summed(*p, template=" => {:03d} .") for p in train_of]
    found, sources = {"base": measured(base, base, sums, others)}, {}
    for name, procedure in ARMS.items():
        how = {"rate": 5e-4, "batch": 32, "seed": seed, "epochs": 100, "max_steps": steps}
        arm = tuned(folder / name.replace(" ", "-"), base, train, procedure, **how)
        found[name] = measured(base, Path(arm.folder) / "model", sums, others)
        if procedure != "sft":
            sources[name] = arm.metrics["training"]["s3ft"]
    return found, sources


def experiment(folder, seeds=(0, 1, 2), **sizes):
    """Every arm at every seed, with what is required of them."""
    arms, sources = {}, {}
    for seed in seeds:
        found, sources[str(seed)] = one_seed(folder / str(seed), seed, **sizes)
        for name, values in found.items():
            arms.setdefault(name, {})[str(seed)] = values

    def of(name, key):
        return np.array([arms[name][str(s)][key] for s in seeds])

    def seeds_where(mask):
        return f"{int(mask.sum())} of {len(seeds)}"

    keys = ("numbers right", "other skills", "divergence")
    return {
        "method": "s3ft",
        "design": __doc__,
        "seeds": list(seeds),
        "arms": arms,
        "sources": sources,
        "claims": {
            "numbers right not below plain SFT by more than 0.02, on seeds": seeds_where(
                of("s3ft", "numbers right") >= of("sft", "numbers right") - 0.02
            ),
            "more of the other skills kept than with plain SFT, on seeds": seeds_where(
                of("s3ft", "other skills") > of("sft", "other skills")
            ),
            "less divergence from the base than with plain SFT, on seeds": seeds_where(
                of("s3ft", "divergence") < of("sft", "divergence")
            ),
        },
        "mean": {name: {key: float(of(name, key).mean()) for key in keys} for name in arms},
    }


def test_s3ft(tmp_path):
    found = experiment(tmp_path)
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert all(v["divergence"] >= 0 for some in found["arms"].values() for v in some.values())
    assert all(v["divergence"] < 1e-9 for v in found["arms"]["base"].values())
