import json
import threading
import time

import pytest
import torch

from luthier import lab
from luthier.core.errors import LuthierError, UserError
from luthier.lab import bases


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))
    return tmp_path


def _tiny(low=0.0, high=1.0, seeds=(0,)):
    return bases.Making(
        task="causal-lm",
        config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
        data="lab:mixture?n=64",
        files=("mixture",),
        training={"max_steps": 3, "batch_rows": 8, "threads": 1},
        probes={"sums": bases.Probe("arithmetic", {"difficulty": 1}, low, high, n=4)},
        about="a test",
        seeds=seeds,
    )


def test_fresh_models_are_a_function_of_the_seed(tmp_path):
    state = torch.random.get_rng_state()
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        bases.fresh("nano", tmp_path / folder, seed)
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in "abc"]
    assert weights[0] == weights[1] != weights[2]
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("nano", 0.15e6, 0.3e6), ("small", 1.7e6, 2.3e6), ("encoder-nano", 0.1e6, 0.25e6), ("vision-nano", 3e4, 2e5)],
)
def test_sizes(tmp_path, name, low, high):
    from luthier.models.load import load

    bases.fresh(name, tmp_path / "m", 0)
    assert low < load(tmp_path / "m").model.num_parameters() < high


def test_a_base_is_trained_measured_and_kept(cache, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setitem(bases.MAKINGS, "tiny", _tiny())
    target = cache / "made"
    target.mkdir()
    bases.make("tiny", target)
    found = json.loads((target / bases.COMPETENCE).read_text())["sums"]
    assert (found["n"], found["task"], found["low"], found["high"]) == (4, "arithmetic", 0.0, 1.0)
    model = AutoModelForCausalLM.from_pretrained(target)
    ids = AutoTokenizer.from_pretrained(target)("3+4=", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=2, do_sample=False).shape[0] == 1
    assert sorted(p.name for p in cache.iterdir() if p.name.startswith(".making")) == []


def test_competence_outside_the_window_is_refused_after_every_seed(cache, monkeypatch, tmp_path):
    tried = []
    monkeypatch.setitem(bases.MAKINGS, "tiny", _tiny(low=0.9, seeds=(0, 1, 2)))
    monkeypatch.setattr(bases, "_train", lambda name, scratch, seed: tried.append(seed))
    monkeypatch.setattr(bases, "measure", lambda name, model: {"sums": {"value": 0.5, "low": 0.9, "high": 1.0}})
    with pytest.raises(LuthierError, match="outside the stated window: sums"):
        bases.make("tiny", tmp_path / "x")
    assert tried == [0, 1, 2]


def test_one_of_many_callers_makes_the_base(cache, monkeypatch):
    made = []

    def slowly(name, target, progress):
        made.append(name)
        time.sleep(0.2)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(bases, "_in_own_process", slowly)
    found = []
    callers = [threading.Thread(target=lambda: found.append(lab.base("nano", progress=False))) for _ in range(5)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert made == ["nano"]
    assert len(set(found)) == 1
    assert (found[0] / "config.json").exists()
    lab.base("nano", refresh=True, progress=False)
    assert made == ["nano", "nano"]


def test_a_failed_making_leaves_nothing(cache, monkeypatch):
    def broken(name, target, progress):
        (target / "half").write_text("")
        raise LuthierError("no")

    monkeypatch.setattr(bases, "_in_own_process", broken)
    with pytest.raises(LuthierError):
        lab.base("nano", progress=False)
    assert not bases.folder("nano").exists()
    assert [p.name for p in (cache / "lab").iterdir() if not p.name.endswith(".lock")] == []


def test_an_unknown_base_is_named():
    with pytest.raises(UserError, match="Did you mean 'nano'"):
        lab.base("nanno")


def test_the_lab_lists_its_bases():
    assert set(lab.BASES) == set(bases.MAKINGS)


@pytest.mark.slow
def test_nano_has_something_to_gain_and_something_to_lose():
    found = lab.competence("nano")
    assert found["easy arithmetic"]["value"] > 3 * found["two-digit arithmetic"]["value"]
    assert found["facts of known people"]["value"] > found["facts of new people"]["value"] + 0.1
    for probe in found.values():
        assert probe["low"] <= probe["value"] <= probe["high"]
    assert bases.measure("nano", lab.base("nano")) == found
