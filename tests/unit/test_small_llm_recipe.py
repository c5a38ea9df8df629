"""The training contract of the study, its phases, and that one phase is plain fine-tuning."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import luthier
from helpers import MemoryRows, make_session, settings, tiny_llama, weights
from luthier.advisor.presets import study
from luthier.core.errors import UserError
from luthier.engine.loop import Trainer
from luthier.lab.tokenizer import tokenizer
from luthier.methods.procedures.small_llm_recipe import phases, with_replay


def uneven(count=12):
    """Rows of 4 to 26 tokens of which 1 to 12 are supervised: micro-batches of very different weight."""
    rng = np.random.default_rng(5)
    rows = []
    for i in range(count):
        ids = [1, *rng.integers(3, 64, size=2 + 2 * i).tolist(), 2]
        rows.append((ids, [len(ids) - 1 - i, len(ids)]))
    return MemoryRows(rows)


def moved(accumulation):
    """What one step of plain gradient descent at rate 1 changes, which is minus the gradient."""
    session = make_session(tiny_llama())
    before = weights(session.model)
    values = {"optimizer": "sgd", "beta1": 0.0, "learning_rate": 1.0, "schedule": "constant", "warmup": 0.0}
    Trainer(
        session, uneven(), settings(batch_rows=12, accumulation=accumulation, max_grad_norm=None, max_steps=1, **values)
    ).run()
    return {k: v - before[k] for k, v in weights(session.model).items()}


def mean_of_means(parts):
    """The gradient of the mean over micro-batches of each one's mean loss, in plain PyTorch."""
    model, rows, total = tiny_llama(), uneven(), 0.0
    order = np.argsort(rows.lengths, kind="stable")
    for part in np.array_split(order, parts):
        losses = []
        for i in part:
            start, end = rows.spans[i]
            ids = torch.from_numpy(rows.ids[i].astype(np.int64))
            logp = torch.log_softmax(model(input_ids=ids[None]).logits[0], -1)
            losses.append(-logp[start - 1 : end - 1].gather(1, ids[start:end, None]).squeeze(1))
        total = total + torch.cat(losses).mean() / parts
    total.backward()
    return {n: -p.grad for n, p in model.named_parameters()}


def test_a_batch_of_twelve_is_three_micro_batches_of_four_and_no_mean_of_means():
    whole, parts = moved(1), moved(3)
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, atol=1e-6, rtol=0)
    # One micro-batch has one mean, so there the hand-made gradient must be the engine's; with three it must not.
    for name, value in mean_of_means(1).items():
        torch.testing.assert_close(whole[name], value, atol=1e-6, rtol=1e-4)
    other = mean_of_means(3)
    assert max(float((whole[n] - v).abs().max()) for n, v in other.items()) > 1e-3


def test_evaluations_come_at_equal_samples_whatever_the_batch(tmp_path):
    rows = MemoryRows([([1, 5, 6, 7, 2], [2, 5])] * 256)
    seen = {}
    for entry in study(256, batches=(4, 16), rates=(1e-3,), evaluations=4):
        values = dict(pair.split("=") for pair in entry[entry.index("[") + 1 : -1].split(","))
        batch, often = int(values["training.batch_rows"]), int(values["training.eval_steps"])
        trainer = Trainer(
            make_session(tiny_llama()),
            rows,
            settings(batch_rows=batch, eval_steps=often, epochs=1, save_steps=None),
            folder=tmp_path / str(batch),
            evaluate=lambda: {"loss": 1.0},
        )
        trainer.run()
        lines = [json.loads(line) for line in (tmp_path / str(batch) / "metrics.jsonl").read_text().splitlines()]
        seen[batch] = [line["step"] * batch for line in lines if line["split"] == "eval"]
    assert seen[4] == seen[16] == [64, 128, 192, 256]


def test_phases_in_order_of_appearance_or_of_value():
    assert {k: v.tolist() for k, v in phases(["b", "a", "b"], sort=False).items()} == {"b": [0, 2], "a": [1]}
    assert list(phases([3, 1, 10, 1], sort=True)) == [1, 3, 10]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5])
def test_the_replay_share_is_met_within_one_row(share):
    parts = [np.arange(0, 500), np.arange(500, 641), np.arange(641, 1000)]
    made = with_replay(parts, share, seed=3)
    assert made[0].tolist() == parts[0].tolist()
    for p in (1, 2):
        own, earlier = set(parts[p].tolist()), set(np.concatenate(parts[:p]).tolist())
        repeated = [row for row in made[p].tolist() if row in earlier]
        assert own <= set(made[p].tolist())
        assert len(set(repeated)) == len(repeated)
        assert abs(len(repeated) - share * len(made[p])) <= 1
    assert [m.tolist() for m in with_replay(parts, share, seed=3)] == [m.tolist() for m in made]


def test_replay_takes_all_there_is_where_that_is_too_little():
    made = with_replay([np.arange(3), np.arange(3, 103)], 0.5, seed=0)
    assert len(made[1]) == 103


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    words = tokenizer(64)
    torch.manual_seed(0)
    special = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(words), max_position_embeddings=64, **sizes, **special)
    ).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def tuned(base, output, procedure, rows, **training):
    return luthier.tune(
        model=str(base),
        data={"train": rows, "select": rows[:8], "keep": "none"},
        procedure=procedure,
        training={"epochs": 2, "batch_rows": 4, "learning_rate": 1e-2, "log_steps": 1, **training},
        evaluation={"before": False, "max_new_tokens": 4},
        output=str(output),
        quiet=True,
    )  # fmt: skip


def made_rows(levels):
    return [{"prompt": f"{i} + {n} =", "completion": str(i + n), "level": n} for n in levels for i in range(12)]


def same(a, b):
    left, right = (load_file(run.folder / "model" / "model.safetensors") for run in (a, b))
    return all(torch.equal(left[k], right[k]) for k in left)


def test_one_phase_and_stacked_are_plain_fine_tuning_bit_for_bit(base, tmp_path):
    rows = made_rows([1])
    plain = tuned(base, tmp_path / "sft", "sft", rows)
    one = tuned(base, tmp_path / "one", {"small-llm-recipe": {"strategy": "phased", "phase_by": "level"}}, rows)
    stacked = tuned(base, tmp_path / "stacked", "small-llm-recipe", rows)
    assert same(plain, one)
    assert same(plain, stacked)


def test_phases_go_on_from_each_other_with_schedule_and_optimiser_anew(base, tmp_path):
    rows = made_rows([1, 2])
    options = {"strategy": "phased", "phase_by": "level"}
    phased = tuned(base, tmp_path / "phased", {"small-llm-recipe": options}, rows)
    records = {
        name: [json.loads(line) for line in path.read_text().splitlines()]
        for name, path in (
            ("first", tmp_path / "phased" / "stages" / "phase-1" / "metrics.jsonl"),
            ("second", tmp_path / "phased" / "metrics.jsonl"),
        )
    }
    # Each phase has 12 rows: 6 steps, and its own schedule from the first step on.
    rates = {name: [r["learning_rate"] for r in found] for name, found in records.items()}
    assert len(rates["first"]) == 6
    assert rates["first"] == rates["second"]
    # The second phase is plain fine-tuning of what the first one made.
    first = tuned(base, tmp_path / "first", "sft", made_rows([1]))
    second = tuned(first.folder / "model", tmp_path / "second", "sft", made_rows([2]))
    assert same(phased, second)
    assert "trained in 2 phases: 1 (12 rows), 2 (12 rows); 1 checkpoints were chosen" in (
        phased.folder / "manifest.json"
    ).read_text(encoding="utf-8")


def test_the_best_checkpoint_of_a_phase_is_the_one_to_go_on_from(base, tmp_path):
    rows = made_rows([1, 2])
    options = {"strategy": "phased", "phase_by": "level"}
    run = tuned(base, tmp_path / "run", {"small-llm-recipe": options}, rows, eval_steps=2, learning_rate=0.3)
    stage = tmp_path / "run" / "stages" / "phase-1"
    losses = {
        r["step"]: r["loss"]
        for r in map(json.loads, (stage / "metrics.jsonl").read_text().splitlines())
        if r["split"] == "eval"
    }
    best = min(losses, key=lambda step: losses[step])
    assert (stage / "checkpoints" / "best").readlink().name == f"step-{best:08d}"
    assert run.folder.is_dir()


def test_a_row_without_a_phase_is_named(base, tmp_path):
    rows = [*made_rows([1]), {"prompt": "1 + 9 =", "completion": "10"}]
    with pytest.raises(UserError, match=r"row 13 of rows has no column 'level'"):
        tuned(base, tmp_path / "x", {"small-llm-recipe": {"strategy": "phased", "phase_by": "level"}}, rows)
