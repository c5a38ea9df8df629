"""Migration: versions, flat files with the keys of other trainers, comments kept."""

from __future__ import annotations

import pytest

from luthier.core.errors import UserError
from luthier.recipe.load import load
from luthier.recipe.migrate import migrate
from luthier.recipe.problems import FOREIGN
from luthier.recipe.schema import Recipe
from luthier.recipe.source import parse


def test_a_current_recipe_is_left_alone(tmp_path):
    path = tmp_path / "r.yaml"
    text = "# mine\nluthier: 1\nmodel: lab:nano   # small\ndata: {train: lab:text}\n"
    path.write_text(text)
    assert migrate(path) == (text, [])


def test_a_recipe_without_version_gets_one_and_keeps_its_comments(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("# mine\nmodel: lab:nano   # small\ndata:\n  train: lab:text # rows\ntraining: {epochs: 2}\n")
    text, changes = migrate(path)
    assert text == (
        "# mine\nluthier: 1\nmodel: lab:nano   # small\ndata:\n  train: lab:text # rows\ntraining: {epochs: 2}\n"
    )
    assert changes == ["luthier: 1 written"]


def test_the_keys_of_other_trainers(tmp_path):
    path = tmp_path / "flat.yaml"
    path.write_text(
        "model_name_or_path: some/model\n"
        "dataset_name: rows.jsonl\n"
        "num_train_epochs: 3\n"
        "learning_rate: 1e-4  # found by hand\n"
        "per_device_train_batch_size: 4\n"
        "gradient_accumulation_steps: 8\n"
        "lr_scheduler_type: constant_with_warmup\n"
        "optim: adamw_torch_fused\n"
        "report_to: none\n"
        "bf16: true\n"
        "fp16: false\n"
        "max_seq_length: 1024\n"
        "output_dir: out\n"
        "ddp_timeout: 30\n"
    )
    text, changes = migrate(path)
    data, _ = parse(text, "x")
    assert data.pop("ddp_timeout") == 30
    assert "ddp_timeout left as it is: Luthier has no such key" in changes
    recipe = load(data)
    training = recipe.training
    assert (recipe.model.id, recipe.data.train, recipe.output) == ("some/model", "rows.jsonl", "out")
    assert (training.epochs, training.learning_rate) == (3.0, 1e-4)
    assert (training.batch_rows, training.accumulation) == (32, 8)  # 4 rows x 8 micro-batches make a step
    assert (training.schedule, training.optimizer, training.precision) == ("constant", "adamw", "bf16")
    assert training.trackers == []
    assert recipe.data.max_length == 1024
    assert "learning_rate -> training.learning_rate" in changes


def test_nothing_is_overwritten(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: lab:nano\nmodel_revision: main\ndata: {train: a}\ndataset_name: b\nlearning_rate: 1\n")
    text, changes = migrate(path)
    data, _ = parse(text, "x")
    assert data["model"] == {"id": "lab:nano", "revision": "main"}
    assert data["data"] == {"train": "a"}
    assert data["dataset_name"] == "b"
    assert "dataset_name left as it is: data.train is there already" in changes


def test_every_foreign_key_leads_to_a_key_that_exists():
    for foreign, target in FOREIGN.items():
        outer, _, inner = target.partition(".")
        field = Recipe.model_fields[outer]
        if inner:
            model = next(m for m in Recipe.__annotations__ if m == outer)
            assert inner in field.annotation.model_fields, (foreign, model)


@pytest.mark.parametrize(
    ("text", "words"),
    [("luthier: 9\n", "version 9"), ("- a\n", "mapping"), ("luthier: x\n", "'x'"), ("a: [\n", "not valid YAML")],
)
def test_what_cannot_be_migrated(tmp_path, text, words):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        migrate(path)
