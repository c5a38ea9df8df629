"""A whole comparison with real trials in processes of their own, on a model of a few thousand parameters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import luthier
from luthier.cli import main as cli
from luthier.comparison.run import Comparison
from luthier.core.errors import UserError
from luthier.lab.tokenizer import tokenizer

ROWS = [{"question": f"{i} + 1 =", "answer": str(i + 1)} for i in range(24)]
METHODS = "half-ft, loss-top-k(oversample=2)"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    place = tmp_path_factory.mktemp("comparison")
    words = tokenizer(64)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(place / "model")
    words.save_pretrained(place / "model")
    file = place / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {
        "model": str(place / "model"),
        "data": {"train": str(file), "test": str(file), "keep": str(file), "verifier": "numeric"},
        "training": {
            "epochs": 2,
            "batch_rows": 8,
            "learning_rate": 1e-2,
            "log_steps": 1,
            "threads": 1,
            "save_steps": 2,
        },
        "evaluation": {"max_new_tokens": 4, "limit": 12, "batch_rows": 8},
        "output": str(place / "run"),
    }


def numbers(made):
    """What must not depend on how a comparison came about: everything but clocks and memory."""
    kept = {}
    for entry in made["entries"]:
        cost = {k: v for k, v in entry["cost"].items() if k not in ("seconds", "peak_memory_bytes")}
        kept[entry["name"]] = (entry["values"], entry.get("vs_sft"), entry.get("vs_base"), cost, entry["curve"])
    return kept


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return luthier.compare(recipe, methods=METHODS, seeds=1, output=folder, quiet=True), folder


def test_what_a_comparison_leaves(whole):
    made, folder = whole
    names = [e["name"] for e in made["entries"]]
    assert names == [
        "base",
        "sft",
        "half-ft",
        "loss-top-k(oversample=2)",
        "loss-top-k(oversample=2) (equal tokens)",
    ]
    assert all(e["status"] == "done" for e in made["entries"])
    sft, half = made["entries"][1], made["entries"][2]
    assert {"target/score", "target/loss", "calibration/ece", "drift/kl", "drift/weights"} <= set(sft["values"])
    assert half["vs_sft"]["target/loss"]["value"] == pytest.approx(
        half["values"]["target/loss"]["value"] - sft["values"]["target/loss"]["value"]
    )
    assert sft["cost"]["trainable_share"] == 1.0
    assert half["cost"]["trainable_share"] < 1.0
    assert half["cost"]["flops"] < sft["cost"]["flops"]
    assert sft["curve"][0]["points"][-1]["supervised"] == sft["cost"]["supervised_tokens"]
    held = made["entries"][4]
    assert held["held_to"] == "tokens"
    assert held["cost"]["supervised_tokens"] == pytest.approx(sft["cost"]["supervised_tokens"], rel=0.1)
    assert json.loads((folder / "comparison.json").read_text())["findings"] == made["findings"]
    assert "<h1" in (folder / "comparison.html").read_text()
    assert not list(folder.glob("trials/*/run/model"))


def test_values_are_those_the_evaluation_measured(whole):
    """Computed again from the kept positions they equal the streaming metrics, calibration error included."""
    made, folder = whole
    for entry in made["entries"]:
        for trial in entry["trials"]:
            measured = json.loads((folder / trial["folder"] / "evaluation.json").read_text())["after"]
            for ours, group, theirs in (
                ("target/loss", "target", "loss"),
                ("target/score", "target", "score"),
                ("target/token_accuracy", "target", "token_accuracy"),
                ("calibration/brier", "calibration", "brier"),
                ("calibration/ece", "calibration", "ece_equal_mass"),
            ):
                assert entry["values"][ours]["value"] == pytest.approx(measured[group][theirs]["value"], abs=1e-6), ours


def test_a_second_call_runs_nothing_and_a_further_method_runs_alone(recipe, whole):
    made, folder = whole
    seen = []
    comparison = Comparison(recipe, methods=f"{METHODS},dynamic-ft", seeds=1, output=folder)
    again = comparison.run(lambda trial, state, reason: seen.append((trial.entry, state)))
    assert {entry for entry, state in seen if state == "running"} == {"dynamic-ft"}
    old, new = numbers(made), numbers(again)
    for name in ("sft", "half-ft"):
        assert old[name][0] == new[name][0]


def test_the_same_method_under_another_name_is_no_difference(recipe, whole):
    _, folder = whole
    made = luthier.compare(recipe, methods="sft[training.beta1=0.9]", seeds=1, output=folder, quiet=True)
    found = made["entries"][2]["vs_sft"]
    assert all(d["value"] == 0 and d["verdict"] in ("same", "unknown") for d in found.values())


def test_a_comparison_killed_on_the_way_has_the_same_numbers(recipe, whole, tmp_path):
    made, _ = whole
    file = tmp_path / "recipe.json"
    folder = tmp_path / "out"
    file.write_text(json.dumps({"recipe": recipe, "methods": "half-ft", "folder": str(folder)}))
    code = (
        "import json,sys,luthier; s=json.load(open(sys.argv[1]));"
        "luthier.compare(s['recipe'],methods=s['methods'],seeds=1,output=s['folder'],quiet=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(file)], start_new_session=True)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not list(folder.glob("trials/*/run/checkpoints/*")):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)  # the trials with it
    process.wait()
    assert not (folder / "comparison.json").exists()
    found = numbers(luthier.compare(recipe, methods="half-ft", seeds=1, output=folder, quiet=True))
    assert {name: found[name][0] for name in found} == {name: numbers(made)[name][0] for name in found}
    assert [found[name][3:] for name in found] == [numbers(made)[name][3:] for name in found]


def test_a_method_that_fails_has_its_reason_in_its_line(recipe, whole, tmp_path):
    _, folder = whole
    broken = tmp_path / "broken.py"
    broken.write_text(
        "from luthier.core.registry import objective\n\n\n"
        "@objective('broken')\ndef broken(logp_N, weight_N):\n    raise RuntimeError('no such luck')\n"
    )
    made = luthier.compare(recipe, methods=f"{broken}:broken", seeds=1, output=folder, quiet=True)
    entry = made["entries"][2]
    assert entry["status"] == "failed"
    assert "no such luck" in entry["reason"]
    assert any("no such luck" in said for said in made["findings"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-m", "halfft"], "Did you mean 'half-ft'"),
        (["-m", "half-ft(fraction=7)"], "fraction"),
        (["-m", "sft[training.learning_rat=1]"], "learning_rate"),
        (["--budget", "hours=3"], "--budget"),
    ],
)
def test_wrong_input_ends_with_status_2_before_anything_runs(recipe, tmp_path, capsys, arguments, said):
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({"luthier": 1, **recipe}))
    assert cli.run(["compare", str(file), *arguments, "-o", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err.strip()
    assert said in told
    assert "\n" not in told
    assert not (tmp_path / "out" / "trials").exists()


def test_a_budget_of_tokens_is_held_by_all(recipe, whole):
    _, folder = whole
    made = luthier.compare(
        recipe, methods="loss-top-k(oversample=2)", seeds=1, budget="tokens=120", output=folder, quiet=True
    )
    used = [e["cost"]["supervised_tokens"] for e in made["entries"][1:]]
    assert all(abs(tokens - 120) <= 30 for tokens in used), used


def test_trials_on_a_ray_cluster_of_two_nodes(recipe, whole, tmp_path):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made, _ = whole
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        found = luthier.compare(recipe, seeds=1, output=tmp_path, ray=cluster.address, quiet=True)
    finally:
        ray.shutdown()
        cluster.shutdown()
    same = numbers(found)
    assert same == {name: numbers(made)[name] for name in same}


def test_no_cluster_at_the_address_is_one_line(recipe, tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(UserError, match="--ray: no cluster answers"):
        luthier.compare(recipe, methods="half-ft", seeds=1, output=tmp_path, ray="127.0.0.1:1", quiet=True)
