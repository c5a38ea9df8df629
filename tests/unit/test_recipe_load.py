"""Loading recipes: one line per problem with file, line, key and what is accepted; overrides; paths; dumping."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.core.errors import UserError
from luthier.recipe.load import dump, load
from luthier.recipe.problems import RecipeError

MINIMAL = "luthier: 1\nmodel: lab:nano\ndata:\n  train: lab:arithmetic\n"


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def fails(source, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(source, overrides)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2
    return str(caught.value)


def test_defaults(tmp_path):
    recipe = load(write(tmp_path, MINIMAL))
    assert (recipe.model.id, recipe.model.task, recipe.data.train) == ("lab:nano", "auto", "lab:arithmetic")
    assert recipe.data.keep == "default"
    assert recipe.procedure == "sft"
    assert recipe.objective == ["sft"]
    assert recipe.parameters == ["full"]
    assert recipe.decoding == "greedy"
    assert (recipe.training.batch_rows, recipe.training.batch_tokens) == (16, None)
    assert (recipe.training.learning_rate, recipe.training.warmup) == (2e-5, 0.03)
    assert recipe.evaluation.generate == "auto"
    assert recipe.output == "runs/r"
    assert recipe.seed == 0


def test_a_mapping_needs_no_version_and_short_forms_expand():
    recipe = load({"model": "lab:nano", "data": "lab:arithmetic", "objective": {"sft": None}, "parameters": "lora"})
    assert recipe.data.train == "lab:arithmetic"
    assert recipe.parameters == ["lora"]
    assert recipe.output == "runs/lab-arithmetic-sft-lora"


def test_output_takes_the_folder_of_a_nameless_file(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    recipe = load({"model": "m", "data": str(tmp_path / "gsm8k" / "train.jsonl"), "procedure": "s3ft"})
    assert recipe.output == "runs/gsm8k-s3ft"


@pytest.mark.parametrize(
    ("line", "number", "words"),
    [
        (
            "training: {epoch: 2}",
            5,
            ["training.epoch", "unknown key", "Did you mean 'epochs'?", "Accepted: epochs, max"],
        ),
        ("trainign: {}", 5, ["trainign", "Did you mean 'training'?"]),
        ("num_train_epochs: 3", 5, ["'training.epochs'"]),
        ("training: {num_train_epochs: 3}", 5, ["training.num_train_epochs", "'training.epochs'"]),
        ("1: 3", 5, ["1"]),
        ("epochs: 3", 5, ["Did you mean 'training.epochs'?"]),
        ("training:\n  schedule: cosin", 6, ["'cosin' is not accepted", "Did you mean 'cosine'?", "linear, constant"]),
        ("training:\n  learning_rate: 0", 6, ["training.learning_rate", "must be greater than 0", "not 0"]),
        ("training:\n  learning_rate: '2e-5'", 6, ["must be a number", "remove the quotes"]),
        ("training:\n  learning_rate: .nan", 6, ["finite number"]),
        ("training:\n  batch_rows: 2.5", 6, ["must be a whole number, not 2.5"]),
        ("training:\n  batch_rows: true", 6, ["must be a whole number, not true"]),
        ("training:\n  buckets: yes", 6, ["true or false", "YAML 1.2"]),
        ("training:\n  warmup: 1.5", 6, ["share below 1 or a whole number of steps"]),
        ("training:\n  sharding: zero3", 6, ["'zero3' is not accepted", "Accepted: none, ddp, fsdp2"]),
        (
            "training: {batch_rows: 4, batch_tokens: 99}",
            5,
            ["training.batch_tokens: batch_rows and batch_tokens exclude each other"],
        ),
        ("seed: 1\ntraining: {early_stopping: {}}", 6, ["training.early_stopping: watches the loss on data.select"]),
        ("training: 3", 5, ["training: must be a mapping of keys to values, not 3"]),
        ("evaluation: {generate: maybe}", 5, ["evaluation.generate", "Accepted: auto, true, false"]),
        ("seed: -1", 5, ["seed: must be at least 0, not -1"]),
        ("parameters: []", 5, ["parameters", "at least one method"]),
        ("objective: {sft: {}, lora: {}}", 5, ["names 2 methods (sft, lora)"]),
        ("objective: {sft: 3}", 5, ["the options of 'sft' must be a mapping"]),
        ("objective: [{sft: {}, weight: 0}]", 5, ["objective[0]", "weight of a term must be a number greater than 0"]),
        ("transforms: [3]", 5, ["transforms[0]", "must be a method's name"]),
        ("model: {id: a, revison: main}", 5, ["the key 'model' is there twice (first on line 2)"]),
    ],
)
def test_each_problem_is_one_line_with_its_place(tmp_path, line, number, words):
    path = write(tmp_path, MINIMAL + line + "\n")
    text = fails(path)
    assert text.startswith(f"{path}:{number}: "), text
    for word in words:
        assert word in text


def test_missing_keys_say_what_they_are(tmp_path):
    text = fails(write(tmp_path, "luthier: 1\nmodel: lab:nano\ndata:\n  test: x\n"))
    assert text.endswith("r.yaml:3: data.train: is missing. It is file, folder, hub data set, or lab:<task>.")
    assert ":1: model: is missing. It is the base model." in fails(write(tmp_path, "luthier: 1\ndata: lab:strings\n"))


def test_every_problem_is_kept_in_the_order_of_lines(tmp_path):
    path = write(tmp_path, MINIMAL + "seed: x\ntraining:\n  epochs: 0\n  log_steps: 0\n")
    with pytest.raises(RecipeError) as caught:
        load(path)
    lines = [int(re.match(r".*r\.yaml:(\d+):", p).group(1)) for p in caught.value.problems]
    assert lines == [5, 7, 8]
    assert str(caught.value) == caught.value.problems[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["is empty", "luthier init"]),
        ("- a\n- b\n", ["a recipe is a mapping"]),
        ("model: x\n", ["luthier: is missing", "luthier migrate"]),
        ("luthier: 2\n", [":1:", "version 2", "pip install --upgrade luthier"]),
        ("luthier: 0\n", ["luthier migrate"]),
        ("luthier: one\n", ["must be the version", "'one'"]),
        ("luthier: true\n", ["must be the version"]),
        ("luthier: 1\nmodel: {a: 1\n", ["not valid YAML"]),
        ("luthier: 1\ntraining:\n\tepochs: 1\n", [":3:", "spaces, not tabs"]),
        ("luthier: 1\na: &x [*x]\n", ["alias"]),
        ("luthier: 1\nmodel: !!python/object:os.system x\n", [":2:", "not valid YAML"]),
        ("luthier: 1\n[a, b]: 3\n", [":2:"]),
    ],
)
def test_broken_files(tmp_path, text, words):
    message = fails(write(tmp_path, text))
    for word in words:
        assert word in message


def test_files_that_cannot_be_read(tmp_path):
    write(tmp_path, MINIMAL, "recipe.yaml")
    assert "Did you mean 'recipe.yaml'?" in fails(tmp_path / "recpe.yaml")
    assert "there is no folder" in fails(tmp_path / "none" / "r.yaml")
    assert "is a folder" in fails(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"luthier: 1\nmodel: \xe9\n")
    assert "not UTF-8 text (byte 18)" in fails(tmp_path / "latin.yaml")


def test_overrides(tmp_path):
    path = write(tmp_path, MINIMAL + "objective: anchored-sft\ntransforms: [a, {b: {x: 1}}]\n")
    recipe = load(
        path,
        [
            "training.epochs=2",
            "training.learning_rate=1e-3",
            "model.dtype=float32",
            "objective.anchored-sft.anchor_weight=0.1",
            "transforms.b.x=2",
            "transforms.a.rate=0.5",
            "transforms.2=c",
            "parameters.lora.rank=4",
            "data.keep=null",
            "evaluation={before: false, limit: 10}",
            "evaluation.limit=11",
        ],
    )
    assert recipe.training.epochs == 2.0
    assert recipe.training.learning_rate == 1e-3
    assert (recipe.model.id, recipe.model.dtype) == ("lab:nano", "float32")
    assert recipe.objective == [{"anchored-sft": {"anchor_weight": 0.1}}]
    assert recipe.transforms == [{"a": {"rate": 0.5}}, {"b": {"x": 2}}, "c"]
    assert recipe.parameters == [{"lora": {"rank": 4}}]
    assert recipe.data.keep is None
    assert (recipe.evaluation.before, recipe.evaluation.limit) == (False, 11)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training.epoch=2", ["training.epoch: unknown key", "Did you mean 'epochs'?"]),
        ("training.epochs", ["key.path=value"]),
        ("=3", ["key.path=value"]),
        ("training..epochs=3", ["training."]),
        ("seed.x=3", ["seed is 7, which has no keys inside"]),
        ("objective.lora.rank=3", ["objective is 'sft', not 'lora'", "objective=lora"]),
        ("transforms.5=a", ["transforms is a list without '5'", "0: a"]),
        ("training.epochs=[1", ["not valid YAML"]),
        ("training.epochs=0", ["training.epochs: must be greater than 0"]),
    ],
)
def test_bad_overrides_name_the_override(tmp_path, text, words):
    path = write(tmp_path, MINIMAL + "objective: sft\nseed: 7\ntransforms: [a]\n")
    message = fails(path, text)
    assert message.startswith(f"command line, '{text}'"), message
    for word in words:
        assert word in message


def test_overrides_leave_the_given_mapping_alone():
    given = {"model": "lab:nano", "data": {"train": "lab:strings"}, "training": {"epochs": 1}}
    assert load(given, ["training.epochs=3", "data.limit=4"]).training.epochs == 3
    assert given == {"model": "lab:nano", "data": {"train": "lab:strings"}, "training": {"epochs": 1}}


def test_a_loaded_recipe_can_be_changed():
    first = load({"model": "lab:nano", "data": [{"text": "a"}], "training": {"batch_tokens": 64}})
    second = load(first, ["seed=3"])
    assert (second.seed, second.data.train, second.training.batch_tokens) == (3, [{"text": "a"}], 64)
    assert second.training.batch_rows is None


def test_paths_fall_back_to_the_folder_of_the_recipe(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    for name in ("train.jsonl", "keep.txt", "here.jsonl"):
        (home / name).write_text("{}\n")
    (tmp_path / "here.jsonl").write_text("{}\n")
    text = "luthier: 1\nmodel: lab:nano\ndata: {train: train.jsonl, test: here.jsonl, keep: [keep.txt, lab:text]}\n"
    path = write(home, text)
    monkeypatch.chdir(tmp_path)
    recipe = load(path)
    assert Path(recipe.data.train) == home / "train.jsonl"
    assert recipe.data.test == "here.jsonl"  # the current directory comes first
    assert list(map(str, recipe.data.keep)) == [str(home / "keep.txt"), "lab:text"]


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {
            "training": {
                "batch_tokens": 512,
                "max_grad_norm": None,
                "early_stopping": {"patience": 2},
                "learning_rate": 1e-8,
            }
        },
        {"data": {"train": ["a.txt", "b.txt"], "keep": "none", "test": "lab:text", "system": "be: 'brief' é\nplease"}},
        {
            "objective": [{"sft": {}, "weight": 0.5}, {"anchored-sft": {"kind": "no", "x": [1, 2.0]}}],
            "selection": "loss-top-k",
        },
    ],
)
def test_dump_loads_to_the_same_recipe(tmp_path, extra):
    data = {"train": "lab:arithmetic", "test": "lab:arithmetic"} | extra.pop("data", {})
    recipe = load({"model": {"id": "lab:nano", "dtype": "float32"}, "data": data, **extra})
    again = load(write(tmp_path, dump(recipe)))
    assert again.model_dump() == recipe.model_dump()
    assert dump(again) == dump(recipe)
    assert list(again.model_dump())[:3] == ["luthier", "model", "data"]
    assert dump(recipe).startswith("luthier: 1\nmodel:\n  id: lab:nano\n")


def test_rows_in_memory_leave_a_note_in_the_dump():
    recipe = load({"model": "lab:nano", "data": {"train": [{"text": "a"}, {"text": "b"}], "keep": [{"text": "k"}]}})
    assert "train: memory:2 rows" in dump(recipe)
    assert "- memory:1 rows" in dump(recipe)


def test_loading_imports_no_heavy_module(tmp_path):
    path = write(tmp_path, MINIMAL)
    code = (
        "import sys\nfrom luthier.recipe.load import load\n"
        f"load({str(path)!r})\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
