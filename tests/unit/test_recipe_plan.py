"""The plan: names become methods, options follow their signatures, impossible combinations are refused by line."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Annotated, Literal

import pytest
from pydantic import Field

from luthier.core import registry
from luthier.core.errors import UserError
from luthier.core.protocols import Needs
from luthier.recipe.load import load
from luthier.recipe.plan import plan


class Plain:
    """Does nothing."""


class Anchored:
    """An anchored loss."""

    needs = Needs(models=("reference",))

    def __init__(
        self,
        *,
        anchor_weight: Annotated[float, Field(ge=0, le=1, description="pull to the base")] = 0.05,
        kind: Literal["kl", "reverse-kl"] = "kl",
        layers: tuple[int, ...] = (),
        other: float | None = None,
    ) -> None:
        if other is not None and anchor_weight == 0:
            raise UserError("other needs an anchor_weight above 0.")
        self.anchor_weight, self.layers = anchor_weight, layers


class Counting:
    """Divides by what the model does."""

    def __init__(self, *, threshold: float = 0.0) -> None:
        self.threshold = threshold

    @property
    def needs(self) -> Needs:
        return Needs(fixed_weight=self.threshold == 0.0)


def noise(batch, ctx, *, rate: Annotated[float, Field(ge=0, le=1)] = 0.1):
    """Noise on the inputs."""


@pytest.fixture(autouse=True)
def methods(monkeypatch):
    """A registry with a few methods of every kind, whatever the library ships."""
    monkeypatch.setattr(registry, "_METHODS", {})
    monkeypatch.setattr(registry, "_index", dict)
    registry.objective("sft")(Plain)
    registry.objective(
        "anchored-sft",
        conflicts={
            "gradient_checkpointing": "the reference is scored row by row.",
            "transform:noise": "the anchor needs clean inputs",
            "precision:bf16": "the pull is lost in rounding",
        },
    )(Anchored)
    registry.objective("counting")(Counting)
    registry.objective("writer")(type("Writer", (), {"needs": Needs(generation=True), "__init__": lambda self: None}))
    registry.transform("noise", tasks=("causal-lm",))(noise)
    registry.transform("blur")(noise)
    registry.parameters("full")(type("Full", (), {"__init__": lambda self: None}))
    registry.parameters("lora", conflicts={"parameters:full": "its base stays frozen"})(
        type("Lora", (), {"__init__": lambda self: None})
    )
    registry.decoder("greedy")(type("Greedy", (), {"__init__": lambda self: None}))
    registry.reward("numeric")(lambda rows, completions, ctx: [])
    registry.data_stage("deduplicate")(lambda dataset, ctx: dataset)
    registry.procedure("sft")(lambda ctx: None)


def made(*overrides: str, **keys):
    return plan(load({"model": "lab:nano", "data": "lab:arithmetic", **keys}, overrides))


def fails(*overrides: str, **keys) -> str:
    with pytest.raises(UserError) as caught:
        made(*overrides, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_default_plan():
    p = made()
    assert [c.slug for c in p.choices()] == ["sft", "full", "greedy", "sft"]
    assert (p.selection, p.verifier, p.task) == (None, None, "causal-lm")
    assert p.facts == {
        *("objective:sft", "parameters:full", "decoding:greedy", "procedure:sft"),
        *("task:causal-lm", "optimizer:adamw"),
    }


def test_choices_carry_complete_options():
    p = made(
        objective=[{"anchored-sft": {"layers": [1, 2]}, "weight": 0.5}, "sft"],
        transforms={"blur": {"rate": 1}},
        data={"train": "lab:arithmetic", "verifier": "numeric", "stages": ["deduplicate"]},
    )
    first, second = p.objective
    assert first.options == {"anchor_weight": 0.05, "kind": "kl", "layers": (1, 2), "other": None}
    assert (first.weight, second.weight) == (0.5, 1.0)
    assert (first.key, second.key, p.transforms[0].key) == ("objective[0]", "objective[1]", "transforms")
    assert first.build().layers == (1, 2)
    assert p.transforms[0].build().keywords == {"rate": 1.0}
    assert {"reference", "weighted_sum", "data:deduplicate", "reward:numeric"} <= p.facts
    shown = p.to_dict()
    assert json.loads(json.dumps(shown)) == shown
    assert shown["objective"][0] == {
        "name": "anchored-sft",
        "options": {"anchor_weight": 0.05, "kind": "kl", "layers": [1, 2], "other": None},
        "weight": 0.5,
    }


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("anchord-sft", ["objective: unknown objective 'anchord-sft'", "Did you mean 'anchored-sft'?"]),
        ("noise", ["'noise' exists under: transform"]),
        (
            {"anchored-sft": {"anchor": 1}},
            ["objective.anchored-sft.anchor: unknown key", "Accepted: anchor_weight, kind"],
        ),
        ({"anchored-sft": {"anchor_weight": 1.5}}, ["anchor_weight: must be at most 1", "not 1.5"]),
        ({"anchored-sft": {"anchor_weight": "0.5"}}, ["must be a number, not '0.5'", "remove the quotes"]),
        ({"anchored-sft": {"kind": "reverse"}}, ["'reverse' is not accepted", "Accepted: kl, reverse-kl"]),
        ({"anchored-sft": {"layers": 3}}, ["layers: must be a list, not 3"]),
        ({"anchored-sft": {"layers": [1, "b"]}}, ["layers[1]: must be a whole number, not 'b'"]),
        ({"anchored-sft": {"other": 1, "anchor_weight": 0}}, ["objective.anchored-sft: other needs an anchor_weight"]),
        ({"sft": {"x": 1}}, ["objective.sft.x: unknown key", "it has no options"]),
        (["sft", "sft"], ["objective[1]: 'sft' is there twice (first as objective[0])"]),
        (
            ["sft", {"counting": {"threshold": 0.5}}],
            ["objective[1]: 'counting' divides by a count", "the only objective"],
        ),
    ],
)
def test_names_and_options_are_checked(objective, words):
    text = fails(objective=objective)
    for word in words:
        assert word in text


def test_a_method_whose_needs_follow_its_options_may_be_a_term():
    assert len(made(objective=["sft", {"counting": {"threshold": 0.0}}]).objective) == 2


def test_problems_in_a_file_carry_the_line(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "luthier: 1\nmodel: lab:nano\ndata: {train: lab:strings}\n"
        "objective:\n  - sft\n  - anchored-sft:\n      anchor_weight: 2\ntransforms:\n- nois\n"
    )
    with pytest.raises(UserError) as caught:
        plan(load(path))
    assert str(caught.value).startswith(f"{path}:7: objective[1].anchored-sft.anchor_weight: must be at most 1")
    with pytest.raises(UserError) as caught:
        plan(load(path, ["objective.anchored-sft.anchor_weight=1"]))
    assert str(caught.value).startswith(f"{path}:9: transforms[0]: unknown transform 'nois'. Did you mean 'noise'?")
    with pytest.raises(
        UserError, match=r"command line, 'transforms.0=noise': transforms\[0\]|:6: objective\[1\]"
    ) as caught:
        plan(load(path, ["objective.anchored-sft.anchor_weight=1", "transforms.0=noise"]))
    assert "'anchored-sft' does not go with 'noise' (transforms[0])" in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"training": {"gradient_checkpointing": True}},
            [
                "does not go with gradient checkpointing",
                "scored row by row. Way out: set training.gradient_checkpointing: false",
            ],
        ),
        (
            {"training": {"precision": "bf16"}},
            ["training.precision: bf16", "lost in rounding", "another training.precision"],
        ),
        ({"transforms": ["noise"]}, ["'noise' (transforms)", "clean inputs", "remove 'anchored-sft' or 'noise'"]),
    ],
)
def test_conflicts_name_both_the_reason_and_the_way_out(keys, words):
    text = fails(objective="anchored-sft", **keys)
    for word in ("objective: 'anchored-sft'", *words):
        assert word in text


def test_two_parameter_methods_may_exclude_each_other():
    assert "'lora' does not go with 'full' (parameters[0])" in fails(parameters=["full", "lora"])


def test_tasks():
    model = {"id": "lab:nano", "task": "sequence-classification"}
    assert "'noise' is not defined for the task sequence-classification, only for causal-lm" in fails(
        model=model, transforms=["noise"]
    )
    assert "'writer' lets the model write text" in fails(model=model, objective="writer")
    assert "generation" in made(objective="writer").facts


def test_a_task_may_be_settled_later():
    p = made(model="some/hub-model", transforms=["noise"])
    assert p.task == "auto"
    p.settle_task("causal-lm")
    assert "task:causal-lm" in p.facts
    with pytest.raises(UserError, match="'noise' is not defined for the task token-classification"):
        p.settle_task("token-classification")


def test_files_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("{}\n")
    text = fails(data="tarin.jsonl")
    assert text == f"data.train: there is no 'tarin.jsonl' (looked in {tmp_path}). Did you mean 'train.jsonl'?"
    assert "data.keep[1]: there is no './k.txt'" in fails(
        data={"train": "train.jsonl", "keep": ["lab:text", "./k.txt"]}
    )
    assert "model.id: there is no './model'" in fails(model="./model", data="train.jsonl")
    assert "config.json" in fails(model=str(tmp_path), data="train.jsonl")
    assert made(model="org/name", data="org/rows").recipe.data.train == "org/rows"  # the hub will tell
    assert "given in memory" in fails(data="memory:3 rows")


def test_layout_and_columns_are_checked():
    assert "data.layout: unknown layout 'messges'. Did you mean 'messages'?" in fails("data.layout=messges")
    text = fails("data.columns={promt: q}")
    assert text.startswith(
        "command line, 'data.columns={promt: q}': data.columns.promt: there is no such part of a row."
    )
    assert "Did you mean 'prompt'?" in text


def test_optional_packages_are_asked_for(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n in ("wandb", "liger_kernel") else find(n, *a)
    )
    assert "training.trackers[0]: wandb needs the package 'wandb'" in fails("training.trackers=[wandb]")
    assert "pip install 'liger-kernel'" in fails("training.head=liger")


def test_the_users_own_file(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.py").write_text(
        "def my_loss(logp_N, weight_N, *, power: float = 1.0):\n    'Mine.'\n    return -logp_N * power\n"
    )
    path = tmp_path / "sub" / "r.yaml"
    path.write_text(
        "luthier: 1\nmodel: lab:nano\ndata: {train: lab:text}\nobjective:\n  ./mine.py:my_loss:\n    power: 2\n"
    )
    monkeypatch.chdir(tmp_path)
    choice = plan(load(path)).objective[0]
    assert choice.options == {"power": 2.0}
    assert choice.build()(3.0, 1.0) == -6.0
    assert plan(load(path, ["objective../mine.py:my_loss.power=3"])).objective[0].options == {"power": 3.0}
    path.write_text(path.read_text().replace("power", "powr"))
    with pytest.raises(UserError, match=r"r\.yaml:6: objective\.\./mine\.py:my_loss\.powr: unknown key.*'power'"):
        plan(load(path))
    path.write_text(path.read_text().replace("my_loss:", "my_los:"))
    with pytest.raises(UserError, match=r"r\.yaml:\d: objective: .*defines no 'my_los'\. Did you mean 'my_loss'\?"):
        plan(load(path))


def test_planning_does_not_import_torch(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("luthier: 1\nmodel: lab:nano\ndata: {train: lab:arithmetic}\nobjective: {sft: {}}\n")
    code = (
        "import sys\nfrom luthier.recipe.load import load\nfrom luthier.recipe.plan import plan\n"
        f"plan(load({str(path)!r}))\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
