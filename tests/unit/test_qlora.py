"""QLoRA: the rounded base, the adapter for the unrounded one, the merge with consent, refusals."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from helpers import make_session, random_rows, settings, tiny_llama
from luthier.core import registry
from luthier.core.errors import UserError
from luthier.engine.loop import Trainer
from luthier.methods.parameters.qlora import QuantizedLowRank, rounds_only
from luthier.recipe.load import load
from luthier.recipe.plan import plan

pytestmark = pytest.mark.filterwarnings("ignore:qlora")
IDS = {"input_ids": torch.arange(3, 11)[None]}
needs_package = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
# The sixteen values of NF4 (appendix E of the paper).
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)


def rounded(weight, block=64):
    """A weight to NF4 and back in float64: the nearest of the sixteen values times each block's largest entry."""
    flat = weight.reshape(-1, block)
    largest = np.abs(flat).max(axis=1, keepdims=True)
    code = np.abs((flat / largest)[..., None] - NF4).argmin(-1)
    return (NF4[code] * largest).reshape(weight.shape)


def llama():
    """Wide enough for blocks of 64."""
    torch.manual_seed(0)
    config = tiny_llama().config
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 32
    return LlamaForCausalLM(config)


def session_with(**options):
    return make_session(llama(), parameters=[QuantizedLowRank(**{"rank": 4, **options})])


@needs_package
def test_the_maps_of_the_blocks_are_rounded_to_the_papers_values():
    import bitsandbytes

    plain = llama()
    session = session_with(double_quantization=False)
    for path in ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"):
        layer = session.model.base_model.model.model.get_submodule(path).base_layer
        assert isinstance(layer, bitsandbytes.nn.Linear4bit)
        assert layer.weight.dtype == torch.uint8
        found = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double().numpy()
        wanted = rounded(plain.model.get_submodule(path).weight.detach().double().numpy())
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert torch.equal(session.model.get_base_model().lm_head.weight, plain.lm_head.weight)
    assert sum(p.requires_grad for p in session.model.parameters()) == 2 * 7 * 2


@needs_package
def test_the_adapter_is_for_the_base_as_it_was(tmp_path):
    session = session_with()
    Trainer(session, random_rows(), settings(max_steps=2)).run()
    method = session.stack.parameters[0]
    assert method.export(session.model) is session.model
    session.model.save_pretrained(tmp_path)
    opened = PeftModel.from_pretrained(llama(), tmp_path).eval()
    difference = (opened(**IDS).logits - session.model.eval()(**IDS).logits).abs().max()
    assert 0 < float(difference.detach()) < 0.1  # the rounding of the base, and nothing else


@needs_package
def test_with_consent_the_rounded_weights_are_saved_with_the_addition():
    session = session_with(merge_dequantized=True)
    Trainer(session, random_rows(), settings(max_steps=2)).run()
    wanted = session.model.eval()(**IDS).logits
    plain = session.stack.parameters[0].export(session.model)
    assert not isinstance(plain, PeftModel)
    assert {type(m).__name__ for m in plain.modules()} == {type(m).__name__ for m in llama().modules()}
    assert not hasattr(plain.config, "quantization_config")
    torch.testing.assert_close(plain(**IDS).logits, wanted, atol=1e-5, rtol=1e-4)
    assert torch.equal(session.model(**IDS).logits, wanted)  # training may go on


@needs_package
def test_what_cannot_be_quantised_is_named():
    import transformers

    method = QuantizedLowRank()
    model = llama()
    method.prepare_model(model, None)
    with pytest.raises(UserError, match=r"quantised already. Use 'lora'"):
        method.prepare_model(model, None)
    config = transformers.GPT2Config(vocab_size=64, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    with pytest.raises(UserError, match=r"'transformer.h.0.attn.c_attn' is a Conv1D"):
        method.prepare_model(transformers.GPT2LMHeadModel(config), None)


@needs_package
def test_a_map_that_does_not_come_back_stays_as_it_is():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    nearest = torch.tensor(rounded(weight.double().numpy())).float()
    assert rounds_only(weight, nearest)
    assert not rounds_only(weight, nearest * 1.3)
    method, model = QuantizedLowRank(), tiny_llama()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    method.prepare_model(model, None)
    record = method.record()
    assert len(record["quantized"]) + len(record["in_full_precision"]) == 14
    after = dict(model.named_parameters())
    assert all(torch.equal(after[f"{p}.weight"], before[f"{p}.weight"]) for p in record["in_full_precision"])


def test_without_the_package_the_plan_says_how_to_get_it(tmp_path, monkeypatch):
    registry.get("parameters", "qlora")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    (tmp_path / "recipe.yaml").write_text(
        "luthier: 1\nmodel: lab:nano\ndata: {train: lab:arithmetic}\nparameters: [qlora]\noutput: runs/x\n"
    )
    with pytest.raises(UserError, match=r"recipe.yaml:4: .*'qlora' needs the package 'bitsandbytes'.*pip install"):
        plan(load(tmp_path / "recipe.yaml"))
