"""What each command hands on and prints; the functions behind them are stand-ins here."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import luthier.data
import luthier.runs
from luthier.cli import main as cli

RECIPE = "luthier: 1\nmodel: lab:nano\ndata: {train: lab:arithmetic}\noutput: runs/x\n"


def metric(value, **more):
    return {
        "value": value,
        "n": 10,
        "low": value - 0.1,
        "high": value + 0.1,
        "unit": "nats",
        "direction": "lower",
        **more,
    }


METRICS = {
    "before": {"target": {"loss": metric(2.0)}, "keep": {}, "calibration": {}, "items": {"target": [1, 2]}},
    "after": {"target": {"loss": metric(1.0)}, "keep": {"loss": metric(float("nan"))}, "items": {"target": [1, 2]}},
    "training": {"steps": 7},
}


SOURCE = {
    "name": "train",
    "layout": "pair",
    "read": {"rejected": {}},
    "prepared": {
        "rows": 1_234_567,
        "kept": 1_234_566,
        "nothing_to_learn": 1,
        "tokens": 9,
        "supervised_tokens": 8,
        "lengths": {"p50": 3, "p99": 4, "max": 5},
        "examples": {"nothing_to_learn": ["f:7"]},
    },
}
CHECK = {
    "task": "causal-lm",
    "model": {"id": "m", "parameters": 5, "max_length": None},
    "data": {"train": SOURCE, "test": None, "keep": [SOURCE | {"name": "text"}]},
    "steps": 3,
    "estimate": {
        "memory": {"weights": 2**20, "total": 2**31, "total_gib": 2.0},
        "seconds": 150.0,
        "notes": ["a remark"],
    },
    "methods": {
        **{axis: [{"name": "sft", "options": {}}] for axis in ("objective", "parameters")},
        **{axis: {"name": "greedy", "options": {}} for axis in ("procedure", "decoding")},
        "transforms": [],
        "stages": [],
        "weights": [],
        "analysis": [],
        "selection": None,
        "verifier": None,
    },
}


@pytest.fixture
def api(monkeypatch, tmp_path):
    """Stand-ins that remember how they were called."""
    monkeypatch.chdir(tmp_path)
    calls = {}

    def remember(name, result):
        def call(*args, **keys):
            calls[name] = (args, keys)
            return result

        return call

    run = SimpleNamespace(folder=Path("runs/x"), metrics=METRICS, model=None)
    fake = SimpleNamespace(
        calls=calls,
        train=remember("train", run),
        check=remember("check", CHECK),
        evaluate=remember("evaluate", {"model": "m", **METRICS["after"], "harness": {"arc": {"acc": 0.5}}}),
        generate=lambda model, prompts, **keys: (
            calls.update(generate=(model, prompts, keys)) or ["an [answer]"] * len(prompts)
        ),
        quickstart=remember("quickstart", {"runs": {"sft": METRICS, "half-ft": METRICS}, "report": "r.html"}),
    )
    monkeypatch.setattr(luthier.runs, "api", fake, raising=False)
    monkeypatch.setitem(sys.modules, "luthier.runs.api", fake)
    Path("r.yaml").write_text(RECIPE)
    return fake


def test_train(api, capsys):
    assert cli.run(["train", "r.yaml", "training.epochs=3", "--resume"]) == 0
    (plan,), keys = api.calls["train"]
    assert plan.recipe.training.epochs == 3
    assert keys == {"resume": True, "quiet": False}
    out = capsys.readouterr().out
    for word in (
        "loss ↓",
        "before",
        "after",
        "2 [1.9, 2.1]",
        "1 [0.9, 1.1]",
        "nats",
        "runs/x/model",
        "report.html",
        "steps",
    ):
        assert word in out


def test_train_json_is_one_document_and_nothing_else(api, capsys):
    assert cli.run(["train", "r.yaml", "--json"]) == 0
    assert api.calls["train"][1] == {"resume": False, "quiet": True}
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == ""
    assert found["folder"] == "runs/x"
    assert found["after"] == {
        "target": {"loss": metric(1.0)},
        "keep": {"loss": {**metric(0.0), **dict.fromkeys(("value", "low", "high"))}},
    }


def test_train_resumes_from_a_runs_folder(api):
    Path("runs/x").mkdir(parents=True)
    Path("runs/x/recipe.yaml").write_text(RECIPE.replace("nano", "small"))
    assert cli.run(["train", "runs/x", "--resume"]) == 0
    assert api.calls["train"][0][0].recipe.model.id == "lab:small"


def test_only_the_first_process_prints(api, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert cli.run(["train", "r.yaml", "--json"]) == 0
    assert capsys.readouterr().out == ""


def test_check(api, capsys):
    assert cli.run(["check", "r.yaml"]) == 0
    out = capsys.readouterr().out
    for words in ("1,234,567", "memory  about 2.00 GiB: weights 1.0 MiB", "time    about 2 min", "a remark"):
        assert words in out
    assert "note: train: 1 row (0.0%) without a supervised token, left out: f:7\n" in out
    assert "note: text: 1 row" in out
    assert cli.run(["check", "r.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == CHECK


def test_evaluate(api, capsys):
    assert cli.run(["evaluate", "r.yaml", "--harness", "arc_easy, hellaswag"]) == 0
    assert api.calls["evaluate"][1] == {"model_folder": None, "harness": ["arc_easy", "hellaswag"]}
    out = capsys.readouterr().out
    assert "loss" in out
    assert "arc" in out
    Path("runs/x/model").mkdir(parents=True)
    Path("runs/x/recipe.yaml").write_text(RECIPE)
    assert cli.run(["evaluate", "runs/x", "--json"]) == 0
    assert api.calls["evaluate"][1] == {"model_folder": Path("runs/x/model"), "harness": None}
    assert json.loads(capsys.readouterr().out)["target"]["loss"]["value"] == 1.0
    assert cli.run(["evaluate", "r.yaml", "--model", "nowhere"]) == 2
    assert cli.run(["evaluate", "r.yaml", "--harness", " , "]) == 2


def test_generate_from_arguments(api, capsys):
    assert cli.run(["generate", "lab:nano", "1+1="]) == 0
    keys = {"decoding": "greedy", "options": {}, "max_new_tokens": 256, "seed": 0}
    assert api.calls["generate"] == ("lab:nano", ["1+1="], keys)
    assert capsys.readouterr().out == "an [answer]\n"
    assert cli.run(["generate", "lab:nano", "a", "b", "-d", "sample", "-o", "temperature=0.5", "--json"]) == 0
    keys |= {"decoding": "sample", "options": {"temperature": 0.5}}
    assert api.calls["generate"][2] == keys
    assert json.loads(capsys.readouterr().out) == [
        {"prompt": "a", "completion": "an [answer]"},
        {"prompt": "b", "completion": "an [answer]"},
    ]


def test_generate_takes_prompts_from_files_and_pipes(api, capsys, monkeypatch):
    chat = [{"role": "user", "content": "hi"}]
    Path("p.jsonl").write_text(json.dumps({"messages": chat}) + "\n\n" + json.dumps({"prompt": "a\nb", "x": 1}) + "\n")
    assert cli.run(["generate", "runs/x", "--file", "p.jsonl"]) == 0
    assert api.calls["generate"][:2] == ("runs/x", [chat, "a\nb"])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"one\n\ntwo\n"), isatty=lambda: False))
    assert cli.run(["generate", "lab:nano"]) == 0
    assert api.calls["generate"][1] == ["one", "two"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-d", "sampel", "p"], "Did you mean 'sample'?"),
        (["-d", "sample", "-o", "temprature=1", "p"], "Did you mean 'temperature'?"),
        (["-d", "sample", "-o", "temperature=0", "p"], "must be greater than 0"),
        (["-d", "sample", "-o", "temperature", "p"], "name=value"),
        (["--file", "none.txt"], "there is no file 'none.txt'"),
        (["--file", "r.yaml", "p"], "not both"),
        (["--file", "bad.jsonl"], "bad.jsonl:2: a row holds 'prompt'"),
        (["--file", "broken.jsonl"], "broken.jsonl:1: not valid JSON"),
        (["--file", "empty.txt"], "holds no prompt"),
        (["--file", "latin.txt"], "not UTF-8"),
    ],
)
def test_generate_refuses(api, capsys, arguments, words):
    Path("bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    Path("broken.jsonl").write_text('{"prompt": \n')
    Path("empty.txt").write_text("\n")
    Path("latin.txt").write_bytes(b"\xe9\n")
    assert cli.run(["generate", "lab:nano", *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert "generate" not in api.calls


def test_quickstart(api, capsys):
    assert cli.run(["quickstart", "here"]) == 0
    assert api.calls["quickstart"] == ((Path("here"),), {"quiet": False})
    out = capsys.readouterr().out
    for word in ("base", "sft", "half-ft", "loss", "r.html"):
        assert word in out
    assert cli.run(["quickstart", "here", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"]["sft"]["after"]["target"]["loss"]["value"] == 1.0
    assert "items" not in found["runs"]["sft"]["after"]


def test_quickstart_deletes_nothing_of_the_users(monkeypatch, tmp_path):
    from luthier.core.errors import UserError
    from luthier.runs.api import quickstart

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        quickstart(tmp_path / "mine", quiet=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


def test_show_data(api, capsys, monkeypatch):
    rows = [{"source": "f.jsonl", "row": i} for i in range(1, 6)]
    report = SimpleNamespace(
        to_dict=lambda: {"rows": 8, "truncated": 2, "supervised_lost": 30, "examples": {"truncated": ["f:1"]}}
    )
    read = SimpleNamespace(
        to_dict=lambda: {"rejected": {"empty": 3}, "reject_file": "rejects.jsonl", "duplicated_rows": 1}
    )
    api.prepare_data = lambda plan: (
        SimpleNamespace(dataset=rows, report=read),
        "renderer",
        SimpleNamespace(report=report),
    )
    tokens = [("<s>", False, "prompt"), ("a", False, "prompt"), ("b", True, "completion"), ("c", True, "completion")]

    def account(renderer, row):
        about = {"row": row["row"], "source": "f.jsonl", "kind": "pair", "length": 4, "supervised": 2, "label": "x"}
        return about | {"tokens": [{"text": t, "supervised": s, "origin": o} for t, s, o in tokens]}

    fake = SimpleNamespace(coloured=lambda renderer, row: None, spans_json=account)
    monkeypatch.setattr(luthier.data, "inspect", fake, raising=False)
    monkeypatch.setitem(sys.modules, "luthier.data.inspect", fake)
    assert cli.run(["show-data", "r.yaml", "--rows", "2", "--start", "1"]) == 0
    out = capsys.readouterr().out
    assert "f.jsonl, row 2 (pair): 4 tokens, 2 supervised\n[prompt] <s>a[completion] ⟦bc⟧\nlabel: x\n" in out
    assert "row 3" in out
    assert "row 4" not in out
    assert "note: train: 3 rows left out: empty; listed in rejects.jsonl\n" in out
    assert "note: train: 2 rows (25.0%) cut at the maximal length, which loses 30 supervised tokens: f:1\n" in out
    assert "note: train: 1 row repeats an earlier one\n" in out
    assert cli.run(["show-data", "r.yaml", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["row"] for row in found["rows"]] == [1, 2, 3]
    assert found["prepared"]["truncated"] == 2
    assert cli.run(["show-data", "r.yaml", "--start", "5"]) == 2
    assert "there are 5 rows" in capsys.readouterr().err


def test_init_writes_a_recipe_that_can_be_planned(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 4)
    Path("test.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    assert cli.run(["init", "lab:nano", "train.jsonl"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "wrote recipe.yaml" in err
    text = Path("recipe.yaml").read_text()
    assert "  test: test.jsonl" in text
    from luthier.recipe.load import load
    from luthier.recipe.plan import plan

    assert plan(load("recipe.yaml")).recipe.output.startswith("runs/")
    assert cli.run(["init", "lab:nano", "train.jsonl"]) == 2
    assert "--force" in capsys.readouterr().err
    assert cli.run(["init", "lab:nano", "train.jsonl", "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == "recipe.yaml"
    assert cli.run(["init", "lab:nano", "train.jsonl", "-o", "-"]) == 0
    assert capsys.readouterr().out == text


def test_migrate(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    old = "model: lab:nano # mine\ndata: {train: a}\n"
    Path("r.yaml").write_text(old)
    assert cli.run(["migrate", "r.yaml"]) == 0
    out, err = capsys.readouterr()
    assert out == "luthier: 1\n" + old
    assert "luthier: 1 written" in err
    assert Path("r.yaml").read_text() == old
    assert cli.run(["migrate", "r.yaml", "--write", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["written"] is True
    assert Path("r.yaml").read_text() == "luthier: 1\n" + old
    assert cli.run(["migrate", "r.yaml"]) == 0
    assert "nothing to change" in capsys.readouterr().err


def test_methods(capsys):
    assert cli.run(["methods"]) == 0
    out = capsys.readouterr().out
    assert "beyond-log-likelihood" in out
    assert cli.run(["methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"axis": "objective", "name": "sft"}.items() <= next(m for m in found if m["name"] == "sft").items()
    assert cli.run(["methods", "--axis", "decoding", "--json"]) == 0
    assert {m["axis"] for m in json.loads(capsys.readouterr().out)} == {"decoding"}


def test_one_method_in_detail(capsys):
    assert cli.run(["methods", "sample"]) == 0
    out = capsys.readouterr().out
    for word in ("temperature", "above 0", "min_p", "float", "rollout"):
        assert word in out
    assert cli.run(["methods", "sample", "--json"]) == 0
    (about,) = json.loads(capsys.readouterr().out)
    option = next(o for o in about["options"] if o["name"] == "temperature")
    assert option == {
        "name": "temperature",
        "type": "float",
        "accepted": "above 0",
        "required": False,
        "default": 1.0,
        "description": "below 1 sharpens, above 1 flattens",
    }
    assert about["schema"]["additionalProperties"] is False
    # One slug may stand on two axes.
    assert cli.run(["methods", "sft", "--json"]) == 0
    assert [m["axis"] for m in json.loads(capsys.readouterr().out)] == ["objective", "procedure"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["methods", "smaple"], "Did you mean 'sample'?"),
        (["methods", "--axis", "objectiv"], "Did you mean 'objective'?"),
    ],
)
def test_unknown_methods(capsys, arguments, words):
    assert cli.run(arguments) == 2
    assert words in capsys.readouterr().err


def test_doctor_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    status = cli.run(["doctor", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert status == (1 if facts["problems"] else 0)
    assert list(tmp_path.rglob("*")) == []
    assert facts["packages"]["torch"].startswith("2.")
    assert facts["cache"]["folder"] == str(tmp_path / "cache")
    assert facts["cache"]["exists"] is False
    assert facts["torch"]["threads"] >= 1
    assert facts["hardware"]["cores usable"] >= 1
    assert facts["optional"]["lm_eval"]["install"] == "luthier[harness]"


def test_doctor_finds_what_is_wrong(tmp_path, monkeypatch, capsys):
    from luthier.cli import doctor

    versions = {"torch": "2.1.0", "peft": None}
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, "99.0"))
    from packaging.specifiers import SpecifierSet

    monkeypatch.setattr(doctor, "_required", lambda: {"torch": SpecifierSet(">=2.8"), "peft": SpecifierSet(">=0.21")})
    monkeypatch.setattr(doctor, "_torch", lambda: {"threads": 999})
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    assert cli.run(["doctor", "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert "torch is 2.1.0, needed is >=2.8: pip install 'torch>=2.8'" in problems
    assert "peft is not installed: pip install 'peft>=0.21'" in problems
    assert any("torch uses 999 threads" in p for p in problems)
