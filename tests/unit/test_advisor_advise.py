"""The whole way of an advice: the command, its folder, what it refuses, and how race and comparison are put together."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import luthier
from luthier.advisor import advise as advising
from luthier.advisor.race import SFT, Progress
from luthier.advisor.trials import TrialRunner, shortened
from luthier.cli import main as cli
from luthier.core.errors import UserError
from luthier.lab.tokenizer import tokenizer
from luthier.recipe.load import load
from luthier.recipe.plan import plan
from luthier.recipe.source import parse


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama that knows nothing, with the lab's tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    words = tokenizer(64)
    torch.manual_seed(0)
    special = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), max_position_embeddings=64, **sizes, **special))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path):
    """220 sums, of which the last twenty repeat earlier ones."""
    rows = [{"prompt": f"{i} + 1 =", "completion": str(i + 1)} for i in (*range(200), *range(20))]
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def arguments(base, data, folder, *more):
    quick = ["--sample", "32", "--answers", "8", "evaluation.max_new_tokens=4", "data.keep=none"]
    return ["advise", "--model", base, "--data", data, "-o", str(folder), *quick, *more]


def test_without_a_race_it_measures_proposes_and_writes_a_recipe_that_runs(base, data, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "advice"
    assert cli.run(arguments(base, data, folder, "--no-race")) == 0
    shown = capsys.readouterr().out
    assert "20 of 220 rows (9.1%) repeat an earlier row word for word." in shown
    assert "deduplicate" in shown
    assert "Nothing was raced" in shown
    kept = json.loads((folder / "advice.json").read_text())
    assert kept["rules"]["candidates"][0]["entry"] == "deduplicate"
    assert kept["race"] is None
    assert {"advice.html", "advice.json", "asked.json", "findings.json", "recommended.yaml"} <= {
        p.name for p in folder.iterdir()
    }
    text = (folder / "recommended.yaml").read_text()
    assert "Copies are memorised" in text
    recipe = load(parse(text, "recommended.yaml")[0], ["training.max_steps=1", f"output={tmp_path / 'run'}"])
    assert recipe.data.stages == ["deduplicate"]
    plan(recipe)
    run = luthier.tune(
        folder / "recommended.yaml", overrides=["training.max_steps=1", f"output={tmp_path / 'run'}"], quiet=True
    )
    assert (run.folder / "model").is_dir()
    # Asked again, nothing is measured a second time; and --json is one document.
    monkeypatch.setattr(advising, "measure", None)
    assert cli.run(arguments(base, data, folder, "--no-race", "--json")) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["findings"] == kept["findings"]
    assert again["folder"] == str(folder)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--budget", "20"], "the budget '20' is not a time"),
        (["--methods", "half-tf"], r"there is no method 'half-tf'. Did you mean"),
        (["--methods", "half-ft(fraction=0.5"], "brackets"),
        (["training.epoch=2"], "training.epoch"),
        (["--seeds", "0"], "seeds"),
        (["--answers", "0"], "answers"),
    ],
)
def test_wrong_inputs_are_one_clear_line_and_leave_nothing(base, data, tmp_path, capsys, more, message):
    assert cli.run(arguments(base, data, tmp_path / "advice", *more)) == 2
    told = capsys.readouterr().err.strip()
    assert re.search(message, told)
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "advice").exists()


def test_a_model_or_data_that_is_not_there(data, tmp_path, capsys):
    assert cli.run(arguments("./no-such-model", data, tmp_path / "x")) == 2
    assert cli.run(arguments("lab:nano", str(tmp_path / "none.jsonl"), tmp_path / "x")) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2


def test_another_question_does_not_overwrite_an_advice(base, data, tmp_path):
    advising.Advisor(base, data, output=tmp_path / "advice", budget="5m")
    advising.Advisor(base, data, output=tmp_path / "advice", budget="5m")
    with pytest.raises(UserError, match=r"holds an advice on another question \(budget differ\)"):
        advising.Advisor(base, data, output=tmp_path / "advice", budget="6m")
    with pytest.raises(UserError, match=r"\(recipe differ\)"):
        advising.Advisor(base, data, output=tmp_path / "advice", budget="5m", overrides=["training.epochs=9"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="holds no advice"):
        advising.Advisor(base, data, output=tmp_path / "mine")


class Pretend(TrialRunner):
    """Plans like the real one and trains nothing."""

    def run_to(self, entry, step, length):
        score = 0.9 if entry == "lora" else 0.5
        records = [{"step": s, "loss": 3.0 - 0.01 * s, "grad_norm": 1.0, "split": "train"} for s in range(1, step + 1)]
        return Progress(step, score, 1.0 + 0.01 * step, 0.01 * step, records)


def canned(names):
    target = {"name": "target/score", "group": "target", "label": "Answers judged right", "unit": "share",
              "direction": "higher", "primary": True}  # fmt: skip
    entries = []
    for name in ("base", "sft", *names):
        better = {"value": 0.2, "low": 0.1, "high": 0.3, "verdict": "better"}
        kind = name if name in ("base", "sft") else "method"
        against = {} if kind == "base" else {"vs_base": {"target/score": better}}
        against |= {"vs_sft": {"target/score": better}} if kind == "method" else {}
        value = {"target/score": {"value": 0.5 + 0.1 * (name == "lora")}}
        entries.append(
            {"name": name, "kind": kind, "status": "done", "reason": None, "held_to": None, "values": value, **against}
        )
    return {"metrics": [target], "entries": entries, "seeds": [0], "confidence": 0.95, "title": "t", "costs": []}


def test_the_race_and_the_comparison_use_the_same_trials(base, data, tmp_path, monkeypatch):
    seen = {}

    def run(self, *_, **__):
        seen["final"] = self
        return canned([e.name for e in self.entries])

    monkeypatch.setattr(advising, "TrialRunner", Pretend)
    monkeypatch.setattr("luthier.comparison.run.Comparison.run", run)
    advisor = advising.Advisor(
        base, data, output=tmp_path / "advice", budget="10m", methods="loss-top-k", seeds=2, overrides=["data.keep=none"],
        sample_rows=32, answered_rows=4,
    )  # fmt: skip
    found = advisor.run()
    raced = [s["entry"] for s in found["race"]["standings"]]
    assert raced[:3] == [SFT, "loss-top-k", "deduplicate"]
    assert "lora" in raced
    final = seen["final"]
    assert [e.name for e in final.entries] == found["race"]["finalists"]
    assert found["race"]["finalists"][0] == "lora"
    assert len(final.seeds) == 2
    # The recipe of the final comparison is that of the race, so that its first seed is there already.
    from luthier.comparison.trial import trial

    runner = Pretend(advisor._race_recipe(), advisor.folder)
    for entry in (SFT, "lora"):
        assert trial(entry, runner.plan(entry, 1.0)).key == trial(entry, final.plans[entry, final.seeds[0]]).key
    # Candidates are ranked by rows that are neither trained on nor tested on, and the recommended recipe knows nothing of it.
    data_of = final.recipe.data
    assert [p.rpartition("/")[2] for p in (data_of.train, data_of.select, data_of.test)] == [
        "train.jsonl",
        "select.jsonl",
        "test.jsonl",
    ]
    assert found["verdict"]["entry"] == "lora"
    assert found["verdict"]["beats_sft"]
    recipe = load(parse(found["recommended"], "recommended.yaml")[0])
    assert recipe.parameters == ["lora"]
    assert recipe.data.train == data
    assert recipe.data.select is None
    assert "lora beat plain SFT" in found["recommended"].splitlines()[0]
    page = (tmp_path / "advice" / "advice.html").read_text(encoding="utf-8")
    assert "lora beat plain SFT" in page
    assert "loss-top-k" in page


def test_groups_lengths_and_steps(base, data, tmp_path):
    recipe = {
        "model": base, "data": {"train": data, "keep": "none"},
        "training": {"epochs": 2, "batch_rows": 20, "learning_rate": 1e-3},
    }  # fmt: skip
    runner = TrialRunner(recipe, tmp_path)
    assert runner.group("sft") == runner.group("sft[training.learning_rate=1e-4]") == "sft"
    assert runner.group("half-ft[training.epochs=2]") == "half-ft"
    assert runner.group("half-ft[data.limit=5]") != runner.group("half-ft")
    assert runner.steps("sft", 1.0) == 22
    assert runner.steps("sft", 0.5) == 11
    assert runner.steps("sft[training.batch_rows=44]", 1.0) == 10
    assert runner.steps("deduplicate", 1.0) == 20
    assert shortened(recipe, 0.25)["training"]["epochs"] == 0.5
