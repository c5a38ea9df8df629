"""Sorted fine-tuning of a language model of eight blocks: are its intermediate exits usable, and what does it cost?

One design: a Llama of 8 blocks is pretrained on the lab's mixture, then fine-tuned on its arithmetic with the same rows,
order and steps by

- ``sft``: plain fine-tuning; its exits are read zero-shot ("early exit");
- ``sorted-ft``: exits 2, 4, 6 and 8, mean of the losses;
- ``head``: the first n blocks of the ``sft`` model, frozen, with a norm and a head of their own trained (the paper's ICT);
- ``extracted``: the first n blocks of the base fine-tuned alone (upper reference).

Measured on test rows for each exit: exact answers and loss; for sorted-ft also speed of static exits, mean depth at
a target agreement of 0.95, and what speculative decoding accepts.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

EXITS = (2, 4, 6, 8)
ROOT = Path(__file__).resolve().parents[2]


def pretrained(folder, seed, rows):
    """An 8-block model trained on the lab's mixture from scratch."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import luthier
    from luthier.lab.tokenizer import tokenizer
    from luthier.models.save import save

    words = tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words), max_position_embeddings=words.model_max_length, hidden_size=64, num_hidden_layers=8,
        num_attention_heads=4, intermediate_size=192, initializer_range=0.04, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0}, pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
    )  # fmt: skip
    save(LlamaForCausalLM(config), words, folder / "fresh")
    run = luthier.tune(
        model=str(folder / "fresh"),
        data={"train": f"lab:mixture?n={rows}", "keep": "none"},
        training={"learning_rate": 3e-3, "batch_tokens": 160, "warmup": 0.05, "beta2": 0.99},
        evaluation={"before": False, "generate": False, "calibration": False},
        output=str(folder / "base"),
        seed=seed,
        quiet=True,
    )
    return Path(run.folder) / "model"


def tuned(model, folder, seed, rows, steps, **sections):
    """The folder of a model fine-tuned on arithmetic, and its loss on the test rows."""
    import luthier

    run = luthier.tune(
        model=str(model),
        data={"train": f"lab:arithmetic?n={rows}", "test": "lab:arithmetic?n=200", "keep": "none"},
        training={"learning_rate": 1e-3, "batch_rows": 32, "max_steps": steps},
        evaluation={"before": False, "generate": False, "calibration": False},
        output=str(folder),
        seed=seed,
        quiet=True,
        **sections,
    )
    return Path(run.folder) / "model", run.metrics["after"]["target"]["loss"]["value"]


def cut(model, exit, folder):
    """The first blocks of a model as a folder."""
    from luthier.functional.exits import first_blocks
    from luthier.models.load import load
    from luthier.models.save import save

    loaded = load(model, task="causal-lm")
    return save(first_blocks(loaded.model, exit), loaded.processor, folder)


class Writer:
    """Answers of a model folder to the test prompts."""

    def __init__(self, folder, questions):
        from luthier import lab
        from luthier.data.render import Renderer
        from luthier.models.load import load
        from luthier.runs.api import prompt_row

        loaded = load(folder, task="causal-lm")
        self.model, self.processor = loaded.model.eval(), loaded.processor
        renderer = Renderer(loaded.processor, task="causal-lm")
        stops = self.model.generation_config.eos_token_id
        self.stops = set([stops] if isinstance(stops, int) else stops or [])
        self.rows = lab.dataset("arithmetic", split="test", n=questions)
        self.calibration = [
            renderer.prompt_ids(prompt_row(r["prompt"])) for r in lab.dataset("arithmetic", split="train", n=32)
        ]
        self.prompts = [renderer.prompt_ids(prompt_row(r["prompt"])) for r in self.rows]

    def write(self, prompts=None, **options):
        """(completions, the decoder's report, seconds)."""
        from luthier.core import registry, rng

        decoder = registry.get("decoding", "sorted-ft").build({"max_new_tokens": 32, **options})
        context = SimpleNamespace(
            processor=self.processor,
            device=self.model.device,
            rng=lambda name, *keys: rng.stream(0, name, *keys),
        )
        started = time.perf_counter()
        found = decoder.generate(self.model, prompts or self.prompts, context)
        return found, decoder.report, time.perf_counter() - started

    def right(self, completions):
        """Share of exact answers."""
        from luthier import lab

        return float(
            np.mean([lab.verify("arithmetic", r, c.text) for r, c in zip(self.rows, completions, strict=True)])
        )


def serving(writer):
    """Speed and depth of a sorted model in each mode, one prompt at a time."""
    whole, report, _ = writer.write(batch_rows=1)
    found = {"static": {str(n): writer.write(exit=n, batch_rows=1)[1]["tokens_per_second"] for n in EXITS}}
    known = len(writer.calibration)
    both, report, _ = writer.write(
        [*writer.calibration, *writer.prompts], mode="dynamic", target_agreement=0.95, calibration_prompts=known
    )
    same = [a.token_ids == b.token_ids for a, b in zip(both[known:], whole, strict=True)]
    found["dynamic"] = {**report, "same_text": float(np.mean(same)), "right": writer.right(both[known:])}
    drafted, report, _ = writer.write(mode="speculative", exit=EXITS[0])
    assert [c.token_ids for c in drafted] == [c.token_ids for c in whole]
    found["speculative"] = report
    return found


def experiment(folder, seed, *, pretraining=25000, rows=8000, steps=400, head_steps=200, questions=200):
    """All arms for one seed: {arm: {exit: {"right", "loss"}}}, and serving of the sorted model."""
    base = pretrained(folder, seed, pretraining)
    common = {"seed": seed, "rows": rows}
    arms = {}
    for arm, objective in (("sft", "sft"), ("sorted-ft", {"sorted-ft": {"exits": list(EXITS)}})):
        model, _ = tuned(base, folder / arm, steps=steps, objective=objective, **common)
        arms[arm] = {n: cut(model, n, folder / f"{arm}-{n}") for n in EXITS}
    found = {"base": {"8": {"right": (w := Writer(base, questions)).right(w.write()[0])}}}
    for arm, models in arms.items():
        found[arm] = {str(n): score(m, folder / f"{arm}-{n}-loss", questions, seed) for n, m in models.items()}
    found["head"], found["extracted"] = {}, {}
    for n in EXITS[:-1]:
        model, loss = tuned(
            arms["sft"][n],
            folder / f"head-{n}",
            steps=head_steps,
            parameters=[{"sorted-ft": {"untie": True}}],
            **common,
        )
        writer = Writer(model, questions)
        found["head"][str(n)] = {"right": writer.right(writer.write()[0]), "loss": loss}
        model, loss = tuned(cut(base, n, folder / f"base-{n}"), folder / f"extracted-{n}", steps=steps, **common)
        writer = Writer(model, questions)
        found["extracted"][str(n)] = {"right": writer.right(writer.write()[0]), "loss": loss}
    found["serving"] = serving(Writer(arms["sorted-ft"][8], questions))
    return found


def score(model, folder, questions, seed):
    """Exact answers and loss of a model as it is."""
    from luthier.runs import api

    writer = Writer(model, questions)
    plan = api.plan_of(
        model=str(model),
        data={"train": "lab:arithmetic?n=200", "test": "lab:arithmetic?n=200", "keep": "none"},
        evaluation={"generate": False, "calibration": False},
        output=str(folder),
        seed=seed,
    )
    measured = api.evaluate(plan)
    return {"right": writer.right(writer.write()[0]), "loss": measured["target"]["loss"]["value"]}


def mean(found, *path):
    """Over the seeds."""
    values = []
    for one in found:
        for key in path:
            one = one[key]
        values.append(one)
    return float(np.mean(values))


def summary(found):
    """What is kept: every seed, the means, and what became of the claims."""
    exits = [str(n) for n in EXITS]

    def better(other, key, sign):
        return all(sign * mean(found, "sorted-ft", n, key) > sign * mean(found, other, n, key) for n in exits[:-1])

    right, static = [mean(found, arm, "8", "right") for arm in ("sorted-ft", "sft")], ("serving", "static")
    claims = {
        "sorted exits answer better than early exits of sft": better("sft", "right", 1),
        "sorted exits answer better than heads trained on sft": better("head", "right", 1),
        "reported: sorted exits have a lower loss than early exits of sft": better("sft", "loss", -1),
        "reported: sorted exits have a lower loss than heads trained on sft": better("head", "loss", -1),
        "the whole model loses at most 0.05": right[0] >= right[1] - 0.05,
        "exit 4 takes at most 0.65 of the time": mean(found, *static, "4") >= mean(found, *static, "8") / 0.65,
        "mean depth below 8 at 0.95 agreement": mean(found, "serving", "dynamic", "mean_depth") < 8,
    }
    means = {"base": {"right, exit 8": mean(found, "base", "8", "right")}}
    for arm in ("sft", "sorted-ft", "head", "extracted"):
        names = {f"{key}, exit {n}": (n, key) for key in ("right", "loss") for n in exits if n in found[0][arm]}
        means[arm] = {label: mean(found, arm, *path) for label, path in names.items()}
    return {
        "method": "sorted-ft",
        "design": __doc__,
        "seeds": {str(n): one for n, one in enumerate(found)},
        "mean": means,
        "claims": claims,
    }


def test_intermediate_exits_of_a_sorted_model(tmp_path):
    result = summary([experiment(tmp_path / str(seed), seed) for seed in (0, 1, 2)])
    target = ROOT / "docs" / "measured" / "sorted-ft.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for one in result["seeds"].values():
        assert one["base"]["8"]["right"] > 0, "a base that answers nothing has no exits worth measuring"
        assert all(np.isfinite(v["loss"]) for arm in ("sft", "sorted-ft") for v in one[arm].values())
