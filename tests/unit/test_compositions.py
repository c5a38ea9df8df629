"""Methods of four axes in one recipe, from the file to the saved adapter."""

from __future__ import annotations

import json

import pytest

import luthier

RECIPE = """\
luthier: 1
model: lab:nano
data: {train: "lab:arithmetic?n=64", test: "lab:arithmetic?n=16", keep: null}
objective:
  anchored-sft: {anchor_weight: 0.1}
transforms:
  - masked-thought: {rate_max: 0.3}
selection:
  uds: {keep_fraction: 0.5}
parameters:
  - lora: {rank: 4}
training: {epochs: 2, batch_rows: 8, learning_rate: 1.0e-3, log_steps: 1}
evaluation: {before: false, generate: false}
"""


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("composed")
    (folder / "recipe.yaml").write_text(RECIPE)
    run = luthier.tune(folder / "recipe.yaml", overrides=[f"output={folder / 'run'}"], quiet=True)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return run, [json.loads(line) for line in lines]


def test_each_of_the_four_acts(composed):
    _, records = composed
    assert len(records) == 8  # half of the 64 rows in batches of 8, twice
    assert all(r["nll"] > 0 and 0 < r["mean_probability"] < 1 for r in records)
    assert records[0].get("masked_thought_rate", 0.0) == 0.0 < records[-1]["masked_thought_rate"]
    assert records[-1]["kl"] > 0, "the anchor sees the model move from its base"
    assert records[-1]["kl_to_base"] > 0
    assert {"utility_kept", "utility_dropped"} <= set(records[0])


def test_the_adapter_opens_in_plain_peft(composed):
    from peft import AutoPeftModelForCausalLM

    run, _ = composed
    opened = AutoPeftModelForCausalLM.from_pretrained(run.folder / "model")
    assert any("lora_A" in name for name, _ in opened.named_parameters())


SPARSE = """\
luthier: 1
model: lab:nano
data: {train: "lab:arithmetic?n=64", test: "lab:arithmetic?n=16", keep: null}
objective: dynamic-ft
selection:
  uds: {keep_fraction: 0.5}
parameters:
  - spiel: {density: 0.02, reselect_every: 4, accumulate: 2}
training: {epochs: 2, batch_rows: 8, learning_rate: 1.0e-3, log_steps: 1}
evaluation: {before: false, generate: false}
"""


def test_sparse_weights_with_another_loss_and_chosen_rows(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from luthier.models.delta import Delta
    from luthier.models.load import load

    (tmp_path / "recipe.yaml").write_text(SPARSE)
    run = luthier.tune(tmp_path / "recipe.yaml", overrides=[f"output={tmp_path / 'run'}"], quiet=True)
    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 8
    assert all(r["nll"] > 0 and "utility_kept" in r for r in records)
    assert [r["step"] for r in records if "replaced" in r] == [2, 6]
    base, tuned = load("lab:nano"), AutoModelForCausalLM.from_pretrained(run.folder / "model")
    delta = Delta.load(run.folder / "delta")
    changed = sum(int((p != dict(tuned.named_parameters())[n]).sum()) for n, p in base.model.named_parameters())
    assert 0 < changed <= delta.entries <= 0.02 * sum(p.numel() for p in base.model.parameters())
    delta.apply(base.model, base.fingerprint)
    for (name, a), b in zip(base.model.named_parameters(), tuned.parameters(), strict=True):
        assert torch.equal(a, b), name
