"""Attention-only training: which tensors are projections, and that exactly they move."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from helpers import make_session, random_rows, settings, tiny_llama, weights
from luthier.core.errors import UserError
from luthier.engine.loop import Trainer
from luthier.methods.parameters.attention import AttentionOnly, projections


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=64, n_positions=64))


def gpt_neox():
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, vocab_size=64, max_position_embeddings=64))


EXPECTED = {
    "llama": {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (0, 1) for p in "qkvo"},
    "gpt2": {
        f"transformer.h.{i}.attn.{m}.{t}" for i in (0, 1) for m in ("c_attn", "c_proj") for t in ("weight", "bias")
    },
}


@pytest.mark.parametrize(("name", "make"), [("llama", tiny_llama), ("gpt2", gpt2)])
def test_after_ten_steps_exactly_the_projections_changed(name, make):
    method = AttentionOnly()
    session = make_session(make(), parameters=[method])
    before, records = weights(session.model), []
    training = settings(weight_decay=0.3, epochs=4, max_steps=10)
    Trainer(session, random_rows(), training, observe=lambda e, r: records.append(r)).run()
    after = weights(session.model)
    assert {n for n in before if not torch.equal(before[n], after[n])} == EXPECTED[name]
    share = sum(before[n].numel() for n in EXPECTED[name]) / sum(p.numel() for p in session.model.parameters())
    assert records[0]["trainable_share"] == pytest.approx(share)
    assert method.record() == {"tensors": sorted(EXPECTED[name]), "trainable_share": pytest.approx(share)}


def test_projections_of_other_families():
    neox = projections(gpt_neox())
    assert {n.split("attention.")[1] for n in neox} == {
        f"{m}.{t}" for m in ("query_key_value", "dense") for t in ("weight", "bias")
    }
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 16}
    t5 = projections(T5ForConditionalGeneration(T5Config(**sizes)))
    assert len(t5) == 12  # four in the encoder, eight in the decoder; no table of position biases
    assert all(n.split(".")[-2] in "qkvo" for n in t5)


def test_a_new_head_is_trained_and_the_language_model_head_is_not():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertForSequenceClassification(BertConfig(**sizes, vocab_size=16, num_labels=3)).requires_grad_(False)
    ctx = SimpleNamespace(task="sequence-classification")
    opened = {n for n, p in AttentionOnly().apply(bert, ctx).named_parameters() if p.requires_grad}
    assert {"classifier.weight", "classifier.bias"} < opened
    inside = {n.split("attention.")[1].rpartition(".")[0] for n in opened if "attention" in n}
    assert inside == {"self.query", "self.key", "self.value", "output.dense"}
    assert len(opened) == 2 + 8


def block(**modules):
    """A model of one block with these parts."""
    return torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict(modules)])})


def test_matrices_with_both_roles_are_refused_and_torch_attention_is_whole():
    with pytest.raises(UserError, match=r"'layers\.0\.fused_attn_ff' holds attention and feed-forward weights"):
        projections(
            block(fused_attn_ff=torch.nn.Linear(4, 16), attn_out=torch.nn.Linear(4, 4), ff_out=torch.nn.Linear(8, 4))
        )
    with pytest.raises(UserError, match=r"in its block, 'layers\.0\.attn'"):
        projections(block(attn=torch.nn.Linear(4, 16), norm=torch.nn.LayerNorm(4)))
    with pytest.raises(UserError, match="found no attention projections"):
        projections(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    own = projections(block(self_attn=torch.nn.MultiheadAttention(4, 2), mlp=torch.nn.Linear(4, 4)))
    assert {n.removeprefix("layers.0.self_attn.") for n in own} == {
        "in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias",
    }  # fmt: skip
