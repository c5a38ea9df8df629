"""Scale and shift features: the affine and its folding by hand, the sites of several architectures, the plain model."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from fakes import FakeContext
from peft import PeftModel

from helpers import make_session, random_rows, settings, tiny_bert, tiny_llama, weights
from luthier.core.errors import UserError
from luthier.engine.loop import Trainer
from luthier.functional.affine_sites import affine, channels, find_sites, folded, norm_offset, unfolded
from luthier.methods.parameters.scale_shift_features import ScaleShiftFeatures
from luthier.models.load import load
from luthier.models.merge import merge
from luthier.models.save import save

IDS = {"input_ids": torch.arange(3, 11)[None]}
SCALE, SHIFT = np.array([2.0, -0.5, 1.5]), np.array([0.25, 1.0, -3.0])


def vit(labels=5):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**small, image_size=16, patch_size=4, num_labels=labels)
    ).eval()


def swin():
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=4, num_labels=5
    )
    return transformers.SwinForImageClassification(config).eval()


def convnext():
    torch.manual_seed(0)
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32, num_labels=5)
    return transformers.ConvNextForImageClassification(config).eval()


def gpt2(tied=True):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=64, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=tied
    )
    return transformers.GPT2LMHeadModel(config).eval()


def pictures(size):
    return {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))}


def adapted(model, task="causal-lm", *, seed=0, **options):
    method = ScaleShiftFeatures(**options)
    return method, method.apply(model.requires_grad_(False), FakeContext(seed=seed, task=task)).eval()


def shake(method, model):
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in method.opened(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


MODELS = {
    "vit": (vit, pictures(16), "image-classification"),
    "swin": (swin, pictures(32), "image-classification"),
    "convnext": (convnext, pictures(32), "image-classification"),
    "gpt2": (gpt2, IDS, "causal-lm"),
    "gpt2 untied": (lambda: gpt2(tied=False), IDS, "causal-lm"),
    "llama": (lambda: tiny_llama().eval(), IDS, "causal-lm"),
    "bert": (lambda: tiny_bert().eval(), IDS, "masked-lm"),
}


def test_the_affine_goes_along_the_channels():
    y = np.arange(18.0).reshape(2, 3, 3)  # as many tokens as channels: the axis must not be guessed
    scale, shift = torch.tensor(SCALE), torch.tensor(SHIFT)
    tokens = affine(torch.tensor(y), scale, shift, -1).numpy()
    np.testing.assert_allclose(tokens, y * SCALE + SHIFT, atol=1e-12)
    image = affine(torch.tensor(y[None]), scale, shift, 2).numpy()
    np.testing.assert_allclose(image, y[None] * SCALE[:, None] + SHIFT[:, None], atol=1e-12)


def operations():
    torch.manual_seed(3)
    norm = torch.nn.LayerNorm(3)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    batch_norm = torch.nn.BatchNorm2d(3).eval()
    batch_norm.running_mean.normal_()
    batch_norm.running_var.uniform_(0.5, 2.0)
    return {
        "linear": (torch.nn.Linear(4, 3), torch.randn(2, 3, 4)),
        "linear without bias": (torch.nn.Linear(4, 3, bias=False), torch.randn(2, 3, 4)),
        "convolution": (torch.nn.Conv2d(2, 3, 3, padding=1), torch.randn(2, 2, 3, 3)),
        "depthwise": (torch.nn.Conv2d(3, 3, 3, padding=1, groups=3), torch.randn(2, 3, 3, 3)),
        "layer norm": (norm, torch.randn(2, 3, 3)),
        "batch norm": (batch_norm, torch.randn(2, 3, 3, 3)),
        "transposed linear": (transformers.pytorch_utils.Conv1D(3, 4), torch.randn(2, 3, 4)),
    }


@pytest.mark.parametrize("name", operations())
def test_folding_is_exact_and_can_be_undone(name):
    module, x = operations()[name]
    module, x = module.double(), x.double()
    size, axis = channels(module)
    assert size == 3
    scale, shift = torch.tensor(SCALE), torch.tensor(SHIFT)
    shape = [1] * x.dim()
    shape[axis] = 3
    with torch.no_grad():
        wanted = module(x).numpy() * SCALE.reshape(shape) + SHIFT.reshape(shape)
        before = module.weight.clone()
        dim = 1 if name == "transposed linear" else 0
        weight, bias = folded(module.weight, module.bias, scale, shift, dim=dim)
        back, _ = unfolded(weight, bias, scale, shift, dim=dim)
        module.weight.copy_(weight)
        module.bias = torch.nn.Parameter(bias)
        np.testing.assert_allclose(module(x).numpy(), wanted, atol=1e-10)
        torch.testing.assert_close(back, before, atol=1e-12, rtol=1e-12)


def test_a_norm_that_adds_one_to_its_weight():
    gemma = transformers.models.gemma.modeling_gemma.GemmaRMSNorm(3)
    llama = transformers.models.llama.modeling_llama.LlamaRMSNorm(3)
    assert (norm_offset(gemma), norm_offset(llama)) == (1.0, 0.0)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    wanted = gemma(x) * torch.tensor(SCALE).float()
    gemma.weight.data = folded(gemma.weight.data, None, torch.tensor(SCALE), None, offset=1.0)[0]
    torch.testing.assert_close(gemma(x), wanted)


def test_nothing_can_be_divided_by_nothing():
    with pytest.raises(UserError, match=r"a scale is 1\.0e-07"):
        unfolded(torch.ones(2, 2), None, torch.tensor([1.0, 1e-7]), None)


def test_an_operation_without_channels_is_named():
    with pytest.raises(UserError, match=r"'head\.pool' is a MaxPool2d"):
        channels(torch.nn.MaxPool2d(2), "head.pool")


def test_where_the_sites_are():
    blocks = find_sites(vit())
    assert blocks["vit.embeddings.patch_embeddings.projection"] == "embed"
    assert blocks["vit.layernorm"] == "final"
    assert len(blocks) == 1 + 2 * (2 + 3 + 1 + 2) + 1
    assert not any("classifier" in path for path in blocks)
    llama = find_sites(tiny_llama())
    assert {s: list(llama.values()).count(s) for s in set(llama.values())} == {
        "norm": 4,
        "qkv": 6,
        "proj": 2,
        "fc1": 4,
        "fc2": 2,
        "final": 1,
    }
    assert find_sites(gpt2())["transformer.h.1.attn.c_attn"] == "qkv"  # fused: one pair of 3C channels
    assert find_sites(gpt2())["transformer.h.1.mlp.c_proj"] == "fc2"
    assert [p for p, s in find_sites(gpt2(tied=False)).items() if s == "embed"] == ["transformer.wpe"]
    merging = [path for path, site in find_sites(swin()).items() if "downsample" in path]
    assert merging == ["swin.encoder.layers.0.downsample.norm"]
    assert find_sites(convnext())["convnext.encoder.stages.0.layers.0.dwconv"] == "conv"


@pytest.mark.parametrize("name", MODELS)
def test_the_identity_start_is_the_base_and_the_count_is_two_per_channel(name):
    make, inputs, task = MODELS[name]
    base = make()
    wanted = base(**inputs).logits
    method, model = adapted(make(), task, init="identity")
    # 1 * y + 0 may lie in memory in another order than y, and Swin's sums then round differently.
    tolerance = 1e-7 if name == "swin" else 0.0
    torch.testing.assert_close(model(**inputs).logits, wanted, atol=tolerance, rtol=0.0)
    inner, record = model.get_base_model(), method.record()
    sizes = {path: channels(inner.get_submodule(path).base_layer)[0] for path in record["sites"]}
    expected = sum(2 * size for size in sizes.values()) - sum(sizes[path] for path in record["scaled_only"])
    head = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" in n)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected + head
    assert (head > 0) == (task == "image-classification")


@pytest.mark.parametrize("name", MODELS)
def test_folded_away_it_is_a_plain_model_with_the_same_outputs(name, tmp_path):
    make, inputs, task = MODELS[name]
    base = make()
    method, model = adapted(make(), task)
    shake(method, model)
    wanted = model(**inputs).logits
    assert (wanted - base(**inputs).logits).abs().max() > 1e-2
    plain = method.export(model)
    torch.testing.assert_close(plain(**inputs).logits, wanted, atol=1e-5, rtol=1e-5)
    assert [n for n, _ in plain.named_modules()] == [n for n, _ in base.named_modules()]
    if name != "llama":  # to which biases were added
        assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in base.parameters())
    assert torch.equal(model(**inputs).logits, wanted)  # training may go on
    plain.save_pretrained(tmp_path)
    again = type(base).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**inputs).logits, wanted, atol=1e-5, rtol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(model(**inputs).logits, wanted, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(**inputs).logits, wanted, atol=1e-5, rtol=1e-5)


def test_a_llama_gets_the_biases_its_configuration_knows():
    method, model = adapted(tiny_llama().eval(), sites=["qkv", "norm"])
    shake(method, model)
    plain = method.export(model)
    assert (plain.config.attention_bias, plain.config.mlp_bias) == (True, False)
    assert float(plain.model.layers[0].self_attn.o_proj.bias.abs().max()) == 0.0
    assert method.record()["scaled_only"] == [
        f"model.layers.{n}.{norm}" for n in (0, 1) for norm in ("input_layernorm", "post_attention_layernorm")
    ]


def test_removing_the_affines_gives_the_base_bit_for_bit():
    base = vit()
    wanted = base(**pictures(16)).logits
    method, model = adapted(vit(), "image-classification")
    shake(method, model)
    with model.disable_adapter():
        assert torch.equal(model(**pictures(16)).logits, wanted)
    model.merge_adapter()
    with model.disable_adapter():  # takes it out of the weights first, up to rounding
        torch.testing.assert_close(model(**pictures(16)).logits, wanted, atol=1e-6, rtol=1e-5)


def test_frozen_stays_and_scales_are_not_decayed():
    session = make_session(parameters=[ScaleShiftFeatures(init="normal")])
    before = weights(session.model)
    Trainer(session, random_rows(), settings(weight_decay=0.1, max_steps=3)).run()
    after = weights(session.model)
    opened = {n for n, p in session.model.named_parameters() if p.requires_grad}
    assert all(torch.equal(after[n], before[n]) for n in before if n not in opened)
    assert all("scale_shift_features_" in n for n in opened)
    (group,) = {g["weight_decay"] for g in session.stack.parameters[0].groups(session.model) if g["params"]}
    assert group == 0.0


def test_decay_where_it_is_wanted_draws_towards_the_base():
    method, model = adapted(tiny_llama(), weight_decay=0.5)
    affines = method.groups(model)[0]
    optimizer = torch.optim.AdamW([affines], lr=0.1)
    for parameter in affines["params"]:
        parameter.grad = torch.zeros_like(parameter)
    before = [p.detach().clone() for p in affines["params"]]
    optimizer.step()  # what is stored is scale - 1 and the shift, so decay leads to scale 1 and shift 0
    for old, new in zip(before, affines["params"], strict=True):
        torch.testing.assert_close(new.detach(), old * 0.95)


def test_subsets():
    _, scaled = adapted(vit(), "image-classification", scale_only=True)
    assert not any("shift_features_shift" in n for n, _ in scaled.named_parameters())
    method, shifted = adapted(tiny_llama(), shift_only=True)
    assert not any("shift_features_scale" in n for n, _ in shifted.named_parameters())
    assert not any("norm" in path for path in method.record()["sites"])
    method, _ = adapted(vit(), "image-classification", layers=[1, 1], sites=["qkv", "norm", "final"])
    assert len(method.record()["sites"]) == 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sites": ["conv"]}, "has no 'conv'. It has: norm, qkv, proj, fc1, fc2, final"),
        ({"layers": [0, 2]}, "there are 2 blocks, so the last is 1, not 2"),
    ],
)
def test_places_that_are_not_there(options, said):
    with pytest.raises(UserError, match=said):
        adapted(tiny_llama(), **options)


def test_options_that_do_not_go_together():
    with pytest.raises(UserError, match="leave nothing to train"):
        ScaleShiftFeatures(scale_only=True, shift_only=True)
    with pytest.raises(UserError, match="is no range"):
        ScaleShiftFeatures(layers=[2, 1])


def test_one_module_in_two_places_is_refused():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    with pytest.raises(UserError, match=r"layers.0.mlp.up_proj' and 'model.layers.1.mlp.up_proj' are one module"):
        adapted(model)


def test_a_quantised_base_is_not_merged_into():
    method, model = adapted(tiny_llama())
    model.get_base_model().config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(UserError, match=r"base is quantised.*merge: false"):
        method.export(model)


READER = """
import sys, torch
from luthier.models.load import load
from safetensors.torch import save_file
loaded = load(sys.argv[1])
with torch.no_grad():
    save_file({"logits": loaded.model(input_ids=torch.arange(3, 11)[None]).logits}, sys.argv[2])
"""


def test_the_adapter_opens_in_a_new_process_and_luthier_merges_it(tmp_path):
    from safetensors.torch import load_file

    made = load("lab:nano")
    save(made.model, made.processor, tmp_path / "base")
    base = load(tmp_path / "base")
    method, model = adapted(base.model, merge=False)
    shake(method, model)
    wanted = model(**IDS).logits.detach()
    assert isinstance(method.export(model), PeftModel)
    save(method.export(model), base.processor, tmp_path / "adapter", task="causal-lm")
    subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path / "adapter"), str(tmp_path / "out.safetensors")], check=True
    )
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors")["logits"], wanted, atol=1e-5, rtol=1e-5)
    report = merge(tmp_path / "adapter", tmp_path / "merged")
    assert report.adapter_effect > 1e-2
    plain = load(tmp_path / "merged").model
    assert not hasattr(plain, "peft_config")
    torch.testing.assert_close(plain(**IDS).logits, wanted, atol=1e-4, rtol=1e-4)
