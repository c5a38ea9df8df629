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
