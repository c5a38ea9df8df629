"""What a new user met on the way from a recipe to a model: each test is one surprise that must not come back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForTokenClassification, LlamaConfig, LlamaForCausalLM

import luthier
from luthier.cli import main as cli
from luthier.core.errors import UserError
from luthier.lab.tokenizer import tokenizer
from luthier.methods.decoding.greedy import Greedy
from luthier.runs import api, disk

ROWS = [{"question": f"{i} + 1 =", "answer": str(i + 1)} for i in range(24)]
QUICK = {
    "training": {"max_steps": 2, "batch_rows": 8, "learning_rate": 1e-3, "log_steps": 1},
    "evaluation": {"max_new_tokens": 4, "bootstrap": 100},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A Llama of 64 positions with the lab's tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "llama"
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
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A BERT of 32 positions, which are a table."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    words = tokenizer(32)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)
    BertForTokenClassification(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder of its own."""
    monkeypatch.chdir(tmp_path)


def tune(model: Path, output: str, rows=ROWS, data=None, **sections):
    """A run of two steps."""
    return luthier.tune(
        model=str(model),
        data={"train": rows, "test": rows[:4], "keep": "none", **(data or {})},
        output=output,
        quiet=True,
        **{**QUICK, **sections},
    )


def test_a_run_that_its_data_stops_leaves_the_folder_free(llama):
    with pytest.raises(UserError, match="is null or missing"):
        tune(llama, "runs/a", rows=[*ROWS, {"question": "x", "answer": None}])
    assert not Path("runs/a/recipe.yaml").exists()
    assert tune(llama, "runs/a").folder == Path("runs/a")


def test_generation_writes_prompts_as_training_did(llama):
    """Question and answer are joined by a line break; the model must be asked with it."""
    tune(llama, "runs/a", data={"system": "Add."})
    assert json.loads(Path("runs/a/model/luthier.json").read_text())["prompts"] == {"separator": "\n", "system": "Add."}
    asked = []
    original = Greedy.generate

    def spy(self, model, prompts, ctx):
        asked.extend(prompts)
        return original(self, model, prompts, ctx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Greedy, "generate", spy)
        assert len(luthier.generate("runs/a", ["3 + 1 ="], max_new_tokens=2)) == 1
    words = AutoTokenizer.from_pretrained("runs/a/model")
    assert asked == [[words.bos_token_id, *words("Add.\n\n3 + 1 =\n", add_special_tokens=False).input_ids]]


def test_only_what_ends_all_prompts_is_put_behind_one(llama):
    """The bases of the lab read questions that end with a line break, and openings of stories that do not."""
    asked = [{"prompt": f"say {n}\n", "completion": "a"} for n in range(20)]
    spaced = tune(llama, "runs/a", rows=asked).folder / "model" / "luthier.json"
    assert json.loads(spaced.read_text())["prompts"] == {"separator": "\n"}
    mixed = tune(llama, "runs/b", rows=[*asked, {"prompt": "once upon", "completion": " a time"}])
    assert not (mixed.folder / "model" / "luthier.json").exists()


def test_a_chat_template_of_the_recipe_is_saved_with_the_model(llama):
    rows = [
        {"messages": [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]}
        for r in ROWS
    ]
    tune(llama, "runs/a", rows=rows, data={"template": "plain"})
    words = AutoTokenizer.from_pretrained("runs/a/model")
    text = words.apply_chat_template(rows[3]["messages"][:1], tokenize=False, add_generation_prompt=True)
    assert text == "<bos>User: 3 + 1 =\nAssistant:"


def test_the_card_asks_the_model_as_training_did(llama):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 8
    tune(llama, "runs/a")
    tune(llama, "runs/b", rows=rows, data={"template": "plain"})
    assert 'inputs = processor("Your prompt\\n", return_tensors="pt")' in Path("runs/a/README.md").read_text()
    assert "processor.apply_chat_template(" in Path("runs/b/README.md").read_text()


def test_material_to_keep_is_judged_by_its_own_verifier(llama):
    """The verifier of the recipe is for the target: it would find no tests in rows of another task."""
    kept = [{"question": "2 + 2 =", "answer": "4", "verifier": "numeric"}] * 4
    Path("a").mkdir()
    Path("b").mkdir()
    for folder in ("a", "b"):
        Path(f"{folder}/kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    run = tune(
        llama, "runs/a", data={"verifier": {"regex": {"pattern": "x"}}, "keep": ["a/kept.jsonl", "b/kept.jsonl"]}
    )
    found = run.metrics["after"]["keep"]
    assert {"kept: score", "b/kept.jsonl: score"} <= set(found)  # two files of one name are told apart
    from luthier.runs.measure import Measure

    measure = Measure(api.plan_of(model=str(llama), data={"train": ROWS, "verifier": "python-tests"}), None, None)
    assert measure.verifier.choice.slug == "python-tests"
    row = {"completion": "4", "extra": json.dumps({"answer": "4", "verifier": "numeric"})}
    assert measure.keep_verifier([row], ["it is 4.0"], None) == [1.0]


def test_weights_can_be_read_by_others(llama):
    tune(llama, "runs/a", parameters=["lora"])
    tune(llama, "runs/b")
    for file in (Path("runs/a/model/adapter_model.safetensors"), Path("runs/b/model/model.safetensors")):
        assert file.stat().st_mode == (file.parent / "README.md").stat().st_mode


def test_a_lora_run_is_silent_and_merges(llama, capfd):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        run = tune(llama, "runs/a", parameters=["lora"], training={**QUICK["training"], "gradient_checkpointing": True})
        merged = luthier.merge("runs/a", "merged")
    assert [str(w.message) for w in caught if w.category is FutureWarning] == []
    assert capfd.readouterr().err == ""
    assert repr(run) == "Run(folder=PosixPath('runs/a'))"  # not the whole model
    assert merged.max_difference <= merged.tolerance
    assert json.loads(Path("merged/luthier.json").read_text()) == {"prompts": {"separator": "\n"}}
    assert luthier.generate("merged", ["3 + 1 ="], max_new_tokens=3) == luthier.generate(
        "runs/a", ["3 + 1 ="], max_new_tokens=3
    )
    assert cli.run(["merge", "runs/a", "merged"]) == 2
    assert "there already" in capfd.readouterr().err


def test_weight_operations_refuse_an_adapter_before_training(llama):
    with pytest.raises(UserError, match=r"'half-reset' works on a whole model, but 'lora' .* leaves an adapter"):
        api.plan_of(model=str(llama), data=ROWS, parameters=["lora"], weights=["half-reset"])
    api.plan_of(model=str(llama), data=ROWS, parameters=[{"lora": {"merge": True}}], weights=["half-reset"])


def test_rows_longer_than_a_table_of_positions_are_refused(bert, llama):
    rows = [{"tokens": ["a", "b"], "tags": ["O", "X"]}] * 4
    section = {"train": rows, "keep": "none", "max_length": 33}
    with pytest.raises(UserError, match="positions for 32 tokens, not for 33"):
        luthier.check({"model": str(bert), "data": section})
    # Rotations go on, which is worth a word and no more.
    found = luthier.check({"model": str(llama), "data": {"train": ROWS, "keep": "none", "max_length": 65}})
    assert found["notes"] == ["data.max_length is 65, but the model was made for 64 tokens"]


def test_check_says_that_the_folder_is_taken(llama):
    tune(llama, "runs/a")
    recipe = {"model": str(llama), "data": {"train": ROWS, "keep": "none"}}
    assert "already holds a run" in luthier.check(recipe, overrides=["output=runs/a"])["notes"][0]
    assert luthier.check(recipe, overrides=["output=runs/b"])["notes"] == []


def test_an_output_that_cannot_be_is_refused_by_name(llama):
    Path("file").touch()
    recipe = {"model": str(llama), "data": {"train": ROWS, "keep": "none"}}
    for output in ("file", "file/run"):
        with pytest.raises(UserError, match="is a file, not a folder"):
            luthier.check({**recipe, "output": output})
        with pytest.raises(UserError, match="is a file, not a folder"):
            luthier.tune({**recipe, "output": output}, quiet=True)


def test_a_disk_that_is_too_small_is_refused_before_training(llama, monkeypatch):
    plan = api.plan_of(model=str(llama), data=ROWS, output="runs/a", training={"save_steps": 5, "keep_checkpoints": 2})
    from luthier.models.load import inspect

    info = inspect(str(llama))
    # The model in fp32, and three checkpoints of weights and AdamW's two moments.
    assert disk.needed(plan, info) == info.parameters * (4 + 3 * 12) + disk.REPORT
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"at least 2\.\d MB will be written to runs/a, where 0.0 MB are free"):
        disk.check(plan, info)


def test_show_data_counts_what_is_learnt_of_every_task(bert):
    from luthier.data import inspect

    rows = [{"tokens": ["a", "b", "c"], "tags": ["O", "X", "O"]}] * 4
    data, renderer, _ = api.prepare_data(api.plan_of(model=str(bert), data={"train": rows, "keep": "none"}))
    assert inspect.spans_json(renderer, data.dataset[0])["supervised"] == 3
    labelled = [{"text": "a b", "label": name} for name in ("x", "y")]
    recipe = {"model": {"id": str(bert), "task": "sequence-classification"}, "data": {"train": labelled}}
    data, renderer, _ = api.prepare_data(api.plan_of(recipe))
    assert inspect.spans_json(renderer, data.dataset[0])["supervised"] == 1


def test_generate_refuses_a_model_that_writes_no_text(bert):
    with pytest.raises(UserError, match="token-classification, which does not write text"):
        luthier.generate(bert, ["a"])


def test_the_public_names_work_in_any_order(llama):
    import luthier.methods  # its name must not hide a function

    assert {m.slug for m in luthier.list_methods()} >= {"sft", "lora"}
    assert set(luthier.__all__) <= set(dir(luthier))
    tune(llama, "runs/a", parameters=["lora"])
    recipe = {"model": str(llama), "data": {"train": ROWS, "test": ROWS[:4], "keep": "none"}, **QUICK}
    base, found = luthier.evaluate(recipe), luthier.evaluate(recipe, "runs/a/model")
    assert found["target"]["loss"]["value"] < base["target"]["loss"]["value"]
    draws = [luthier.generate(llama, ["a"], decoding="sample", seed=s, max_new_tokens=8) for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_init_measures_the_words_of_tagged_rows_and_leaves_verifiers_of_the_rows(bert, capsys):
    tagged = "\n\n".join("\n".join(f"{word} O" for word in ["a"] * 20) for _ in range(3))
    Path("t.txt").write_text(tagged + "\n")
    assert cli.run(["init", str(bert), "t.txt", "-o", "-"]) == 0
    assert "truncation: drop" not in capsys.readouterr().out  # 20 words and their tags would be more than 32 tokens
    assert cli.run(["init", "lab:nano", "lab:arithmetic", "-o", "-"]) == 0
    assert "# verifier: null" in capsys.readouterr().out


def test_small_words(capsys):
    assert cli.run(["chekc", "x"]) == 2
    assert capsys.readouterr().err.endswith("Did you mean 'check'? See: luthier --help\n")
    Path("l.csv").write_text("text,label\na,x\nb,\n")
    Path("n.jsonl").write_text('{"prompt": "a", "completion": {"x": 1}}\n')
    Path("r.yaml").write_text("luthier: 1\nmodel: lab:nano\ndata: {train: n.jsonl, select: none.jsonl}\n")
    assert cli.run(["check", "r.yaml"]) == 2
    assert "data.select: there is no 'none.jsonl'" in capsys.readouterr().err
    from luthier.data.read import read

    with pytest.raises(UserError, match="the label is empty"):
        read("l.csv", task="sequence-classification")
    with pytest.raises(UserError, match="is an object, not text"):
        read("n.jsonl")
    with pytest.raises(UserError, match="there is no such file or folder"):
        read("nothere/")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_sigterm_ends_a_command_with_a_word(llama):
    Path("d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    program = (
        "import time; from luthier.runs import api; from luthier.cli import main\n"
        "api.check = lambda plan: print('ready', flush=True) or time.sleep(60)\n"
        "main.main()"
    )
    Path("r.yaml").write_text(f"luthier: 1\nmodel: {llama}\ndata: d.jsonl\n")
    command = [sys.executable, "-c", program, "check", "r.yaml"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    ) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    assert process.returncode == cli.INTERRUPTED
    assert err.strip() == "interrupted: stopped"
