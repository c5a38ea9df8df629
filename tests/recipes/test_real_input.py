"""A real pretrained checkpoint on a real data set, from the recipe; skipped where they are not beside the checkout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import luthier

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT.parent / "shared" / "models" / "stories260k"

OPENS_ALONE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
text = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0])
print(json.dumps({"text": text, "luthier": "luthier" in sys.modules, "dtype": str(model.dtype)}))
"""


@pytest.mark.skipif(not MODEL.is_dir(), reason="its model and data are not here")
def test_gsm8k_on_a_pretrained_llama(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    small = ["data.limit=400", "evaluation.limit=16", "evaluation.max_new_tokens=8"]
    steps = ["training.max_steps=25", "training.save_steps=25", "training.eval_steps=null", "training.log_steps=5"]
    run = luthier.tune(
        "recipes/gsm8k_stories260k.yaml", overrides=[*small, *steps, f"output={tmp_path / 'run'}"], quiet=True
    )
    before, after = (run.metrics[k]["target"]["loss"]["value"] for k in ("before", "after"))
    assert 6 < before < 8
    assert after < before - 2
    kept = run.metrics["after"]["keep"]
    assert {"lab:text: loss", "tinyshakespeare: loss"} <= set(kept)
    assert all(kept[k]["n"] > 100 for k in kept if k.endswith("loss"))
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    done = subprocess.run(
        [sys.executable, "-c", OPENS_ALONE, str(tmp_path / "run" / "model")], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["luthier"] is False
    assert found["dtype"] == "torch.float32"
    assert len(found["text"]) > len("Once upon a time")


@pytest.mark.skipif(not MODEL.is_dir(), reason="its model and data are not here")
def test_a_greedy_soup_and_lines_over_three_fine_tunings(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    small = ["data.limit=300", "evaluation.limit=16", "evaluation.max_new_tokens=8", "evaluation.before=false"]
    steps = ["training.max_steps=20", "training.save_steps=null", "training.eval_steps=null", "training.log_steps=5"]
    places = []
    for number, rate in enumerate((1e-3, 2e-3, 4e-3)):
        places.append(tmp_path / f"run{number}")
        own = [f"training.learning_rate={rate}", f"seed={number}", f"output={places[-1]}"]
        luthier.tune("recipes/gsm8k_stories260k.yaml", overrides=[*small, *steps, *own], quiet=True)
    soup = luthier.merge(places, tmp_path / "soup", op={"model-soups": {"method": "greedy"}}, rows=places[0])
    found = soup.operations[0]["found"]
    assert len(found["log"]) == 3
    assert found["score"] >= max(found["scores"].values())
    assert soup.operations[0]["found"]["coefficients"].keys() <= {"tuned", *map(str, places)}
    lines = luthier.merge(tmp_path / "soup", tmp_path / "lines", op="lines", base=MODEL, rows=places[0])
    found = lines.operations[0]["found"]
    assert found["blocks"] == {"model.layers": 5}
    assert [row["alpha"] for row in found["search"]] == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    tuned, nearly_base = found["search"][0], found["search"][-1]
    assert tuned["target"] > nearly_base["target"]
    assert tuned["control"] < nearly_base["control"]
    for folder in ("soup", "lines"):
        done = subprocess.run(
            [sys.executable, "-c", OPENS_ALONE, str(tmp_path / folder)], capture_output=True, text=True, check=True
        )
        assert json.loads(done.stdout)["luthier"] is False
