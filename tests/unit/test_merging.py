"""Merging models from the command line and from Python: files, provenance, refusals, memory, and mergekit as a peer."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import luthier
from helpers import tiny_llama
from luthier.cli import main as cli
from luthier.core.errors import UserError
from luthier.functional import task_vectors
from luthier.lab.tokenizer import tokenizer
from luthier.models.info import fingerprint
from luthier.models.sources import ModelSource, first_other_token
from luthier.runs import weights
from luthier.runs.weights import WeightContext, combine

WORDS = tokenizer(64)
SMALL = {
    "training": {"max_steps": 2, "batch_rows": 8, "learning_rate": 1e-2, "log_steps": 1},
    "evaluation": {"max_new_tokens": 4, "bootstrap": 100, "before": False},
}
ROWS = [{"question": f"{i} + 1 =", "answer": str(i + 1)} for i in range(24)]


def write(folder: Path, seed: int, *, tied: bool = False, kind: torch.dtype = torch.float32, **config: object) -> Path:
    """A tiny Llama a little away from the common start, with the lab's tokenizer."""
    model = tiny_llama(0, vocabulary=len(WORDS), tied=tied)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.02 if seed else 0.0))
    for key, value in config.items():
        setattr(model.config, key, value)
    model.to(kind).save_pretrained(folder)
    WORDS.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write(root / name, seed) for seed, name in enumerate(("base", "a", "b", "c"))}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def tensors(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def changed(folder: Path, into: Path, change) -> Path:
    """A copy of a model folder whose tensors went through ``change``."""
    into.mkdir()
    for file in folder.iterdir():
        (into / file.name).write_bytes(file.read_bytes())
    found = tensors(folder)
    change(found)
    save_file(found, into / "model.safetensors", metadata={"format": "pt"})
    return into


# -- what comes out


def test_from_the_command_line_to_a_plain_model(models, capfd):
    a, b, base = (str(models[n]) for n in ("a", "b", "base"))
    line = ["merge", "--op", "task-arithmetic", a, b, "merged", "--base", base, "-o", "scale=0.5", "--json"]
    assert cli.run(line) == 0
    out = json.loads(capfd.readouterr().out)
    assert out["models"] == [a, b]
    assert out["operations"][0]["found"] == {"weights": {"tuned": 1.0, b: 1.0}, "scale": 0.5}
    found, one, two, start = (tensors(f) for f in ("merged", a, b, base))
    for name, tensor in found.items():
        wide = start[name].double() + 0.5 * (one[name].double() + two[name].double() - 2 * start[name].double())
        torch.testing.assert_close(tensor, wide.float(), atol=1e-7, rtol=1e-7)
    opened = AutoModelForCausalLM.from_pretrained("merged")
    ids = AutoTokenizer.from_pretrained("merged")("1 + 1 =", return_tensors="pt").input_ids
    assert opened(ids).logits.isfinite().all()
    assert {p.name for p in Path("merged").iterdir()} >= {"README.md", "manifest.json", "merge.yaml", "tokenizer.json"}
    assert [p.name for p in Path().iterdir()] == ["merged"]


def test_what_it_was_made_from_is_told_and_makes_it_again(models):
    a, b, base = models["a"], models["b"], models["base"]
    ops = [{"ties": {"density": 0.5}}, {"lines": {"beta": 0.2}}]
    luthier.merge([a, b], "merged", op=ops, base=base)
    manifest = json.loads(Path("merged/manifest.json").read_text())
    assert manifest["models"][str(a)]["fingerprint"] == fingerprint(a)
    assert manifest["base"]["fingerprint"] == fingerprint(base)
    assert [o["op"] for o in manifest["operations"]] == ["ties", "lines"]
    assert json.loads(Path("merged/luthier.json").read_text()) == {"base_fingerprint": fingerprint(base)}
    again = luthier.merge("merged/merge.yaml", "again")
    assert Path("again/model.safetensors").read_bytes() == Path("merged/model.safetensors").read_bytes()
    assert again.operations[1]["found"]["alpha"] == manifest["operations"][1]["found"]["alpha"]
    card = Path("merged/README.md").read_text()
    assert "by ties, then lines from" in card
    assert 'from_pretrained("merged")' in card


@pytest.mark.parametrize("op", ["task-arithmetic", "ties", "dare", "slerp", "model-soups", "lines", "half-reset"])
def test_pieces_and_shards_change_nothing(models, monkeypatch, op):
    options = {"lines": {"alpha": 0.3}, "ties": {"density": 0.3, "trim": "tensor"}, "dare": {"drop_rate": 0.5}}
    several = op not in ("lines", "half-reset")
    inputs = [models["a"], models["b"]] if several else [models["a"]]
    luthier.merge(inputs, "whole", op={op: options.get(op, {})}, base=models["base"])
    for module in (task_vectors, weights):
        monkeypatch.setattr(module, "PIECE", 100)
    monkeypatch.setattr(task_vectors.pieces, "__defaults__", (100,))
    writer = weights.ShardWriter
    monkeypatch.setattr(weights, "ShardWriter", lambda *a: writer(*a, max_bytes=20_000))
    luthier.merge(inputs, "cut", op={op: options.get(op, {})}, base=models["base"])
    assert len(list(Path("cut").glob("model-*.safetensors"))) > 2
    one, two = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in ("whole", "cut"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-6, rtol=1e-6)


def test_types_are_kept_or_chosen_and_sums_are_wide(models):
    kind = torch.bfloat16
    a, b = write(Path("a16"), 1, kind=kind), write(Path("b16"), 2, kind=kind)
    luthier.merge([a, b], "kept", op="model-soups")
    luthier.merge([a, b], "chosen", op="slerp", dtype="float32")
    assert {t.dtype for t in tensors("kept").values()} == {kind}
    assert AutoModelForCausalLM.from_pretrained("chosen", dtype="auto").dtype is torch.float32
    name = "model.norm.weight"
    mean = (tensors(a)[name].double() + tensors(b)[name].double()) / 2
    assert torch.equal(tensors("kept")[name], mean.to(kind))


def test_tied_embeddings_count_once(models):
    a, b = write(Path("a"), 1, tied=True), write(Path("b"), 2, tied=True)
    # Some files hold the output embedding as well.
    both = changed(a, Path("both"), lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    luthier.merge([both, b], "merged", op="model-soups")
    assert "lm_head.weight" not in tensors("merged")
    opened = AutoModelForCausalLM.from_pretrained("merged")
    assert opened.lm_head.weight is opened.model.embed_tokens.weight
    with pytest.raises(UserError, match=r"config\.json: 'a' has tie_word_embeddings: True and .* has False"):
        luthier.merge(["a", models["b"]], "out", op="model-soups")


def test_adapters_are_merged_first(models):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(models["base"])
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained("adapter")
    name = "model.layers.0.self_attn.q_proj.weight"
    wanted = adapted.merge_and_unload().state_dict()[name].double()
    luthier.merge(["adapter", models["a"]], "merged", op="model-soups")
    mean = (wanted + tensors(models["a"])[name].double()) / 2
    torch.testing.assert_close(tensors("merged")[name], mean.float(), atol=1e-6, rtol=1e-6)
    assert sorted(p.name for p in Path().iterdir()) == ["adapter", "merged"]


def test_an_adapter_alone_is_merged_as_ever(models, capfd):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(models["base"])
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained("adapter")
    WORDS.save_pretrained("adapter")
    assert cli.run(["merge", "adapter", "merged"]) == 0
    assert "largest difference of a logit" in capfd.readouterr().out


# -- choices on rows


def test_a_greedy_soup_and_lines_on_a_recipes_rows(models):
    data = {"train": ROWS, "test": ROWS[:8], "select": ROWS[8:16], "keep": [ROWS[16:]]}
    recipe = {"model": str(models["base"]), "data": data, "output": "run", **SMALL}
    names = [models[n] for n in ("a", "b", "c")]
    soup = luthier.merge(names, "soup", op={"model-soups": {"method": "greedy"}}, rows=recipe)
    found = soup.operations[0]["found"]
    assert found["score"] >= max(found["scores"].values())
    mean = sum(tensors(names[i])["model.norm.weight"].double() for i in range(3) if _kept(i, names, found))
    mean = mean / len(found["coefficients"])
    assert torch.equal(tensors("soup")["model.norm.weight"], mean.float())
    lines = luthier.merge(names[0], "lines", op="lines", base=models["base"], rows=recipe)
    table = lines.operations[0]["found"]["search"]
    assert len(table) == 11
    assert lines.operations[0]["found"]["alpha"] == max(table, key=lambda row: (row["score"], row["alpha"]))["alpha"]


def _kept(index, names, found):
    return ("tuned" if index == 0 else str(names[index])) in found["coefficients"]


def test_a_recipe_with_several_operations(models):
    run = luthier.tune(
        model=str(models["base"]),
        data={"train": ROWS, "test": ROWS[:4], "keep": "none"},
        weights=[{"task-arithmetic": {"models": [str(models["b"])], "scale": 1.0}}, {"lines": {"beta": 0.0}}],
        output="run",
        quiet=True,
        **SMALL,
    )
    base, trained, b = tensors(models["base"]), tensors("run/model-trained"), tensors(models["b"])
    record = json.loads(Path("run/weights-lines.json").read_text())
    assert record["alpha"] == pytest.approx(0.5, rel=1e-5)
    for name, tensor in tensors("run/model").items():
        middle = base[name].double() + 0.5 * (trained[name].double() + b[name].double() - 2 * base[name].double())
        torch.testing.assert_close(tensor.double(), middle, atol=1e-6, rtol=1e-6)
    assert torch.equal(run.model.state_dict()["model.norm.weight"], tensors("run/model")["model.norm.weight"])
    assert sorted(p.name for p in Path("run").iterdir() if p.name.startswith(".")) == []


def test_operations_that_need_rows_say_so_before_training(models):
    recipe = {"model": str(models["base"]), "data": {"train": ROWS, "test": None, "keep": "none"}, "output": "run"}
    with pytest.raises(UserError, match="'lines' chooses by a score on held-out rows, and there are none"):
        luthier.tune(recipe, weights=["lines"])
    with pytest.raises(UserError, match=r"--rows recipe\.yaml"):
        luthier.merge(models["a"], "out", op="lines", base=models["base"])
    assert not Path("out").exists()


# -- refusals


def refused(match: str, inputs, **options):
    with pytest.raises(UserError, match=match):
        luthier.merge(inputs, "out", **{"op": "model-soups", **options})
    assert not Path("out").exists()


def test_tensors_that_differ_are_named(models):
    a, b = models["a"], models["b"]
    name = "model.layers.1.mlp.up_proj.weight"
    short = changed(b, Path("short"), lambda t: t.pop(name))
    refused(f"tensor '{name}' is in '.*a' and not in 'short'", [a, short])
    wide = changed(b, Path("wide"), lambda t: t.update({name: torch.zeros(33, 16)}))
    refused(rf"tensor '{name}' has shape \(32, 16\) in '.*a' and \(33, 16\) in 'wide'", [a, wide])
    refused(rf"tensor '{name}' has shape \(33, 16\) in the base", [a], op="ties", base=wide)
    broken = changed(b, Path("broken"), lambda t: t[name].view(-1)[7:8].fill_(float("nan")))
    for op in ("model-soups", "slerp", "ties"):
        refused(f"broken: tensor '{name}' holds NaN", [a, broken], op=op, base=models["base"])


def test_configurations_and_tokenizers_that_differ_are_named(models):
    a = models["a"]
    refused(
        "other/config.json: .* has num_attention_heads: 2 and 'other' has 4",
        [a, write(Path("other"), 2, num_attention_heads=4)],
    )
    other = changed(models["b"], Path("words"), lambda t: None)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    refused(r"words/tokenizer\.json: its tokenizer is not that of .* has id 10 there and 11 in 'words'", [a, other])
    packed = changed(models["b"], Path("packed"), lambda t: None)
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    refused("packed: is quantised", [a, packed])
    assert first_other_token({"x": 0, "y": 1}, {"x": 0, "y": 1}) is None
    assert first_other_token({"x": 0, "y": 1}, {"x": 0, "y": 1, "z": 2}) == "z"


def test_bases_that_differ_are_named(models):
    for name in ("a", "b"):
        copy = changed(models[name], Path(name), lambda t: None)
        recorded = fingerprint(models["base"]) if name == "a" else "0" * 32
        (copy / "luthier.json").write_text(json.dumps({"base_fingerprint": recorded}))
    luthier.merge("a", "fine", op={"lines": {"alpha": 0.5}}, base=models["base"])
    refused(r"^b: 'b' was fine-tuned from another state of its base: .* 0{32}", "b", op="ties", base=models["base"])
    refused("'a' and 'b' were fine-tuned from different bases", ["a", "b"])


@pytest.mark.parametrize(
    ("inputs", "options", "match"),
    [
        (["a"], {"op": "ties"}, r"ties works on what fine-tuning changed: name the base .*--base"),
        (["a"], {"op": "slerp"}, "slerp needs two models, or one and its base"),
        (["a", "b", "c"], {"op": "slerp"}, "slerp takes 1 to 2 models, not 3. Combine them first"),
        (["a", "b"], {"op": "lines", "base": "base"}, "lines takes 1 model, not 2"),
        (["a", "b"], {"op": {"ties": {"weights": [1.0]}}, "base": "base"}, "ties: 1 weights for 2 models"),
        (["a", "b"], {"op": {"model-soups": {"coefficients": {"tuned": 0.0}}}}, "must sum to more than 0"),
        (["a", "a"], {}, "is named twice"),
        (["a", "b"], {"op": None}, "2 models without an operation.* dare, "),
        (["a", "b"], {"op": "tis"}, "unknown weights 'tis'.*Did you mean 'ties'"),
        (["a", "b"], {"op": {"ties": {"densty": 1}}}, "densty"),
        (["a", "b"], {"dtype": "float8"}, "unknown dtype 'float8'"),
    ],
)
def test_what_does_not_suffice(models, inputs, options, match):
    options = {k: models["base"] if k == "base" else v for k, v in options.items()}
    refused(match, [models[n] for n in inputs], **options)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (["merge", "only"], "name what is to be merged and a folder"),
        (["merge", "a", "b", "out"], "2 models without an operation"),
        (["merge", "--op", "ties", "-o", "density", "a", "out"], "is not written name=value"),
        (["merge", "--op", "ties", "--op", "lines", "-o", "density=1", "a", "out"], r"Write it as ties\.density="),
        (["merge", "--op", "ties", "-o", "dare.seed=1", "a", "out"], "'dare' is none of the operations ties"),
        (["merge", "-o", "density=1", "a", "out"], "an option belongs to an operation"),
        (["merge", "recipe.yml", "out"], "there is no file 'recipe.yml'"),
    ],
)
def test_a_wrong_command_line(line, match, capfd):
    assert cli.run(line) == 2
    found = capfd.readouterr().err
    assert len(found.strip().splitlines()) == 1
    assert re.search(match, found), found


def test_a_merge_file_is_read_strictly(models):
    Path("m.yaml").write_text(f"models: [{models['a']}]\nwieghts: [slerp]\n")
    refused(r"m\.yaml:2: unknown key 'wieghts'\. Did you mean 'weights'", "m.yaml", op=None)
    Path("m.yaml").write_text("models: []\nweights: [slerp]\n")
    refused(r"m\.yaml:1: 'models' must be a list with at least one entry", "m.yaml", op=None)
    Path("m.yaml").write_text("- x\n")
    refused("must hold the keys models, base", "m.yaml", op=None)
    refused("say.* all that is to be merged", "m.yaml", base="x")


# -- an operation of one's own, and a head that the base has not


def test_a_function_is_an_operation_on_whole_tensors(models):
    shapes = []

    def largest(name, tensors, ctx):
        shapes.append(tuple(tensors["tuned"].shape))
        return torch.maximum(tensors["tuned"], tensors["b"])

    sources = {"tuned": ModelSource(models["a"]), "b": ModelSource(models["b"])}
    Path("out").mkdir()
    combine(largest, "largest", sources, WeightContext({}), Path("out"))
    assert (len(WORDS), 16) in shapes
    for name, tensor in tensors("out").items():
        assert torch.equal(tensor, torch.maximum(tensors(models["a"])[name], tensors(models["b"])[name]))


def test_a_new_head_is_kept_and_several_cannot_be_combined(models):
    one, two = (changed(models[n], Path(n), lambda t: t.update({"score.weight": torch.ones(2, 16)})) for n in "ab")
    luthier.merge(one, "out1", op={"lines": {"alpha": 0.0}}, base=models["base"])
    assert torch.equal(tensors("out1")["score.weight"], torch.ones(2, 16))
    refused("tensor 'score.weight' is in 'a' and not in the base", [one, two], op="ties", base=models["base"])


# -- memory

MEASURE = """
import json, resource, sys
import luthier
from luthier.runs import merging, weights
import torch
folder, op, *models = sys.argv[1:]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
luthier.merge(models[1:], folder, op={op: json.loads("{}")}, base=models[0])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("op", ["ties", "model-soups", "slerp"])
def test_memory_does_not_grow_with_the_model(op):
    """Models of 50 MB in tensors of 6 MB: less than one model, or three of its largest tensors, is ever in memory."""
    names, size = [f"layers.{i}.weight" for i in range(8)], (1600, 1000)
    for seed, folder in enumerate(("base", "a", "b")):
        Path(folder).mkdir()
        generator = torch.Generator().manual_seed(seed)
        save_file({n: torch.randn(size, generator=generator) for n in names}, Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": "llama"}))
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, "merged", op, "base", "a", "b"], capture_output=True, text=True, check=True
    )
    grown = int(out.stdout) * 1024
    assert grown < 45e6, f"{grown / 1e6:.0f} MB"


# -- mergekit


@pytest.mark.skipif(importlib.util.find_spec("mergekit") is None, reason="mergekit is not installed")
@pytest.mark.parametrize(
    ("peer", "ours", "inputs"),
    [
        ({"merge_method": "linear", "parameters": {"weight": 1.0}}, "model-soups", ("a", "b", "c")),
        (
            {"merge_method": "task_arithmetic", "parameters": {"weight": 0.4}},
            {"task-arithmetic": {"scale": 0.4}},
            ("a", "b", "c"),
        ),
        (
            {"merge_method": "ties", "parameters": {"weight": 1.0, "density": 0.3}},
            {"ties": {"density": 0.3, "trim": "tensor"}},
            ("a", "b", "c"),
        ),
        (
            {"merge_method": "dare_linear", "parameters": {"weight": 0.5, "density": 1.0}},
            {"dare": {"drop_rate": 0.0, "scale": 0.5}},
            ("a", "b"),
        ),
        ({"merge_method": "slerp", "parameters": {"t": 0.3}}, {"slerp": {"t": 0.3}}, ("a", "b")),
    ],
    ids=lambda v: v.get("merge_method") if isinstance(v, dict) and "merge_method" in v else None,
)
def test_mergekit_gives_the_same(models, peer, ours, inputs):
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    method = peer["merge_method"]
    base = {"linear": {}, "slerp": {"base_model": str(models[inputs[0]])}}.get(
        method, {"base_model": str(models["base"])}
    )
    listed = [{"model": str(models[n])} for n in inputs]
    config = {**peer, **base, "models": listed, "dtype": "float32"}
    run_merge(MergeConfiguration.model_validate(config), "peer", options=MergeOptions())
    luthier.merge([models[n] for n in inputs], "own", op=ours, base=models["base"])
    found, wanted = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in ("own", "peer"))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-6, rtol=1e-5)
