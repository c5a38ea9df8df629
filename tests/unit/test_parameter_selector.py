"""The grammar of parameters on real architectures: what each term names, counted by hand, and what an error says."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForSequenceClassification

from helpers import tiny_bert, tiny_llama
from luthier.core.errors import UserError
from luthier.functional.parameter_selector import choose, is_linear, sites


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=3, n_head=2, vocab_size=16, n_positions=8))


def named(model, *selection):
    return choose(sites(model), list(selection)).names


LAYERS = "model.layers"


@pytest.mark.parametrize(
    ("selection", "count"),
    [
        (["category:attention"], 2 * 4),
        (["category:ffn"], 2 * 3),
        (["category:norm"], 2 * 2),
        (["category:final-norm"], 1),
        (["category:embedding"], 1),
        (["category:head"], 1),
        (["layer:0"], 9),
        (["layer:-1"], 9),
        (["layer:0-1"], 18),
        (["layer:0,1 & category:ffn"], 6),
        (["q_proj"], 2),
        (["module:up_proj"], 2),
        (["self_attn"], 8),
        (["layers.1.mlp"], 3),
        (["model.layers.*.mlp.up_proj"], 2),
        (["model.layers.0.mlp.up_proj.weight"], 1),
        (["*"], 21),
        (["!layer:0"], 12),
        (["category:attention", "category:ffn", "!q_proj", "!layer:1"], 6),
    ],
)
def test_terms_on_llama(selection, count):
    found = named(tiny_llama(), *selection)
    assert len(found) == len(set(found)) == count


def test_terms_mean_what_they_say():
    assert named(tiny_llama(), "layer:-1 & q_proj") == [f"{LAYERS}.1.self_attn.q_proj.weight"]
    assert named(tiny_llama(), "category:embedding", "lm_head") == ["model.embed_tokens.weight", "lm_head.weight"]
    assert named(tiny_bert(), "layer:0 & module:query") == [
        "bert.encoder.layer.0.attention.self.query.weight",
        "bert.encoder.layer.0.attention.self.query.bias",
    ]


def test_tied_storage_is_one_site_under_either_name():
    every = sites(tiny_llama(tied=True))
    (embedding,) = [s for s in every if "embed_tokens" in s.name]
    assert embedding.names == ("model.embed_tokens.weight", "lm_head.weight")
    assert embedding.category == "embedding"
    assert choose(every, "lm_head").names == choose(every, "embed_tokens").names == ["model.embed_tokens.weight"]
    assert sum(s.numel for s in every) == sum(p.numel() for p in tiny_llama(tied=True).parameters())


def test_a_new_head_is_a_head():
    model = LlamaForSequenceClassification(LlamaConfig(**tiny_llama().config.to_dict()))
    assert named(model, "category:head") == ["score.weight"]


def test_fused_parts_and_conv1d():
    every = sites(gpt2())
    c_attn = next(s for s in every if s.name == "transformer.h.1.attn.c_attn.weight")
    assert c_attn.out_dim == 1
    assert c_attn.fused.parts == ("q", "k", "v")
    chosen = choose(every, "layer:1 & c_attn[k]")
    assert chosen.names == ["transformer.h.1.attn.c_attn.weight", "transformer.h.1.attn.c_attn.bias"]
    mask = chosen.mask(chosen.sites[0]).expand(8, 24)
    assert mask[:, 8:16].all()
    assert int(mask.sum()) == 8 * 8
    assert chosen.mask(chosen.sites[1]).tolist() == [False] * 8 + [True] * 8 + [False] * 8
    both = choose(every, ["c_attn[q]", "c_attn[k]", "c_attn[v]"])
    assert both.parts == {}
    rest = choose(every, ["c_attn", "!c_attn[v]"])
    assert set(rest.parts.values()) == {("q", "k")}
    assert sum(is_linear(m) for m in gpt2().modules()) == 3 * 4 + 1


@pytest.mark.parametrize(
    ("selection", "text"),
    [
        ("q_prj", r"where: 'q_prj' fits no tensor of this model\. The nearest names: q_proj"),
        ("model.layers.0.self_attn.q_prj", "nearest names: model.layers.0.self_attn.q_proj"),
        ("category:attn", "nearest names: attention. It has: attention, embedding"),
        ("module:upproj", "nearest names: up_proj"),
        ("layer:7", "model.layers has layers 0 to 1"),
        ("layer:x", "layer:0-3"),
        ("block:1", "no kind 'block'"),
        ("layer:0 & lm_head", "none are the same"),
        (["q_proj", "!category:attention"], "leaves no tensor"),
    ],
)
def test_what_fits_nothing_is_refused_with_the_nearest_names(selection, text):
    with pytest.raises(UserError, match=text):
        choose(sites(tiny_llama()), selection, where="where")
